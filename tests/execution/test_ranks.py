"""Several ranks find and write what one does, say each thing once, and end together."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import plugins
from support.ranks import forked, kept_store, on_ranks, shard
from torch.utils.data import DataLoader

from metaplug import MetaLearner, Plugin, RequestError, RunError, checkpoint, hookimpl
from metaplug.cli.main import main
from metaplug.errors import RankError
from metaplug.execution.devices import resolve_device
from metaplug.execution.ranks import ALONE, World, joined
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import read_metrics, train
from metaplug.testing import Stream, assert_close, problem

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

TRAIN, TEST = Stream(split="train"), Stream(split="test")


def sharing(**settings):
    return lambda: [plugins.make("gradient-sharing", **settings)]


ALGORITHMS = {
    "maml": ("maml", list, {}),
    "maml, sequential": ("maml", sharing(), {"task_batching": "sequential"}),
    "maml, in chunks": ("maml", lambda: [plugins.make("weight-decay-to-init")], {"chunk_size": 2}),
    "sharing, checkpointed": ("maml", sharing(), {"checkpoint_steps": 1}),
    "maml, no inner step": ("maml", list, {"inner_steps": 0}),
    "fomaml": ("fomaml", sharing(), {}),
    "maml++ and sharing": ("maml++", sharing(), {}),
    "reptile and sharing": ("reptile", sharing(), {}),
    "reptile and learned rates": ("reptile", lambda: [plugins.make("meta-sgd")], {}),
    "sharing, by tensor": ("maml", sharing(granularity="step-and-tensor", scope="tensor"), {}),
    "sharing, plain mean": ("maml", sharing(normalisation="none"), {}),
    "sharing, unit mean": ("maml", sharing(normalisation="mean-unit"), {}),
    "sharing, constant mean": ("maml", sharing(through_mean=False), {}),
    "sharing, learned": ("maml", sharing(statistics="learned"), {}),
    "sharing and clipping": (
        "maml",
        lambda: [
            *sharing()(),
            plugins.make("gradient-clipping"),
            plugins.make("weight-decay-to-init"),
        ],
        {},
    ),
    "entropy": ("maml", lambda: [plugins.make("taml")], {"chunk_size": 2}),
    "inequality": ("maml", lambda: [plugins.make("taml", measure="atkinson")], {}),
}
COUNTS = (4, 5)


def make(name, world=ALONE, **more):
    preset, listed, settings = ALGORITHMS[name]
    model = "batch-norm" if "maml++" in name else "mlp"
    return problem(model).learner(
        preset=preset, plugins=listed(), world=world, **{**settings, **more}
    )


def steps_of(history):
    return [
        (record.step.outer_loss, record.step.meta_gradient_norm, dict(record.step.figures))
        for record in history.records
    ]


def tensors_of(learner):
    return {
        **learner.model.state_dict(),
        **{
            f"{plugin.name}.{k}": v
            for plugin in learner.chain.plugins
            for k, v in plugin.state_dict().items()
        },
    }


def both(name, world):
    """Return meta-gradients of 4 and 5 tasks, three meta-steps on 5, and the state they left."""
    learner = make(name, world, meta_lr=1e-2)
    batches = [shard(TRAIN.batch(7, range(count)), world) for count in COUNTS]
    before = [learner.meta_gradients(batch) for batch in batches]
    history = learner.fit(TRAIN, iterations=3, tasks_per_batch=5)
    return before, steps_of(history), tensors_of(learner)


@pytest.fixture(scope="module")
def alone():
    return {name: both(name, ALONE) for name in ALGORITHMS}


@pytest.fixture(scope="module")
def together(alone):
    answers = on_ranks(lambda world: {name: both(name, world) for name in ALGORITHMS})
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers


# What ranks compute.


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_ranks_find_the_meta_gradients_of_one(alone, together, name):
    for found in together:
        for one, two in zip(alone[name][0], found[name][0], strict=True):
            assert_close(two, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_ranks_train_as_one_does(alone, together, name):
    _, steps, state = alone[name]
    for found in together:
        # Three steps of Adam, which divides by the size of a gradient.
        assert_close(found[name][2], state, rtol=1e-9, atol=1e-9)
        for (loss, norm, figures), (own_loss, own_norm, own_figures) in zip(
            steps, found[name][1], strict=True
        ):
            assert (own_loss, own_norm) == pytest.approx((loss, norm), rel=1e-9)
            assert own_figures == pytest.approx(figures, rel=1e-6)  # some are float32


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ranks_have_the_same_state_and_figures_bit_for_bit(together, name):
    first, second = (answer[name] for answer in together)
    assert first[1] == second[1]
    for tensor, other in zip(first[2].values(), second[2].values(), strict=True):
        assert torch.equal(tensor, other)


def test_the_mean_over_ranks_is_its_own_adjoint_to_any_order():
    def derivatives(world):
        share = world.share((2, 3)[world.rank])
        x = torch.tensor(0.3 + world.rank, dtype=torch.float64, requires_grad=True)
        value = share.mean(x.sin()) ** 3 * (1 + world.rank)
        [first] = torch.autograd.grad(value, x, create_graph=True)
        [second] = torch.autograd.grad(share.mean(first) * first, x)
        return first.detach(), second

    answers = on_ranks(derivatives)
    weights, x = (
        (0.4, 0.6),
        [torch.tensor(0.3 + rank, dtype=torch.float64, requires_grad=True) for rank in (0, 1)],
    )
    mean = sum(weight * one.sin() for weight, one in zip(weights, x, strict=True))
    whole = sum(weight * mean**3 * (1 + rank) for rank, weight in enumerate(weights))
    # A rank's gradient is that of Σ_r s[r] · (...), over its own weight s[r].
    first = [
        gradient / weight
        for gradient, weight in zip(
            torch.autograd.grad(whole, x, create_graph=True), weights, strict=True
        )
    ]
    again = sum(weight * one for weight, one in zip(weights, first, strict=True))
    second = torch.autograd.grad(
        sum(weight * again * one for weight, one in zip(weights, first, strict=True)), x
    )
    for rank, (own_first, own_second) in enumerate(answers):
        assert_close(own_first, first[rank].detach(), rtol=1e-13, atol=0)
        assert_close(own_second, second[rank] / weights[rank], rtol=1e-13, atol=0)


class Halves(Plugin):
    """Answers for one parameter on rank 0 and for another on rank 1."""

    rank = 0

    @hookimpl
    def compute_meta_gradients(self, outcome, outer_loss, meta_parameters):
        name = ("0.bias", "2.bias")[self.rank]
        return {name: torch.full_like(meta_parameters[name], len(outcome.batch.support_x))}


def test_a_gradient_that_is_missing_on_a_rank_counts_as_zero_there():
    def find(world):
        plugin = Halves()
        plugin.rank = world.rank
        return (
            problem()
            .learner(plugins=[plugin], world=world)
            .meta_gradients(shard(TRAIN.batch(0, range(5)), world))
        )

    for found in on_ranks(find):
        assert_close(
            found,
            {
                "0.bias": torch.full((6,), 3 * 0.6, dtype=torch.float64),
                "2.bias": torch.full((3,), 2 * 0.4, dtype=torch.float64),
            },
        )


def test_evaluation_is_that_of_one_rank_bit_for_bit():
    def measure(world):
        learner = problem().learner(
            plugins=[plugins.make("gradient-sharing", share_at_evaluation=True)], world=world
        )
        score = "per-class-accuracy"  # whose table needs more than a sum over ranks
        found = [
            learner.evaluate(TEST, num_tasks=count, tasks_per_batch=4, score=score)
            for count in (2, 13)
        ]
        return [*found, learner.evaluate(TEST, num_tasks=16, tasks_per_batch=4)]

    expected = measure(ALONE)
    for found in on_ranks(measure):
        for one, two in zip(expected, found, strict=True):
            assert torch.equal(one.per_task, two.per_task)
            assert str(one.per_class) == str(two.per_class)
            assert (one.metric, one.inner_steps, one.transductive) == (
                two.metric,
                two.inner_steps,
                two.transductive,
            )


def test_every_rank_refuses_training_classes():
    class Named(Stream):
        identities = {"one": "1"}

    def measure(world):
        learner = problem().learner(world=world)
        learner.fit(Named(), iterations=2, tasks_per_batch=2)
        with pytest.raises(
            RequestError,
            match="draw on 1 of 1 classes that this learner is trained on, the first being 'one'",
        ):
            learner.evaluate(Named(split="test"), num_tasks=4)
        return learner.evaluate(
            Named(split="test"), num_tasks=4, allow_training_classes=True
        ).training_classes

    assert on_ranks(measure) == [1, 1]


def test_a_diverging_test_task_is_the_one_that_one_rank_names():
    def loss(prediction, target):
        return torch.nn.functional.cross_entropy(prediction, target) + torch.where(
            target.sum() == 6, torch.inf, 0.0
        )

    def measure(world):
        return (
            problem()
            .learner(loss=loss, world=world)
            .evaluate(TEST, num_tasks=24, tasks_per_batch=4)
        )

    with pytest.raises(
        RunError, match=r"evaluation task (4|5|6|7) has a query loss of NaN or Inf"
    ) as error:  # one of rank 1's
        measure(ALONE)
    assert [str(answer) for answer in on_ranks(measure)] == [str(error.value)] * 2


class Noisy(Plugin):
    """Random numbers wherever a plugin may draw them."""

    drawn = None

    @hookimpl
    def transform_tasks(self, batch, iteration, generator):
        self.drawn.append(torch.rand((), generator=generator))

    @hookimpl
    def transform_gradients(self, gradients, step):
        self.drawn.append(torch.rand(()))

    @hookimpl
    def transform_meta_gradients(self, gradients, iteration):
        return {
            name: gradient + torch.randn(gradient.shape, dtype=gradient.dtype)
            for name, gradient in gradients.items()
        }


def test_tasks_draw_other_numbers_on_every_rank_and_what_is_common_the_same():
    def draw(world):
        plugin = Noisy()
        plugin.drawn = []
        learner = problem().learner(plugins=[plugin], inner_steps=1, world=world)
        learner.fit(TRAIN, iterations=2, tasks_per_batch=4)
        return plugin.drawn, tensors_of(learner)

    (one, state), (two, other) = on_ranks(draw)
    assert len(one) == len(two) == 4
    assert not set(map(float, one)) & set(map(float, two))
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert list(map(float, one)) == list(
        map(float, draw(ALONE)[0])
    )  # rank 0 draws what one process does


def test_ranks_start_from_the_weights_of_rank_0():
    def start(world):
        learner = MetaLearner(
            problem("mlp", seed=world.rank).model,
            plugins=[plugins.make("meta-curvature")],
            world=world,
        )
        return tensors_of(learner)

    one, two = on_ranks(start)
    assert_close(
        two,
        tensors_of(
            MetaLearner(problem("mlp", seed=0).model, plugins=[plugins.make("meta-curvature")])
        ),
        rtol=0,
        atol=0,
    )
    assert_close(two, one, rtol=0, atol=0)


def test_three_ranks_load_what_one_saved_and_go_on(tmp_path):
    learner = problem().learner(plugins=["gradient-sharing"])
    learner.fit(TRAIN, iterations=2, tasks_per_batch=4)
    learner.save(tmp_path / "one.pt")

    def go_on(world):
        loaded = MetaLearner.load(tmp_path / "one.pt", model=problem().model, world=world)
        loaded.fit(TRAIN, iterations=2, tasks_per_batch=4)
        return tensors_of(loaded)

    expected = go_on(ALONE)
    for found in on_ranks(go_on, size=3):
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


# How ranks end.


def failure(answers):
    """The errors of two ranks, the first of which speaks for itself and the other repeats it."""
    assert all(isinstance(answer, RunError) for answer in answers)
    return sorted(answers, key=lambda error: isinstance(error, RankError))


def test_numbers_that_are_not_finite_on_one_rank_stop_all():
    def train_badly(world):
        learner = problem().learner(plugins=["gradient-sharing"], world=world)
        if world.rank == 1:
            learner.engine.inner.loss = lambda prediction, target: (
                torch.nn.functional.cross_entropy(prediction, target) * float("inf")
            )
        learner.fit(TRAIN, iterations=1, tasks_per_batch=4)

    found, repeated = failure(on_ranks(train_badly))
    assert str(found) == (
        "iteration 1 stopped, nothing was updated: the support loss holds NaN or Inf in 'loss' of "
        "all 2 tasks in iteration 1, "
        "inner step 0; the model's output was finite: see what the loss function computes"
    )
    assert str(repeated) == f"rank 1 ended the run: {found}"


def test_a_fault_of_one_rank_ends_the_others():
    class Faulty(Plugin):
        @hookimpl
        def transform_gradients(self, gradients):
            raise KeyError("x")

    def train_badly(world):
        listed = ["gradient-sharing", Faulty()] if world.rank == 1 else ["gradient-sharing"]
        MetaLearner(problem().model, plugins=listed, world=world).fit(
            TRAIN, iterations=1, tasks_per_batch=4
        )

    found, repeated = failure(on_ranks(train_badly))
    fault = (
        "plugin 'faulty' in transform_gradients (link 2 of 2, iteration 1, inner step 0) failed: "
        "KeyError: 'x'"
    )
    assert fault in plugins.placeless(found)
    assert str(repeated) == f"rank 1 ended the run: {found}"


def train_until(world, at, act):
    """Train; at iteration `at`, rank 1 does something else."""
    learner = problem().learner(plugins=["gradient-sharing"], world=world)
    for _ in learner.iterate(TRAIN, iterations=50, tasks_per_batch=4):
        if world.rank == 1 and learner.iteration == at:
            act()


def test_a_rank_that_is_killed_ends_the_others():
    """At once, as the closed connection tells, and not because the waiting timed out."""
    survivor, killed = on_ranks(
        lambda world: train_until(world, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    assert killed is None
    assert isinstance(survivor, RankError)
    assert str(survivor) == (
        "rank 0 of 2 lost another rank, whose process ended without a word, killed or out of "
        "memory: "
        "go on with --resume, on as many ranks as you like"
    )


def test_ranks_that_start_again_find_nothing_of_the_former_ones_in_the_store():
    """As torchrun starts them: it holds the store, and keeps it."""
    store, kept = kept_store()

    def end(world):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        world.any()

    for _ in range(2):
        survivor, killed = on_ranks(end, **kept)
        assert killed is None
        assert isinstance(survivor, RankError)
        assert str(survivor).startswith("rank 0 of 2 lost another rank")
    assert on_ranks(lambda world: world.gather(world.rank), size=3, **kept) == [[0, 1, 2]] * 3
    assert store.check(["metaplug/ask/1"])  # it was the store of all


def test_ranks_that_nobody_joins_end_in_time():
    _, kept = kept_store()
    [error] = on_ranks(World.any, size=1, timeout=1.0, **{**kept, "WORLD_SIZE": "2"})
    assert isinstance(error, RunError)
    assert str(error) == (
        "rank 0 of 2 does not reach the others (they have not come within 1 seconds): see that "
        "torchrun started all of them"
    )


def test_a_rank_that_hangs_ends_the_others_in_time():
    read, write = os.pipe()

    def act(world):
        try:
            train_until(world, 3, lambda: os.read(read, 1))  # hangs until rank 0 has ended
        finally:
            if world.rank == 0:
                os.write(write, b".")

    waiting, _ = on_ranks(act, timeout=3.0)
    os.close(read)
    os.close(write)
    assert isinstance(waiting, RankError)
    assert str(waiting) == (
        "rank 0 of 2 has waited for another rank in vain, which hangs or is slower than the limit "
        "(METAPLUG_RANK_TIMEOUT, else 600 "
        "seconds): go on with --resume, with a higher limit if it was only slow"
    )


def test_statistics_that_have_no_mean_over_ranks_are_refused():
    class Keeps(Plugin):
        kept = None

        @hookimpl
        def transform_gradients(self, gradients, step):
            step.keep("value", self.kept)

    def keep(of_ranks):
        def act(world):
            plugin = Keeps()
            plugin.kept = of_ranks[world.rank]
            return (
                problem()
                .learner(plugins=[plugin], world=world)
                .meta_gradients(shard(TRAIN.batch(0, range(4)), world))
            )

        return [str(error) for error in on_ranks(act)]

    assert keep([torch.zeros(2), torch.zeros(3)]) == [
        f"the ranks' plugins kept different statistics (rank {rank}: keeps.value ({rank + 2},) "
        f"torch.float32), which have no mean: "
        "keep the same names and shapes in every iteration"
        for rank in (0, 1)
    ]


def test_what_cannot_be_spread_is_refused():
    world = World(0, 2)
    with pytest.raises(RequestError) as error:
        next(iter(problem_of(world).iterate(TRAIN, iterations=1, tasks_per_batch=1)))
    assert str(error.value) == (
        "tasks_per_batch = 1 on 2 ranks: a rank without a task would only wait; give at least 2 "
        "tasks, or start fewer ranks"
    )
    loader = DataLoader([TRAIN.batch(0, [0])], collate_fn=list)
    for use in (
        lambda: problem_of(world).evaluate(loader),
        lambda: next(problem_of(world).iterate(loader, iterations=1)),
        lambda: next(problem_of(world).iterate(TRAIN, iterations=1, validation=loader)),
    ):
        with pytest.raises(RequestError) as error:
            use()
        assert str(error.value) == (
            "a DataLoader decides itself which tasks come next, so that 2 ranks would see the "
            "same: give a list of its tasks, a function (seed, iteration, index) that returns one, "
            "or the CombinationMetaDataset of a loader of torchmeta"
        )
    with pytest.raises(RequestError) as error:
        resolve_device("cuda:0", world)
    assert (
        str(error.value)
        == "device 'cuda:0' for 2 ranks: each needs a device of its own; give auto, cuda or cpu"
    )
    answers = on_ranks(
        lambda world: (
            problem().learner(
                plugins=[plugins.make("gradient-sharing", streaming=True)], world=world
            )
            and None
        )
    )
    assert [str(answer) for answer in answers] == [
        "plugin 'gradient-sharing': streaming = true on 2 ranks: each task must find what those "
        "before it have left, and these are on "
        "other ranks; use one rank, or leave streaming out"
    ] * 2


def test_a_compiled_step_cannot_wait_for_other_ranks():
    answers = on_ranks(
        lambda world: (
            problem().learner(plugins=["gradient-sharing"], compile=True, world=world) and None
        )
    )
    assert [str(answer) for answer in answers] == [
        "compile on 2 ranks: plugin 'gradient-sharing' takes means over all of their tasks in the "
        "inner loop, for which a compiled step "
        "cannot wait: leave compile out, or use one rank"
    ] * 2


def problem_of(world):
    """Make a learner that believes to be in `world`, without processes."""
    learner = problem().learner()
    learner.world = learner.engine.world = world
    return learner


def test_an_environment_that_is_not_whole_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(
            RequestError,
            match=r"^WORLD_SIZE = 2 asks for several processes, but .*RANK.*: start them with ",
        ),
        joined(),
    ):
        pass


def test_a_process_alone_is_a_world_that_exchanges_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world is ALONE
    assert (
        world.is_main,
        world.salt,
        world.share(3),
        world.any(True, False),
        world.tell(ValueError()),
    ) == (
        True,
        (),
        None,
        [True, False],
        True,
    )
    assert world.shard(range(5)) == range(5)
    assert [list(World(rank, 3).shard(range(5))) for rank in range(3)] == [[0, 3], [1, 4], [2]]
    x = torch.ones(2)
    assert world.sum(x) is x


# Runs.

TINY = {
    "plugins": ["gradient-sharing"],
    "model": {"name": "mlp", "settings": {"hidden": [4]}},
    "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
    "training": {
        "iterations": 12,
        "tasks_per_batch": 3,
        "validate_every": 4,
        "validation_tasks": 20,
        "test_tasks": 18,
    },
    "runtime": {"threads": 1, "device": "cpu"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of one process that was left alone."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(ExperimentConfig.model_validate(TINY), folder)
    return folder


def assert_close_runs(folder, expected):
    """Float32, over 12 iterations."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in expected.iterdir()
    )
    lines, others = read_metrics(folder), read_metrics(expected)
    assert len(lines) == len(others) == 12
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for key in ("outer_loss", "meta_gradient_norm", "meta_lr", "figures"):
            assert line[key] == pytest.approx(other[key], rel=1e-5)
        if "validation" in line:
            assert line["validation"]["mean"] == pytest.approx(
                other["validation"]["mean"], rel=1e-5
            )
    one, two = (json.loads((path / "summary.json").read_text()) for path in (folder, expected))
    assert one["test"]["mean"] == pytest.approx(two["test"]["mean"], rel=1e-5)
    assert one["best_validation"]["iteration"] == two["best_validation"]["iteration"]


