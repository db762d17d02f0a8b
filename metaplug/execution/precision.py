"""The precision of a step: float32, or products in TF32 or bfloat16; it ends with the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from metaplug.core.function_mode import FunctionMode
from metaplug.errors import RequestError, unknown

Precision = Literal["float32", "tf32", "bfloat16"]
T = TypeVar("T")


def check_precision(precision: Precision, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what the model's dtype or device cannot have.

    Raises:
        RequestError: an unknown name; anything but "float32" for a model in another dtype; TF32 on
            a CPU; bfloat16 where a device lacks it.
    """
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    if precision != "float32" and dtype != torch.float32:
        own = str(dtype).removeprefix("torch.")
        raise RequestError(
            f"precision '{precision}' is for models in float32, but this one is in {own}: "
            "leave precision out, or call model.float()"
        )
    if precision == "tf32" and device.type != "cuda":
        raise RequestError(
            f"precision 'tf32' is for CUDA devices, but the model is on {device.type}: "
            "leave precision out, or use bfloat16"
        )
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RequestError(
            "precision 'bfloat16' cannot be had, as this CUDA device does not support it: use "
            "float32 or tf32"
        )


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA in TF32 where `precision` says so.

    torch's own default is mixed: TF32 in convolutions, float32 in matrix products. Its settings
    are the whole process's; after this they read as before.
    """
    if device.type != "cuda":
        yield
        return
    # Two interfaces to the same settings, which torch refuses to read where they disagree. The old
    # one sets both, so it is used inside; what it cannot express is put back by the new one, which
    # torch has since 2.9.
    backends: Any = torch.backends
    matmul, cudnn, onednn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    finer: list[tuple[Any, Any]] = []
    if hasattr(cudnn, "conv"):
        finer = [(cudnn.conv, cudnn), (cudnn.rnn, cudnn), (matmul, cudnn), (onednn.matmul, onednn)]
    values = [setting.fp32_precision for setting, _ in finer]
    products = _readable(torch.get_float32_matmul_precision)
    matrices = _readable(lambda: matmul.allow_tf32)
    convolutions = _readable(lambda: cudnn.allow_tf32)
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        cudnn.allow_tf32 = precision == "tf32"
        # Where the old interface says no, a wider setting of the new one would count.
        for setting, _ in finer[:2]:
            setting.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        if matrices is not None:
            matmul.allow_tf32 = matrices
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            cudnn.allow_tf32 = convolutions
        for (setting, above), value in zip(finer, values, strict=True):
            # "none" lets the setting above count.
            setting.fp32_precision = "none" if value == above.fp32_precision else value


def _readable(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except RuntimeError:  # the caller has set what the old interface cannot express
        return None


@contextmanager
def forward(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a model under "bfloat16" with its products in bfloat16, its normalisations in float32."""
    if precision != "bfloat16":
        yield
        return
    # A cast that autocast keeps for later would carry the graph of one inner step into the next.
    with torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False), _Layers():
        yield


class _Layers(FunctionMode):
    """Casts for layers that vmap takes apart before autocast sees them.

    So stacked tasks round as single ones do. Normalisations are in float32 on every device, as not
    all devices take their weights and their input in two dtypes.
    """

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if dtype := _DTYPES.get(func):
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
        return func(*args, **kwargs)


_CONVOLUTIONS: list[Any] = [F.conv1d, F.conv2d, F.conv3d]
_CONVOLUTIONS += [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d]
_NORMALISATIONS: list[Any] = [F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm]
_DTYPES: dict[Any, torch.dtype] = {
    **dict.fromkeys(_CONVOLUTIONS, torch.bfloat16),
    **dict.fromkeys(_NORMALISATIONS, torch.float32),
}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
