"""An experiment as pydantic models, read from YAML and written as YAML."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from metaplug.contract.logger import LoggerUse
from metaplug.contract.presets import PluginUse, Preset
from metaplug.errors import one_line
from metaplug.evaluation.score_names import ScoreName
from metaplug.execution.settings import LearnerSettings, NonFinite
from metaplug.settings import Settings, validated
from metaplug.yaml_text import parse_yaml

AtLeastOne = Annotated[int, Field(ge=1)]
UpTo1000 = Annotated[int, Field(ge=1, le=1000)]


class ModelSettings(Settings):
    """The model, built for the tasks' input shape and outputs."""

    name: str = Field(
        "conv4",
        description="A model's entry-point name, MODULE:FACTORY, transformers:NAME_OR_FOLDER, "
        "timm:NAME, or torchvision:NAME.",
    )
    settings: dict[str, Any] = Field(
        {}, description="Fields of the model's Config, or arguments of its factory."
    )


class TaskSettings(Settings):
    """Where tasks come from, and their form."""

    source: str = Field(
        "glyphs",
        description="A task source's entry-point name, with its argument after a colon: "
        "folder:PATH.",
    )
    ways: int = Field(5, ge=2, le=1000, description="Classes in a task (classification).")
    shots: UpTo1000 = Field(
        1,
        description="Support examples of each class (classification) or of the task (regression).",
    )
    queries: UpTo1000 = Field(
        5, description="Query examples of each class (classification) or of the task (regression)."
    )
    settings: dict[str, Any] = Field({}, description="Fields of the task source's Config.")


class TrainingSettings(Settings):
    """How long meta-training runs, and what is measured on the way."""

    iterations: AtLeastOne = Field(400, description="Meta-iterations.")
    tasks_per_batch: AtLeastOne = Field(8, description="Tasks in a meta-batch.")
    validate_every: AtLeastOne = Field(25, description="Iterations between two validations.")
    validation_tasks: int = Field(
        200, ge=2, description="Validation tasks, the same at every validation."
    )
    profile_tasks: int = Field(
        16,
        ge=0,
        description="Validation tasks, of the first, whose inner loop is recorded step by step; "
        "0 for none.",
    )
    test_tasks: int = Field(600, ge=2, description="Test tasks at the end.")
    score: ScoreName | None = Field(
        None,
        description="How well query targets are predicted, at validations and tests; null: "
        "accuracy, or mean-squared-error for regression.",
    )
    non_finite: NonFinite = Field(
        "stop",
        description="What NaN or Inf does: stop the run, or skip the batch, which is counted; "
        "ten in a row stop it all the same.",
    )


class RuntimeSettings(Settings):
    """How a run is computed and kept: the same up to rounding, which only `precision` coarsens."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    task_batching: Literal["auto", "vectorized", "sequential"] = Field(
        "auto", description="Whether tasks run in one call or one after the other."
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=1,
        description="Inner steps whose graph is kept at a time, the others' being recomputed; "
        "null keeps all: more memory.",
    )
    chunk_size: int | None = Field(
        None,
        ge=1,
        description="Tasks that are computed together, for plugins that do not couple tasks; "
        "null takes all of a batch at once.",
    )
    cache_frozen: bool = Field(
        False,
        description="Compute what lies below the first adapted layer once a batch, "
        "not once an inner step.",
    )
    compile: Literal[True, False, "auto"] = Field(
        False,
        description="Compile meta-steps: a minute or more once, then many times faster for small "
        "models; auto: beside the run, where it is long enough.",
    )
    capture: Literal[True, False, "auto"] = Field(
        False,
        description="Replay meta-steps from CUDA graphs; "
        "auto: after 10 steps of a form, where it can be had.",
    )
    metrics_every: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Meta-steps after which losses and figures are fetched from the device, "
        "so that it need not wait.",
    )
    save_every: int | None = Field(
        None,
        ge=1,
        description="Iterations after which a checkpoint is written between validations too; "
        "null: at validations alone.",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="TF32 off, TF32 on (CUDA), or the model's run in bfloat16; "
        "losses and updates stay in float32.",
    )
    deterministic: bool = Field(
        False,
        description="Only algorithms that give the same bits every time, on CUDA too; "
        "an operation without one stops the run.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; null leaves torch's choice."
    )


class ExperimentConfig(Settings):
    """Everything that a run needs to be repeated."""

    preset: str | Preset = Field(
        "maml",
        description="The algorithm, as `metaplug plugins` lists it, "
        "or a whole preset of one's own.",
    )
    plugins: tuple[PluginUse, ...] = Field(
        (), description="Plugins after the preset's, in the order of application."
    )
    model: ModelSettings = ModelSettings()
    tasks: TaskSettings = TaskSettings()
    learner: LearnerSettings = LearnerSettings()
    training: TrainingSettings = TrainingSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Of the model's first weights, the tasks and every other random number.",
    )
    loggers: tuple[LoggerUse, ...] = Field(
        (),
        description="Where a run's figures are shown besides its folder; no result depends on it.",
    )

    @field_validator("loggers")
    @classmethod
    def _each_once(cls, value: tuple[LoggerUse, ...]) -> tuple[LoggerUse, ...]:
        names = [use.logger for use in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"the logger '{one_line(twice[0])}' stands twice, and would log every figure "
                "twice: leave one of them out"
            )
        return value

    @property
    def algorithm(self) -> str:
        """The preset's name, with what was changed of it."""
        return self.preset if isinstance(self.preset, str) else self.preset.label


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with the values of `over` in their places; nested mappings are merged."""
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        below, above = under[key], over[key]
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            merged[key] = merge(below, above)
    return merged


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted path; an empty mapping counts as a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_yaml(config: ExperimentConfig) -> str:
    """The configuration as YAML that `from_yaml` reads back to an equal one."""
    values = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def from_yaml(text: str, origin: str) -> ExperimentConfig:
    """The configuration in a text, which `origin` names in errors.

    Raises:
        RequestError: it is none.
    """
    return validated(ExperimentConfig, parse_yaml(text, origin), origin)
