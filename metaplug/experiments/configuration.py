"""The experiment as pydantic models: YAML and options in, one resolved configuration out, with the origin of every value."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from metaplug.contract.presets import YAML_ENDINGS, PluginUse, Preset, find_preset
from metaplug.errors import RequestError, did_you_mean
from metaplug.execution.settings import LearnerSettings, NonFinite
from metaplug.settings import Settings, validated


class ModelSettings(Settings):
    """The model, built for the tasks' input shape and outputs."""

    name: str = Field(
        "conv4", description="A model's entry-point name, MODULE:FACTORY, or torchvision:NAME."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the model's Config, or arguments of its factory.",
    )


class TaskSettings(Settings):
    """Where tasks come from, and their form."""

    source: str = Field(
        "glyphs",
        description="A task source's entry-point name, with its argument behind a colon: folder:PATH.",
    )
    ways: int = Field(5, ge=2, le=1000, description="Classes in a task (classification).")
    shots: int = Field(
        1,
        ge=1,
        le=1000,
        description="Support examples of each class (classification) or of the task (regression).",
    )
    queries: int = Field(
        5,
        ge=1,
        le=1000,
        description="Query examples of each class (classification) or of the task (regression).",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the task source's Config."
    )


class TrainingSettings(Settings):
    """How long meta-training runs, and what is measured on the way."""

    iterations: int = Field(400, ge=1, description="Meta-iterations.")
    tasks_per_batch: int = Field(8, ge=1, description="Tasks in a meta-batch.")
    validate_every: int = Field(25, ge=1, description="Iterations between two validations.")
    validation_tasks: int = Field(
        200, ge=2, description="Validation tasks, the same at every validation."
    )
    test_tasks: int = Field(600, ge=2, description="Test tasks at the end.")
    non_finite: NonFinite = Field(
        "stop",
        description="What NaN or Inf does: stop the run, or skip the batch, which is counted; ten in a row stop it all the same.",
    )


class RuntimeSettings(Settings):
    """How a step is computed: the same numbers up to rounding. How coarsely is rounded, `precision` says; nothing else here does."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    task_batching: Literal["auto", "vectorized", "sequential"] = Field(
        "auto", description="Whether tasks run in one call or one after the other."
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=1,
        description="Inner steps whose graph is kept at a time, the others' being made again; null keeps all: more memory.",
    )
    chunk_size: int | None = Field(
        None,
        ge=1,
        description="Tasks that are computed together, for plugins that do not couple tasks; null takes all of a batch at once.",
    )
    compile: bool = Field(
        False,
        description="Compile meta-steps: a minute or more once, then many times faster for small models.",
    )
    capture: Literal[True, False, "auto"] = Field(
        False,
        description="Replay meta-steps from CUDA graphs; auto: after 10 steps of a form, where it can be had.",
    )
    metrics_every: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Meta-steps after which losses and figures are fetched from the device, so that it need not wait.",
    )
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="TF32 off, TF32 on (CUDA), or the model's run in bfloat16; losses and updates stay in float32.",
    )
    deterministic: bool = Field(
        False,
        description="Only algorithms that give the same bits every time, on CUDA too; an operation without one stops the run.",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; null leaves torch's choice."
    )


class ExperimentConfig(Settings):
    """Everything that a run needs to be repeated."""

    preset: str | Preset = Field(
        "maml",
        description="The algorithm, as `metaplug plugins` lists it, or a whole preset of one's own.",
    )
    plugins: tuple[PluginUse, ...] = Field(
        (), description="Plugins behind the preset's, in the order of application."
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

    @property
    def algorithm(self) -> str:
        """The preset's name."""
        return self.preset if isinstance(self.preset, str) else self.preset.name


@dataclass(frozen=True)
class Resolved:
    """A configuration, and by dotted path where each value came from: "default", "preset …", "FILE" or "option".

    Settings of plugins, the preset's too, stand as plugins.NAME.FIELD; those that are at their default are left out.
    """

    config: ExperimentConfig
    origins: Mapping[str, str]


