"""The README and the test of a package that is made of a plugin's file."""

from __future__ import annotations

from metaplug.contract.example_settings import example_settings
from metaplug.contract.naming import camel
from metaplug.contract.plugin_files import load, source_of
from metaplug.errors import RequestError
from metaplug.report.catalogue import Entry, file_entry
from metaplug.templates import FilePlugin


def file_plugin(path: str, name: str) -> FilePlugin:
    """Make what a package called `name` has of the plugin in a file, which is run.

    Raises:
        RequestError: the file holds no plugin, or is not in UTF-8; see `plugin_files.load`.
        RunError: it fails when it is run.
    """
    entry, plugin = file_entry(path), load(path)
    if entry.error is not None:
        raise RequestError(entry.error)
    try:
        source = source_of(path)[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the plugin file {path} is not in UTF-8: save it so") from error
    own = None if hasattr(plugin, "written_as") else plugin.__name__
    settings = example_settings(plugin.Config)
    module = name.replace("-", "_")
    return FilePlugin(source, own, _readme(name, entry), _test(module, own, name, settings))


def _readme(name: str, entry: Entry) -> str:
    """Begin with the docstring and the settings; the common part follows."""
    cells = [
        (f"`{each.name}`", each.bounds or each.type, each.default, each.description)
        for each in entry.fields
    ]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rows = [f"| {' | '.join(row)} |" for row in escaped]
    head = ["| setting | bounds | default | what it is |", "|---|---|---|---|"]
    table = "\n".join([*head, *rows]) if rows else ""
    use = (
        f"## Use\n\n```sh\npip install metaplug-{name}\nmetaplug plugins {name}\n"
        f"metaplug train --preset maml --with {name}\n```"
    )
    parts = [f"# {name}", "A plugin for metaplug.", entry.documentation, table, use]
    return "\n\n".join(filter(None, parts)) + "\n"


def _test(module: str, own: str | None, name: str, settings: dict[str, object]) -> str:
    found = f"from {module} import {own}" if own else f"import {module}"
    given = f"    settings = {settings!r}\n" if settings else ""
    return (
        '"""What every plugin promises."""\n\n'
        f"from metaplug.testing import PluginConformance\n\n{found}\n\n\n"
        f"class Test{own or camel(name)}(PluginConformance):\n"
        f"    plugin = {own or module}\n{given}"
    )
