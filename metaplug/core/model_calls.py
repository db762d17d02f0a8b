"""How a model is called on inputs of any form, and which part of its answer is the prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from metaplug.contract.inputs import Inputs
from metaplug.errors import RequestError, quoted

Output: TypeAlias = str | int | None
"""The part of a model's answer that is its prediction: an attribute or key by name, or a place.
None takes a tensor as it is, and `logits` of an object that has them, as Hugging Face's do."""

MaskForm: TypeAlias = Literal["keys", "causal"]
"""What each token may attend to: all tokens that count, or those up to itself."""


def arguments(x: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments of a model: a mapping is given by name."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x if isinstance(x, tuple) else (x,)), {}


def call_model(model: nn.Module, x: Inputs, output: Output) -> Any:
    """Return the prediction of a model for its inputs, of its own weights.

    >>> call_model(nn.Identity(), torch.ones(2), None)
    tensor([1., 1.])
    """
    positional, named = arguments(x)
    return prediction_of(model(*positional, **named), output)


def prediction_of(answer: Any, output: Output) -> Any:
    """Return the part of a model's answer that is the prediction.

    Raises:
        RequestError: the answer has no such part, or several and none is named.
    """
    if output is None and isinstance(answer, Tensor):
        return answer
    parts = _parts(answer)
    if output is None:
        if "logits" in parts or not parts:
            return parts.get("logits", answer)  # no tensor: refused where its rows are looked at
        first = next(iter(parts))
        raise RequestError(
            f"the model answers with a {type(answer).__name__} of {quoted(map(str, parts))}, and "
            "which of them is the prediction nobody says: give output=, such as "
            f"output={first!r}"
        )
    # Named tuples and others have parts by attribute; of a tensor these are its own.
    by_name = isinstance(output, str) and not isinstance(answer, Tensor | Mapping)
    found = getattr(answer, str(output), None) if by_name else parts.get(output)
    if isinstance(found, Tensor):
        return found
    known = quoted(map(str, parts)) if parts else "no named or numbered tensors"
    raise RequestError(
        f"output={output!r} asks for a part of the model's answer, a {type(answer).__name__} with "
        f"{known}: name a part that is a tensor"
    )


def _parts(answer: Any) -> dict[Any, Tensor]:
    """The tensors in an answer, by key, place or attribute."""
    if isinstance(answer, Tensor):
        return {}
    found: Any = answer if isinstance(answer, Mapping) else getattr(answer, "__dict__", {})
    found = dict(enumerate(answer)) if isinstance(answer, tuple | list) else found
    return {part: each for part, each in found.items() if isinstance(each, Tensor)}


def expand_mask(mask: Tensor, form: MaskForm, dtype: torch.dtype | None) -> Tensor:
    """Return what each token attends to, from which tokens count.

    Libraries make it in forward, and branch on the values on the way, which vmap refuses.

    Args:
        mask: (..., L), nonzero where a token counts.
        dtype: of a mask that is added to scores, 0 or the lowest number; None for booleans.

    Returns:
        (..., 1, 1, L) for "keys", (..., 1, L, L) for "causal".
    """
    attended = mask.bool()[..., None, None, :]
    if form == "causal":
        attended = attended & attended.new_ones(mask.shape[-1], mask.shape[-1]).tril()
    if dtype is None:
        return attended
    added = torch.zeros(attended.shape, dtype=dtype, device=mask.device)
    return added.masked_fill(~attended, torch.finfo(dtype).min)
