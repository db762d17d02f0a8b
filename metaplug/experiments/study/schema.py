"""A study as a file: variants, axes and seeds, and what is left out of their grid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from metaplug.contract.presets import YAML_ENDINGS, PluginUse, Preset, find_preset
from metaplug.errors import quoted
from metaplug.experiments.study.variant_files import with_algorithm
from metaplug.experiments.variant_texts import parse_variant
from metaplug.settings import Settings, validated
from metaplug.yaml_text import number_of, read_yaml

MOST_CELLS = 10_000
"""Of a study."""

Value = Annotated[Any, BeforeValidator(number_of)]
Values = Annotated[tuple[Value, ...], Field(min_length=1, max_length=1000)]


class Variant(Settings):
    """One algorithm of a study: a text PRESET[+PLUGIN[:FIELD=VALUE,...]]..., or its parts."""

    label: str = Field(min_length=1, max_length=200, description="Its name in tables.")
    preset: str | Preset = Field("maml", description="The algorithm.")
    plugins: tuple[PluginUse, ...] = Field((), description="Plugins after the preset's.")
    set: dict[str, Any] = Field({}, description="Other fields, by dotted path.")

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        preset, plugins = parse_variant(given)
        return {"label": given.replace(" ", ""), "preset": preset, "plugins": plugins}

    @field_validator("label")
    @classmethod
    def _one_line(cls, label: str) -> str:
        if not label.isprintable() or not label.strip():
            raise ValueError("it names a row of tables: give one line of text")
        return label

    @field_validator("preset")
    @classmethod
    def _known(cls, preset: str | Preset) -> str | Preset:
        found = find_preset(preset)
        is_file = isinstance(preset, str) and preset.endswith(YAML_ENDINGS)
        return found if is_file else preset  # a study is whole in itself


class Study(Settings):
    """A grid of runs: every variant, at every value of every axis, with every seed."""

    base: dict[str, Any] = Field(
        {}, description="Fields that all runs share, as in a configuration of metaplug train."
    )
    variants: tuple[Variant, ...] = Field(
        min_length=1, max_length=1000, description="The algorithms."
    )
    axes: dict[str, Values] = Field(
        {},
        description="Values of fields, by dotted path; plugins.NAME.FIELD concerns the variants "
        "that have that plugin.",
    )
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = Field(
        (0,), min_length=1, max_length=1000, description="A list, or a number: 3 is 0, 1, 2."
    )
    exclude: tuple[dict[str, Value], ...] = Field(
        (), description="Cells to leave out: those that have all these values, or one of a list."
    )
    baseline: str | None = Field(
        None, description="What the others are compared with; null is the first variant."
    )
    tuned: tuple[str, ...] | None = Field(
        None,
        description="The axes over which each variant's best setting is chosen; null is all but "
        "those of tasks and training.",
    )
    target: float | None = Field(
        None,
        description="The validation value to reach, a share as 0.8; null is the best that the "
        "baseline reaches, seed by seed.",
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool) and 1 <= given <= 1000:
            return tuple(range(given))
        if isinstance(given, int):
            raise ValueError("give how many, from 1 to 1000, or a list of seeds")
        return given

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed stands twice, and would be counted twice: leave one out")
        return seeds

    @field_validator("axes")
    @classmethod
    def _distinct(cls, axes: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
        for path, values in axes.items():
            if any(value in values[:place] for place, value in enumerate(values)):
                raise ValueError(f"a value of {path} stands twice: leave one out")
        return axes

    @model_validator(mode="after")
    def _named(self) -> Study:
        labels = [variant.label for variant in self.variants]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(
                f"the variant '{twice[0]}' stands twice, and would be compared with itself: "
                "leave one out"
            )
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(
                f"the baseline '{self.baseline}' is no variant: give one of {quoted(labels)}"
            )
        return self

    @model_validator(mode="after")
    def _may_be_tuned(self) -> Study:
        for path in self.tuned or ():
            if path not in self.axes:
                raise ValueError(f"tuned names {path}, which is no axis: add it to axes")
            if not is_tuned(path):
                raise ValueError(
                    f"tuned names {path}, which changes the tasks or the budget, so validation "
                    "cannot choose it: leave it out"
                )
        return self

    @property
    def reference(self) -> str:
        """The label of the baseline."""
        return self.variants[0].label if self.baseline is None else self.baseline


def is_tuned(path: str) -> bool:
    """Whether a field may be chosen by validation: it changes neither the tasks nor the budget."""
    return path.partition(".")[0] not in ("tasks", "training") or path == "training.non_finite"


def read_study(path: Path, also: Iterable[str] = ()) -> Study:
    """The study in a YAML file.

    Its `base` may be the path of a configuration beside it. So may the `config` of a variant, which
    then has the algorithm of that file (`variant_files`).

    Args:
        also: paths of fields that the caller gives, beside those of the file.

    Raises:
        RequestError: it is none; names the file and the field.
    """
    values = read_yaml(path)
    base, variants = values.get("base"), values.get("variants")
    if isinstance(base, str):
        values["base"] = read_yaml(path.parent / base)
    if isinstance(variants, list):
        values["variants"] = [with_algorithm(each, path, values, also) for each in variants]
    return validated(Study, values, str(path))
