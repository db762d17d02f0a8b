"""From a model, plugins and settings to an engine that runs meta-iterations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from metaplug.checks.find_nonfinite import find_nonfinite
from metaplug.contract.chain import Chain
from metaplug.contract.presets import Preset
from metaplug.contract.values import Context, Kind
from metaplug.core.inner_loop import InnerLoop
from metaplug.core.losses import cross_entropy
from metaplug.core.task_model import Loss
from metaplug.errors import RequestError
from metaplug.execution.engine import Engine
from metaplug.execution.plan import StepPlan
from metaplug.execution.precision import Precision, check_precision, forward
from metaplug.execution.ranks import World
from metaplug.execution.settings import LearnerSettings
from metaplug.settings import validated

LOSSES: dict[Kind, Loss] = {
    "classification": cross_entropy,
    "regression": nn.functional.mse_loss,
}
"""The loss of one task where none is given."""

_NOTHING_ADAPTS = "the plugins select no parameter to adapt: leave at least one"


def learner_settings(preset: Preset | None, given: Mapping[str, Any]) -> LearnerSettings:
    """Return the settings of a learner: those that were given, over the preset's defaults.

    Args:
        given: the learner's arguments by name; None for one that was not given.

    Raises:
        RequestError: a value out of bounds.
    """
    settings = {} if preset is None else preset.defaults.get("learner", {})
    own = {name: given[name] for name in LearnerSettings.model_fields}
    settings = settings | {name: each for name, each in own.items() if each is not None}
    return validated(LearnerSettings, settings, "learner")


def assemble(
    model: nn.Module,
    chain: Chain,
    loss: Loss,
    settings: LearnerSettings,
    plan: StepPlan,
    *,
    kind: Kind,
    precision: Precision,
    deterministic: bool,
    seed: int,
    world: World,
) -> Engine:
    """Return an engine over the model; the plugins are set up on the way.

    On several ranks all start from rank 0's values.

    Raises:
        RequestError: the plugins select nothing to adapt, or an option cannot be had on the model's
            device or with its dtype.
    """
    world.align([*model.parameters(), *model.buffers()])  # plugins start from these values
    adapted, variables = _set_up(model, chain, settings, kind, ranks=world.size, seed=seed)
    owned = [each for own in chain.plugins for each in (*own.parameters(), *own.buffers())]
    world.align([*owned, *variables.values()])
    inner = InnerLoop(
        model,
        chain,
        loss,
        adapted=adapted,
        inner_steps=settings.inner_steps,
        inner_lr=settings.inner_lr,
        optimizer=settings.inner_optimizer,
        optimizer_settings=settings.inner_optimizer_settings,
        batch_norm=settings.batch_norm,
        output=settings.output,
        variables=variables,
    )
    check_precision(precision, inner.dtype, inner.device)
    plan.check_device(inner.device)
    inner.checkpoint_steps = plan.checkpoint_steps
    narrow = partial(forward, precision, inner.device)
    inner.autocast = narrow if precision == "bfloat16" else nullcontext
    engine = Engine(
        model,
        chain,
        inner,
        meta_optimizer=settings.meta_optimizer,
        meta_lr=settings.meta_lr,
        seed=seed,
        world=world,
        diagnose=find_nonfinite,
    )
    engine.deterministic, engine.precision = deterministic, precision
    engine.derivation = plan.derivation(engine)
    return engine


def _set_up(
    model: nn.Module, chain: Chain, settings: LearnerSettings, kind: Kind, *, ranks: int, seed: int
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Let the plugins choose what is adapted, and create their meta- and task parameters."""
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    layers = {name: type(model.get_submodule(name.rpartition(".")[0])) for name in trainable}
    selected = chain.fold("select_adapted", tuple(trainable), layers=layers)
    if not selected and not chain.links("task_parameters"):
        raise RequestError(_NOTHING_ADAPTS)
    adapted = tuple(name for name in trainable if name in selected)
    reference = next(iter(trainable.values()))
    context = Context(
        shapes={name: parameter.shape for name, parameter in trainable.items()},
        parameters={name: parameter.detach() for name, parameter in trainable.items()},
        layers=layers,
        adapted=adapted,
        dtype=reference.dtype,
        device=reference.device,
        inner_steps=settings.inner_steps,
        inner_lr=settings.inner_lr,
        kind=kind,
        ranks=ranks,
        inner_optimizer=settings.inner_optimizer,
    )
    variables = chain.setup(context, seed)
    _refuse_clashes(model, chain, variables)
    if not adapted and not variables:
        raise RequestError(_NOTHING_ADAPTS)
    return adapted, variables


def _refuse_clashes(model: nn.Module, chain: Chain, variables: Mapping[str, Tensor]) -> None:
    """Refuse a plugin's parameter that is another's, or would stand under the name of the model's.

    Meta-gradients and fast weights are found by name, so one would take the place of the other.
    """
    owners = {id(each): "the model" for each in model.parameters()}
    for plugin in chain.plugins:
        for name, each in plugin.named_parameters():
            if id(each) in owners:
                raise RequestError(
                    f"plugin '{plugin.name}' has the parameter '{name}', which is one of "
                    f"{owners[id(each)]}, so that it would be updated twice: read the model's in "
                    "step.parameters, and give every plugin parameters of its own"
                )
        owners |= {id(each): f"plugin '{plugin.name}'" for each in plugin.parameters()}
    taken = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    owned = [
        (plugin, f"{plugin.name}.{name}")
        for plugin in chain.plugins
        for name, _ in plugin.named_parameters()
    ]
    owned += [
        (plugin, name)
        for plugin in chain.plugins
        for name in variables
        if name.startswith(f"{plugin.name}.")
    ]
    for plugin, name in owned:
        if name in taken:
            raise RequestError(
                f"plugin '{plugin.name}' has a parameter '{name}', and so has the model: give the "
                "plugin another name, by name='...'"
            )
