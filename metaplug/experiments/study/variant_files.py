"""The algorithm of a study's variant, from the file of a configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError
from metaplug.experiments.configuration import ExperimentConfig, flatten
from metaplug.experiments.resolving import is_inside, resolve
from metaplug.settings import validated
from metaplug.yaml_text import read_yaml

_SHARED = ("tasks.", "model.", "training.tasks_per_batch", "training.non_finite")
"""How the fields begin that a search may be about, and that a study's variants share."""


def with_algorithm(
    variant: Any, path: Path, study: Mapping[str, Any], also: Iterable[str] = ()
) -> Any:
    """A variant whose `config` names a file, with the algorithm of that file in its place.

    That is the preset, the plugins, and those fields of `learner` that the file gives: all in the
    best.yaml of a search. Tasks, model and tasks a batch are the study's, so a file that has others
    than its preset is refused where the study does not give the field.

    Args:
        path: of the study.
        study: its content.
        also: paths of fields that the study has from elsewhere.

    Raises:
        RequestError: the file is no configuration, the variant gives its algorithm too, or
            something of the file would be lost.
    """
    if not isinstance(variant, dict) or not isinstance(variant.get("config"), str):
        return variant
    own = dict(variant)
    file, where = path.parent / own.pop("config"), f"{path}, variant {variant.get('label')!r}"
    if both := own.keys() & {"preset", "plugins"}:
        raise RequestError(
            f"{where}: both its config and the variant give {' and '.join(sorted(both))}; leave "
            "one of them out"
        )
    values = read_yaml(file)
    config = validated(ExperimentConfig, values, str(file))
    found = config.model_dump(mode="json")
    usual = flatten(
        resolve([(str(file), {"preset": config.preset})]).config.model_dump(mode="json")
    )
    named = _given(study, own).union(also)
    for field, value in flatten(found).items():
        if not field.startswith(_SHARED) or value == usual.get(field):
            continue
        if not any(is_inside(field, name) for name in named):
            raise RequestError(
                f"{where}: {file} has {field} = {value!r}, and the study leaves it out: give it in "
                "base, which all variants share"
            )
    learner = {f"learner.{name}": found["learner"][name] for name in values.get("learner") or {}}
    algorithm = {"preset": found["preset"], "plugins": found["plugins"]}
    return {**algorithm, **own, "set": {**learner, **(own.get("set") or {})}}


def _given(study: Mapping[str, Any], own: Mapping[str, Any]) -> set[str]:
    """The paths of fields that base, every value of an axis, or the variant give."""
    base = {path for path, value in flatten(_mapping(study.get("base"))).items() if value != {}}
    axes = [
        set.intersection(*(set(flatten({path: value})) for value in values))
        for path, values in _mapping(study.get("axes")).items()
        if isinstance(values, list) and values
    ]
    return base.union(*axes, _mapping(own.get("set")))


def _mapping(given: Any) -> dict[str, Any]:
    """The same, or nothing where it is of another kind, which is refused later."""
    return given if isinstance(given, dict) else {}
