"""From a study to its cells: one whole configuration for every variant, setting and seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metaplug.errors import MetaplugError, RequestError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.plugin_files import recorded
from metaplug.experiments.resolving import assign, resolve
from metaplug.experiments.study.checks import (
    check_base,
    check_exclude,
    check_fair,
    check_once,
    concerns,
    is_excluded,
)
from metaplug.experiments.study.identity import digest_of
from metaplug.experiments.study.schema import MOST_CELLS, Study, Variant


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a study.

    Attributes:
        variant: its label.
        setting: the values of the axes that concern the variant, by path, in the axes' order.
        config: the whole configuration, with the seed.
        computed_as: its digest by the code that computed it; None by the code of today.
    """

    variant: str
    setting: Mapping[str, Any]
    config: ExperimentConfig
    computed_as: str | None = None

    @property
    def seed(self) -> int:
        """The configuration's."""
        return self.config.seed

    @cached_property
    def digest(self) -> str:
        """The name of the cell's folder: of the configuration and of the code that it runs."""
        return self.computed_as or digest_of(self.config)

    @property
    def label(self) -> str:
        """The variant, the setting and the seed, in words."""
        return f"{row_text(self.variant, self.setting)}, seed {self.seed}"


def row_text(variant: str, setting: Mapping[str, Any]) -> str:
    """Write a variant and a setting in words."""
    return ", ".join(filter(None, (variant, setting_text(setting))))


def setting_text(setting: Mapping[str, Any]) -> str:
    """Write the values of axes in words, each field by the last part of its path.

    >>> setting_text({"learner.inner_lr": 0.1, "learner.inner_steps": 3})
    'inner_lr 0.1, inner_steps 3'
    >>> setting_text({"plugins.gradient-sharing.gate": 0.1, "plugins.mine.gate": 0.2})
    'gradient-sharing.gate 0.1, mine.gate 0.2'
    """
    last = [path.rpartition(".")[2] for path in setting]
    named = [
        name if last.count(name) == 1 else ".".join(path.split(".")[-2:])
        for path, name in zip(setting, last, strict=True)
    ]
    return ", ".join(f"{name} {value}" for name, value in zip(named, setting.values(), strict=True))


def cells_of(study: Study, origin: str, *, to_compute: bool = True) -> tuple[Cell, ...]:
    """All cells of a study but the excluded ones: by seed, then by variant and setting.

    Args:
        origin: the file of the study, for errors.
        to_compute: False for cells that were computed, whose code may be gone by now: no plugin
            file is read, and their digests are those of `computed_as` alone.

    Raises:
        RequestError: a field is unknown, given twice or a value refused; an exclusion concerns
            nothing, or everything; two variants that would be compared differ in their tasks or
            training; or there are too few validation tasks or too many cells.
    """
    check_base(study, origin)
    check_once(study, origin)
    rows = [
        (variant, setting) for variant in study.variants for setting in _settings(study, variant)
    ]
    if len(rows) * len(study.seeds) > MOST_CELLS:
        raise RequestError(
            f"{origin}: {len(rows) * len(study.seeds)} cells, more than the {MOST_CELLS} that a "
            "study may have: take fewer values"
        )
    check_exclude(study, rows, origin)
    made: list[Cell] = []
    for variant, setting in rows:
        with naming(f"variant '{row_text(variant.label, setting)}'"):
            config = _configuration(study, variant, setting, origin)
            if to_compute:
                config = recorded(config)
                digest_of(config)  # names what is not installed
        made += [
            Cell(variant.label, setting, config.model_copy(update={"seed": seed}))
            for seed in study.seeds
            if not is_excluded(study, variant.label, setting, seed)
        ]
    if not made:
        raise RequestError(f"{origin}, exclude: no cell is left; exclude less")
    if not any(cell.variant == study.reference for cell in made):
        raise RequestError(
            f"{origin}, exclude: no cell of the baseline '{study.reference}' is left, so nothing "
            "would be compared; exclude less, or give another baseline"
        )
    check_fair(study, made, origin)
    return tuple(sorted(made, key=lambda cell: study.seeds.index(cell.seed)))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in errors what they concern."""
    try:
        yield
    except MetaplugError as error:
        raise type(error)(f"{what}: {error}") from error


def _settings(study: Study, variant: Variant) -> list[dict[str, Any]]:
    axes = {path: values for path, values in study.axes.items() if concerns(path, variant)}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _configuration(
    study: Study, variant: Variant, setting: Mapping[str, Any], origin: str
) -> ExperimentConfig:
    uses = [use.model_dump() for use in variant.plugins]
    preset = variant.preset if isinstance(variant.preset, str) else variant.preset.model_dump()
    values: dict[str, Any] = {"preset": preset, "plugins": uses}
    for path, value in {**variant.set, **setting}.items():
        values = assign(values, path, value)
    base = f"{origin}, base" if origin else "option"
    config = resolve([(base, study.base), (variant.label, values)]).config
    if config.runtime.threads is None:
        # Sums differ by the number of threads, and a cell's must not differ by where it runs.
        runtime = config.runtime.model_copy(update={"threads": 1})
        config = config.model_copy(update={"runtime": runtime})
    return config
