"""A run in a folder of its own: trained, killed and resumed, read back, and repeated.

`training` runs it; `folder` orders the writes and holds the lock; `layout` names the files;
`sessions` records who trained; `data` keeps what tells other data from the run's own; `loading`
makes the experiment again; `reading` checks metrics and summary; `repeating` compares a run with
the one that it repeats.
"""

from metaplug.experiments.runs.loading import load
from metaplug.experiments.runs.reading import read_metrics, read_summary
from metaplug.experiments.runs.training import train

__all__ = ["load", "read_metrics", "read_summary", "train"]
