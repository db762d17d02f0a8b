"""Scores: scikit-learn's definitions by plain loops, padding that does not count, and what is
refused before training."""

import json
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, RequestError, RunError, Score, TaskBatch
from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.score_names import ScoreName
from metaplug.evaluation.score_tasks import Scorer
from metaplug.evaluation.scores import SCORES, as_score, better, named, option_of
from metaplug.experiments.json_values import result_values
from metaplug.report.terminal import class_lines, result_line
from metaplug.testing import Stream, problem

TRAIN, TEST = Stream(), Stream(split="test")
FORMS = {
    "class indices": ("classification", (3,), ()),
    "dense": ("classification", (3, 2, 2), (2, 2)),
    "classes last": ("classification", (4, 3), (4,)),
    "labels": ("classification", (4,), (4,)),
    "numbers": ("regression", (2,), (2,)),
}
PAIRS = [
    (name, form)
    for form in FORMS
    for name, score in SCORES.items()
    if {
        "dense": "class indices",
        "classes last": "class indices",
        "labels": "labels of 0 and 1",
    }.get(form, form).replace("numbers", "real numbers")
    in score.forms
]


def drawn(form, seed, tasks=2, examples=5, ways=3):
    """Predictions (tasks, examples, *output) and targets, some of them ignored."""
    kind, output, target = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(tasks, examples, *output, generator=generator)
    shape = (tasks, examples, *target)
    if kind == "regression":
        return predictions, torch.randn(shape, generator=generator)
    if form == "labels":
        return predictions, torch.randint(2, shape, generator=generator).float()
    targets = torch.randint(ways, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.2
    ignored[:, 0] = False
    return predictions, targets.masked_fill(ignored, -100)


def scored(name, form, predictions, targets, sizes=None):
    return Scorer(SCORES[name], FORMS[form][0])(predictions, targets, sizes)


# Definitions, by plain loops over what scikit-learn's functions would be given.


def flat(form, predictions, targets):
    """What is predicted and what is true, one after the other, for one task."""
    if form == "classes last":
        predictions = predictions.movedim(-1, 1)
    guesses = predictions.argmax(1).flatten().tolist()
    pairs = zip(guesses, targets.flatten().tolist(), strict=True)
    return [(guess, true) for guess, true in pairs if true != -100]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def recall_score(pairs, each):
    return mean(guess == true for guess, true in pairs if true == each)


def balanced_accuracy_score(pairs):
    return mean(recall_score(pairs, each) for each in {true for _, true in pairs})


def jaccard_score(pairs):
    def one(each):
        union = sum(each in pair for pair in pairs)
        return sum(pair == (each, each) for pair in pairs) / union

    return mean(one(each) for each in {each for pair in pairs for each in pair})


@pytest.mark.parametrize("form", ["class indices", "dense", "classes last"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_of_class_indices_by_definition(form, seed):
    predictions, targets = drawn(form, seed)
    pairs = [flat(form, *task) for task in zip(predictions, targets, strict=True)]
    expected = {
        "accuracy": [mean(guess == true for guess, true in task) for task in pairs],
        "balanced-accuracy": [balanced_accuracy_score(task) for task in pairs],
        "per-class-accuracy": [balanced_accuracy_score(task) for task in pairs],
        "mean-iou": [jaccard_score(task) for task in pairs],
    }
    for name, values in expected.items():
        assert scored(name, form, predictions, targets).tolist() == pytest.approx(values, abs=1e-12)
    table = Scorer(SCORES["per-class-accuracy"], "classification").by_class(predictions, targets)
    for row, task in zip(table.tolist(), pairs, strict=True):
        present = {true for _, true in task}
        assert [not math.isnan(value) for value in row] == [each in present for each in range(3)]
        assert all(row[each] == recall_score(task, each) for each in present)


@pytest.mark.parametrize("form", ["class indices", "dense", "classes last"])
def test_perplexity_is_the_exponential_of_torchs_cross_entropy(form):
    predictions, targets = drawn(form, 0)
    moved = predictions.movedim(-1, 2) if form == "classes last" else predictions
    expected = [F.cross_entropy(*task).exp() for task in zip(moved, targets, strict=True)]
    found = scored("perplexity", form, predictions, targets)
    assert found.tolist() == pytest.approx([float(each) for each in expected], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_f1_is_that_of_scikit_learn(seed):
    predictions, targets = drawn("labels", seed, examples=3)
    predictions[..., 0], targets[..., 0] = -1, 0  # neither true nor predicted: 0

    def f1_score(pairs):
        hits = sum(guess and true for guess, true in pairs)
        wrong = sum(guess != true for guess, true in pairs)
        return 2 * hits / (2 * hits + wrong) if hits or wrong else 0.0

    def pairs(x, y):
        return list(zip((x > 0).flatten().tolist(), y.bool().flatten().tolist(), strict=True))

    tasks = list(zip(predictions, targets, strict=True))
    macro = [mean(f1_score(pairs(x[:, each], y[:, each])) for each in range(4)) for x, y in tasks]
    found = scored("macro-f1", "labels", predictions, targets)
    assert found.tolist() == pytest.approx(macro, abs=1e-12)
    micro = [f1_score(pairs(x, y)) for x, y in tasks]
    found = scored("micro-f1", "labels", predictions, targets)
    assert found.tolist() == pytest.approx(micro, abs=1e-12)


def test_labels_as_integers_are_one_logit_each_and_may_be_ignored():
    predictions = torch.tensor([[[1.0], [-1.0], [2.0]]])
    targets = torch.tensor([[1, 1, -100]])
    assert scored("accuracy", "labels", predictions, targets).tolist() == [0.5]
    assert scored("micro-f1", "labels", predictions, targets).tolist() == [2 / 3]


def test_a_single_output_is_a_class_where_the_model_says_so():
    """Of a task of one way, no logit: with a learner's cross-entropy, it is always right."""
    predictions, targets = torch.full((1, 3, 1), -2.0), torch.zeros(1, 3, dtype=torch.int64)
    accuracy = SCORES["accuracy"]
    assert Scorer(accuracy, "classification", outputs=1)(predictions, targets).tolist() == [1.0]
    model = nn.Linear(4, 1)
    nn.init.constant_(model.bias, -2)
    x = torch.zeros(1, 3, 4)
    learner = MetaLearner(model, inner_steps=1)
    assert learner.evaluate(Tasks(TaskBatch(x, targets, x, targets)), num_tasks=1).mean == 1.0


# Padding.


@pytest.mark.parametrize(("name", "form"), PAIRS)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4))
@settings(max_examples=12)
def test_a_padded_batch_gives_each_task_what_it_gets_alone(name, form, sizes):
    """Whatever stands in the padding, and in the outputs beyond a task's ways."""
    indices = form in ("class indices", "dense", "classes last")
    axis = {"class indices": 2, "dense": 2, "classes last": 3}.get(form)
    tasks, own, alone = [], [], []
    for seed, (examples, ways) in enumerate(sizes):
        predictions, y = drawn(form, seed, tasks=1, examples=examples, ways=ways)
        tasks.append(TaskBatch(torch.zeros(1, examples, 1), y, torch.zeros(1, examples, 1), y))
        own.append(predictions)
        narrow = predictions.narrow(axis, 0, ways) if indices else predictions
        scorer = Scorer(SCORES[name], FORMS[form][0], outputs=ways if indices else None)
        alone.append((scorer(narrow, y), scorer.by_class(narrow, y)))
    batch = TaskBatch.from_tasks(tasks, ways=[ways if indices else None for _, ways in sizes])
    most = batch.query_y.shape[1]
    rest = [each.new_full((1, most - each.shape[1], *each.shape[2:]), 7.0) for each in own]
    padded = torch.cat([torch.cat(pair, 1) for pair in zip(own, rest, strict=True)])
    scorer = Scorer(SCORES[name], FORMS[form][0], outputs=3 if indices else None)
    found = scorer(padded, batch.query_y, batch.sizes)
    assert found.tolist() == pytest.approx([float(values) for values, _ in alone], rel=1e-6)
    first = batch.tasks(slice(0, 1))  # whose predictions the engine does not pad
    short = scorer(own[0], first.query_y, first.sizes)
    assert short.tolist() == pytest.approx(found[:1].tolist())
    table = scorer.by_class(padded, batch.query_y, batch.sizes)
    for row, (_, expected) in zip([] if table is None else table, alone, strict=table is not None):
        count = expected.shape[1]
        torch.testing.assert_close(row[:count], expected[0], equal_nan=True)
        assert row[count:].isnan().all()


def test_a_function_of_ones_own_sees_no_padding():
    seen = []

    def median(predictions, targets):
        seen.append((tuple(predictions.shape), tuple(targets.shape)))
        return predictions.flatten(1).median(1).values + 0 * targets.sum(1)

    y = torch.tensor([[0, 1, 2]])
    small = TaskBatch(y, y, y, y)
    batch = TaskBatch.from_tasks([small, TaskBatch(*[y.repeat(1, 2)] * 4), small], ways=[3, 4, 3])
    found = Scorer(as_score(median, "classification"), "classification")(
        torch.randn(3, 6, 5), batch.query_y, batch.sizes
    )
    assert seen == [((2, 3, 3), (2, 3)), ((1, 6, 4), (1, 6))]
    assert (found.shape, found.dtype) == ((3,), torch.float64)


# Names, and scores of one's own.


def test_every_name_is_known_as_an_option_and_in_results():
    assert get_args(ScoreName) == tuple(SCORES)
    for name, score in SCORES.items():
        assert named(name) is named(score.name) is as_score(name, "classification") is score
        assert option_of(score) == name
        assert better(score.name, 2.0, 1.0) == score.more_is_better
        made = EvaluationResult(score.name, torch.ones(2).double(), 1)
        assert made.more_is_better == score.more_is_better
    assert [name for name in SCORES if not SCORES[name].more_is_better] == [
        "perplexity",
        "mean-squared-error",
    ]
    assert as_score(None, "regression") is SCORES["mean-squared-error"]


def refused(call, kind=RequestError):
    with pytest.raises(kind) as error:
        call()
    return str(error.value)


def test_what_is_no_score_is_refused():
    assert refused(lambda: problem().learner(score="f1")) == (
        "unknown score 'f1': known: 'accuracy', 'balanced-accuracy', 'per-class-accuracy', "
        "'micro-f1', 'macro-f1', 'mean-iou', 'perplexity', 'mean-squared-error'"
    )
    assert refused(lambda: problem().learner(score="macro-f")) == (
        "unknown score 'macro-f': did you mean 'macro-f1'?"
    )
    assert refused(lambda: problem().learner(score=3)) == (
        "score is a int: give one of accuracy, balanced-accuracy, per-class-accuracy, micro-f1, "
        "macro-f1, mean-iou, perplexity, mean-squared-error, a function (predictions, targets) → "
        "(tasks,), or a Score"
    )
    own = Score("Mean IoU", lambda predictions, targets: targets.sum(1))
    assert refused(lambda: problem().learner(score=own)) == (
        "the score 'Mean IoU' of your own has the name of one of metaplug's: call it otherwise, or "
        "give score='mean-iou'"
    )


def margin(predictions, targets):
    """How far the right logits are behind the largest."""
    chosen = predictions.gather(2, targets.unsqueeze(2)).squeeze(2)
    return (predictions.amax(2) - chosen).mean(1)


margin.more_is_better = False


def test_a_function_of_ones_own_has_its_name_interval_and_direction():
    learner = problem().learner(score=margin)
    fit = {"iterations": 3, "validate_every": 1, "validation_tasks": 8}
    history = learner.fit(TRAIN, validation=TEST, **fit)
    result = learner.evaluate(TEST, num_tasks=25)
    assert (result.metric, result.more_is_better) == ("margin", False)
    assert result.per_task.dtype == torch.float64
    low, high = result.bounds("bootstrap")
    assert low < result.mean < high
    means = [each.mean for _, each in history.validations]
    assert history.best[1].mean == min(means)
    line = result_line(result_values(result))
    assert line.startswith(f"margin {result.mean:.4f} ± {result.interval:.4f} (95 % interval")
    upwards = Score("margin", margin, more_is_better=True)
    assert problem().learner(score=upwards).evaluate(TEST, num_tasks=2).more_is_better


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (
            lambda predictions, targets: predictions.mean(2),
            "score 'own' gives a tensor of shape (1, 4) for 1 tasks: return one number for each, "
            "of shape (1,)",
        ),
        (
            lambda predictions, targets: 0.5,
            "score 'own' gives a float for 1 tasks: return one number for each, of shape (1,)",
        ),
        (
            lambda predictions, targets: {}["x"],
            "score 'own' fails on predictions of shape (1, 4, 3) and targets of shape (1, 4) "
            "(KeyError: 'x'): correct its function",
        ),
    ],
)
def test_a_function_that_gives_something_else_is_refused_before_training(function, text):
    learner = problem().learner(score=Score("own", function))
    before = {name: each.clone() for name, each in learner.model.state_dict().items()}
    fit = {"iterations": 2, "validation": TEST, "validation_tasks": 2}
    assert refused(lambda: learner.fit(TRAIN, **fit)) == text
    assert learner.iteration == 0
    assert all(torch.equal(each, before[name]) for name, each in learner.model.state_dict().items())
    assert len(learner.fit(TRAIN, iterations=1)) == 1, "without a validation nothing is scored"


