"""A learner trains and measures on a user's own tasks, whatever form they are given in."""

from collections import Counter
from itertools import cycle, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.ranks import on_ranks
from torch.utils.data import DataLoader

from metaplug import RequestError, RunError, TaskBatch
from metaplug.tasks.adapters import training_stream
from metaplug.testing import Stream, assert_close, problem

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

STREAM = Stream()
TASKS = [STREAM.batch(0, [number]) for number in range(6)]
TUPLES = [tuple(x[0] for x in task.tensors()) for task in TASKS]


def weights(learner):
    return torch.cat([each.detach().flatten() for each in learner.model.parameters()])


def same(one, other):
    return torch.equal(weights(one), weights(other))


@given(st.data())
def test_a_list_is_the_function_that_gives_its_tasks_bit_for_bit_resumed_as_well(data):
    tasks = TASKS[: data.draw(st.integers(1, 6), label="tasks")]
    size = data.draw(st.integers(1, len(tasks)), label="tasks_per_batch")
    iterations = data.draw(st.integers(1, 4), label="iterations")
    cut = data.draw(st.integers(0, iterations), label="cut")
    settings = {"seed": data.draw(st.integers(0, 9)), "metrics_every": data.draw(st.integers(1, 3))}

    def function(seed, iteration, index):
        return training_stream(tasks, seed, size).batch(iteration, [index])

    whole, by_function, resumed = (problem().learner(**settings) for _ in range(3))
    rest = {"iterations": iterations - cut, "total": iterations, "tasks_per_batch": size}
    whole.fit(tasks, iterations=iterations, tasks_per_batch=size)
    by_function.fit(function, iterations=cut, total=iterations, tasks_per_batch=size)
    resumed.load_state_dict(by_function.state_dict())
    by_function.fit(function, **rest)
    resumed.fit(tasks, **rest)
    assert same(whole, by_function)
    assert same(whole, resumed)


def test_every_form_of_the_same_tasks_measures_the_same():
    learner = problem().learner()
    batch = TaskBatch.stack(TASKS)
    wanted = learner.evaluate(TASKS)
    assert wanted.num_tasks == 6
    for tasks in (
        batch,
        [batch.tasks(slice(0, 4)), batch.tasks(slice(4, 6))],
        TUPLES,
        (task for task in TASKS),
        DataLoader(TUPLES, batch_size=4),
        DataLoader(TUPLES, batch_size=4, collate_fn=list),
        DataLoader(TASKS, batch_size=4, collate_fn=TaskBatch.stack),
        DataLoader(TASKS, batch_size=None),
        dict(enumerate(TASKS)).values(),
    ):
        assert torch.equal(learner.evaluate(tasks).per_task, wanted.per_task)
    for tasks in (cycle(TASKS), DataLoader(TUPLES, batch_size=4), TASKS, STREAM, function):
        result = learner.evaluate(tasks, num_tasks=5, tasks_per_batch=2)
        assert torch.equal(result.per_task, wanted.per_task[:5])


def function(seed, iteration, index):
    return TUPLES[index % 6]


def test_what_has_no_last_task_is_measured_on_600_and_validated_on_200():
    learner = problem().learner()
    assert learner.evaluate(function).num_tasks == 600
    for tasks, count in ((function, 200), (TASKS, 6), (DataLoader(TUPLES, batch_size=4), 6)):
        history = learner.fit(STREAM, iterations=1, tasks_per_batch=1, validation=tasks)
        assert history.validations[0][1].num_tasks == count


def test_validations_of_a_loader_that_shuffles_measure_the_same_tasks():
    learner = problem().learner(meta_lr=1e-12)
    loader = DataLoader(TUPLES, batch_size=1, shuffle=True)
    given = {"validation": loader, "validate_every": 1, "validation_tasks": 4}
    history = learner.fit(loader, iterations=4, tasks_per_batch=2, **given)
    first, *others = [result.per_task for _, result in history.validations]
    assert len(others) == 3
    assert all(torch.equal(first, other) for other in others)


