"""The trial of a model: what it keeps in forward, its hooks, sleeping layers and loss.

Models that keep something, or whose layers sleep without a difference, are exact; what matters
later is refused.
"""

import copy
import types

import numpy as np
import pytest
import torch
from test_guards import body
from test_silently_wrong import BATCH, double, exactly, learner_of, off
from torch import nn
from torch.nn import functional as F

from metaplug import RequestError
from metaplug.checks.refuse_memory import REMEMBERS, WRITES
from metaplug.testing import Stream


class Keeping(nn.Module):
    """A model of which a test writes the beginning and what is done with the input, with the hidden
    layer and with the output."""

    def __init__(self, begin=None, before=None, between=None, after=None):
        super().__init__()
        self.layers = body()
        self.steps = before, between, after
        if begin:
            begin(self)

    def forward(self, x):
        before, between, after = self.steps
        x = before(self, x) if before else x
        hidden = torch.tanh(self.layers[0](x))
        if between:
            between(self, hidden)
        output = self.layers[2](hidden)
        return after(self, output) if after else output


def setting(**values):
    def begin(model):
        for name, value in values.items():
            setattr(model, name, copy.copy(value))  # no two tests share a container

    return begin


def storing(name, make):
    return lambda model, value: setattr(model, name, make(value))


def counts(model, hidden):
    model.calls += 1


def counts_from_nothing(model, hidden):
    model.calls = getattr(model, "calls", 0) + len(hidden)


def masked(model, x):
    if model.mask is None:
        model.mask = torch.ones(x.shape[-1], dtype=x.dtype)
    return x * model.mask


def like_the_input(model, x):
    if model.size != len(x):
        model.size, model.mask = len(x), torch.ones_like(x)
    return x * model.mask


def placed(model, x):
    if len(x) > model.longest:
        model.longest, model.places = len(x), torch.zeros(len(x), 1, dtype=x.dtype)
    return x + model.places[: len(x)]


def by_size(model, x):
    if len(x) != model.size:
        model.size, model.places = len(x), torch.zeros(len(x), 1, dtype=x.dtype)
    return x + model.places


def mean_kept(name, put=setattr, get=getattr):
    """A running mean that training keeps, too slow for a few passes to show it."""

    def keep(model, hidden):
        if model.training:
            put(model, name, 0.9999 * get(model, name) + 0.0001 * hidden.detach().mean())

    return keep


def masked_in_training(model, x):
    if model.training or model.mask is None:
        model.mask = torch.ones(x.shape[-1], dtype=x.dtype)
    return x * model.mask


HARMLESS = {
    "shapes": (setting(seen=()), None, storing("seen", lambda hidden: tuple(hidden.shape))),
    "a size": (setting(n=0), None, storing("n", len)),
    "a size, None at first": (setting(n=None), None, storing("n", len)),
    "a size that was not there": (None, None, storing("n", len)),
    "a text": (setting(last=""), None, storing("last", lambda hidden: str(hidden.dtype))),
    "features with their graph": (
        setting(features=None),
        None,
        storing("features", lambda hidden: hidden),
    ),
    "features": (None, None, storing("features", torch.Tensor.detach)),
    "a number of the features": (
        setting(norm=0.0),
        None,
        storing("norm", lambda hidden: hidden.detach().norm().item()),
    ),
    "a dictionary": (
        setting(kept={}),
        None,
        lambda model, hidden: model.kept.update(hidden=hidden),
    ),
    "a list": (setting(kept=[]), None, lambda model, hidden: model.kept.append(hidden)),
    "a mean that nothing reads": (setting(mean=torch.zeros(())), None, mean_kept("mean")),
    "features of evaluation": (
        setting(features=None),
        None,
        lambda model, hidden: None if model.training else setattr(model, "features", hidden),
    ),
    "a mask of training that evaluation reads": (setting(mask=None), masked_in_training, None),
    "a number of calls": (setting(calls=0), None, counts),
    "a number of examples": (None, None, counts_from_nothing),
    "NaN": (setting(fill=float("nan")), None, None),
    "NaN, written": (
        setting(fill=float("nan")),
        None,
        storing("fill", lambda hidden: float("nan")),
    ),
    "a mask, made once": (setting(mask=None), masked, None),
    "a mask of the input's form": (setting(size=0), like_the_input, None),
    "places of the longest": (setting(longest=0), placed, None),
    "places of a size": (setting(size=0), by_size, None),
}


