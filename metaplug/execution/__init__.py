"""How a meta-step runs; every way gives the same numbers.

* `engine` makes meta-iterations one by one, `windows` several in a row.
* `plan` decides what stands in for the plain step: `chunks`, `traced` (compiled), `cuda_graphs`;
  `python_state` is what a trace would freeze, `graph_rewrites` what it becomes for the compiler.
* `batching` chooses between stacked tasks and one at a time.
* `ranks`: several processes; `devices`, `precision`, `determinism`, `memory` and `free_memory`:
  the machine.
* `settings`: the fields of the bilevel loop, for learners and configuration files.
"""
