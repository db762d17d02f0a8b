"""Mends for torchmeta 1.8.0, which was written for torch 1.9: with them it runs on today's torch and torchvision.

Call `apply()`, then `import torchmeta`. Each mend looks for its symptom first, so that a torchmeta without it stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from metaplug.errors import RequestError

_NEEDS = ("torchvision", "h5py", "ordered_set", "requests", "tqdm")


def apply() -> ModuleType:
    """Mend what needs it; further calls change nothing.

    Returns:
        The package torchmeta, ready for use.

    Raises:
        RequestError: torchmeta, or a package that it needs, is missing or does not import; what installs it is said.
    """
    for name in _NEEDS:
        _imported(name)
    mend_names()
    torchmeta = _imported("torchmeta")
    mend_integrity()
    mend_drive()
    mend_subsets()
    mend_pickles()
    return torchmeta


def mend_names() -> None:
    """ImportError at `import torchmeta`: torchvision lost two helpers that its own download, which `mend_drive` replaces, was made of."""
    utils = import_module("torchvision.datasets.utils")
    for name in ("_get_confirm_token", "_save_response_content"):
        if name not in vars(utils):
            setattr(utils, name, None)


def mend_integrity() -> None:
    """NameError where an archive was put in its place by hand: torchmeta.datasets.utils calls `check_integrity` without importing it."""
    utils = import_module("torchmeta.datasets.utils")
    if "check_integrity" not in vars(utils):
        utils.check_integrity = import_module("torchvision.datasets.utils").check_integrity  # type: ignore[attr-defined]


def mend_drive() -> None:
    """Downloads from Google Drive that save its warning page in place of the data: torchvision's own download knows it. It needs gdown."""
    name = "download_file_from_google_drive"
    old = getattr(import_module("torchmeta.datasets.utils"), name)
    if old.__module__ == "torchmeta.datasets.utils":
        new = getattr(import_module("torchvision.datasets.utils"), name)
        for module in [
            module for path, module in sys.modules.items() if path.startswith("torchmeta.datasets.")
        ]:
            if vars(module).get(name) is old:
                setattr(module, name, new)


def mend_subsets() -> None:
    """NotImplementedError in every ClassSplitter: torch wants `__getitems__` of a Subset that has its own `__getitem__`."""
    subset = import_module("torchmeta.utils.data.task").SubsetTask
    if "__getitems__" not in vars(subset):
        subset.__getitems__ = lambda self, indices: [self[index] for index in indices]


def mend_pickles() -> None:
    """The ImportError of `mend_names` in DataLoader workers that start by spawn or forkserver: there unpickling imports torchmeta first.

    What torchmeta's own classes pickle therefore begins with the mends.
    """
    data = import_module("torchmeta.utils.data")
    for owner in (
        data.MetaDataset,
        data.ClassDataset,
        data.Dataset,
        data.dataloader.BatchMetaCollate,
    ):
        if "__reduce_ex__" not in vars(owner):
            owner.__reduce_ex__ = _reduce


class _Mends:
    """Unpickles to None, once `apply()` has been called."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _mend, ()


def _mend() -> None:
    apply()


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    reduced: Any = object.__reduce_ex__(self, protocol)
    function, arguments, *rest = reduced
    # The class stands in the arguments: it is imported behind the mends, which unpickle first.
    return _rebuild, (_Mends(), function, *arguments), *rest


def _rebuild(_: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except (
        ImportError,
        RuntimeError,
    ) as error:  # RuntimeError: a torchvision that was built for another torch
        reason = " ".join(str(error).split())
        raise RequestError(
            f"torchmeta's tasks need the package {name}, which does not import ({reason}): run make setup, or by hand "
            f"pip install 'metaplug[torchmeta]' and pip install --no-deps torchmeta==1.8.0"
        ) from None
