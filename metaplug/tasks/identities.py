"""The classes that streams draw from, by digest, so none that was trained on passes for unseen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from metaplug.errors import RequestError

if TYPE_CHECKING:  # which takes digests from here
    from metaplug.tasks.episodes import TaskStream

MOST_NAMED, MOST_LETTERS, MOST_KNOWN = 5_000, 200, 2**22
"""Bounds of a state: on classes with names, on a name's letters, on classes (16 bytes each)."""
_HEXADECIMAL = frozenset("0123456789abcdef")


def digest(*parts: str | bytes) -> str:
    """The 32 hexadecimal digits that stand for these parts and no others."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.hexdigest()


def identities_of(stream: TaskStream) -> Mapping[str, str] | None:
    """By name of a class, the digest of its data; None for a stream that does not say.

    A stream says it by an attribute `identities`, of this form. One without classes may name one
    identity for all of its tasks. A digest may be any text; a text that `digest` did not make is
    itself digested.

    Raises:
        RequestError: it is of another form.
    """
    given = getattr(stream, "identities", None)
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(
        isinstance(part, str) for pair in given.items() for part in pair
    ):
        raise RequestError(
            f"the identities of {type(stream).__name__} are no mapping from names to digests, both "
            "of them text: give {name: metaplug.tasks.identities.digest(data)}, or None where it "
            "is not known"
        )
    return {name: _standard(text) for name, text in given.items()}


def digest_of_stream(stream: TaskStream) -> str | None:
    """The digest of all classes of a stream, by the order of their names; None where not known.

    Raises:
        RequestError: as `identities_of`.
    """
    given = identities_of(stream)
    return None if given is None else digest(*(text for _, text in sorted(given.items())))


def _standard(text: str) -> str:
    return text if len(text) == 32 and _HEXADECIMAL.issuperset(text) else digest(text)


def identity_of_stream(source: str, settings: str, split: str, seed: int) -> dict[str, str]:
    """The one identity of tasks that are computed: all that decides what they are."""
    return {f"{source}, split {split}, seed {seed}": digest(source, settings, split, str(seed))}


@dataclass(frozen=True)
class TrainedOn:
    """The classes that a learner was trained on.

    Attributes:
        classes: by digest, the name of every class that is known of.
        complete: False where there were others, in streams that do not say.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True

    def and_by(self, stream: TaskStream) -> TrainedOn:
        """These classes and the stream's."""
        given = identities_of(stream)
        if given is None:
            return TrainedOn(self.classes, complete=False)
        new = {digest: name for name, digest in given.items()}
        return TrainedOn(new | dict(self.classes), self.complete)

    def shared(self, stream: TaskStream) -> int | None:
        """The number of the stream's classes among these; None where that is not known."""
        given = identities_of(stream)
        if given is None:
            return None
        seen = sum(digest in self.classes for digest in given.values())
        return seen if seen or self.complete else None

    def refuse(self, stream: TaskStream, noun: str, instead: str) -> None:
        """Refuse a stream that shares a class with these.

        Args:
            noun: what its classes are called, in the plural.
            instead: what to do instead.

        Raises:
            RequestError: a class is shared; the first one is named.
        """
        if not self.shared(stream):
            return
        given = identities_of(stream) or {}
        seen = [name for name, digest in given.items() if digest in self.classes]
        raise RequestError(
            f"the {stream.split} tasks draw on {len(seen)} of {len(given)} {noun} that this "
            f"learner is trained on, the first being '{seen[0]}', so that nothing would be "
            f"measured on unseen ones: {instead}"
        )

    def to_state(self) -> dict[str, Any]:
        """These classes as plain values and a tensor, for a checkpoint.

        Returns:
            classes: by digest, the names of the first MOST_NAMED, cut to MOST_LETTERS.
            others: the digests of further ones, up to MOST_KNOWN in all, uint8 (n, 16); left out
                where there are none.
            complete: False also where there were more than MOST_KNOWN.
        """
        named = {text: _cut(name) for text, name in islice(self.classes.items(), MOST_NAMED)}
        state = {"classes": named, "complete": self.complete and len(self.classes) <= MOST_KNOWN}
        if len(self.classes) > MOST_NAMED:
            others = bytearray.fromhex("".join(islice(self.classes, MOST_NAMED, MOST_KNOWN)))
            state["others"] = torch.from_numpy(np.frombuffer(others, np.uint8).reshape(-1, 16))
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> TrainedOn:
        """The classes of a state; a state of None knows nothing. A digest names the unnamed."""
        if state is None:
            return cls(complete=False)
        others = state.get("others")
        text = "" if others is None else others[:MOST_KNOWN].numpy().tobytes().hex()
        unnamed = (text[start : start + 32] for start in range(0, len(text), 32))
        return cls(
            {_standard(text): name for text, name in state["classes"].items()}
            | {text: text for text in unnamed},
            state["complete"],
        )


def _cut(name: str) -> str:
    """A name that can stand in a file, whatever letters a stream of somebody else's has in it."""
    return name[:MOST_LETTERS].encode(errors="replace").decode()
