"""Fixes for torchmeta 1.8.0, which was written for torch 1.9: it then runs on today's torch.

Call `apply()`, then `import torchmeta`. Each fix looks for its symptom first, so a torchmeta
without it stays as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from metaplug.errors import RequestError, one_line

_NEEDS = ("torchvision", "h5py", "ordered_set", "requests", "tqdm")


def apply() -> ModuleType:
    """Fix what needs it; further calls change nothing.

    Returns:
        The package torchmeta, ready for use.

    Raises:
        RequestError: torchmeta, or a package that it needs, is missing or does not import.
    """
    for name in _NEEDS:
        _imported(name)
    fix_names()
    torchmeta = _imported("torchmeta")
    fix_integrity()
    fix_drive()
    fix_subsets()
    fix_pickles()
    return torchmeta


def fix_names() -> None:
    """Fix an ImportError at `import torchmeta`: torchvision lost two helpers of a download.

    They are never called, as `fix_drive` replaces that download.
    """
    utils = import_module("torchvision.datasets.utils")
    for name in ("_get_confirm_token", "_save_response_content"):
        if name not in vars(utils):
            setattr(utils, name, None)


def fix_integrity() -> None:
    """Fix a NameError where an archive was put in its place by hand: a missing import."""
    utils: Any = import_module("torchmeta.datasets.utils")
    if "check_integrity" not in vars(utils):
        utils.check_integrity = import_module("torchvision.datasets.utils").check_integrity


def fix_drive() -> None:
    """Fix downloads from Google Drive, which save its warning page in place of the data.

    torchvision's own download knows that page. It needs gdown.
    """
    name = "download_file_from_google_drive"
    old = getattr(import_module("torchmeta.datasets.utils"), name)
    if old.__module__ == "torchmeta.datasets.utils":
        new = getattr(import_module("torchvision.datasets.utils"), name)
        for path, module in list(sys.modules.items()):
            if path.startswith("torchmeta.datasets.") and vars(module).get(name) is old:
                setattr(module, name, new)


def fix_subsets() -> None:
    """Fix a NotImplementedError in every ClassSplitter: torch asks a Subset for `__getitems__`."""
    subset = import_module("torchmeta.utils.data.task").SubsetTask
    if "__getitems__" not in vars(subset):
        subset.__getitems__ = lambda self, indices: [self[index] for index in indices]


def fix_pickles() -> None:
    """Fix the ImportError of `fix_names` in DataLoader workers that start by spawn.

    There unpickling imports torchmeta first, so the pickles of its classes begin with the fixes.
    """
    data = import_module("torchmeta.utils.data")
    collate = data.dataloader.BatchMetaCollate
    for owner in (data.MetaDataset, data.ClassDataset, data.Dataset, collate):
        if "__reduce_ex__" not in vars(owner):
            owner.__reduce_ex__ = _reduce


class _Fixes:
    """Unpickles to torchmeta's name, once `apply()` has been called."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return _fixed, ()


def _fixed() -> str:
    return apply().__name__


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    reduced: Any = object.__reduce_ex__(self, protocol)
    function, arguments, *rest = reduced
    # The class stands in the arguments, and unpickles after the fixes before it.
    return _rebuild, (_Fixes(), function, *arguments), *rest


def _rebuild(_: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _imported(name: str) -> ModuleType:
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision for another torch
        raise RequestError(
            f"torchmeta's tasks need the package {name}, which does not import ({one_line(error)}):"
            " run make setup, or by hand pip install 'metaplug[torchmeta]' and pip install "
            "--no-deps torchmeta==1.8.0"
        ) from None