def test_a_run_on_two_ranks_is_that_of_one(whole, tmp_path):
    called = []

    def act(world):
        summary = train(
            ExperimentConfig.model_validate(TINY),
            tmp_path / "run",
            world=world,
            on_record=lambda record: called.append(record.step.iteration),
        )
        return summary, list(called)

    (one, first), (two, second) = on_ranks(act)
    assert_close_runs(tmp_path / "run", whole)
    assert (first, second) == (list(range(1, 13)), [])
    assert one["ranks"] == json.loads((tmp_path / "run" / "summary.json").read_text())["ranks"] == 2
    assert json.loads((whole / "summary.json").read_text())["ranks"] == 1
    assert one["test"] == two["test"]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_run_that_lost_a_rank_goes_on_with_another_number_of_ranks(whole, tmp_path, killed):
    config = ExperimentConfig.model_validate(TINY)

    def act(world):
        asked = iter(range(1, 100))

        def stop():
            if next(asked) == 6 and world.rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        train(config, tmp_path / "run", world=world, stop=stop)

    answers = on_ranks(act)
    assert answers[killed] is None
    assert isinstance(answers[1 - killed], RankError)
    assert checkpoint.read(tmp_path / "run" / "last.safetensors")["iteration"] == 4
    if killed:
        train(config, tmp_path / "run", resume=True)
    else:
        on_ranks(lambda world: train(config, tmp_path / "run", resume=True, world=world), size=3)
    assert_close_runs(tmp_path / "run", whole)


