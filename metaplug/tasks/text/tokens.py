"""Texts as token ids, made once by a tokenizer of transformers and then kept in the cache."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metaplug.errors import RequestError, one_line, reason, said_by
from metaplug.tasks.cache import make_room, read_cached, write_cached
from metaplug.tasks.identities import digest
from metaplug.tasks.reading import cache_folder, read_regular

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files of which a folder needs one, to make a tokenizer of."""
FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""Files that decide what a tokenizer does."""
_MOST_BYTES = 2**28
"""Of such a file."""
_CACHE_BYTES = 2**32
"""Bound on the cached tokens of all data sets together."""
_CHUNK = 4096
"""Texts that are tokenised together."""
_FORMAT = "1"


class Tokens(NamedTuple):
    """The token ids of N texts.

    Attributes:
        ids: (tokens,) int32, text after text.
        lengths: (N,) int64, at least 1.
        cut: (N,) bool, whether a text was longer.
        pad: the id that fills a text up; the attention mask leaves it out.
        vocabulary: the number of ids that the tokenizer knows.
    """

    ids: NDArray[np.int32]
    lengths: NDArray[np.int64]
    cut: NDArray[np.bool_]
    pad: int
    vocabulary: int


def tokenize(texts: Sequence[str], tokenizer: str, max_length: int, *, download: bool) -> Tokens:
    """Return the tokens of texts, from the cache where it has them.

    Args:
        texts: none of them empty.
        tokenizer: a folder, or a name on the hub of Hugging Face.
        max_length: of a text in tokens, those that the tokenizer adds among them.
        download: whether a tokenizer that is not here may be fetched from the hub.

    Raises:
        RequestError: there is no such tokenizer, it does not load, it takes fewer than `max_length`
            tokens, a text has no token, or transformers is not installed.
    """
    folder = find_tokenizer(tokenizer, download=download)
    try:
        files = [
            digest(name, read_regular(folder / name, _MOST_BYTES))
            for name in FILES
            if (folder / name).is_file()
        ]
    except OSError as error:
        raise RequestError(
            f"the tokenizer in {folder} cannot be read: {reason(error)}; give one that you may read"
        ) from None
    key = digest(_FORMAT, _version(), str(max_length), digest(*files), digest(*texts))
    path = cache_folder() / "tokens" / f"{key}.bin"
    tokens = _read(path, len(texts), max_length)
    if tokens is None:
        tokens = _tokenized(texts, folder, max_length)
        _write(path, tokens)
    return tokens


def find_tokenizer(name: str, *, download: bool) -> Path:
    """Return the folder of a tokenizer.

    Raises:
        RequestError: there is none, or no vocabulary in it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
            raise RequestError(
                f"the tokenizer {one_line(name)}: there is no such folder; give one that has a "
                "tokenizer.json, such as the model's, or its name on the hub of Hugging Face"
            )
        folder = _fetched(name, download=download)
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise RequestError(
            f"the tokenizer folder {folder} has no tokenizer.json, nor a vocabulary of another "
            "name: put the tokenizer's files there, by its save_pretrained"
        )
    return folder


def _fetched(name: str, *, download: bool) -> Path:
    hub = _package("huggingface_hub")
    try:
        found = hub.snapshot_download(
            name, allow_patterns=list(FILES), local_files_only=not download
        )
    except Exception as error:
        if not download:
            raise RequestError(
                f"the tokenizer '{name}' is no folder here, and not in the cache of Hugging Face "
                f"({hub.constants.HF_HUB_CACHE}): put its tokenizer.json and tokenizer_config.json "
                "in a folder and name that, or set download: true"
            ) from None
        raise RequestError(
            f"the tokenizer '{name}' cannot be fetched from the hub ({said_by(error)}): put its "
            "tokenizer.json and tokenizer_config.json in a folder and name that"
        ) from None
    return Path(found)


def _tokenized(texts: Sequence[str], folder: Path, max_length: int) -> Tokens:
    transformers = _package("transformers")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise RequestError(
            f"the tokenizer in {folder} does not load ({said_by(error)}): give the folder of one "
            "that transformers knows"
        ) from error
    if max_length > tokenizer.model_max_length:
        raise RequestError(
            f"max_length = {max_length}, but the tokenizer in {folder} is for at most "
            f"{tokenizer.model_max_length} tokens: lower max_length"
        )
    plain = {
        "padding": False,
        "return_attention_mask": False,
        "return_token_type_ids": False,
        "verbose": False,
    }
    ids, lengths = array("i"), np.empty(len(texts), np.int64)
    cut = np.zeros(len(texts), np.bool_)
    for begin in range(0, len(texts), _CHUNK):
        chunk = list(texts[begin : begin + _CHUNK])
        for place, row in enumerate(tokenizer(chunk, **plain)["input_ids"], begin):
            # Cut by the tokenizer, since its closing token must stay.
            cut[place] = len(row) > max_length
            own = (
                tokenizer(texts[place], truncation=True, max_length=max_length, **plain)
                if cut[place]
                else {"input_ids": row}
            )["input_ids"]
            if not own:
                raise RequestError(
                    f"the text '{one_line(texts[place], 80)}' has no token of the tokenizer in "
                    f"{folder}: leave its row out"
                )
            ids.extend(own)
            lengths[place] = len(own)
    pads = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad = next(each for each in pads if each is not None)
    return Tokens(np.frombuffer(ids, np.int32), lengths, cut, int(pad), len(tokenizer))


def _read(path: Path, count: int, max_length: int) -> Tokens | None:
    content = read_cached(path, 1024 + count * (5 + 4 * max_length), "tokens")
    if content is None:
        return None
    # The checksum of the file says that `_write` made it, of so many texts.
    head, _, rest = content.partition(b"\n")
    given = json.loads(head)
    lengths = np.frombuffer(rest, np.int32, count).astype(np.int64)
    cut = np.frombuffer(rest, np.bool_, count, offset=4 * count)
    ids = np.frombuffer(rest, np.int32, int(lengths.sum()), offset=5 * count)
    return Tokens(ids, lengths, cut, given["pad"], given["vocabulary"])


def _write(path: Path, tokens: Tokens) -> None:
    """Put the tokens in the cache: a line of JSON, then lengths, cuts and ids."""
    head = json.dumps({"pad": tokens.pad, "vocabulary": tokens.vocabulary}).encode() + b"\n"
    parts = (
        head,
        tokens.lengths.astype(np.int32).tobytes(),
        tokens.cut.tobytes(),
        tokens.ids.tobytes(),
    )
    make_room(path.parent, sum(map(len, parts)), _CACHE_BYTES)
    write_cached(path, *parts, noun="tokens")


def _version() -> str:
    """The version of transformers, since another one may tokenise otherwise."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise RequestError(
            f"the task source 'text' needs {name}: pip install 'metaplug[text]'"
        ) from None
