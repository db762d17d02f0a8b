"""What is refused before the first step, or diagnosed after a failed one.

* `model`: a model and loss as they stand (dtype, device, form); `probe_model`: tried on one task.
  It uses `model_copy` (the model, called as its user would), `module_state` (what forward leaves on
  modules), `output_form` and `autograd_graph`.
* `compare_batching`: whether stacked tasks give the numbers of one task at a time, on which the
  rule in `execution.batching` decides.
* `attention_mask`: the form in which a mask is expanded outside vmap; `find_frozen`: what lies
  below the first adapted layer.
* `model_changes`: what was changed of a model after its learner was made.
* `prepare_batch`: the way of a batch into the engine, which asks all of these.
* `find_nonfinite`: the origin of a NaN or Inf.
"""
