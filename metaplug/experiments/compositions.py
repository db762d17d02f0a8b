"""Which plugins go together: every pair in both orders, tried on small models as a run would."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from metaplug.contract import plugin_files, registry
from metaplug.contract.chain import Chain
from metaplug.contract.example_settings import example_settings
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_checks import implementations
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RunError, unknown
from metaplug.learner import MetaLearner
from metaplug.random_streams import stream

Verdict: TypeAlias = Literal["composes", "order matters", "refused"]

STEPS = 2
"""Inner steps of a trial."""
TOTAL = 4
"""Meta-iterations of the run that a trial is the beginning of: schedules follow it."""

_State: TypeAlias = dict[str, dict[str, Tensor]]
_Found: TypeAlias = tuple[dict[str, Tensor], float]

_ORDERLESS = frozenset({"setup", "commit", "end_meta_step"})
"""Hooks that give a plugin nothing of what another one did in the same hook."""


@dataclass(frozen=True)
class Case:
    """A model and a batch of tasks that plugins are tried on; both stay as they are.

    Attributes:
        outputs: the classes that the model tells apart; None for regression.
    """

    model: nn.Module
    batch: TaskBatch
    outputs: int | None


@dataclass(frozen=True)
class Pair:
    """Two plugins, and how they go together.

    Attributes:
        first, second: their names.
        verdict: "composes" where their order in the list means nothing, "refused" where a run ends
            with an error in both orders.
        reasons: of "order matters" the hooks that both are in, or why one order is refused; of
            "refused" the texts of the errors; of "composes" none.
    """

    first: str
    second: str
    verdict: Verdict
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Compositions:
    """Which plugins go together.

    Attributes:
        plugins: those that were tried, by name.
        pairs: of these, each once.
        left_out: by name, why a plugin cannot be tried at all.
    """

    plugins: tuple[str, ...]
    pairs: tuple[Pair, ...]
    left_out: Mapping[str, str]


class _Subject:
    """A plugin that is tried."""

    def __init__(self, name: str, plugin: type[Plugin]) -> None:
        self.name, self.plugin = name, plugin
        self.hooks = frozenset(implementations(plugin)) - _ORDERLESS
        self._refusals: dict[int, str | None] = {}

    def make(self) -> Plugin:
        """Make a new instance, with the settings that its Config gives as examples."""
        return self.plugin(name=self.name, **example_settings(self.plugin.Config))

    def refused_by(self, case: Case) -> str | None:
        """Return why the plugin does not fit a case; None where it does."""
        if id(case) not in self._refusals:
            self._refusals[id(case)] = self._try_alone(case)
        return self._refusals[id(case)]

    def _try_alone(self, case: Case) -> str | None:
        with _restored(case.model):
            try:
                learner = _learner(case, [self])
                learner.engine.meta_step(case.batch, TOTAL)
                losses = learner.engine.evaluate(case.batch, STEPS).query_losses[STEPS]
                _finite("losses of test tasks", [losses])
            except MetaplugError as error:
                return str(error)
        return None


def small_cases() -> tuple[Case, ...]:
    """Make a perceptron, a convolution and a regressor with random tasks, in float64.

    The classifiers have batch norm, as per-step batch norm needs it.
    """

    def numbers(*shape: int) -> Tensor:
        return torch.randn(2, 6, *shape, dtype=torch.float64)

    labels = (torch.arange(6) % 3).expand(2, 6)
    with stream(0, torch.device("cpu")):
        perceptron = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())
        perceptron.extend([nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)])
        convolution = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten())
        convolution.append(nn.Linear(12, 3))
        regressor = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        return (
            Case(perceptron.double(), TaskBatch(numbers(4), labels, numbers(4), labels), 3),
            Case(
                convolution.double(),
                TaskBatch(numbers(1, 4, 4), labels, numbers(1, 4, 4), labels),
                3,
            ),
            Case(
                regressor.double(),
                TaskBatch(numbers(4), numbers(2), numbers(4), numbers(2)),
                None,
            ),
        )


def compositions(name: str | None = None, cases: Sequence[Case] | None = None) -> Compositions:
    """Try every pair of the installed plugins in both orders.

    A trial makes the learner and one meta-update, with all the checks of a run; then it takes
    meta-gradients in both orders from the same state. Pairs are tried on the first case that both
    plugins fit, each alone, with an evaluation too.

    Args:
        name: of one plugin, or the path of the file of one, which is run: to try only its pairs.
        cases: default: `small_cases()`.

    Raises:
        RequestError: no plugin of that name is installed, or the file holds none.
        RunError: the file fails when it is run.
    """
    cases = small_cases() if cases is None else tuple(cases)
    subjects: dict[str, _Subject] = {}
    left_out: dict[str, str] = {}
    parts = registry.parts("plugin")
    if name is not None and plugin_files.is_file(name):
        parts.append(own := plugin_files.part_of(name))
        name = own.name
    for part in parts:
        if part.error is not None:
            left_out[part.name] = part.error
            continue
        subject = _Subject(part.name, part.value)
        if (text := subject.refused_by(cases[0])) is None or any(
            subject.refused_by(case) is None for case in cases[1:]
        ):
            subjects[part.name] = subject
        else:
            left_out[part.name] = text
    if name not in (None, *subjects, *left_out):
        raise unknown("plugin", str(name), [*subjects, *left_out])
    pairs = tuple(
        _tried(subjects[first], subjects[second], cases)
        for first, second in combinations(subjects, 2)
        if name in (None, first, second)
    )
    return Compositions(tuple(subjects), pairs, left_out)


def _tried(first: _Subject, second: _Subject, cases: Sequence[Case]) -> Pair:
    pair = partial(Pair, first.name, second.name)
    fits = (case for case in cases if not (first.refused_by(case) or second.refused_by(case)))
    if (case := next(fits, None)) is None:
        return pair("refused", ("none of the models that are tried fits both",))
    shared, texts = first.hooks & second.hooks, {}
    found: list[_Found] = []
    state: _State | None = None
    for order in ((first, second), (second, first)):
        with _restored(case.model):
            try:
                if found and not shared:
                    Chain([each.make() for each in order])  # the same calls as before, if allowed
                    continue
                learner = _learner(case, order)
                if state is None:
                    learner.engine.meta_step(case.batch, TOTAL)
                    state = _state(learner)
                else:
                    _load(learner, state)
                found.append(_found(learner, case.batch))
            except MetaplugError as error:
                texts[order] = str(error)
    if not found:
        return pair("refused", tuple(dict.fromkeys(texts.values())))
    if texts:
        reasons = [
            f"{one.name} before {other.name} is refused: {text}"
            for (one, other), text in texts.items()
        ]
        return pair("order matters", tuple(reasons))
    if len(found) == 1 or _equal(*found):
        return pair("composes")
    hooks = ", ".join(hook for hook in KINDS if hook in shared)
    return pair("order matters", (f"both are in {hooks}",))


def _learner(case: Case, plugins: Sequence[_Subject]) -> MetaLearner:
    # With Adam, a gradient that is only rounding would become a whole step.
    learner = MetaLearner(
        case.model,
        plugins=[each.make() for each in plugins],
        kind="regression" if case.outputs is None else "classification",
        inner_steps=STEPS,
        inner_lr=0.1,
        meta_optimizer="sgd",
        meta_lr=0.1,
    )
    learner.engine.outputs = case.outputs  # preparing a batch would find it, anew for every pair
    return learner


def _found(learner: MetaLearner, batch: TaskBatch) -> _Found:
    """Take the meta-gradients of the second iteration, and the factor on its rate."""
    found = dict(learner.engine.meta_gradients(batch, 1, TOTAL).gradients)
    _finite("meta-gradients", found.values())
    return found, learner.engine.factor(1, TOTAL)


def _finite(what: str, values: Iterable[Tensor]) -> None:
    if not all(torch.isfinite(each).all() for each in values):
        raise RunError(f"{what} are not finite: see what the plugins compute, or leave one out")


def _equal(one: _Found, other: _Found) -> bool:
    """Whether two findings differ by rounding at most."""
    (gradients, factor), (others, other_factor) = one, other
    largest = max(float(each.abs().max()) for each in gradients.values())
    return (
        gradients.keys() == others.keys()
        and math.isclose(factor, other_factor)
        and all(
            torch.allclose(gradients[name], others[name], rtol=1e-9, atol=1e-10 * largest)
            for name in gradients
        )
    )


def _state(learner: MetaLearner) -> _State:
    """Copy what the model and the plugins have learned and stored."""
    return {
        name: {key: value.clone() for key, value in module.state_dict().items()}
        for name, module in _modules(learner)
    }


def _load(learner: MetaLearner, state: _State) -> None:
    for name, module in _modules(learner):
        module.load_state_dict(state[name])


def _modules(learner: MetaLearner) -> list[tuple[str, nn.Module]]:
    return [("", learner.model), *((plugin.name, plugin) for plugin in learner.chain.plugins)]


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the model its values back afterwards."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(before)
