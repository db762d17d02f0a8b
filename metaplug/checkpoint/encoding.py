"""A state as tensors under names and JSON that refers to them, and back."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaplug.errors import one_line
from metaplug.execution.free_memory import size_text

MOST_HEADER = 16 * 2**20
"""The bytes that a file may have beside the values of its tensors."""
MOST_DEPTH = 50
"""How deep lists and mappings may nest in a state."""
DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
"""The dtypes that a file keeps."""


class UnfitError(Exception):
    """A value that no file keeps, or bytes that are no file; the text goes on from "it"."""


def split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """Separate a state into its tensors and JSON that refers to them; `joined` is the inverse.

    Args:
        state: plain values and tensors, in lists, tuples and mappings that nest at most MOST_DEPTH
            deep.

    Returns:
        The tensors by name, on the CPU, contiguous, each with bytes of its own, complex ones as
        pairs of real numbers; and the text.

    Raises:
        UnfitError: the state holds something else, or takes more than MOST_HEADER bytes beside the
            values of its tensors.
    """
    prefixes = {"plugin_states": "plugins", "optimizer": "meta_optimizer"}
    tensors: dict[str, Tensor] = {}
    values = {key: _value(state[key], prefixes.get(key, key), tensors) for key in state}
    text, storages = json.dumps(values), set[int]()
    for name, tensor in tensors.items():  # of tied ones, safetensors wants each with its own bytes
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    if len(json.dumps([text, *tensors])) + 150 * len(tensors) + 200 > MOST_HEADER:
        most = max(values, key=lambda key: len(json.dumps(values[key])))
        size = f"{size_text(MOST_HEADER)} beside its tensors' values"
        raise UnfitError(f"it has more than {size}, most of it in {most}")
    return tensors, text


def _value(part: Any, name: str, tensors: dict[str, Tensor], depth: int = 1) -> Any:
    """A part as JSON; objects with keys such as "$tuple" stand for what JSON does not have."""
    kind = type(part)
    if part is None or kind in (bool, str) or (kind is int and part.bit_length() < 10_000):
        return part
    if kind is float:
        return part if math.isfinite(part) else {"$float": repr(part)}
    if isinstance(part, Tensor):
        return _tensor(part, name, tensors)
    if depth > MOST_DEPTH:
        raise UnfitError(f"{one_line(name)} nests more than {MOST_DEPTH} deep")
    if kind in (list, tuple):
        items = [_value(one, f"{name}.{i}", tensors, depth + 1) for i, one in enumerate(part)]
        return items if kind is list else {"$tuple": items}
    if kind in (dict, OrderedDict) and {*map(type, part)} <= {str, int}:
        pairs = [
            [key, _value(one, f"{name}.{key}", tensors, depth + 1)] for key, one in part.items()
        ]
        is_plain = all(type(key) is str and key[:1] != "$" for key in part)
        values = dict(pairs) if is_plain else {"$items": pairs}
        if kind is dict:
            return values
        versions = vars(part).get("_metadata")  # of a module's state: those of its submodules
        return {"$ordered": values, "versions": _value(versions, name, tensors, depth + 1)}
    keys = " with a key that is no text" * isinstance(part, dict)
    raise UnfitError(f"{one_line(name)} is a {kind.__name__}{keys}, which no checkpoint keeps")


def _tensor(part: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Add a tensor to `tensors`, and refer to it by the name that it has there."""
    plain = part.detach()
    is_plain = type(plain) is Tensor and not (part.is_meta or part.is_nested)
    if part.dtype not in DTYPES or part.layout is not torch.strided or not is_plain:
        kind = f"{type(plain).__name__} of {part.dtype}, {part.layout}, on {part.device}"
        raise UnfitError(f"{one_line(name)} is a {kind}, which no checkpoint keeps")
    plain = plain.resolve_conj().resolve_neg().cpu()
    name = str(name).encode(errors="replace").decode()
    while name in tensors:  # "a.b" and "c" beside "a" and "b.c"
        name += "'"
    tensors[name] = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()
    return {"$complex" if plain.is_complex() else "$tensor": name}


def joined(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Make a state, or a part of it, of what `split` made.

    Args:
        value: the parsed JSON.
        tensors: those that it refers to, by name. Those that are used are taken out.

    Raises:
        UnfitError: a tensor of truth values has bytes other than 0 and 1.
        Exception: of any kind, where forged JSON has another form.
    """
    match value:
        case list():
            return [joined(one, tensors) for one in value]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(joined(items, tensors))
        case {"$items": items}:
            return {key: joined(one, tensors) for key, one in items}
        case {"$ordered": items, "versions": versions}:
            made = OrderedDict(joined(items, tensors))
            vars(made).update(_metadata=joined(versions, tensors))
            return made
        case {"$complex": name}:
            return torch.view_as_complex(tensors.pop(name))
        case {"$tensor": name}:
            tensor = tensors.pop(name)
            if tensor.dtype is torch.bool and (tensor.view(torch.uint8) > 1).any():
                raise UnfitError("a truth value is neither 0 nor 1")
            return tensor
        case dict():
            return {key: joined(one, tensors) for key, one in value.items()}
    return value