def test_a_score_that_is_not_finite_stops_or_is_passed_over():
    learner = problem().learner(score=Score("own", lambda x, y: x.flatten(1).mean(1) / 0))
    text = (
        "score 'own' of evaluation task 0 is NaN or Inf, while its query loss is finite: choose a "
        "score that is finite for every task"
    )
    assert refused(lambda: learner.evaluate(TEST, num_tasks=3), RunError) == text
    with pytest.warns(UserWarning, match=r"^the validation after iteration 1 counts for nothing: "):
        fit = {"iterations": 1, "validation_tasks": 2, "non_finite": "skip"}
        history = learner.fit(TRAIN, validation=TEST, **fit)
    assert math.isnan(history.validations[0][1].mean)


# Where a score is chosen, and refused.


class Tasks:
    """One batch of tasks, whatever is asked for."""

    split = "test"

    def __init__(self, batch):
        self.one = batch

    def batch(self, iteration, indices):
        rows = [index % self.one.num_tasks for index in indices]
        return self.one.map(lambda each: each[rows])


def of_labels(y, outputs=2):
    """A learner and its tasks, of these targets (n, ...) and a loss of one's own."""
    torch.manual_seed(0)
    x = torch.randn(1, len(y), 4)
    batch = TaskBatch(x, y.unsqueeze(0), x, y.unsqueeze(0))
    loss = F.binary_cross_entropy_with_logits
    return MetaLearner(nn.Linear(4, outputs), loss=loss, inner_steps=1), Tasks(batch)


