"""What is measured by name: contestants of the bench, workloads, files of tests, a training."""

from __future__ import annotations

from typing import Any

from metaplug.report.gpu_sections import LOOP, SHARING, STACKED

EAGER = (
    *(LOOP, "higher, task by task", "metaplug, sequential", STACKED, SHARING),
    "metaplug, first order",
)
CAPTURED = (STACKED, "metaplug, captured")
COMPILED = {
    ", compiled": (STACKED, "metaplug, compiled"),
    ", compiled and captured": (STACKED, "metaplug, compiled and captured"),
    " + gradient-sharing, compiled": (SHARING, f"{SHARING}, compiled"),
}
"""By what the unit is called. Each has to compile twice, its meta-gradient in float64 too, so each
is a unit of its own."""
MEMORY = (LOOP, STACKED, SHARING, "metaplug, recomputed steps", "metaplug, chunks of 4")

TEST_FILES = {"cuda": 1, "captured": 3, "family": 3}
TEST_FILES |= dict.fromkeys(("precision", "memory", "bench", "deterministic", "tasks", "ranks"), 1)
"""Files tests/cuda/test_NAME.py, and how many processes share the tests of each."""

WORKLOADS = {
    "cuda": ("conv4-64-max-32x5", "sinusoid-25x5", "conv4-32-stride-32x3"),
    "cpu": ("sinusoid-25x5", "conv4-32-stride-8x3"),
    "small": ("sinusoid-25x1",),
}
LARGE = {"cuda": ("sinusoid-100x5", "resnet12-4x1"), "cpu": ("sinusoid-100x5",), "small": ()}
MORE_TASKS: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": {"conv4-32-stride-32x3": (8, 32, 128, 512), "sinusoid-25x5": (8, 32, 128, 512, 2048)},
    "cpu": {"sinusoid-25x5": (8, 32, 128)},
    "small": {},
}

_IMAGES: dict[str, Any] = {
    "model": {"name": "conv4", "settings": {"filters": 32, "pooling": "stride"}},
    "tasks": {"source": "glyphs", "ways": 5, "shots": 1, "queries": 5},
    "learner": {"inner_lr": 0.4, "inner_steps": 3},
}
_CURVES: dict[str, Any] = {
    "model": {"name": "mlp"},
    "tasks": {"source": "sinusoid", "shots": 10, "queries": 10},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
}
TRAINING = {
    "cuda": {**_IMAGES, "training": {"iterations": 200, "validate_every": 25}},
    "cpu": {**_IMAGES, "training": {"iterations": 50, "validate_every": 25, "test_tasks": 200}},
    "small": {
        **_CURVES,
        "training": {
            "iterations": 4,
            "validate_every": 2,
            "validation_tasks": 4,
            "test_tasks": 8,
        },
    },
}
"""The configuration of the short training, but for its algorithm and runtime."""