def test_a_generator_goes_on_where_it_stopped_and_says_where_it_ended():
    once, twice = problem().learner(), problem().learner()
    once.fit(iter(TASKS), iterations=3, tasks_per_batch=2)
    tasks = iter(TASKS)
    twice.fit(tasks, iterations=1, total=3, tasks_per_batch=2)
    twice.fit(tasks, iterations=2, total=3, tasks_per_batch=2)
    assert same(once, twice)
    for metrics_every in (1, 3):
        learner = problem().learner(metrics_every=metrics_every)
        with pytest.raises(RunError) as error:
            learner.fit((task for task in TASKS), iterations=9, tasks_per_batch=4)
        assert str(error.value) == (
            "iteration 2 needs 4 tasks, but the generator ended after 6 in this call: give an "
            "endless one, or a list, whose tasks come epoch after epoch"
        )
        assert learner.iteration == 1


def test_an_iterable_that_starts_anew_in_a_later_fit_says_so():
    learner = problem().learner()
    loader = DataLoader(TUPLES, batch_size=4)
    learner.fit(loader, iterations=2, tasks_per_batch=4)
    with pytest.warns(UserWarning) as warned:
        learner.fit(loader, iterations=1, tasks_per_batch=4)
    assert [str(each.message) for each in warned] == [
        "training goes on at iteration 3, but a DataLoader does not say where it stopped: its "
        "tasks start anew"
    ]
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda learner: learner.fit(TASKS, iterations=1),
            "tasks_per_batch = 8 with 6 tasks: some would count twice in every meta-batch; give "
            "tasks_per_batch=6 or less, or more tasks",
        ),
        (
            lambda learner: learner.evaluate(TASKS, num_tasks=7),
            "num_tasks = 7, but the list has 6 tasks: give at most 6, or leave num_tasks out",
        ),
        (
            lambda learner: learner.evaluate(DataLoader(TUPLES), num_tasks=7),
            "num_tasks = 7, but the DataLoader has 6 tasks: give at most 6, or leave num_tasks out",
        ),
        (
            lambda learner: learner.evaluate(TASKS, num_tasks=0),
            "num_tasks = 0: give at least 1",
        ),
        (
            lambda learner: learner.fit(STREAM, iterations=1, validation=TASKS, validation_tasks=7),
            "validation_tasks = 7, but the list has 6 tasks: give at most 6, or leave "
            "validation_tasks out",
        ),
        (
            lambda learner: learner.fit(STREAM, iterations=1, validation=(each for each in TASKS)),
            "validation is a generator, which gives each of its tasks once, but all validations "
            "have to measure the same: give list(itertools.islice(validation, 200))",
        ),
        (
            lambda learner: learner.evaluate(cycle([TASKS[0]])),
            "num_tasks says nothing, and the cycle has more than 10000 tasks, if it ever ends: "
            "give num_tasks",
        ),
        (
            lambda learner: learner.evaluate(islice(TASKS, 0), num_tasks=2),
            "the islice gives no task: give it at least one, or make it anew if it gave them "
            "before",
        ),
    ],
)
def test_what_cannot_be_measured_or_trained_on_is_refused_at_once(call, message):
    learner = problem().learner()
    with pytest.raises(RequestError) as error:
        call(learner)
    assert str(error.value) == message
    assert learner.iteration == 0


def test_two_ranks_share_a_list_and_a_function():
    def trained(world):
        learner, other = (problem().learner(world=world) for _ in range(2))
        learner.fit(TASKS, iterations=2, tasks_per_batch=5)
        other.fit(function, iterations=2, tasks_per_batch=5)
        return weights(learner), weights(other), learner.evaluate(TASKS).per_task

    alone = trained(problem().learner().world)
    for found in on_ranks(trained):
        for one, other in zip(found, alone, strict=True):
            assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_list_is_shuffled_anew_every_epoch_by_the_seed():
    def order(seed, epochs=6, size=3):
        stream = training_stream(TASKS, seed, size)
        batches = [stream.batch(iteration, range(size)) for iteration in range(2 * epochs)]
        drawn = [float(x) for batch in batches for x in batch.support_x[:, 0, 0]]
        return [tuple(drawn[start : start + 6]) for start in range(0, len(drawn), 6)]

    firsts = Counter(float(task.support_x[0, 0, 0]) for task in TASKS)
    assert all(Counter(epoch) == firsts for epoch in order(0))
    assert len({*order(0), *order(1)}) > 10
    assert order(0) == order(0)