SOFT = (
    "but the targets are real numbers, float32 of shape (2,) an example: give mean-squared-error, "
    "or a function of your own"
)


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        (
            "micro-f1",
            lambda: (problem().learner(), TEST),
            "score 'micro F1' is for labels of 0 and 1, but the targets are class indices, int64 "
            "of shape () an example: give accuracy, balanced-accuracy, per-class-accuracy, "
            "mean-iou, perplexity, or a function of your own",
        ),
        (
            "perplexity",
            lambda: of_labels(torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
            "score 'perplexity' is for class indices, but the targets are labels of 0 and 1, "
            "float32 of shape (2,) an example: give accuracy, micro-f1, macro-f1, or a function of "
            "your own",
        ),
        (
            None,
            lambda: of_labels(torch.tensor([[0.2, 1.0], [1.0, 1.0]])),
            f"score 'accuracy' is for class indices or labels of 0 and 1, {SOFT}",
        ),
        (
            "accuracy",
            lambda: (problem("regression").learner(), Stream("regression", split="test")),
            "score 'accuracy' is for class indices or labels of 0 and 1, but the targets are real "
            "numbers, float64 of shape (2,) an example: give mean-squared-error, or a function of "
            "your own",
        ),
        (
            "mean-squared-error",
            lambda: (problem().learner(), TEST),
            "score 'mean squared error' is for real numbers, but the targets are class indices, "
            "int64 of shape () an example: give accuracy, balanced-accuracy, per-class-accuracy, "
            "mean-iou, perplexity, or a function of your own",
        ),
    ],
)
def test_targets_that_a_score_is_not_for_are_refused(name, make, text):
    learner, tasks = make()
    assert refused(lambda: learner.evaluate(tasks, num_tasks=1, score=name)) == text
    learner.evaluator.score = as_score(name, learner.kind)
    assert refused(lambda: learner.fit(tasks, iterations=1, validation=tasks)) == text
    assert learner.iteration == 0


