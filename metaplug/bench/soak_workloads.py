"""The long runs that are watched: every first-party plugin that composes, on two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metaplug.bench.meters import ON_CPU, Meter
from metaplug.experiments.configuration import ExperimentConfig

_SCHEDULE = {"iterations_per_epoch": None}  # epochs are hundredths of the run
_CHAIN: Mapping[str, Mapping[str, Any]] = {
    "per-step-batch-norm": {},
    "partial-adaptation": {"adapts": "body"},
    "mr-maml": {"weights": ["*.weight"], "beta": 1e-6},
    "meta-mix": {},
    "l2f": {},
    "proto-maml": {},
    "label-smoothing": {},
    "weight-decay-to-init": {"strength": 1e-3},
    "gradient-clipping": {"max_norm": 10.0, "max_meta_norm": 10.0},
    "gradient-noise": {"scale": 1e-4},
    "drop-grad": {},
    "sharp-maml": {"level": "lower"},
    "gradient-sharing": {},
    "meta-curvature": {},
    "meta-sgd": {},
    "per-step-learning-rates": {},
    "aruba": {},
    "taml": {"measure": "theil"},
    "multi-step-loss": {"annealing_epochs": 5, **_SCHEDULE},
    "derivative-order": {"switch": 5, **_SCHEDULE},
    "cosine-meta-lr": {},
}
_REPTILE = "it replaces the outer loss, which multi-step-loss weighs: the two refuse each other"
_ADAPTS = "it says itself what adapts, which partial-adaptation does here"
_ORDER = "it goes together with no plugin that chooses the order, as derivative-order does here"
_RATES = "its rates times those of three plugins more diverge in long runs"
_ALONE = {
    "alfa": _RATES,
    **dict.fromkeys(("cavia", "lora"), _ADAPTS),
    **dict.fromkeys(("imaml", "metal", "warp-grad"), _ORDER),
    "reptile": _REPTILE,
}


@dataclass(frozen=True)
class SoakWorkload:
    """A run that is watched.

    Attributes:
        steps: meta-steps where none are asked for.
        left_out: by name, the first-party plugins that do not fit, each with the reason.
        settings: fields of ExperimentConfig.
    """

    name: str
    steps: int
    left_out: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def plugins(self) -> tuple[str, ...]:
        """The plugins of the run, in the order of the chain."""
        return tuple(name for name in _CHAIN if name not in self.left_out)

    def config(self, steps: int, meter: Meter = ON_CPU) -> ExperimentConfig:
        """Return the experiment: at most 40 validations, each with a checkpoint."""
        training = {"iterations": steps, "validate_every": max(steps // 40, 10)}
        training |= {"validation_tasks": 40, "test_tasks": 40, **self.settings["training"]}
        precision = "tf32" if meter.precision == "TF32" else "float32"
        return ExperimentConfig.model_validate(
            {
                **self.settings,
                "plugins": [{"plugin": each, "settings": _CHAIN[each]} for each in self.plugins],
                "training": training,
                "runtime": {"device": str(meter.device), "precision": precision},
            }
        )


_SINUSOID = SoakWorkload(
    "sinusoid",
    20_000,
    {
        "per-step-batch-norm": "the network has no batch norm",
        "label-smoothing": "regression has no labels",
        "proto-maml": "regression has no classes",
        **dict.fromkeys(("l2f", "sharp-maml"), "with aruba's rates this run diverges"),
        **_ALONE,
    },
    {
        "model": {"name": "mlp"},
        "tasks": {"source": "sinusoid", "shots": 10, "queries": 10},
        "learner": {"inner_lr": 0.01, "inner_steps": 2},
        "training": {"tasks_per_batch": 8},
    },
)
_CONV4 = SoakWorkload(
    "conv4",
    2_000,
    _ALONE,
    {
        "model": {"name": "conv4", "settings": {"filters": 32, "pooling": "stride"}},
        "tasks": {"source": "glyphs", "ways": 5, "shots": 1, "queries": 5},
        "learner": {"inner_lr": 0.1, "inner_steps": 2},
        "training": {"tasks_per_batch": 4},
    },
)
SOAKS = {"sinusoid": _SINUSOID, "conv4": _CONV4}
