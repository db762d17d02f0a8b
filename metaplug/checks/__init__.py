"""What is refused before the first step, or diagnosed after a failed one.

* `model`, `probe_model`: models and losses that cannot be meta-trained, or not rightly.
* `compare_batching`: whether stacked tasks give the numbers of one task at a time.
* `model_changes`: what was changed of a model after its learner was made.
* `prepare_batch`: the way of a batch into the engine, which asks all of these.
* `find_nonfinite`: the origin of a NaN or Inf.
"""
