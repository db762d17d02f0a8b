"""Names of runs: what was set otherwise than by default, safe as the name of a folder.

    maml+gradient-sharing-gate0.3-glyphs-5way-1shot-lr0.1-steps5-seed0

Configurations of two runs have two names. Where words of bounded length cannot tell them apart, as
with a file that lies elsewhere, a digest of all that differs ends the name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from metaplug.contract import registry
from metaplug.contract.presets import PluginUse, Preset, find_preset, label_of
from metaplug.experiments.build import task_form
from metaplug.experiments.configuration import ExperimentConfig, flatten
from metaplug.experiments.plugin_files import comparable

LONGEST = 120
"""Letters of a name. File systems take 255 bytes."""

_SHORT = {
    "learner.inner_lr": "lr",
    "learner.inner_steps": "steps",
    "training.tasks_per_batch": "batch",
}
_EXACT = re.compile(r"[a-z0-9_.+=,-]+")
"""No capitals, which some file systems take for small letters."""
_MORE = "\0"
"""Ends a word that does not say all of what it stands for."""


def differences(config: ExperimentConfig, base: ExperimentConfig | None = None) -> dict[str, Any]:
    """The fields that a configuration sets otherwise than its preset and the defaults, by path.

    Settings of plugins are plugins.NAME.FIELD, all that are given; those of the preset's plugins
    are preset.NAME.FIELD, where they were changed. Of the runtime only the precision is there, as
    the rest of it gives the same run, and no logger is.

    Args:
        base: another configuration to differ from.

    >>> from metaplug.experiments.configuration import LearnerSettings
    >>> differences(ExperimentConfig(preset="maml++", learner=LearnerSettings(inner_lr=0.2)))
    {'learner.inner_lr': 0.2}
    """
    if base is None:
        base = ExperimentConfig.model_validate(find_preset(config.preset).defaults)
    below = _fields(base)
    return {
        path: value
        for path, value in _fields(config).items()
        if path not in below or below[path] != value
    }


def name_of(
    config: ExperimentConfig, file: str | None = None, base: ExperimentConfig | None = None
) -> str:
    """Name a run: the same configuration always has the same name.

    Args:
        file: the stem of a configuration file, which stands for all that is in it.
        base: what that file alone resolves to.

    >>> name_of(ExperimentConfig(seed=3))
    'maml-glyphs-5way-1shot-seed3'
    """
    sections = _sections(config, base)
    if file is not None and base is not None:
        own = _sections(base, base)
        sections = {key: words for key, words in sections.items() if words != own[key]}
    said = [word for words in sections.values() for word in words]
    if file is not None and not said:
        return file
    whole = "-".join(said)
    words = [*([] if file is None else [file]), *map(_clean, said)]
    name = "-".join(words).lstrip("-.")
    if len(name) <= LONGEST and name.endswith(whole) and _EXACT.fullmatch(whole):
        return name
    return f"{_shortened(words, LONGEST - 9)}-{_digest(config)}"


def _digest(config: ExperimentConfig) -> str:
    """Tell a configuration from others; a field that a later version adds does not change it."""
    parts = {
        path: value
        for path, value in comparable(config).items()
        if path.partition(".")[0] in ("preset", "plugins")
    }
    text = json.dumps(parts | differences(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _shortened(words: Sequence[str], most: int) -> str:
    """Join words; where they are too many, those before the last one, the seed, are left out."""
    *before, last = words
    while len(before) > 1 and len("-".join([*before, last])) > most:
        before.pop()
    last = last[: most // 2]
    head = "-".join(before)[: most - len(last) - 1].strip("-.")
    return f"{head}-{last}"


def _counts(path: str) -> bool:
    return not path.startswith("runtime.") or path == "runtime.precision"


def _fields(config: ExperimentConfig) -> dict[str, Any]:
    changes = config.preset.changes if isinstance(config.preset, Preset) else {}
    own = {f"preset.{path}": value for path, value in changes.items()}
    for use in config.plugins:
        own |= {f"plugins.{use.label}.{field}": value for field, value in use.settings.items()}
    flat = flatten(config.model_dump(mode="json", exclude={"preset", "plugins", "loggers"}))
    return own | {path: value for path, value in flat.items() if _counts(path)}


def _sections(config: ExperimentConfig, base: ExperimentConfig | None) -> dict[str, list[str]]:
    """The words of a name by what they are about; a section says all of that, or nothing."""
    changed = differences(config, base)
    source, colon, argument = config.tasks.source.partition(":")
    place = PurePath(argument).name
    tasks = [source, *([place if place == argument else place + _MORE] if colon else [])]
    forms = {form.partition("-")[2]: form.replace("-", "") for form in task_form(config)}
    said = {"tasks.source", *(f"tasks.{form}s" for form in forms)}
    model = [config.model.name, *_settings(config.model.settings)]
    fields = [
        _setting(_SHORT.get(path, path.partition(".")[2]), value)
        for path, value in changed.items()
        if path.startswith(("tasks.", "learner.", "training.", "runtime."))
        and not path.startswith("tasks.settings")
        and path not in said
    ]
    return {
        "algorithm": ["+".join([_preset(config.preset), *map(_plugin, config.plugins)])],
        "tasks": [*tasks, *_settings(config.tasks.settings)],
        "ways": [forms["way"]] if "way" in forms else [],
        "shots": [forms["shot"]],
        "fields": fields,
        "model": model if any(path.startswith("model.") for path in changed) else [],
        "seed": [f"seed{config.seed}"],
    }


def _preset(preset: str | Preset) -> str:
    if isinstance(preset, str):
        return preset
    words = "-".join([preset.name, *_settings(preset.changes)])
    return words if _is_installed(preset) else words + _MORE


def _is_installed(preset: Preset) -> bool:
    """Whether it is the installed preset of its name, but for the settings that were changed."""
    if preset.name not in registry.names("preset"):
        return False

    def rest(one: Preset) -> dict[str, Any]:
        values: dict[str, Any] = one.model_dump(exclude={"changed"})
        for use, entry in zip(one.plugins, values["plugins"], strict=True):
            entry["settings"] = {
                field: value
                for field, value in use.settings.items()
                if f"{use.label}.{field}" not in preset.changed
            }
        return values

    return rest(preset) == rest(find_preset(preset.name))


def _plugin(use: PluginUse) -> str:
    words = "-".join([use.label, *_settings(use.settings)])
    return words + _MORE if use.is_file or use.label != label_of(use.plugin) else words


def _settings(settings: dict[str, Any]) -> Iterable[str]:
    return (_setting(field, value) for field, value in flatten(settings).items())


def _setting(field: str, value: Any) -> str:
    """Write gate0.3 for a number, and mode=colour, hidden=4,8 or on=true for all else."""
    if _is_number(value) and not field[-1:].isdigit():
        return f"{field}{value}"
    if not isinstance(value, list):
        return f"{field}={_value(value)}"
    words = ",".join(map(_value, value))
    # A list of one reads as a value that is none, unless that would be written as a number is.
    several = len(value) > 1 or (value and _is_number(value[0]) and not field[-1:].isdigit())
    return f"{field}={words}" if several else f"{field}={words}{_MORE}"


def _value(value: Any) -> str:
    if isinstance(value, str):
        place = PurePath(value).name
        plain = place == value and re.fullmatch(r"[a-z][a-z0-9_.+-]*", value)
        return place if plain and value not in ("true", "false", "null") else place + _MORE
    return json.dumps(value, default=str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _clean(word: str) -> str:
    return re.sub(r"[^\w.+=,-]+", "-", word.replace(_MORE, ""), flags=re.ASCII).strip("-")
