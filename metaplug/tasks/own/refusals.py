"""Why something holds no tasks, and what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from metaplug.errors import RequestError
from metaplug.tasks.own.items import FORM

KNOWN = (
    "give a stream, such as the train, val or test of a task source; a list, a DataLoader or "
    "another iterable of tasks; or a function (seed, iteration, index) that returns one"
)


def check_tasks(tasks: Any) -> None:
    """Refuse what holds no tasks, though it may be called or iterated over.

    Raises:
        RequestError: it is a class, an array, a mapping, a single task or a source.
    """
    name = type(tasks).__name__
    if isinstance(tasks, type):
        raise RequestError(
            f"tasks are the class {tasks.__name__}, which has none before it is called: give an "
            f"instance, {tasks.__name__}(...)"
        )
    if isinstance(tasks, Tensor | np.ndarray):
        raise RequestError(
            f"tasks are a {name} of shape {tuple(tasks.shape)}, which does not say what is support "
            f"and what is query: give a list of tuples {FORM}, or images and labels to "
            "metaplug.tasks.LabelledTasks"
        )
    if isinstance(tasks, Mapping):
        raise RequestError(
            f"tasks are a {name} of {len(tasks)}, and a mapping has no first task: give "
            "list(tasks.values()), or one of its values"
        )
    if isinstance(tasks, tuple) and any(isinstance(part, Tensor) for part in tasks):
        raise RequestError(
            f"tasks are a tuple of {len(tasks)} with a tensor in it, which is one task at most: "
            f"give a list of tuples {FORM}"
        )
    splits = all(hasattr(tasks, split) for split in ("train", "val", "test"))
    if splits and not hasattr(tasks, "batch"):
        raise RequestError(
            f"tasks are the source {name}, whose splits are apart: give its train, val or test"
        )
    if tasks is None or isinstance(tasks, str | bytes):
        raise unknown_tasks(tasks)


def unknown_tasks(tasks: Any) -> RequestError:
    """Make the error for what is none of the forms in which tasks may be given."""
    return RequestError(f"tasks of type {type(tasks).__name__} are no tasks: {KNOWN}")


def not_on_ranks(tasks: Any, ranks: int) -> RequestError:
    """Make the error for tasks that several ranks cannot share."""
    return RequestError(
        f"a {type(tasks).__name__} decides itself which tasks come next, so that {ranks} ranks "
        "would see the same: give a list of its tasks, a function (seed, iteration, index) "
        "that returns one, or the CombinationMetaDataset of a loader of torchmeta"
    )


def too_few(name: str, measure: str, wanted: int, given: int) -> RequestError:
    """Make the error for tasks that end before all that are to be measured are there.

    Args:
        name: of the tasks' type.
        measure: the argument that says how many are wanted.
    """
    return RequestError(
        f"{measure} = {wanted}, but the {name} has {given} task{'s' * (given > 1)}: give at most "
        f"{given}, or leave {measure} out"
    )
