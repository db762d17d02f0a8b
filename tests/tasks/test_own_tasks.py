"""One task in each form that a user may give it, and what is no task."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from metaplug import RequestError, TaskBatch
from metaplug.contract.task_sizes import TaskSize
from metaplug.tasks import Sinusoid
from metaplug.tasks.adapters import training_stream
from metaplug.tasks.own.items import batches_of, split
from metaplug.tasks.own.promises import Promises, promises_of
from metaplug.testing import Stream

FORM = "(support_x, support_y, query_x, query_y)"


def task(support=2, query=3, width=4, fill=0.0):
    """One task as a tuple, of 3 classes."""
    x = [torch.full((count, width), fill) for count in (support, query)]
    y = [torch.arange(count) % 3 for count in (support, query)]
    return x[0], y[0], x[1], y[1]


def refused(make):
    with pytest.raises(RequestError) as error:
        make()
    return str(error.value)


def first(tasks, count=1):
    """The first batch of tasks to train on."""
    return training_stream(tasks, 0, count).batch(0, range(count))


def equal(one, other):
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return one.sizes == other.sizes and all(torch.equal(*pair) for pair in pairs)


# The forms of a task.


def test_a_batch_gives_its_tasks_one_by_one_without_their_padding():
    one, two = (TaskBatch(*(x[None] for x in task(*sizes))) for sizes in ((2, 3), (4, 5)))
    batch = TaskBatch.from_tasks([one, two], ways=[None, 3])
    first, second = split(batch)
    assert equal(first, one)
    assert (second.support_x.shape, second.sizes) == ((1, 4, 4), (TaskSize(4, 5, 3),))


def test_several_inputs_are_a_mapping_or_a_tuple():
    x, y, query_x, query_y = task()
    named = ({"ids": x, "mask": x}, y, {"ids": query_x, "mask": query_x}, query_y)
    placed = ((x, x), y, (query_x, query_x), query_y)
    for given in (named, placed):
        [alone] = batches_of(given, "it")
        assert [*map(len, alone.tensors())] == [1] * 6
        collated = next(iter(DataLoader([given] * 3, batch_size=3)))
        [batch] = batches_of(collated, "it")
        assert batch.num_tasks == 3
        assert all(equal(each, alone) for each in split(batch))


def test_tasks_of_other_sizes_are_joined_and_count_in_all_outputs():
    tasks = [task(2, 3), task(4, 1), task(1, 5)]
    batch = first(tasks, 3)
    assert batch.support_x.shape == (3, 4, 4)
    assert sorted(batch.sizes) == [TaskSize(1, 5), TaskSize(2, 3), TaskSize(4, 1)]
    assert first(DataLoader(tasks, collate_fn=list, batch_size=2), 2).sizes == (
        TaskSize(2, 3),
        TaskSize(4, 1),
    )


def test_a_batch_of_the_right_number_is_handed_on_as_it_is():
    batch = TaskBatch.stack([TaskBatch(*(x[None] for x in task(fill=float(n)))) for n in range(3)])
    stream = training_stream(iter([batch] * 3), 0, 3)
    assert stream.batch(0, range(3)) is batch
    drawn = [stream.batch(1, range(2)), stream.batch(2, range(4))]
    assert [each.support_x[:, 0, 0].tolist() for each in drawn] == [[0, 1], [2, 0, 1, 2]]


class Numbered:
    """A map-style data set of tasks, each filled with its number."""

    def __len__(self):
        return 5

    def __getitem__(self, number):
        return task(fill=float(number))


class Lazy(IterableDataset):
    def __iter__(self):
        return iter([task(), task()])


def test_a_data_set_reads_what_is_asked_for():
    batch = first(Numbered(), 5)
    assert sorted(batch.support_x[:, 0, 0].tolist()) == [0, 1, 2, 3, 4]
    assert first(Lazy(), 3).num_tasks == 3  # in its second epoch


def test_each_form_says_what_it_promises():
    everything, nothing = Promises(), Promises(False, False, False)
    for tasks in ([task()], Numbered(), lambda seed, iteration, index: task(), Sinusoid().train):
        assert promises_of(training_stream(tasks, 0, 1)) == everything
    for tasks in (iter([task()]), DataLoader([task()]), Lazy()):
        assert promises_of(training_stream(tasks, 0, 1)) == nothing


def test_a_function_gets_the_seed_the_iteration_and_the_index():
    asked = []

    def function(seed, iteration, index):
        asked.append((seed, iteration, index))
        return task(fill=float(index))

    stream = training_stream(function, 7, 4)
    assert stream.batch(2, [1, 3]).support_x[:, 0, 0].tolist() == [1, 3]
    stream.batch(3, [1])
    assert asked == [(7, 2, 1), (7, 2, 3), (7, 2, 1), (7, 3, 1)], "the first is asked for twice"


def test_a_tuple_is_one_task_wherever_its_shapes_allow_no_other_reading():
    points, tokens = torch.zeros(10, 1), torch.zeros(6, 8, dtype=torch.long)
    images, masks = torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.long)
    for x, y in ((points, points), (tokens, tokens), (images, masks)):
        [alone] = batches_of((x, y, x, y), "it")
        assert alone.num_tasks == 1


# What is refused.

Episode = namedtuple("Episode", ["support_x", "support_y", "query_x", "query_y"])


def unsteady(seed, iteration, index):
    x, y, query_x, query_y = task()
    return x, y, torch.rand_like(query_x), query_y


def endless(seed):
    yield task()


def three(seed, iteration, index):
    yield task()


class Random(Numbered):
    def __getitem__(self, number):
        return unsteady(0, 0, number)


class Empty(Numbered):
    def __len__(self):
        return 0


class Spent:
    """An iterable that cannot be started anew."""

    def __init__(self):
        self.tasks = iter([task()])

    def __iter__(self):
        return self.tasks


NO_TASKS = (
    "give a stream, such as the train, val or test of a task source; a list, a DataLoader or "
    "another iterable of tasks; or a function (seed, iteration, index) that returns one"
)
NO_TASK = f"which is no task: give a TaskBatch, or a plain tuple {FORM}"
PAIRS = (
    "which is no task: let metaplug.tasks.LabelledTasks.from_dataset draw tasks from a data set of "
    f"examples (x, y), or give a TaskBatch, or a plain tuple {FORM}"
)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, f"tasks of type NoneType are no tasks: {NO_TASKS}"),
        ("omniglot", f"tasks of type str are no tasks: {NO_TASKS}"),
        (3, f"tasks of type int are no tasks: {NO_TASKS}"),
        (
            Stream,
            "tasks are the class Stream, which has none before it is called: give an instance, "
            "Stream(...)",
        ),
        (
            Sinusoid(),
            "tasks are the source Sinusoid, whose splits are apart: give its train, val or test",
        ),
        (
            torch.zeros(8, 5),
            "tasks are a Tensor of shape (8, 5), which does not say what is support and what is "
            f"query: give a list of tuples {FORM}, or images and labels to "
            "metaplug.tasks.LabelledTasks",
        ),
        (
            np.zeros(8),
            "tasks are a ndarray of shape (8,), which does not say what is support and what is "
            f"query: give a list of tuples {FORM}, or images and labels to "
            "metaplug.tasks.LabelledTasks",
        ),
        (
            {"train": [task()]},
            "tasks are a dict of 1, and a mapping has no first task: give list(tasks.values()), or "
            "one of its values",
        ),
        (
            task(),
            "tasks are a tuple of 4 with a tensor in it, which is one task at most: give a list of "
            f"tuples {FORM}",
        ),
        ([], "the list gives no task: give it at least one"),
        (Empty(), "the Empty gives no task: give it at least one"),
        (
            DataLoader([task()], batch_size=2, drop_last=True),
            "the DataLoader gives no task: give it a smaller batch_size, or no drop_last, or more "
            "tasks",
        ),
        ([1, 2], f"item 0 of the list is of type int, {NO_TASK}"),
        ([task(), task()[:3]], f"item 1 of the list is a tuple of 3, {NO_TASK}"),
        ([{"x": 1}], f"item 0 of the list is a dict of 1, {NO_TASK}"),
        ([Episode(*task())], f"item 0 of the list is a Episode of 4, {NO_TASK}"),
        ([task()[:2]], f"item 0 of the list is a tuple of 2, {PAIRS}"),
        (
            DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4))),
            f"item 0 of the DataLoader is a list of 2, {PAIRS}",
        ),
        (
            [tuple(x.numpy() for x in task())],
            "item 0 of the list: TaskBatch: support_x is a ndarray, not a tensor: give "
            "torch.as_tensor(support_x)",
        ),
        (
            [(*task()[:3], torch.zeros(9).long())],
            "item 0 of the list: TaskBatch: query_x is float32 of shape (1, 3, 4) and query_y "
            "int64 of shape (1, 9), which do not fit: give one target for every example",
        ),
        (
            [list(task())],
            f"item 0 of the list is a list {FORM}, so a batch of tasks, but support_x has shape "
            "(2, 4), which leaves no axis of tasks: give one task as a tuple or a TaskBatch",
        ),
        (
            [tuple(x[None] for x in task())],
            f"item 0 of the list is a tuple {FORM} with support_x of shape (1, 2, 4) and support_y "
            "of shape (1, 2), which may be one task or many: give a TaskBatch, whose first axis is "
            "that of tasks",
        ),
        (
            [(torch.zeros(3, 5, 1),) * 2 + (torch.zeros(3, 7, 1),) * 2],
            f"item 0 of the list is a tuple {FORM} with support_x of shape (3, 5, 1) and support_y "
            "of shape (3, 5, 1), which may be one task or many: give a TaskBatch, whose first axis "
            "is that of tasks",
        ),
        (
            DataLoader([task()], batch_size=None),
            "the DataLoader with batch_size=None makes lists of tuples, so that a task cannot be "
            "told from a batch: give it batch_size=1, or let its data set give TaskBatch",
        ),
        (
            DataLoader([task(2), task(1)], batch_size=2),
            "the DataLoader cannot join its tasks (stack expects each tensor to be equal size, but "
            "got [2, 4] at entry 0 and [1, 4] at entry 1): give it collate_fn=list, which leaves "
            "them apart",
        ),
        (
            Spent(),
            "the Spent gave 1 task, and none when it was started anew: let its __iter__ make a "
            "new iterator each time, or give a list of its tasks",
        ),
        (
            Random(),
            "item 1 of the Random has another query_x when it is read once more, so no run could "
            "be repeated: draw by the index that it is given, or give DataLoader(dataset, "
            "collate_fn=list), of which nothing is promised",
        ),
        (
            unsteady,
            "the function unsteady returns another query_x when it is called once more with "
            "(seed, iteration, index) = (0, 0, 0), so no run could be repeated: draw by these "
            "three alone",
        ),
        (
            endless,
            "the function endless(seed) cannot be called with (seed, iteration, index): give "
            "endless(), the generator that it makes",
        ),
        (
            refused,
            "the function refused(make) cannot be called with (seed, iteration, index): define "
            "refused(seed, iteration, index), which returns the task of these numbers",
        ),
        (three, f"task 0 of iteration 1 of the function three is of type generator, {NO_TASK}"),
        (
            lambda seed, iteration, index: [task(), task()],
            "task 0 of iteration 1 of the function <lambda> is 2 tasks, but a number stands for "
            "one: give the task of that number alone",
        ),
    ],
)
def test_what_holds_no_tasks_is_refused(tasks, message):
    assert refused(lambda: first(tasks, 2 if isinstance(tasks, Spent) else 1)) == message
