"""The mathematics of a meta-iteration. It knows no device, no file and no process.

* `inner_loop` adapts the tasks of a batch, stacked; `outer_loop` differentiates through it.
* `functional_model` runs the model with weights from outside; `vmap_rules` does so for all tasks,
  with layers of its own where vmap's rule is slow or wrong.
* `optimizers` holds the differentiable inner optimizers, the only meeting with `higher`.
* `rematerialize` recomputes inner steps in the backward pass, to save memory.
"""
