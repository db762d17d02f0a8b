"""The names of a run's files, beside its record in run.json."""

from __future__ import annotations

CONFIG, METRICS, LAST, BEST, SUMMARY = (
    "config.yaml",
    "metrics.jsonl",
    "last.safetensors",
    "best.safetensors",
    "summary.json",
)
"""The files of a run. The last is written last: a run that has it is finished."""

LOCK = ".lock"
"""An empty file that the training process holds locked; the system unlocks it when that process ends, however it ends. It stays there."""