@pytest.mark.parametrize("batching", ["auto", "sequential"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_matter_later_may_be_kept(name, batching):
    model = double(Keeping, *HARMLESS[name])
    before = {
        key: copy.copy(value) if isinstance(value, list | dict) else value
        for key, value in vars(model).items()
    }
    learner, exact = learner_of(model, task_batching=batching), exactly(double())
    exact = {f"layers.{key}": value for key, value in exact.items()}
    assert off(learner.meta_gradients(BATCH), exact) < 1e-13
    learner.fit(Stream(), iterations=3, tasks_per_batch=2)
    learner.evaluate(Stream(split="test"), num_tasks=2)
    adapted = learner.adapt(BATCH.support_x[0], BATCH.support_y[0])
    assert adapted(BATCH.support_x[0]).shape == (5, 3)
    after = vars(model)
    assert set(after) == set(before)
    assert all(value is before[key] or value == before[key] for key, value in after.items()), (
        "the learner leaves nothing on the model"
    )


@pytest.mark.parametrize("name", HARMLESS)
def test_a_model_that_is_called_by_hand_is_no_changed_model(name):
    model = double(Keeping, *HARMLESS[name])
    learner = learner_of(model)
    for _ in range(2):
        model(BATCH.support_x[0])
        model(torch.cat([BATCH.support_x[0], BATCH.query_x[0]]))
        learner.fit(Stream(), iterations=1, tasks_per_batch=2)


def test_what_is_changed_by_hand_is_still_named():
    model = double(Keeping, setting(n=0, power=1.0), None, storing("n", len))
    learner = learner_of(model)
    model.power = 2.0
    for _ in range(2):
        with pytest.raises(RequestError) as refusal:
            learner.meta_gradients(BATCH)
        assert str(refusal.value) == (
            "the model's 'power' was changed from 1.0 to 2.0 after the learner was made, which "
            "goes on as it was: make a new learner of "
            "the changed model"
        )
    assert (model.n, model.power) == (0, 2.0)


# What matters later.


def scaled_by_the_first(model, x):
    if not model.ready:
        model.scale, model.ready = x.std(0), True
    return x / model.scale


def scaled_by_what_is_there(model, x):
    if model.scale is None:
        model.scale = x.std(0)
    return x / model.scale


def scaled_by_an_entry(model, x):
    return x / model.kept.setdefault("scale", x.std(0))


def growing(model, output):
    model.calls += 1
    return output * (1 if model.calls < 50 else 2)


def growing_from_nothing(model, output):
    model.calls = (model.calls or 0) + 1
    return output * (1 if model.calls < 50 else 2)


def averaged(model, output):
    model.mean = 0.9 * model.mean + 0.1
    return output


def shown(model, output):
    model.calls += 1
    return output + len(f"{model.calls}") - 1


def toggled(model, output):
    model.odd = not model.odd
    return output


def counted_within(model, output):
    model.kept["calls"][0] += 1
    return output * (1 if model.kept["calls"][0] < 50 else 2)


def counted_in_an_array(model, output):
    model.calls += 1
    return output * (1 if model.calls[0] < 50 else 2)


def counted_in_an_object(model, output):
    model.held.calls += 1
    return output * (1 if model.held.calls < 50 else 2)


def last_size(model, output):
    last, model.last = model.last, len(output)
    return output + last


def shifted_at_evaluation(read):
    return lambda model, output: output if model.training else output + read(model)


def counted_in_training(model, hidden):
    model.calls += model.training


class Slotted:
    """A plain object that remembers its first examples."""

    __slots__ = ("mean",)

    def __init__(self):
        self.mean = None

    def shift(self, output):
        self.mean = output.detach().mean(0) if self.mean is None else self.mean
        return output - self.mean


class Held(Slotted):
    """The same, with a __dict__."""


def shifted_by_an_object(model, output):
    return output if model.training else model.held.shift(output)


def last_mean(model, hidden):
    if model.training:
        model.mean = hidden.detach().mean()


HARMFUL = {
    "a mean of training that evaluation reads": (
        setting(mean=torch.zeros(())),
        None,
        mean_kept("mean"),
        shifted_at_evaluation(lambda model: model.mean),
        WRITES.format("mean"),
    ),
    "a mean in a list": (
        setting(kept=[torch.zeros(())]),
        None,
        mean_kept("kept", lambda model, _, mean: model.kept.append(mean), lambda m, _: m.kept[-1]),
        shifted_at_evaluation(lambda model: model.kept[-1]),
        WRITES.format("kept"),
    ),
    "a mean in a dictionary": (
        setting(kept={"mean": torch.zeros(())}),
        None,
        mean_kept(
            "mean", lambda m, name, mean: m.kept.update(mean=mean), lambda m, _: m.kept["mean"]
        ),
        shifted_at_evaluation(lambda model: model.kept["mean"]),
        WRITES.format("kept"),
    ),
    "the last mean of training": (
        setting(mean=torch.zeros(())),
        None,
        last_mean,
        shifted_at_evaluation(lambda model: model.mean),
        REMEMBERS,
    ),
    "a count of training that evaluation compares": (
        setting(calls=0),
        None,
        counted_in_training,
        shifted_at_evaluation(lambda model: float(model.calls > 50)),
        WRITES.format("calls"),
    ),
    "a count of evaluation": (
        setting(calls=0),
        None,
        None,
        lambda model, output: output if model.training else growing(model, output),
        WRITES.format("calls"),
    ),
    "an object at evaluation": (
        lambda model: setattr(model, "held", Held()),
        None,
        None,
        shifted_by_an_object,
        REMEMBERS,
    ),
    "a slotted object at evaluation": (
        lambda model: setattr(model, "held", Slotted()),
        None,
        None,
        shifted_by_an_object,
        REMEMBERS,
    ),
    "a flag": (setting(ready=False), scaled_by_the_first, None, None, REMEMBERS),
    "a tensor of the first task": (
        setting(scale=None),
        scaled_by_what_is_there,
        None,
        None,
        REMEMBERS,
    ),
    "an entry of the first task": (setting(kept={}), scaled_by_an_entry, None, None, REMEMBERS),
    "a count that is compared": (setting(calls=0), None, None, growing, WRITES.format("calls")),
    "the same, None at first": (
        setting(calls=None),
        None,
        None,
        growing_from_nothing,
        WRITES.format("calls"),
    ),
    "a mean": (setting(mean=0.0), None, None, averaged, WRITES.format("mean")),
    "a count that is shown": (setting(calls=0), None, None, shown, WRITES.format("calls")),
    "an array's count": (
        setting(calls=np.zeros(1)),
        None,
        None,
        counted_in_an_array,
        WRITES.format("calls"),
    ),
    "a tensor's count": (
        setting(calls=torch.zeros(1)),
        None,
        None,
        counted_in_an_array,
        WRITES.format("calls"),
    ),
    "an object's count": (
        setting(held=types.SimpleNamespace(calls=0)),
        None,
        None,
        counted_in_an_object,
        WRITES.format("held"),
    ),
    "a flag to and fro": (setting(odd=False), None, None, toggled, WRITES.format("odd")),
    "the last size": (setting(last=0), None, None, last_size, REMEMBERS),
}


def test_what_is_written_within_containers_is_put_back():
    model = double(Keeping, setting(kept={"calls": [0]}), None, None, counted_within)
    learner, exact = learner_of(model), exactly(double())
    exact = {f"layers.{key}": value for key, value in exact.items()}
    for _ in range(10):
        assert off(learner.meta_gradients(BATCH), exact) < 1e-13
    assert model.kept == {"calls": [0]}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_matters_later_is_refused(name):
    *parts, text = HARMFUL[name]
    learner = learner_of(double(Keeping, *parts))
    for call in (
        lambda: learner.meta_gradients(BATCH),
        lambda: learner.adapt(BATCH.support_x[0], BATCH.support_y[0]),
    ):
        with pytest.raises(RequestError) as refusal:
            call()
        assert str(refusal.value) == text


# Hooks.


def test_hooks_that_come_and_go_are_followed():
    model = double()
    learner = learner_of(model)
    plain = learner.meta_gradients(BATCH)
    changes = model[1].register_forward_hook(lambda module, given, output: 2 * output)
    exact = exactly(model)
    assert off(plain, exact) > 0.1
    assert off(learner.meta_gradients(BATCH), exact) < 1e-13
    learner.fit(Stream(), iterations=1, tasks_per_batch=2)
    assert off(learner.meta_gradients(BATCH), exactly(model)) < 1e-13
    changes.remove()
    assert off(learner.meta_gradients(BATCH), exactly(model)) < 1e-13
    assert learner.batching.batching == "vectorized"
    model[1].register_full_backward_hook(lambda module, given, taken: (2 * given[0],))
    assert off(learner.meta_gradients(BATCH), exactly(model)) < 1e-13
    assert learner.batching.batching == "sequential"


def test_what_a_hook_keeps_is_taken_off_again():
    model = double()
    model[1].register_forward_hook(
        lambda module, given, output: setattr(module, "seen", tuple(output.shape))
    )
    assert off(learner_of(model).meta_gradients(BATCH), exactly(double())) < 1e-13
    assert not hasattr(model[1], "seen")


# Layers in evaluation mode.


class Own(nn.Module):
    def __init__(self, heeds):
        super().__init__()
        self.heeds, self.layer = heeds, nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.layer(x)) * (2 if self.heeds and self.training else 1)


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.GRU(1, 4, batch_first=True)

    def forward(self, x):
        return self.rows(x.unsqueeze(-1))[0][:, -1]


def asleep(first):
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.Linear(4, 3)).double()
    model[0].eval()
    return model


