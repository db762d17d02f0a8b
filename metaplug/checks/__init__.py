"""What is refused before the first step, or diagnosed after a failed one.

* `model`: a model and loss as they stand (dtype, device, form); `probe_model`: tried on one task.
  It makes a `model_trial` (the task, and a `model_copy` that is called as its user would), and asks
  of it `refuse_memory` (by `module_state`, what forward leaves on modules, and `find_kept`, whether
  it reads that), `refuse_sleepers`, `refuse_other_answers`, `refuse_other_weights`, `output_form`
  and `try_loss`.
* `compare_batching`: whether stacked tasks give the numbers of one task at a time, on which the
  rule in `execution.batching` decides.
* `attention_mask`: the form in which a mask is expanded outside vmap; `find_frozen`: what lies
  below the first adapted layer.
* `model_changes`: what was changed of a model after its learner was made.
* `prepare_batch`: the way of a batch into the engine, which asks all of these.
* `find_nonfinite`: the origin of a NaN or Inf.
"""
