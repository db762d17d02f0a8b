"""Test tasks: adapted, scored, and summed up.

* `evaluator` gives results and validations; `measure` adapts tasks that do not see
  each other, and scores each.
* `results` holds scores, and the 95 % confidence interval of their mean.
* `history` holds what meta-training recorded, validations included.
"""
