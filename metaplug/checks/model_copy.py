"""An independent copy of the user's model, called as its user would: it says what is right."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from metaplug.checks.compare_batching import as_dtype
from metaplug.contract.inputs import Inputs, device_of, named_tensors
from metaplug.contract.return_checks import form
from metaplug.core.functional_model import clone, give_parameters, set_mode
from metaplug.core.model_calls import Output, call_model
from metaplug.errors import RequestError, quoted, said_by
from metaplug.random_streams import stream


def answer(
    model: nn.Module,
    x: Inputs,
    batch_norm: str,
    output: Output = None,
    asleep: Collection[str] = (),
    *,
    training: bool = True,
) -> Tensor:
    """Call a copy of the user's model in training or evaluation mode, as its user would.

    Args:
        output: the part of its answer that is the prediction.
        asleep: names of modules in evaluation mode.

    Raises:
        RequestError: the model fails on these examples.
    """
    set_mode(model, training, batch_norm)
    for name in asleep:
        model.get_submodule(name).training = False
    try:
        with stream(0, device_of(x)):
            prediction: Tensor = call_model(model, x, output)
    except RequestError:
        raise
    except Exception as error:
        advice = "give it the form and dtype of the tasks"
        if isinstance(x, Mapping) and "unexpected keyword argument" in str(error):
            advice = f"give a model whose forward takes {quoted(x)}"
        if "Expected more than 1 value" in str(error):
            advice = "give tasks more support examples, or take batch_norm='frozen'"
        raise RequestError(
            f"the model fails on the support examples of a task, {_forms(x)} ({said_by(error)}): "
            f"{advice}"
        ) from error
    return prediction


def _forms(x: Inputs) -> str:
    named = named_tensors("x", x)
    return ", ".join(
        form(each) if name == "x" else f"{name[1:]} of {form(each)}" for name, each in named.items()
    )


def give_noisy_weights(model: nn.Module, original: nn.Module) -> dict[str, Tensor]:
    """Put perturbed parameters in the place of those that a clone shares; return them by name."""
    generator = torch.Generator().manual_seed(0)
    own: dict[int, nn.Parameter] = {}
    named: dict[str, Tensor] = {}
    for name, parameter in original.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        value = nn.Parameter(parameter.detach() + 0.1 * noise, parameter.requires_grad)
        own[id(parameter)] = named[name] = value
    give_parameters(model, own)
    return named


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters, buffers and other tensors are in float64."""
    own = clone(model, shared=False)
    wide = {
        id(each): nn.Parameter(as_dtype(each.detach(), torch.float64), each.requires_grad)
        for each in model.parameters()
    }
    give_parameters(own, wide)
    for module in own.modules():
        for holder in (module._buffers, vars(module)):
            tensors = {name: each for name, each in holder.items() if isinstance(each, Tensor)}
            holder.update({name: as_dtype(each, torch.float64) for name, each in tensors.items()})
    return own