@pytest.mark.parametrize(
    "first",
    [lambda: Own(heeds=False), Rows, lambda: nn.Dropout(0.0), lambda: nn.Sequential(nn.Tanh())],
)
def test_layers_that_sleep_without_a_difference_are_exact(first):
    model = asleep(first)
    assert off(learner_of(model).meta_gradients(BATCH), exactly(model)) < 1e-13
    assert not model[0].training


def test_frozen_batch_norm_may_sleep_with_all_around_it():
    model = asleep(lambda: nn.Sequential(Own(heeds=False), nn.BatchNorm1d(4)))
    awake = copy.deepcopy(model).train()
    given = {"batch_norm": "frozen"}
    assert (
        off(
            learner_of(model, **given).meta_gradients(BATCH),
            learner_of(awake, **given).meta_gradients(BATCH),
        )
        == 0
    )


@pytest.mark.parametrize(
    ("first", "name"),
    [
        (lambda: Own(heeds=True), "0"),
        (lambda: nn.Sequential(nn.Tanh(), Own(heeds=True)), "0.1"),
        (lambda: nn.BatchNorm1d(4), "0"),
    ],
)
def test_layers_whose_sleep_makes_a_difference_are_named(first, name):
    with pytest.raises(RequestError) as refusal:
        learner_of(asleep(first)).meta_gradients(BATCH)
    assert str(refusal.value) == (
        f"the layer '{name}' is in evaluation mode in a model in training mode, but meta-training "
        "is in training mode throughout: "
        "call model.train(), and set what the layer is to do (dropout p = 0, batch_norm = 'frozen')"
    )


# Losses.


class Weighed(nn.Module):
    """Class weights and a temperature in buffers, and how often it was asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        self.register_buffer("temperature", torch.tensor(2.0, dtype=torch.float64))
        self.calls = 0

    def forward(self, prediction, target):
        self.calls += 1
        return F.cross_entropy(prediction / self.temperature, target, self.weights)


def test_a_loss_with_buffers_is_exact():
    exact = exactly(double(), loss=Weighed())
    assert off(learner_of(double(), loss=Weighed()).meta_gradients(BATCH), exact) < 1e-13
