"""Configurations as YAML: plain values under names, of bounded size, whoever wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from metaplug.errors import RequestError, one_line


def read_yaml(path: Path) -> dict[str, Any]:
    """A configuration file, or a pipe with one: plain values under names, at most 256 KiB.

    Raises:
        RequestError: it cannot be read, is too large, is no YAML, names a key twice, holds something other than plain values, or is no
            mapping; the file and line are named.
    """
    try:
        with path.open("rb") as file:
            text = file.read(
                MOST_BYTES + 1
            ).decode()  # one more than it may be, as a pipe has no size to ask for
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RequestError(f"cannot read {path}: {reason}; give a YAML file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """The settings in a text, which `origin` names in errors; raises as `read_yaml`."""
    if len(text) > MOST_BYTES:
        raise RequestError(
            f"{origin} has more than {MOST_BYTES // 1024} KiB, and no configuration is so long: give a YAML file of settings"
        )
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(
            f"{origin}{where} is not valid YAML: {one_line(error.problem or error.context)}; correct it there"
        ) from None
    except yaml.YAMLError as error:
        raise RequestError(
            f"{origin} is not valid YAML: {one_line(error)}; correct it there"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(
            f"{origin} holds a {type(values).__name__}, not a mapping of settings: begin with a line such as 'preset: maml'"
        )
    return values


MOST_BYTES = 256 * 1024
"""Of a YAML text; PyYAML takes about ten seconds for a megabyte."""
_MOST_NODES, _MOST_DEPTH, _MOST_BITS = 100_000, 50, 64
"""Of what a YAML text says, each alias counted as what it stands for; of lists in lists; of a whole number."""
_PLAIN = {
    f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")
}
_MERGE = "tag:yaml.org,2002:merge"


class StrictLoader(yaml.SafeLoader):
    """Safe YAML of plain values under names, of bounded size. Refuses a key that stands twice, of which PyYAML silently takes the last."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A part of the text, refused before it nests too deeply to be walked."""
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise _refusal(f"nested more than {_MOST_DEPTH} deep", self.peek_event())  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The whole text, measured before anything is made of it: aliases of aliases grow exponentially."""
        node = super().get_single_node()
        if node is not None:
            _measured(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value, with what PyYAML's own conversions meet as an error of YAML."""
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, OverflowError):
            raise _refusal(
                f"'{_short(node)}' cannot be read as {node.tag.rpartition(':')[2]}; in quotes it is text",
                node,
            ) from None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _refusal(
                f"'{_short(node)}' is a whole number of more than {_MOST_BITS} bits", node
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == _MERGE:
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise _refusal(f"the key '{_short(key)}' is no text: put it in quotes", key)
            if key.value in seen:
                raise _refusal(f"the key '{_short(key)}' stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _measured(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many nodes stand at and below `node`, and how deep; `known` by identity, None while one is being measured."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _refusal("an alias stands for something that it is itself a part of", node)
        return found
    if node.tag not in _PLAIN and node.tag != _MERGE:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")[:40]
        raise _refusal(
            f"'{_short(node)}' is read as a {kind}, which no setting is: put it in quotes to have text",
            node,
        )
    known[id(node)] = None
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = (
        [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
    )
    sizes = [_measured(part, known) for part in parts]
    size, depth = (
        1 + sum(size for size, _ in sizes),
        1 + max((depth for _, depth in sizes), default=0),
    )
    if size > _MOST_NODES or depth > _MOST_DEPTH:
        raise _refusal(
            f"its aliases stand for more than {_MOST_NODES} values, or nest more than {_MOST_DEPTH} deep",
            node,
        )
    known[id(node)] = size, depth
    return size, depth


def _refusal(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _short(node: yaml.Node) -> str:
    return (
        node.value[:40]
        if isinstance(node, yaml.ScalarNode)
        else "[...]"
        if isinstance(node, yaml.SequenceNode)
        else "{...}"
    )
