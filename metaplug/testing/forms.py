"""Clauses on the form of a plugin: its Config, its hooks' arguments, and what they return."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import nn

from metaplug.contract.chain import Chain
from metaplug.contract.link import Link
from metaplug.contract.plugin import PluginConfig
from metaplug.contract.return_checks import form
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError
from metaplug.testing.clauses import (
    FAULTS,
    BreachError,
    Example,
    Subject,
    clause,
    clause_on,
    fit,
    in_words,
)
from metaplug.testing.comparing import difference, evaluation, training
from metaplug.testing.problems import Problem


@clause(
    "strict-config",
    "Config refuses fields that it does not know, cannot be changed once made, and describes every "
    "field",
)
def strict_config(subject: Subject) -> None:
    """Settings that are misspelt would be passed over in silence."""
    config = subject.make().config
    kind = type(config)
    fields = kind.model_fields
    unknown = ["no_such_setting", *(f"{name}s" for name in fields if f"{name}s" not in fields)]
    for name in unknown:
        if _accepts(kind, {**config.model_dump(), name: 1}):
            raise BreachError(
                f"Config accepts the unknown field '{name}', so that a misspelt setting would pass "
                "unseen: extend PluginConfig, keep extra='forbid', and take no field out in a "
                "validator"
            )
    if not kind.model_config.get("frozen"):
        raise BreachError(
            "Config can be changed after it was made, which no checkpoint would tell: "
            "extend PluginConfig and keep it frozen"
        )
    if bare := [name for name, field in fields.items() if not field.description]:
        raise BreachError(
            f"the field '{bare[0]}' says nothing of itself, and `metaplug plugins` shows it: "
            "give Field(description=...)"
        )


@clause(
    "config-round-trip",
    "its settings come back the same from YAML, where experiments and checkpoints keep them",
)
def config_round_trip(subject: Subject) -> None:
    """What is read back may not differ from what was written."""
    for given in (subject.settings, *(() if subject.off is None else (subject.off,))):
        config = subject.make(given).config
        try:
            text = yaml.safe_dump(config.model_dump(mode="json"))
            read = type(config).model_validate(yaml.safe_load(text))
        except (ValidationError, ValueError, TypeError, yaml.YAMLError) as error:
            raise BreachError(
                f"its Config does not survive YAML ({' '.join(str(error).split())}), in which "
                "experiments keep it: use numbers, text, booleans, None, and lists and maps of "
                "these"
            ) from error
        for name in type(config).model_fields:
            before, after = getattr(config, name), getattr(read, name)
            if before != after:
                raise BreachError(
                    f"the field '{name}' is {before!r} and comes back from YAML as {after!r}, so "
                    "that a resumed run would be another: let a validator leave what it has made "
                    "as it is"
                )


@clause(
    "future-arguments",
    "its hooks are marked, exist, and name the arguments that they take, so that one more changes "
    "nothing",
)
def future_arguments(subject: Subject) -> None:
    """The contract grows by arguments."""
    Chain([subject.make()])
    example = subject.example(steps=2)
    try:
        now, again, grown = (subject.learner(example) for _ in range(3))
        expected, repeated = (training(learner, example.problem.batch) for learner in (now, again))
    except (MetaplugError, RuntimeError):
        return  # which other clauses say, as they do where two learners differ
    if difference(expected, repeated, exact=True):
        return
    grown.chain.__class__ = _Grown
    if text := difference(training(grown, example.problem.batch), expected, exact=True):
        raise BreachError(
            f"{text} when every hook has one more argument, as a later metaplug may: "
            "name those that you need, and count none"
        )


class _Grown(Chain):
    """A chain of a later metaplug, whose hooks have one argument more."""

    def fold(self, hook: str, value: Any, **arguments: Any) -> Any:
        return super().fold(hook, value, **arguments, future_argument=None)

    def choose(self, hook: str, default: Any, **arguments: Any) -> Any:
        return super().choose(hook, default, **arguments, future_argument=None)


@clause("another-name", "under another name it does the same, so that a chain may hold two of it")
def another_name(subject: Subject) -> None:
    """An instance is called as its user likes, and its parameters after it."""
    if subject.shortest:
        return  # it has no place for a name
    example = subject.example(steps=2)
    try:
        usual = subject.learner(example)
        first = training(usual, example.problem.batch)
        if difference(training(subject.learner(example), example.problem.batch), first, exact=True):
            return  # which other clauses say
    except FAULTS:
        return  # likewise
    own = usual.chain.plugins[0].name
    advice = 'find what is yours by self.name, as in f"{self.name}.shift"'
    try:
        renamed = subject.learner(example, plugins=[subject.make(name=f"other-{own}")])
        # What setup draws goes by the name, so that two in a chain draw different numbers.
        renamed.chain.plugins[0].load_state_dict(usual.chain.plugins[0].state_dict())
        found = training(renamed, example.problem.batch)
    except Exception as error:
        raise BreachError(f"{in_words(error)}, under the name other-{own}: {advice}") from error
    if text := difference(found.renamed(f"other-{own}", own), first, exact=True):
        raise BreachError(f"{text} under the name other-{own} and under its own: {advice}")


@clause_on(
    "names-and-shapes",
    "what its hooks return keeps names, shapes, dtypes and device",
    dtype=torch.float32,
)
def names_and_shapes(subject: Subject, example: Example) -> None:
    """The chain checks every link; this runs all of them, on every device that there is."""
    case = example.problem
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        case.model.to(device)
        learner = subject.learner(Example(case))
        learner.chain.wrap(_same_tasks)
        findings = [found(learner, case.batch) for found in (training, evaluation)]
        if any(each.non_finite() for each in findings):
            return  # which other clauses say
        fit(learner, example, 1)
        for name, parameter in learner.chain.named_parameters().items():
            if parameter.device != next(learner.model.parameters()).device:
                raise BreachError(
                    f"the meta-parameter {name} is on {parameter.device}, away from the model: "
                    "create it on context.device"
                )
    _fits_an_unused_parameter(subject, case)


def _fits_an_unused_parameter(subject: Subject, case: Problem) -> None:
    """Try a model of which one trainable parameter reaches no loss, and so has no gradient."""
    model, like = copy.deepcopy(case.model), next(case.model.parameters())
    model.register_parameter("unused", nn.Parameter(like.new_ones(2)))
    learner = subject.learner(Example(replace(case, model=model)))
    for run in (training, evaluation):
        try:
            run(learner, case.batch)
        except Exception as error:
            raise BreachError(
                f"{in_words(error)}, of a model whose trainable parameter 'unused' no loss "
                "reaches: gradients lack its name, which parameters have; leave it as it is, as in "
                "gradients.get(name)"
            ) from error


def _same_tasks(link: Link) -> Link:
    """Of a batch of tasks the chain checks the kind alone."""
    if link.hook != "transform_tasks":
        return link

    def call(*values: Any) -> Any:
        result = link.function(*values)
        batch = dict(zip(link.arguments, values, strict=True)).get("batch")
        if isinstance(result, TaskBatch) and isinstance(batch, TaskBatch):
            for name in ("support_x", "query_x"):
                before, after = getattr(batch, name), getattr(result, name)
                forms = [(each.dtype, each.device, each.shape[2:]) for each in (before, after)]
                if forms[0] != forms[1]:
                    raise BreachError(
                        f"transform_tasks made {form(after)} of {name}, {form(before)}: "
                        "keep the examples' shape, dtype and device"
                    )
        return result

    return replace(link, function=call)


def _accepts(kind: type[PluginConfig], values: Mapping[str, Any]) -> bool:
    try:
        kind.model_validate(dict(values))
    except ValidationError as error:
        return not any(fault["type"] == "extra_forbidden" for fault in error.errors())
    return True
