"""The names of a run's files."""

from __future__ import annotations

from metaplug.experiments.loggers import jsonl

METRICS = jsonl.METRICS
CONFIG, RECORD, SUMMARY, CURVES = "config.yaml", "run.json", "summary.json", "curves.png"
"""SUMMARY is written last: a run that has it is finished."""

LAST, BEST = "last.safetensors", "best.safetensors"
"""The checkpoints: the newest, and the one that validated best."""

FORMER = ("last.pt", "best.pt")
"""The checkpoints of older versions, which are refused rather than passed over."""

LOCK = ".lock"
"""An empty file that the training process holds locked, and that stays there.

The system unlocks it when that process ends, however it ends.
"""
