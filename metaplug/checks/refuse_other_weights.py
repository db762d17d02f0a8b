"""Weights in a graph that are not those of the task are refused: no inner step moves them."""

from __future__ import annotations

from torch import Tensor

from metaplug.checks.model_trial import Trial
from metaplug.core.autograd_graph import graph_leaves
from metaplug.errors import RequestError, quoted

OTHER_WEIGHTS = (
    "forward uses the model's own {} and not the weights that it is given, as a stored function "
    "does that closes over a module: reach weights through self, or make that function a method"
)


def refuse_closures(trial: Trial, output: Tensor, what: str = "model") -> None:
    """Refuse the model's own weights in a graph, which the fast weights should stand in."""
    leaves = {id(leaf) for leaf in graph_leaves(output)}
    named = trial.functional.model.named_parameters()
    if own := [name for name, parameter in named if id(parameter) in leaves]:
        if what == "loss":
            raise RequestError(
                f"the loss reads the model's own {quoted(own[:3])}, not the fast weights of a "
                "task: give what it makes of weights to a plugin's transform_inner_losses, "
                "which finds them in step.parameters"
            )
        raise RequestError(OTHER_WEIGHTS.format(quoted(own[:3])))


def refuse_unregistered(trial: Trial, what: str, output: Tensor, again: Tensor) -> None:
    """Refuse leaves of an output's graph that require a gradient and are no given weights.

    Args:
        again: another output; a leaf that forward makes anew, as an energy's input, is not of
            its graph.
    """
    refuse_closures(trial, output, what)
    known = {id(weight) for weight in trial.weights.values()}
    stay = {id(leaf) for leaf in graph_leaves(again)} - known
    if leaves := [leaf for leaf in graph_leaves(output) if id(leaf) in stay]:
        forms = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise RequestError(
            f"the {what} uses tensors that require a gradient and are no parameters of the "
            f"model (of shape {forms}), so that nothing would train them: register them with "
            "the model, as by nn.Parameter and nn.ModuleList, or call requires_grad_(False) on "
            "them"
        )
