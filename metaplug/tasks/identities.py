"""What streams draw from, by name and digest, so that nobody takes classes that were trained on for unseen ones."""

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
"""Of the classes in a state, those whose names are kept; of such a name; and those that are known at all, of 16 bytes each."""


def digest(*parts: str | bytes) -> str:
    """A text that stands for these parts and no others: 32 hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        hashed.update(len(content).to_bytes(8, "little"))
        hashed.update(content)
    return hashed.hexdigest()


def identities_of(stream: TaskStream) -> Mapping[str, str] | None:
    """By name of a class, the digest of its data; None for a stream that does not say.

    A stream says it by an attribute `identities`, of this form. What no classes have may name one identity for all of its tasks. A digest
    may be any text; those that `digest` did not make are themselves digested.

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
            f"the identities of {type(stream).__name__} are no mapping from names to digests, both of them text: "
            "give {name: metaplug.tasks.identities.digest(data)}, or None where it is not known"
        )
    return {name: _standard(text) for name, text in given.items()}


def _standard(text: str) -> str:
    return text if len(text) == 32 and _HEXADECIMAL.issuperset(text) else digest(text)


_HEXADECIMAL = frozenset("0123456789abcdef")


def identity_of_stream(source: str, settings: str, split: str, seed: int) -> dict[str, str]:
    """The one identity of tasks that are computed, and have no classes: everything that decides what they are."""
    return {f"{source}, split {split}, seed {seed}": digest(source, settings, split, str(seed))}


@dataclass(frozen=True)
class TrainedOn:
    """What a learner was trained on.

    Attributes:
        classes: by digest, the name of every class that is known of.
        complete: False where there were others, in streams that do not say.
    """

    classes: Mapping[str, str] = field(default_factory=dict)
    complete: bool = True

    def and_by(self, stream: TaskStream) -> TrainedOn:
        """What it was trained on when it has trained on this stream too."""
        given = identities_of(stream)
        if given is None:
            return TrainedOn(self.classes, complete=False)
        return TrainedOn(
            {digest: name for name, digest in given.items()} | dict(self.classes), self.complete
        )

    def shared(self, stream: TaskStream) -> int | None:
        """How many classes of the stream are among these; None where that is not known."""
        given = identities_of(stream)
        if given is None:
            return None
        return sum(digest in self.classes for digest in given.values()) or (
            0 if self.complete else None
        )

    def refuse(self, stream: TaskStream, noun: str, mend: str) -> None:
        """Refuse a stream that shares a class with these.

        Args:
            noun: what its classes are called, several of them.
            mend: what to do instead.
        """
        if not self.shared(stream):
            return
        given = identities_of(stream) or {}
        seen = [name for name, digest in given.items() if digest in self.classes]
        raise RequestError(
            f"the {stream.split} tasks draw on {len(seen)} of {len(given)} {noun} that this learner is trained on, the first being "
            f"'{seen[0]}', so that nothing would be measured on unseen ones: {mend}"
        )

    def to_state(self) -> dict[str, Any]:
        """As plain values and a tensor, of which a checkpoint takes any number of classes.

        Returns:
            classes: by digest, the names of the first MOST_NAMED, cut to MOST_LETTERS.
            others: the digests of further ones, up to MOST_KNOWN in all, uint8 (n, 16); not there where there are none.
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
        """What `to_state` gave; of a state that says nothing, what is not known. Those without names have their digests as such."""
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
