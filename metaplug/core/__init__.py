"""The mathematics of a meta-iteration. It knows no device, no file and no process.

* `inner_loop` adapts the tasks of a batch, stacked; `outer_loop` differentiates through it;
  `task_model` runs the model for all tasks.
* `functional_model` runs the model with weights from outside, on inputs and with answers of the
  forms in `model_calls`; `vmap_rules` does so for all tasks, with layers of its own where vmap's
  rule is slow or wrong, and of `batch_norm`, `linear` and `max_pool`, whose derivatives take less
  time than torch's; `losses` has the loss where none is given.
* `stacked_tensors` sees through vmap what it stacks.
* `frozen_features` keeps what the inner loop cannot change from step to step.
* `recording` says how autograd records, whatever the caller has set.
* `function_mode` is the base of what follows the torch functions that run.
* `optimizers` holds the differentiable inner optimizers, the only meeting with `higher`.
* `rematerialize` recomputes inner steps in the backward pass, to save memory.
"""
