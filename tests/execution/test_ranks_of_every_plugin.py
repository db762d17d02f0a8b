"""Two ranks find for every plugin, preset and hook the meta-gradients and statistics of one.

One pair of processes runs all cases, on 3 and 2 of 5 tasks.
"""

from dataclasses import replace

import pytest
import torch
from support import plugins
from support.ranks import on_ranks, shard
from torch import nn

from metaplug import Plugin, hookimpl
from metaplug.contract import registry
from metaplug.contract.hookspecs import KINDS
from metaplug.execution.ranks import ALONE, World
from metaplug.testing import Stream, assert_close, problem
from metaplug.testing.first_party import FIRST_PARTY

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

SHARES = (0.6, 0.4)
ITERATIONS = 2
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Everywhere(Plugin):
    """Couples tasks by a mean in every hook of a meta-step that sees tasks, and keeps means."""

    couples_tasks = True

    @hookimpl
    def setup(self, context):
        self.shift = nn.Parameter(torch.full((3,), 0.1, dtype=context.dtype))
        self.register_buffer("seen", torch.zeros((), dtype=context.dtype))

    @hookimpl
    def task_parameters(self):
        return {"shift": self.shift}

    @hookimpl
    def initialize_parameters(self, parameters, step):
        losses, _ = step.forward(parameters)
        return {n: x * (1 + 0.1 * step.task_mean(losses.tanh())) for n, x in parameters.items()}

    @hookimpl
    def transform_parameters(self, parameters, step):
        shift = parameters[f"{self.name}.shift"]
        near = {n: x + 0.1 * (step.task_mean(x.tanh()) - x) for n, x in parameters.items()}
        return {**near, "2.bias": near["2.bias"] + shift}

    @hookimpl
    def transform_inner_losses(self, losses, step):
        return losses + (losses - step.task_mean(losses)).square()

    @hookimpl
    def transform_gradients(self, gradients, step):
        return {
            name: gradient - 0.3 * step.task_mean(gradient, step.losses.sigmoid())
            for name, gradient in gradients.items()
        }

    @hookimpl
    def transform_learning_rates(self, learning_rates, step):
        factor = step.task_mean(step.losses).sigmoid()
        return {name: rate * factor for name, rate in learning_rates.items()}

    @hookimpl
    def update_parameters(self, parameters, gradients, learning_rates, step):
        step.keep(f"{step.index}", step.losses.mean() + self.seen)
        step.log("loss", step.losses)
        return {
            name: x - learning_rates[name] * (gradients[name] - 0.1 * step.task_mean(x))
            for name, x in parameters.items()
        }

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        return losses + (losses - outcome.task_mean(losses)).square()

    @hookimpl
    def transform_meta_gradients(self, gradients):
        return {name: gradient.tanh() for name, gradient in gradients.items()}

    @hookimpl
    def commit(self, kept):
        self.seen.copy_(kept["1"])

    @hookimpl
    def end_meta_step(self):
        return {"seen": float(self.seen)}


class Replaced(Plugin):
    """Replaces the meta-gradients by some that need a mean over all tasks, of order 0."""

    couples_tasks = True

    @hookimpl
    def derivative_order(self):
        return 0

    @hookimpl
    def compute_meta_gradients(self, outcome, outer_loss, meta_parameters):
        tasks = outcome.batch.num_tasks
        scale = 1 + outcome.task_mean(outer_loss.detach().expand(tasks))
        ends, starts = outcome.adapted_parameters, outcome.initial_parameters
        outcome.keep("scale", scale)
        return {n: scale * (starts[n] - ends[n]).mean(0) for n in outcome.adapted}


def plugin(name):
    return lambda: {"plugins": [registry.load("plugin", name)(**FIRST_PARTY[name])]}


CASES = {
    **{f"plugin {name}": plugin(name) for name in plugins.NAMES},
    **{
        f"preset {name}": lambda name=name: {"preset": name}
        for name in registry.names("preset")
        if registry.load("preset", name).plugins
    },
    "gradient sharing that sees each task": lambda: {
        "plugins": [plugins.make("gradient-sharing", conditioning="task", scope="tensor")]
    },
    "sharing beside sharpness": lambda: {
        "plugins": [plugins.make("gradient-sharing"), plugins.make("sharp-maml")]
    },
    "every hook": lambda: {"plugins": [Everywhere()]},
    "replaced": lambda: {"plugins": [Replaced()]},
}


