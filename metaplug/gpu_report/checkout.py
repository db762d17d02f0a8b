"""The checkout that this package lies in, made importable as an installation would make it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import metaplug


def find_checkout() -> Path | None:
    """Return the root of the checkout; None where metaplug is installed without it."""
    root = Path(metaplug.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "plugins").is_dir() else None


def write_metadata(root: Path, folder: Path) -> None:
    """Write what lets Python find the checkout's own parts, into a folder for its search path.

    Plugins are found by entry point, which only an installation has, and `plugins/` is imported as
    `metaplug_plugins`. Both stand in pyproject.toml. First on the path, they also come before
    another metaplug that is installed.
    """
    told = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    project = told["project"]
    info = folder / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    head = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    needs = [f"Requires-Dist: {need}" for need in project["dependencies"]]
    (info / "METADATA").write_text("\n".join([*head, *needs, ""]), encoding="utf-8")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()), ""])
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    for name, place in told["tool"]["setuptools"]["package-dir"].items():
        package = folder / name
        package.mkdir()
        text = f"__path__ = [{str(root / place)!r}]\n"
        (package / "__init__.py").write_text(text, encoding="utf-8")