def test_a_stop_on_any_rank_stops_all_after_the_same_iteration(whole, tmp_path):
    config = ExperimentConfig.model_validate(TINY)

    def act(world):
        asked = iter(range(1, 100))
        return train(
            config, tmp_path / "run", world=world, stop=lambda: next(asked) == 6 and world.rank == 1
        )

    assert on_ranks(act) == [None, None]
    assert checkpoint.read(tmp_path / "run" / "last.safetensors")["iteration"] == 6
    on_ranks(lambda world: train(config, tmp_path / "run", resume=True, world=world))
    assert_close_runs(tmp_path / "run", whole)


# The command line.

OPTIONS = shlex.split(
    "--tasks sinusoid --model mlp --shots 3 --queries 3 --inner-steps 1 --inner-lr 0.01 "
    "--tasks-per-batch 3 --iterations 4 --device cpu --name mine "
    "--set training.validate_every=2 --set training.test_tasks=18 "
    "--set model.settings.hidden=[4] --set runtime.threads=1"
)
ENDLESS = [*OPTIONS, "--iterations", "100000", "--set", "training.validate_every=100000"]


def command(*arguments):
    """Run a command on two ranks; return the exit status of each, and all that both wrote."""
    answers, words = forked(lambda: main([*map(str, arguments)]))
    return [getattr(answer, "code", answer) for answer in answers], words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_line_says_everything_once(folder):
    statuses, words = command("train", *OPTIONS)
    assert statuses == [0, 0]
    lines = words.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "maml (no plugins) on sinusoid, 3-shot, mlp, seed 0, cpu",
        "a new run in runs/mine",
        next(line for line in lines if line.startswith("memory: ")),
        "training: iteration 2",
        "training: iteration 4",
        next(line for line in lines if line.startswith("test mean squared error")),
        next(
            line
            for line in lines
            if line.endswith("which validated best; all of it is in runs/mine")
        ),
        "transductive: no",
    ]
    assert {path.name for path in Path("runs/mine").iterdir()} == {
        *(
            ".lock",
            "best.safetensors",
            "config.yaml",
            "curves.png",
            "last.safetensors",
            "metrics.jsonl",
            "run.json",
            "summary.json",
        )
    }
    statuses, words = command("evaluate", "runs/mine", "--num-tasks", 18, "--json")
    assert statuses == [0, 0]
    found = json.loads(words)
    assert found["mean"] == json.loads(Path("runs/mine/summary.json").read_text())["test"]["mean"]
    assert found["ranks"] == 2
    for arguments, status, said in [
        (
            ["train", *OPTIONS],
            2,
            "the run folder runs/mine already exists: give another --name or --out, or --resume to "
            "go on with it",
        ),
        (
            ["evaluate", "runs/nope"],
            2,
            "there is no run runs/nope: give the folder of a run that `metaplug train` has "
            "validated at least once",
        ),
        (
            ["train", "--iteration", "3"],
            2,
            "No such option: --iteration (Possible options: --iterations)",
        ),
        (["train", "--preset", "mamml"], 2, "unknown preset 'mamml': did you mean 'maml'?"),
        (
            ["compare", "--variant", "maml"],
            2,
            "metaplug compare on 2 ranks: it runs in one process; start it without torchrun, or "
            "train each variant with "
            "torchrun -m metaplug train",
        ),
    ]:
        statuses, words = command(*arguments)
        assert (statuses[0], words) == (status, f"metaplug: {said}\n")
        assert statuses[1] in (1, status)  # 1 where it only learned that rank 0 had ended
    assert (
        command("train", *OPTIONS, "--resume")[1].splitlines()[0] == "runs/mine is finished already"
    )


