"""Measurements of meta-steps: beside every peer, as they grow, and over long runs.

`workloads` (with `encoder`) and `contestants` (metaplug, plain loops) with `peers` (other
libraries) say what is measured, `meters` how, `limits` what the device allows; `measuring` runs
them in turn. `scaling` lets tasks and inner steps grow, `drawing` times the sampling of tasks, and
`soak` with `soak_workloads` and `process` watches a whole long run.
"""

from metaplug.bench.measuring import Row, as_json_values, contestants, run
from metaplug.bench.workloads import WORKLOADS

__all__ = ["WORKLOADS", "Row", "as_json_values", "contestants", "run"]
