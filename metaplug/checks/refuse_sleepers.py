"""Layers that are in evaluation mode while their model trains are refused if that matters."""

from __future__ import annotations

from torch import nn

from metaplug.checks.model_trial import Trial, close
from metaplug.errors import RequestError


def refuse_sleepers(trial: Trial) -> None:
    """Refuse layers in evaluation mode in a model in training mode, if they differ by it."""
    model = trial.functional.model
    asleep = [name for name, each in model.named_modules() if model.training and not each.training]
    own = trial.functional.batch_norm == "batch"
    frozen = [name for name in asleep if own and _stores_statistics(model.get_submodule(name))]
    if frozen or (asleep and not close(trial.ask(trial.x, asleep), trial.expected)):
        differ = (
            name
            for name in asleep
            if name in frozen or not close(trial.ask(trial.x, [name]), trial.expected)
        )
        raise RequestError(
            f"the layer '{next(differ, asleep[0])}' is in evaluation mode in a model in "
            "training mode, but meta-training is in training mode throughout: call "
            "model.train(), and set what the layer is to do (dropout p = 0, batch_norm = "
            "'frozen')"
        )


def _stores_statistics(module: nn.Module) -> bool:
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return norm and module.running_mean is not None
