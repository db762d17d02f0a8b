"""What a study may not ask for, each refused in one line."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaplug.contract.presets import find_preset
from metaplug.errors import RequestError, quoted, unknown
from metaplug.experiments.configuration import flatten
from metaplug.experiments.resolving import is_inside
from metaplug.experiments.study.schema import Study, Variant

if TYPE_CHECKING:
    from metaplug.experiments.study.cells import Cell

LEAST_VALIDATION_TASKS = 200
"""Fewer make the target, a maximum over noisy values, mostly noise."""


def concerns(path: str, variant: Variant) -> bool:
    """Whether a path is of a field that the variant has; plugins' fields are not everybody's."""
    head, _, rest = path.partition(".")
    name = rest.partition(".")[0]
    if head == "plugins":
        return name in [use.label for use in variant.plugins]
    if head == "preset" and rest:
        return name in [use.label for use in find_preset(variant.preset).plugins]
    return True


def check_base(study: Study, origin: str) -> None:
    """Refuse what would be the same for all runs, and axes that are none."""
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


def check_once(study: Study, origin: str) -> None:
    """Refuse a field that an axis gives and another axis or a variant, too: one would not count."""
    for path in study.axes:
        for other in study.axes:
            if other.startswith(f"{path}."):
                raise RequestError(
                    f"{origin}, axes: {path} holds {other}, so the one would replace the other: "
                    f"write the values of {other} into those of {path}, or leave {path} out"
                )
    for variant in study.variants:
        uses = variant.plugins
        settings = [f"plugins.{use.label}.{field}" for use in uses for field in use.settings]
        if twice := [field for field in settings if field in variant.set]:
            raise RequestError(
                f"{origin}, variant '{variant.label}': both set and the list of plugins give "
                f"{twice[0]}: leave one of them out"
            )
        own = [*variant.set, *settings]
        for field, path in itertools.product(own, study.axes):
            if is_inside(field, path) or is_inside(path, field):
                raise RequestError(
                    f"{origin}, variant '{variant.label}': it sets {field}, and the axis {path} "
                    "would replace that: leave one of them out"
                )


def is_excluded(study: Study, label: str, setting: Mapping[str, Any], seed: int) -> bool:
    """Whether an entry of `exclude` names this cell."""
    values = {"variant": label, "seed": seed, **setting}
    return any(
        all(path in values and values[path] in _listed(wanted) for path, wanted in entry.items())
        for entry in study.exclude
    )


def _listed(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else [wanted]


def check_exclude(
    study: Study, rows: Sequence[tuple[Variant, Mapping[str, Any]]], origin: str
) -> None:
    """Refuse entries that name what is not there, or no cell."""
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
            is_excluded(alone, variant.label, setting, seed)
            for variant, setting in rows
            for seed in study.seeds
        ):
            raise RequestError(f"{where}: no cell has all these values; leave it out")


def check_fair(study: Study, cells: Sequence[Cell], origin: str) -> None:
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
