"""From a study to its cells: one whole configuration for every variant, setting and seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from metaplug.contract.presets import find_preset
from metaplug.errors import MetaplugError, RequestError, quoted, unknown
from metaplug.experiments.configuration import ExperimentConfig, assign, flatten, resolve
from metaplug.experiments.plugin_files import recorded
from metaplug.experiments.study.identity import digest_of
from metaplug.experiments.study.schema import MOST_CELLS, Study, Variant

LEAST_VALIDATION_TASKS = 200
"""Fewer make the target, a maximum over noisy values, mostly noise."""


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
    """
    return ", ".join(f"{path.rpartition('.')[2]} {value}" for path, value in setting.items())


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
    _check_base(study, origin)
    _check_once(study, origin)
    rows = [
        (variant, setting) for variant in study.variants for setting in _settings(study, variant)
    ]
    if len(rows) * len(study.seeds) > MOST_CELLS:
        raise RequestError(
            f"{origin}: {len(rows) * len(study.seeds)} cells, more than the {MOST_CELLS} that a "
            "study may have: take fewer values"
        )
    _check_exclude(study, rows, origin)
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
            if not _is_excluded(study, variant.label, setting, seed)
        ]
    if not made:
        raise RequestError(f"{origin}, exclude: no cell is left; exclude less")
    _check_fair(study, made, origin)
    return tuple(sorted(made, key=lambda cell: study.seeds.index(cell.seed)))


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in errors what they concern."""
    try:
        yield
    except MetaplugError as error:
        raise type(error)(f"{what}: {error}") from error


def concerns(path: str, variant: Variant) -> bool:
    """Whether a path is of a field that the variant has; plugins' fields are not everybody's."""
    head, _, rest = path.partition(".")
    name = rest.partition(".")[0]
    if head == "plugins":
        return name in [use.label for use in variant.plugins]
    if head == "preset" and rest:
        return name in [use.label for use in find_preset(variant.preset).plugins]
    return True


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


def _check_base(study: Study, origin: str) -> None:
    for field in ("preset", "plugins", "seed"):
        if field in study.base:
            instead = "seeds" if field == "seed" else "variants"
            raise RequestError(
                f"{origin}, base.{field}: it would be the same for all runs; give it in {instead}"
            )
    elsewhere = {
        "seed": "give seeds",
        **dict.fromkeys(("runtime", "loggers"), "it changes no result, so give it in base"),
    }
    for path in study.axes:
        head = path.partition(".")[0]
        if head in elsewhere or path in ("preset", "plugins"):
            mend = elsewhere.get(head, "write a variant for each")
            raise RequestError(f"{origin}, axes: {path} is no axis: {mend}")
        if not any(concerns(path, variant) for variant in study.variants):
            raise RequestError(
                f"{origin}, axes: {path} is of a plugin that no variant has: add it to one, or "
                "leave the axis out"
            )


def _check_once(study: Study, origin: str) -> None:
    """Refuse a field that an axis gives and another axis or a variant, too: one would not count."""
    for path in study.axes:
        for other in study.axes:
            if other.startswith(f"{path}."):
                raise RequestError(
                    f"{origin}, axes: {path} holds {other}, so the one would replace the other: "
                    f"write the values of {other} into those of {path}, or leave {path} out"
                )
    for variant in study.variants:
        own = [*variant.set]
        own += [f"plugins.{use.label}.{field}" for use in variant.plugins for field in use.settings]
        for field, path in itertools.product(own, study.axes):
            if f"{field}.".startswith(f"{path}.") or path.startswith(f"{field}."):
                raise RequestError(
                    f"{origin}, variant '{variant.label}': it sets {field}, and the axis {path} "
                    "would replace that: leave one of them out"
                )


def _is_excluded(study: Study, label: str, setting: Mapping[str, Any], seed: int) -> bool:
    values = {"variant": label, "seed": seed, **setting}
    return any(
        all(path in values and values[path] in _listed(wanted) for path, wanted in entry.items())
        for entry in study.exclude
    )


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else [wanted]


def _check_exclude(
    study: Study, rows: Sequence[tuple[Variant, Mapping[str, Any]]], origin: str
) -> None:
    known: dict[str, Sequence[Any]] = {
        "variant": [variant.label for variant in study.variants],
        "seed": [*study.seeds],
        **study.axes,
    }
    for place, entry in enumerate(study.exclude, 1):
        where = f"{origin}, exclude, entry {place}"
        if not entry:
            raise RequestError(f"{where}: it names nothing, and would leave no cell; give values")
        for path, wanted in entry.items():
            if path not in known:
                raise RequestError(f"{where}: {unknown('axis', path, known)}")
            for value in _listed(wanted):
                if value not in known[path]:
                    given = ", ".join(map(str, known[path]))
                    raise RequestError(f"{where}: {path} is never {value!r}; it is one of {given}")
        alone = study.model_copy(update={"exclude": (entry,)})
        if not any(
            _is_excluded(alone, variant.label, setting, seed)
            for variant, setting in rows
            for seed in study.seeds
        ):
            raise RequestError(f"{where}: no cell has all these values; leave it out")


def _check_fair(study: Study, cells: Sequence[Cell], origin: str) -> None:
    """Refuse to compare what differs in more than the algorithm and the axes."""
    few = next(
        (c for c in cells if c.config.training.validation_tasks < LEAST_VALIDATION_TASKS), None
    )
    if few is not None:
        fault = "too few to compare by, as the target would be mostly noise"
        raise RequestError(
            f"training.validation_tasks = {few.config.training.validation_tasks}: {fault}; use at "
            f"least {LEAST_VALIDATION_TASKS}"
        )
    own = {"preset", "plugins", "learner", "seed"}
    first: dict[str, tuple[str, dict[str, Any]]] = {}
    for cell in cells:
        shared = flatten(cell.config.model_dump(mode="json", exclude=own))
        at = {path: value for path, value in cell.setting.items() if not is_own(path)}
        label, others = first.setdefault(repr(at), (cell.variant, shared))
        for path in {**others, **shared}:
            values = others.get(path), shared.get(path)
            if values[0] != values[1]:
                what = f"variants {quoted([label])} and {quoted([cell.variant])} differ in {path}"
                fault = f"({values[0]!r} and {values[1]!r}), so a comparison would not be fair"
                raise RequestError(f"{what} {fault}: set {path} for both")


def is_own(path: str) -> bool:
    """Whether a field belongs to the algorithm, so variants may differ in it."""
    return path.partition(".")[0] in ("preset", "plugins", "learner")