def resolve(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """One configuration from (origin, nested values) pairs, a later one over an earlier; the preset's defaults lie under all of them.

    Raises:
        RequestError: an unknown field or preset, or a value out of bounds, each named with its origin.
    """
    values: dict[str, Any] = {}
    layers = [(origin, _with_whole_preset(layer, origin)) for origin, layer in layers]
    for origin, layer in layers:
        validated(ExperimentConfig, layer, origin)
        values = merge(values, layer)
    preset = find_preset(values.get("preset", ExperimentConfig.model_fields["preset"].default))
    stack = [(f"preset {preset.name}", preset.defaults), *layers]
    validated(ExperimentConfig, preset.defaults, f"the defaults of preset {preset.name}")
    config = validated(ExperimentConfig, merge(preset.defaults, values), "configuration")
    origins = dict.fromkeys(flatten(config.model_dump(mode="json")), "default")
    for origin, layer in stack:
        origins.update(
            (path, origin)
            for path in origins
            if any(path == given or path.startswith(f"{given}.") for given in flatten(layer))
        )
    listed = [(f"preset {preset.name}", preset.plugins)]
    listed += [
        (origin, ExperimentConfig.model_validate(layer).plugins)
        for origin, layer in layers
        if "plugins" in layer
    ]
    origins["preset"] = next(
        (origin for origin, layer in reversed(layers) if "preset" in layer), "default"
    )
    return Resolved(config, {**origins, **_plugin_origins(listed)})


def _with_whole_preset(layer: Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    """The layer with a preset of one's own, written out or in a file, as a Preset, so that a run's configuration is whole in itself."""
    preset = layer.get("preset")
    if isinstance(preset, Mapping):
        return {
            **layer,
            "preset": validated(Preset, {"name": Path(origin).stem, **preset}, f"{origin}, preset"),
        }
    if isinstance(preset, str) and preset.endswith(YAML_ENDINGS):
        return {**layer, "preset": find_preset(preset)}
    return layer


def _plugin_origins(listed: Sequence[tuple[str, Sequence[PluginUse]]]) -> dict[str, str]:
    """Where every setting of a plugin came from, from the lists that stand over each other. A later list repeats what it extends."""
    origins: dict[str, str] = {}
    seen: dict[str, Any] = {}
    for origin, uses in listed:
        for use in uses:
            for field, value in use.settings.items():
                path = f"plugins.{use.name or use.plugin}.{field}"
                if path not in seen or seen[path] != value:
                    seen[path], origins[path] = value, origin
    return origins


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`under` with every value of `over` put in its place; nested mappings are merged, everything else is replaced."""
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


def assign(values: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`values` with `value` at a dotted path. An entry of the list of plugins is found by its name, or its plugin's."""
    head, _, rest = path.partition(".")
    if head == "plugins" and rest:
        return {
            **values,
            "plugins": _assign_plugin(list(values.get("plugins", ())), rest, value, path),
        }
    inside = values.get(head, {})
    return {
        **values,
        head: assign(inside if isinstance(inside, Mapping) else {}, rest, value) if rest else value,
    }


def _assign_plugin(uses: list[Any], path: str, value: Any, whole: str) -> list[Any]:
    name, _, field = path.partition(".")
    entries: list[dict[str, Any]] = [
        use.model_dump()
        if isinstance(use, PluginUse)
        else ({"plugin": use} if isinstance(use, str) else dict(use))
        for use in uses
    ]
    known = [entry.get("name") or entry["plugin"] for entry in entries]
    if name not in known or not field:
        raise RequestError(
            f"'{whole}' is no setting of a listed plugin ({did_you_mean(name, known)}): write plugins.NAME.field, or add it by --with"
        )
    index = known.index(name)
    entries[index] = {
        **entries[index],
        "settings": {**(entries[index].get("settings") or {}), field: value},
    }
    return entries


def to_yaml(config: ExperimentConfig) -> str:
    """The configuration as YAML that `read_yaml` reads back to an equal one."""
    return yaml.safe_dump(
        config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=sys.maxsize
    )
