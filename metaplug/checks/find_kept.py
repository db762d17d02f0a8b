"""Whether forward reads what passes before it wrote on modules, in training or evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from metaplug.checks.model_trial import Trial, close, same_value
from metaplug.checks.module_state import Tally
from metaplug.core.functional_model import PLAIN, Place


def number_is_read(trial: Trial, place: Place) -> bool:
    """Return whether forward does anything with a number that it writes but add to it."""
    attributes, name = _attributes(trial, place)
    value = attributes[name]
    try:
        for training in trial.answers:
            attributes[name] = Tally()
            trial.ask(trial.x, training=training)
            if not isinstance(attributes.get(name), (Tally, *PLAIN)):
                return True
    except Exception:
        return True
    finally:
        attributes[name] = value
    return False


def tensors_at(trial: Trial, place: Place) -> list[Tensor]:
    """Return copies of the tensors at an attribute, or in the containers there."""
    attributes, name = _attributes(trial, place)
    leaves = tree_leaves(attributes.get(name))
    return [each.detach().clone() for each in leaves if isinstance(each, Tensor)]


def tensors_are_read(trial: Trial, place: Place, before: list[Tensor]) -> bool:
    """Return whether tensors go on changing from pass to pass, and an answer follows them.

    A statistic may change too little for a few passes to show it in an answer, so the answer is
    asked for with other values.

    Args:
        before: the tensors at the attribute before the last pass, which was on the same examples
            as the one before it.
    """
    now = tensors_at(trial, place)
    if len(now) == len(before) and all(map(same_value, now, before)):
        return False
    attributes, name = _attributes(trial, place)
    value = attributes.get(name)
    for training, expected in trial.answers.items():
        try:
            attributes[name] = tree_map(_moved, value)
            if not close(trial.ask(trial.x, training=training), expected):
                return True
        except Exception:
            continue  # what is there may be more than its value
        finally:
            attributes[name] = value
    return False


def _attributes(trial: Trial, place: Place) -> tuple[dict[str, Any], str]:
    path, name = place
    return vars(trial.model.get_submodule(path)), name


@torch.no_grad()
def _moved(value: Any) -> Any:
    number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    return value + 1 if number else value
