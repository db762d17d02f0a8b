"""Test tasks: adapted, scored, and summed up.

* `evaluator` gives results and validations; `measure` adapts tasks that do not see
  each other, and scores each.
* `scores` has the named ones (their equations are in `score_functions`, their names in
  `score_names`) and those of one's own; `score_tasks` computes them for a batch.
* `inner_profile` sees the inner loop step by step.
* `results` holds what they gave, and the 95 % confidence interval of its mean.
* `history` holds what meta-training recorded, validations included.
"""