def torchrun(*arguments, restarts=3):
    """Start a command on two ranks by torchrun itself, and wait until it trains."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts"
    launch = [*launch.split(), f"{restarts}", "-m", "metaplug"]
    process = subprocess.Popen(
        [sys.executable, *launch, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics, deadline = Path("runs/mine/metrics.jsonl"), time.monotonic() + 300
    while time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            break
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_what_torchrun_started_with_a_checkpoint(folder, number):
    process = torchrun("train", *ENDLESS)
    process.send_signal(number)
    _, words = process.communicate(timeout=300)
    stopped = [line for line in words.splitlines() if re.match(r"stopping|metaplug:", line)]
    assert stopped == [
        f"stopping after this step{'; Ctrl-C again stops at once' * (number == signal.SIGINT)}",
        "metaplug: stopped, with a checkpoint in runs/mine: the same command with --resume goes on",
    ]
    assert checkpoint.read(folder / "runs/mine/last.safetensors")["iteration"] == len(
        read_metrics(folder / "runs/mine")
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_what_torchrun_started(folder):
    process = torchrun("train", *ENDLESS, restarts=0)
    ranks = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    _, words = process.communicate(timeout=300)
    assert process.returncode == 1
    [said] = [line for line in words.splitlines() if line.startswith("metaplug: ")]
    assert re.fullmatch(
        r"metaplug: rank 0 of 2 (lost another rank|was told to end).*: go on with --resume, on as "
        r"many ranks as you like",
        said,
    )
