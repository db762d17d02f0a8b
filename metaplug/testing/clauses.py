"""A clause of the contract, what it is tried on, and how its failure reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from metaplug.contract import plugin_files, registry
from metaplug.contract.chain import Chain
from metaplug.contract.plugin import Plugin
from metaplug.contract.presets import label_of, make_plugins
from metaplug.contract.task_batch import TaskBatch
from metaplug.errors import MetaplugError, RequestError, unknown
from metaplug.learner import MetaLearner
from metaplug.testing.problems import KINKED, MODELS, Problem, Stream, problem

DEFAULT_MODELS = ("mlp", "batch-norm", "conv4")
"""The models that a plugin is tried on where its author names none."""

NOISE = 0.01
"""By which meta-parameters are moved before numbers are compared, as a standard deviation."""

PAGE = "docs/conformance.md"
"""The page that explains every clause."""


FAULTS = (MetaplugError, RuntimeError, TypeError, ValueError, LookupError)
"""What a wrong plugin raises where another clause says so."""


class ConformanceError(MetaplugError, AssertionError):
    """A plugin breaks a clause of the contract.

    Its text is the clause and what is wrong, why that cannot be and what to do; the smallest
    example found; and where the docs explain it.
    """


class BreachError(Exception):
    """A clause is broken, in words that follow "plugin 'my-plugin' breaks CLAUSE: "."""

    example: Example | None = None


@dataclass(frozen=True)
class Example:
    """A problem that a clause is tried on, after `done` meta-iterations on other tasks."""

    problem: Problem
    done: int = 0

    def __str__(self) -> str:
        done = f"after {self.done} iteration{'s' * (self.done != 1)}" if self.done else "untrained"
        return f"{self.problem}, {done}"


@dataclass(frozen=True)
class Subject:
    """The plugin that is held to the contract.

    Attributes:
        source: its class; a function or a module in the shortest form; or the name of an installed
            plugin, or the path of a file with one.
        settings: fields of its Config under which it does something.
        off: fields at which it does nothing; None where it has none.
        models: names of MODELS that it fits.
        examples: how many examples each clause is tried on, at least 1.
    """

    source: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] | None = None
    models: tuple[str, ...] = DEFAULT_MODELS
    examples: int = 5

    def __post_init__(self) -> None:
        if not self.models:
            raise RequestError(
                "models = (): a plugin that fits no model cannot be tried; "
                "give names of metaplug.testing.MODELS"
            )
        for name in self.models:
            if name not in MODELS:
                raise unknown("model of metaplug.testing", name, MODELS)
        if isinstance(self.source, Plugin):
            raise RequestError(
                f"{type(self.source).__name__}(...) is an instance, which serves one learner: "
                "give the class, with its settings beside it"
            )
        if self.settings and not isinstance(self.source, type | str):
            raise RequestError(
                "a plugin in the shortest form has no configuration: leave settings out, "
                "or write it as a class with a Config"
            )

    def make(self, given: Mapping[str, Any] | None = None, name: str | None = None) -> Plugin:
        """Make a new instance with `given` as fields of its Config, by default `settings`.

        Args:
            name: of the instance, where it is not the usual; not in the shortest form.
        """
        if self.shortest:
            return make_plugins(None, [self._part])[0]
        called = name or (label_of(self.source) if isinstance(self.source, str) else None)
        named = {"name": called} if called else {}
        made = self._part(**named, **(self.settings if given is None else given))
        if not isinstance(made, Plugin):
            raise RequestError(
                f"{self._part.__name__} is not a plugin: give a subclass of metaplug.Plugin"
            )
        return made

    @cached_property
    def _part(self) -> Any:
        """The class, function or module; one that is named is looked up once."""
        if not isinstance(self.source, str):
            return self.source
        if plugin_files.is_file(self.source):
            return plugin_files.load(self.source)
        return registry.load("plugin", self.source)

    @property
    def shortest(self) -> bool:
        """Whether it is a function or a module."""
        return not isinstance(self._part, type)

    @cached_property
    def name(self) -> str:
        """Its name in messages."""
        try:
            return self.make().name
        except MetaplugError:
            return str(getattr(self.source, "__name__", self.source))

    @cached_property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that it implements."""
        return tuple(Chain([self.make()]).order())

    @property
    def smooth_models(self) -> tuple[str, ...]:
        """Those of its models that have no kinks; all of them where none is without."""
        return tuple(name for name in self.models if name not in KINKED) or self.models

    def example(self, *, names: tuple[str, ...] | None = None, **given: Any) -> Example:
        """One example that is not drawn, on the first of its models, or of `names`."""
        return Example(problem((names or self.models)[0], lr=0.1, **given))

    def learner(
        self,
        example: Example,
        given: Mapping[str, Any] | None = None,
        *,
        moved: bool = False,
        **options: Any,
    ) -> MetaLearner:
        """Make a learner after the example's iterations; `setup` always draws the same numbers.

        Args:
            given: fields of the plugin's Config, by default `settings`.
            moved: add a little noise to every meta-parameter of the plugin, always the same. One
                that starts at zero hides what is computed behind it.
            options: of MetaLearner.
        """
        options = {"plugins": [self.make(given)], "task_batching": "vectorized", **options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(example.problem.seed)
            learner = example.problem.learner(**options)
        fit(learner, example, example.done)
        if moved:
            generator = torch.Generator().manual_seed(example.problem.seed)
            for parameter in learner.chain.named_parameters().values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += NOISE * noise.to(parameter)
        return learner

    def learner_if_made(self, example: Example, *, moved: bool = False) -> MetaLearner | None:
        """Make a learner; None where that fails, which "names-and-shapes" says."""
        try:
            return self.learner(example, moved=moved)
        except FAULTS:
            return None


def fit(learner: MetaLearner, example: Example, iterations: int, *, tasks: int = 2) -> None:
    """Train on tasks for the example's model."""
    if iterations:
        total = learner.iteration + iterations  # said, since schedules may start anew
        learner.fit(stream(example), iterations=iterations, total=total, tasks_per_batch=tasks)


def stream(example: Example, split: str = "train") -> Stream:
    """Tasks for the example's model, of its form and dtype."""
    case, batch = example.problem, example.problem.batch
    support, query = batch.support_x.shape[1], batch.query_x.shape[1]
    return _Cached(case.name, split, support, query, batch.support_x.dtype)


class _Cached(Stream):
    """The same tasks, drawn once: most clauses ask for the same."""

    def batch(self, iteration: int, indices: Sequence[int]) -> TaskBatch:
        form = self.name, self.split, self.support, self.query, self.dtype
        return TaskBatch.stack([_drawn(form, iteration, index) for index in indices])


@lru_cache(maxsize=256)
def _drawn(form: tuple[Any, ...], iteration: int, index: int) -> TaskBatch:
    return Stream(*form).batch(iteration, [index])


@dataclass(frozen=True)
class Clause:
    """One clause of the contract.

    Attributes:
        name: such as "no-mutation".
        statement: what holds of a plugin that keeps it, in one line.
    """

    name: str
    statement: str
    _check: Callable[..., None] = field(repr=False)
    _draws: Mapping[str, Any] | None = field(default=None, repr=False)
    _cost: int = field(default=1, repr=False)

    @property
    def link(self) -> str:
        """The page and anchor that explain it."""
        return f"{PAGE}#{self.name}"

    def hold(self, subject: Subject) -> None:
        """Hold a plugin to the clause.

        Raises:
            ConformanceError: the plugin breaks it; with the smallest example that hypothesis finds.
        """
        try:
            if self._draws is None:
                self._once(subject)
            else:
                examples = _examples(subject, **self._draws)
                runs = settings(_SETTINGS, max_examples=max(subject.examples // self._cost, 1))
                runs(given(examples)(lambda example: self._once(subject, example)))()
        except BreachError as breach:
            raise self._error(subject, breach) from breach.__cause__
        except FlakyFailure as flaky:  # what the plugin remembers of one example decides the next
            breaches = [each for each in flaky.exceptions if isinstance(each, BreachError)]
            if not breaches:
                raise
            raise self._error(subject, breaches[0]) from breaches[0].__cause__

    def _once(self, subject: Subject, *example: Example) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "adapting for .* inner steps, trained", UserWarning)
            try:
                self._check(subject, *example)
            except Exception as error:
                is_breach = isinstance(error, BreachError)
                breach = error if is_breach else BreachError(in_words(error))
                breach.example = example[0] if example else None  # type: ignore[attr-defined]
                if is_breach:
                    raise
                raise breach from error

    def _error(self, subject: Subject, breach: BreachError) -> ConformanceError:
        example = f"\nsmallest example: {breach.example}" if breach.example else ""
        return ConformanceError(
            f"plugin '{subject.name}' breaks {self.name}: {breach}{example}\nsee {self.link}"
        )


def clause(name: str, statement: str) -> Callable[[Callable[[Subject], None]], Clause]:
    """Mark a check that draws nothing: it raises BreachError where the clause does not hold."""
    return lambda check: Clause(name, statement, check)


def clause_on(
    name: str, statement: str, *, cost: int = 1, **draws: Any
) -> Callable[[Callable[[Subject, Example], None]], Clause]:
    """Mark a check that is tried on examples.

    Args:
        cost: it is tried on one in so many of the examples.
        draws: the options of `_examples`.
    """
    return lambda check: Clause(name, statement, check, draws, cost)


def in_words(error: Exception) -> str:
    """Write an error that should not have come in one line."""
    if isinstance(error, MetaplugError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


_SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
)


@st.composite
def _examples(
    draw: st.DrawFn,
    subject: Subject,
    *,
    tasks: tuple[int, int] = (1, 4),
    steps: tuple[int, int] = (1, 3),
    dtype: torch.dtype = torch.float64,
    smooth: bool = False,
) -> Example:
    drawn = problem(
        draw(st.sampled_from(subject.smooth_models if smooth else subject.models)),
        tasks=draw(st.integers(*tasks)),
        support=draw(st.integers(3, 5)),
        query=draw(st.integers(3, 4)),
        steps=draw(st.integers(*steps)),
        lr=draw(st.sampled_from([0.1, 0.3])),
        seed=draw(st.integers(0, 99)),
        dtype=dtype,
    )
    return Example(drawn, done=draw(st.integers(0, 1)))
