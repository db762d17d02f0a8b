"""Every Python block of the README and of the documentation runs, page by page, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metaplug import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_run(page: Path) -> None:
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), namespace)


def test_every_page_is_in_the_site_and_every_link_is_a_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f": {page.relative_to(DOCS).as_posix()}\n" in navigation
    for target in re.findall(r"\]\((docs/[^)#]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", registry.names("plugin"))
def test_every_installed_plugin_has_a_page_that_the_code_fills_in(name: str) -> None:
    assert f"<!-- plugin {name} -->" in (DOCS / "plugins" / f"{name}.md").read_text(encoding="utf-8")