def test_predictions_that_do_not_fit_labels_are_refused():
    score = Scorer(SCORES["accuracy"], "classification")
    assert refused(lambda: score(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))) == (
        "predictions of shape (3,) an example cannot be scored with targets of float32 of shape "
        "(4,) an example: answer in the targets' shape, beside class indices with an axis of "
        "classes first or last, or give a score of your own"
    )


@pytest.mark.parametrize("metrics_every", [1, 3])
def test_looking_at_the_score_before_training_changes_nothing(metrics_every):
    def trained(**options):
        learner = problem().learner(metrics_every=metrics_every)
        history = learner.fit(TRAIN, iterations=3, **options)
        return learner, [record.step.outer_loss for record in history]

    (looked, losses), (plain, expected) = trained(validation=TEST, validation_tasks=2), trained()
    assert losses == expected
    for one, other in zip(looked.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_learner_scores_as_it_is_told_and_remembers_it(tmp_path):
    learner = problem().learner(score="balanced-accuracy")
    learner.fit(TRAIN, iterations=1)
    result = learner.evaluate(TEST, num_tasks=4)
    assert result.metric == "balanced accuracy"
    assert learner.evaluate(TEST, num_tasks=4, score="perplexity").metric == "perplexity"
    learner.save(tmp_path / "learner")
    loaded = MetaLearner.load(tmp_path / "learner", model=problem().model)
    assert torch.equal(loaded.evaluate(TEST, num_tasks=4).per_task, result.per_task)
    state = learner.state_dict()
    del state["score"]
    learner.load_state_dict(state)  # of an older version


def test_accuracy_by_class_is_a_table():
    learner = problem().learner(score="per-class-accuracy")
    result = learner.evaluate(TEST, num_tasks=6, tasks_per_batch=4)
    assert result.per_class.shape == (6, 3)
    assert torch.equal(result.per_task, result.per_class.nanmean(1))
    balanced = learner.evaluate(TEST, num_tasks=6, score="balanced-accuracy")
    assert torch.equal(result.per_task, balanced.per_task)
    assert "by_class" not in result_values(balanced)
    values = json.loads(json.dumps(result_values(result)))
    for row, line in zip(values["by_class"], class_lines(values), strict=True):
        column = result.per_class[:, row["class"]]
        own = column[~column.isnan()]
        assert row["mean"] == pytest.approx(float(own.mean()))
        assert line == (
            f"class {row['class']}: {row['mean']:.2%}"[:-1]
            + f" ± {100 * row['interval']:.2f} % ({len(own)} tasks)"
        )


def test_a_learner_scores_tasks_of_different_sizes_as_each_alone():
    torch.manual_seed(0)

    def task(shots, ways, queries):
        def part(count):
            x = torch.randn(1, count, 4, dtype=torch.float64)
            return x, torch.arange(count).remainder(ways).unsqueeze(0)

        return TaskBatch(*part(shots), *part(queries))

    tasks = [task(6, 3, 5), task(4, 2, 3), task(6, 3, 5), task(5, 5, 7)]

    class Ragged:
        split = "test"

        def batch(self, iteration, indices):
            return TaskBatch.from_tasks([tasks[index % 4] for index in indices])

    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5)).double()
    learner = MetaLearner(model, inner_steps=2, inner_lr=0.1, score="per-class-accuracy")
    learner.fit(Ragged(), iterations=1, validation=Ragged(), validation_tasks=4)
    together = learner.evaluate(Ragged(), num_tasks=4)
    alone = learner.evaluate(Ragged(), num_tasks=4, tasks_per_batch=1)
    torch.testing.assert_close(together.per_class, alone.per_class, equal_nan=True)
    assert torch.isnan(together.per_class[:3, 3:]).all()
    together, alone = (
        learner.evaluate(Ragged(), num_tasks=4, tasks_per_batch=size, score="perplexity")
        for size in (4, 1)
    )
    torch.testing.assert_close(together.per_task, alone.per_task, rtol=1e-10, atol=0)
