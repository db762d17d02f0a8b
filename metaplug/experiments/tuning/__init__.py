"""A search for the best values of some fields, by their validation in runs of their own.

`ranges` are the values that a field may take; `space` checks fields and ranges against a
configuration; `proposals` is all that Optuna does, sampling and pruning; `trials` trains one trial;
`folder` keeps the search on the disk and holds its lock; `search` goes from trial to trial;
`outcome` is what came of it.
"""

from metaplug.experiments.tuning.outcome import Outcome, Trial, to_values
from metaplug.experiments.tuning.search import tune
from metaplug.experiments.tuning.space import Asked

__all__ = ["Asked", "Outcome", "Trial", "to_values", "tune"]
