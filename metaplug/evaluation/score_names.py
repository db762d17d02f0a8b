"""The names of scores, as options and configurations give them; without torch, for `--help`."""

from __future__ import annotations

from typing import Literal, TypeAlias

ScoreName: TypeAlias = Literal[
    "accuracy",
    "balanced-accuracy",
    "per-class-accuracy",
    "micro-f1",
    "macro-f1",
    "mean-iou",
    "perplexity",
    "mean-squared-error",
]
