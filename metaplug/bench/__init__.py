"""The cost of a meta-step, side by side with every peer and with what the device allows, and how it grows."""

from metaplug.bench.measuring import Row, as_json_values, contestants, run
from metaplug.bench.workloads import WORKLOADS

__all__ = ["WORKLOADS", "Row", "as_json_values", "contestants", "run"]