def make(name, *worlds):
    """Return the name of the model, and a learner in each world."""
    model = "batch-norm" if "batch-norm" in name or "maml++" in name else "mlp"
    # A step of plain descent passes an error on as it is; Adam divides by small gradients.
    descent = {"meta_optimizer": "sgd", "meta_lr": 0.1}
    learners = [problem(model).learner(**CASES[name](), **descent, world=each) for each in worlds]
    return Stream(model), learners


def run(name, world):
    """Make meta-steps; return what each found, what plugins log, and at last the whole state.

    What draws random numbers draws others on each rank. Its steps in one process are those by the
    mean of two learners, which draw as the two ranks do.
    """
    apart = world is ALONE and any(each in name for each in plugins.DRAWING)
    stream, learners = make(name, *((World(0), World(1)) if apart else (world,)))
    shards = (World(0, 2), World(1, 2)) if apart else (world,)
    steps = []
    for iteration in range(ITERATIONS):
        batch, taken = stream.batch(iteration, range(5)), []
        for learner, own in zip(learners, shards, strict=True):
            prepared = learner.prepare_batch(shard(batch, own))
            taken.append(learner.engine.meta_gradients(prepared, iteration, ITERATIONS))
        found = mean(*taken) if apart else taken[0]
        for learner in learners:
            learner.engine.update(found, ITERATIONS)
        figures = learners[0].chain.figures(iteration, ITERATIONS)
        steps.append((flat(found), found.outer_loss, figures))
    parts = {"model": learners[0].model, **{each.name: each for each in learners[0].chain.plugins}}
    state = {f"{at}.{n}": x for at, part in parts.items() for n, x in part.state_dict().items()}
    return steps, state


def mean(one, other):
    """Return the mean of what two learners found, weighted by their tasks."""
    lerp = lambda x, y: {n: torch.lerp(x[n], y[n], SHARES[1]) for n in x}  # noqa: E731
    return replace(
        one,
        gradients=lerp(one.gradients, other.gradients),
        outer_loss=torch.lerp(one.outer_loss, other.outer_loss, SHARES[1]),
        statistics={p: lerp(x, other.statistics[p]) for p, x in one.statistics.items()},
    )


def flat(found):
    """Return meta-gradients and kept statistics by name."""
    kept = {f"kept {p}.{n}": x for p, each in found.statistics.items() for n, x in each.items()}
    return {**found.gradients, **kept}


@pytest.fixture(scope="module")
def alone():
    return {name: run(name, ALONE) for name in CASES}


@pytest.fixture(scope="module")
def together():
    answers = on_ranks(lambda world: {name: run(name, world) for name in CASES})
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_find_and_keep_what_one_does(alone, together, name):
    steps, state = alone[name]
    for of_rank in together:
        own_steps, own_state = of_rank[name]
        for (found, loss, figures), (own, own_loss, own_figures) in zip(
            steps, own_steps, strict=True
        ):
            assert_close(own, found, **EXACT)
            assert_close(own_loss, loss, **EXACT)
            assert own_figures == pytest.approx(figures, rel=1e-6)  # some are float32
        assert_close(own_state, state, **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_have_the_same_bits(together, name):
    (steps, state), (other_steps, other_state) = (answer[name] for answer in together)
    assert [each[2] for each in steps] == [each[2] for each in other_steps]
    for own, other in ((state, other_state), (steps[-1][0], other_steps[-1][0])):
        assert own.keys() == other.keys()
        assert all(torch.equal(x, other[n]) for n, x in own.items())


def test_the_cases_have_every_hook():
    used = set()
    for name in CASES:
        [learner] = make(name, ALONE)[1]
        used |= {hook for hook in KINDS if learner.chain.links(hook)}
    assert used == set(KINDS)
