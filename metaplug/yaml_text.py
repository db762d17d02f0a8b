"""Configurations as YAML: plain values under names, of bounded size, whoever wrote them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from metaplug.errors import RequestError, one_line

MOST_BYTES = 256 * 1024
"""Of a YAML text; PyYAML takes about ten seconds for a megabyte."""
_MOST_NODES, _MOST_DEPTH, _MOST_BITS = 100_000, 50, 64
"""Of the values in a text, each alias counted as what it stands for; of nesting; of integers."""
_TAG = "tag:yaml.org,2002:"
_PLAIN = {"null", "bool", "int", "float", "str", "seq", "map", "merge"}
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
POWER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""A number that YAML 1.1 takes for text, as it lacks a point or a sign: 1e-2, 1.5e3."""


def number_of(given: Any) -> Any:
    """A number where a text is one, such as 1e-2, which YAML 1.1 takes for text; in lists, too.

    >>> number_of(["1e-2", 1, "sgd"])
    [0.01, 1, 'sgd']
    """
    if isinstance(given, list | tuple):
        return [number_of(each) for each in given]
    return float(given) if isinstance(given, str) and POWER.match(given) else given


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file, or a pipe with one.

    Raises:
        RequestError: it cannot be read, or as `parse_yaml` raises.
    """
    try:
        with path.open("rb") as file:
            # One more than it may be, as a pipe has no size to ask for.
            text = file.read(MOST_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RequestError(f"cannot read {path}: {reason}; give a YAML file") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> dict[str, Any]:
    """The settings in a text of at most 256 KiB.

    Args:
        text: YAML of plain values under names.
        origin: of the text, for errors.

    Raises:
        RequestError: it is too large, is no YAML, names a key twice, holds something other than
            plain values, or is no mapping; the origin and line are named.
    """
    if len(text) > MOST_BYTES:
        raise RequestError(
            f"{origin} has more than {MOST_BYTES // 1024} KiB, and no configuration is so long: "
            "give a YAML file of settings"
        )
    try:
        values = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or error
        raise RequestError(
            f"{origin}{where} is not valid YAML: {one_line(problem)}; correct it there"
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RequestError(
            f"{origin} holds a {type(values).__name__}, not a mapping of settings: begin with a "
            "line such as 'preset: maml'"
        )
    return values


class StrictLoader(yaml.SafeLoader):
    """Safe YAML of plain values under names, of bounded size.

    Refuses a key that stands twice, of which PyYAML takes the last in silence; and 010 and 1:30,
    which YAML 1.1 reads in base 8 and 60.
    """

    _count = _depth = _deepest = 0

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._sizes: dict[int, tuple[int, int]] = {}
        """By identity of a node, how many nodes it stands for and how deep it nests."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, refused while it is read: aliases of aliases grow exponentially."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        alias = isinstance(event, yaml.AliasEvent)
        before, above = self._count, self._deepest
        self._depth += 1
        self._deepest = self._depth
        if self._depth > _MOST_DEPTH:
            raise _refusal(f"nested more than {_MOST_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        assert node is not None
        if alias and id(node) not in self._sizes:
            raise _refusal("an alias stands for something that it is itself a part of", event)
        count, height = self._sizes[id(node)] if alias else (1, 0)
        self._count += count
        self._deepest = max(self._deepest, self._depth + height)
        if self._count > _MOST_NODES or self._deepest > _MOST_DEPTH:
            raise _refusal(
                f"its aliases stand for more than {_MOST_NODES} values, or nest more than "
                f"{_MOST_DEPTH} deep",
                event,
            )
        kind = node.tag.removeprefix(_TAG)
        if kind not in _PLAIN:
            raise _refusal(
                f"'{_short(node)}' is read as a {kind[:40]}, which no setting is: put it in quotes "
                "to have text",
                event,
            )
        if base := _unusual_base(node):
            raise _refusal(
                f"'{_short(node)}' is read in base {base}: write the number in base 10, or put it "
                "in quotes to have text",
                event,
            )
        self._sizes[id(node)] = self._count - before, self._deepest - self._depth
        self._deepest = max(self._deepest, above)
        self._depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value; whatever PyYAML's own conversions raise becomes an error of YAML."""
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, LookupError, OverflowError):
            kind = node.tag.removeprefix(_TAG)
            raise _refusal(
                f"'{_short(node)}' cannot be read as {kind}; in quotes it is text", node
            ) from None
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise _refusal(
                f"'{_short(node)}' is a whole number of more than {_MOST_BITS} bits", node
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                raise _refusal(f"the key '{_short(key)}' is no text: put it in quotes", key)
            if key.value in seen:
                raise _refusal(f"the key '{_short(key)}' stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _refusal(problem: str, at: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def _unusual_base(node: yaml.Node) -> int | None:
    """The base of a number that its form does not show: 8 for 010, 60 for 1:30."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in (f"{_TAG}int", f"{_TAG}float"):
        return None
    if ":" in node.value:
        return 60
    is_octal = node.tag == f"{_TAG}int" and _OCTAL.fullmatch(node.value)
    return 8 if is_octal else None


def _short(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value[:40])
    return "[...]" if isinstance(node, yaml.SequenceNode) else "{...}"
