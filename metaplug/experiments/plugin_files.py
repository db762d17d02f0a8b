"""The plugin files that a configuration names: recorded by their digests, and let run by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaplug.contract.plugin_files import changed, is_file, keep_name, name_in, source_of
from metaplug.contract.presets import PluginUse, Preset
from metaplug.errors import MetaplugError, RequestError, names_code, one_line
from metaplug.experiments.configuration import ExperimentConfig, flatten


def file_uses(config: ExperimentConfig) -> list[PluginUse]:
    """The preset's and the own plugins that are files, in the order of application."""
    preset = config.preset.plugins if isinstance(config.preset, Preset) else ()
    return [use for use in (*preset, *config.plugins) if use.is_file]


def recorded(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration with the digest of every plugin file; runs none.

    Raises:
        RequestError: a file is missing, or is not the one whose digest the configuration has.
    """

    def with_digest(use: PluginUse) -> PluginUse:
        _, digest = source_of(use.plugin, use.sha256)
        return use.model_copy(update={"sha256": digest})

    return _with_files(config, with_digest)


def unrecorded(config: ExperimentConfig) -> ExperimentConfig:
    """The configuration without the digests of plugin files."""
    return _with_files(config, lambda use: use.model_copy(update={"sha256": None}))


def keep_names(config: ExperimentConfig) -> None:
    """Run the files of a run's configuration even if plugins of their names are installed by now.

    Args:
        config: with the digests that the run's record has.
    """
    for use in file_uses(config):
        keep_name(str(use.sha256))


def permitted(config: ExperimentConfig, given: Sequence[str], holder: object) -> ExperimentConfig:
    """A run's configuration with the plugin files that a caller names, wherever they lie now.

    One with the digest of the record is run even if a plugin of its name is installed by now.

    Args:
        given: paths of files. A record names code, but only a caller lets it run.
        holder: the file or option that the configuration is from, for errors.

    Raises:
        RequestError: a file of the configuration is not given, or was changed; or one that is
            given is none of its.
    """
    if names := [text for text in given if not is_file(text)]:
        files = [use.plugin for use in file_uses(config)]
        instead = (
            f"give its file, --with {one_line(files[0])}, or the copy in the run's folder"
            if files
            else "leave it out, as the run finds installed plugins by itself"
        )
        raise RequestError(
            f"--with {names[0]}: it is no path of a plugin file, and only files of {holder} need "
            f"to be named: {instead}"
        )
    digests, taken = {path: source_of(path)[1] for path in given}, set[str]()

    def let_run(use: PluginUse) -> PluginUse:
        label = use.label
        for path, digest in digests.items():
            if digest == use.sha256 or (use.sha256 is None and name_in(path) == label):
                taken.add(path)
                if digest == use.sha256:
                    keep_name(digest)
                name = use.name if name_in(path) == name_in(use.plugin) else label
                return use.model_copy(update={"plugin": path, "name": name, "sha256": digest})
        for path, digest in digests.items():
            if name_in(path) == name_in(use.plugin):
                since = f"{holder} was trained with it"
                raise changed(path, str(use.sha256), digest, since, _copy_beside(holder, use))
        raise RequestError(names_code(holder, use.plugin, "plugin", "--with"))

    config = _with_files(config, let_run)
    if others := [path for path in given if path not in taken]:
        raise RequestError(
            f"{holder} has no plugin that is the file {others[0]}: leave out --with {others[0]}"
        )
    return config


def comparable(config: ExperimentConfig) -> dict[str, Any]:
    """What results depend on, flat: without loggers, and with plugin files told apart by digest.

    Where such a file lies is not part of it.
    """
    values = config.model_dump(mode="json", exclude={"loggers"})
    flat = {"preset": config.algorithm, **flatten(values)}
    for key in ("plugins", "preset.plugins"):
        entries = [*flat.get(key, ())]
        for place, entry in enumerate(entries):
            if is_file(entry["plugin"]):
                label = entry["name"] or name_in(entry["plugin"])
                flat[f"{key}.{label}.sha256"] = entry.get("sha256")
                entries[place] = {"plugin": f"{label}.py", "settings": entry["settings"]}
        if key in flat:
            flat[key] = entries
    return flat


def differing_file(
    field: str, one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, str] | None:
    """The plugin and both digests, in words, where `field` of `comparable` is one of a file."""
    _, plugins, rest = field.rpartition("plugins.")
    label, dot, last = rest.rpartition(".")
    if not (plugins and dot and last == "sha256"):
        return None
    then, now = (str(values.get(field))[:12] for values in (one, other))
    return label, f"sha256 {then}… then, {now}… now"


def copies(config: ExperimentConfig) -> dict[str, bytes]:
    """The plugin files that a run keeps beside its configuration, by the name of the copy.

    Raises:
        RequestError: one was changed a moment ago.
    """
    return {_copy_name(use): source_of(use.plugin, use.sha256)[0] for use in file_uses(config)}


def _copy_name(use: PluginUse) -> str:
    return f"{use.label.replace('-', '_')}.py"


def _copy_beside(holder: object, use: PluginUse) -> Path | None:
    """The copy of a plugin file that a run keeps beside a file of its own, if it is there."""
    copy = Path(str(holder)).parent / _copy_name(use)
    try:
        return copy if source_of(str(copy))[1] == use.sha256 else None
    except MetaplugError:
        return None


def _with_files(
    config: ExperimentConfig, change: Callable[[PluginUse], PluginUse]
) -> ExperimentConfig:
    """The configuration with every use of a plugin file changed."""

    def each(uses: Sequence[PluginUse]) -> tuple[PluginUse, ...]:
        return tuple(change(use) if use.is_file else use for use in uses)

    if not file_uses(config):
        return config
    preset = config.preset
    if isinstance(preset, Preset):
        preset = preset.model_copy(update={"plugins": each(preset.plugins)})
    return config.model_copy(update={"preset": preset, "plugins": each(config.plugins)})
