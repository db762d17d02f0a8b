"""How models are called on inputs of any form, and what is taken of their answers."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from support.plain_loop import loop, off
from torch import nn

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.core.model_calls import call_model, expand_mask, prediction_of

ONE, OTHER = torch.ones(2, 3), torch.zeros(2, 3)
Pair = namedtuple("Pair", "hidden scores")


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        (ONE, None),
        (Answer(ONE, OTHER), None),
        ({"hidden": OTHER, "logits": ONE}, None),
        (Answer(OTHER, ONE), "hidden"),
        ({"a": OTHER, "b": ONE}, "b"),
        ({3: OTHER, 4: ONE}, 4),
        ((OTHER, ONE), 1),
        ([ONE, OTHER], 0),
        (Pair(OTHER, ONE), "scores"),
        (Pair(OTHER, ONE), 1),
        (SimpleNamespace(loss=None, z=ONE), "z"),
    ],
)
def test_the_prediction_is_found(answer, output):
    assert prediction_of(answer, output) is ONE


@pytest.mark.parametrize("answer", [None, 3, "words", {}, ()])
def test_what_holds_no_tensor_is_left_to_the_check_of_rows(answer):
    assert prediction_of(answer, None) is answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            {"a": ONE, "b": OTHER, "c": None},
            "the model answers with a dict of 'a', 'b', and which of them is the prediction nobody "
            "says: give output=, such as output='a'",
        ),
        (
            (None, ONE, OTHER),
            "the model answers with a tuple of '1', '2', and which of them is the prediction "
            "nobody says: give output=, such as output=1",
        ),
        (
            SimpleNamespace(loss=None, z=ONE),
            "the model answers with a SimpleNamespace of 'z', and which of them is the prediction "
            "nobody says: give output=, such as output='z'",
        ),
    ],
)
def test_several_parts_need_a_name(answer, message):
    with pytest.raises(RequestError) as error:
        prediction_of(answer, None)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("answer", "output", "parts"),
    [
        (Answer(ONE, OTHER), "scores", "a Answer with 'logits', 'hidden'"),
        ((ONE, OTHER), 2, "a tuple with '0', '1'"),
        ({"a": ONE, "b": 3}, "b", "a dict with 'a'"),
        (ONE, "logits", "a Tensor with no named or numbered tensors"),
        (ONE, "T", "a Tensor with no named or numbered tensors"),  # an attribute of every tensor
        (ONE, 0, "a Tensor with no named or numbered tensors"),
        (None, "logits", "a NoneType with no named or numbered tensors"),
    ],
)
def test_a_part_that_is_not_there_is_refused(answer, output, parts):
    with pytest.raises(RequestError) as error:
        prediction_of(answer, output)
    assert str(error.value) == (
        f"output={output!r} asks for a part of the model's answer, {parts}: name a part that is a "
        "tensor"
    )


def test_masks_are_expanded_as_libraries_do():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    keys, causal = expand_mask(mask, "keys", None), expand_mask(mask, "causal", None)
    assert keys.shape == (2, 1, 1, 3)
    assert torch.equal(keys[:, 0, 0], mask.bool())
    below = torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(causal, below & keys)
    assert expand_mask(mask[None], "causal", None).shape == (1, 2, 1, 3, 3)
    for form, expanded in (("keys", keys), ("causal", causal)):
        added = expand_mask(mask, form, torch.float64)
        assert torch.equal(added == 0, expanded)
        assert (added[~expanded] == torch.finfo(torch.float64).min).all()


# Models that take several inputs, or answer with several parts.


class Sum(nn.Module):
    """Takes its inputs by name or place, and answers in the form that is asked for."""

    def __init__(self, form=None):
        super().__init__()
        self.one, self.other, self.form = nn.Linear(4, 3), nn.Linear(2, 3, bias=False), form

    def forward(self, x, extra):
        logits, hidden = self.one(x) + self.other(extra).tanh(), self.one(x)
        forms = {
            None: logits,
            "object": Answer(logits, hidden),
            "key": {"hidden": hidden, "found": logits},
            "place": (hidden, logits),
        }
        return forms[self.form]


def batch_of(form):
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (5, 4):
        x, extra = (
            torch.randn(3, count, width, generator=generator, dtype=torch.float64)
            for width in (4, 2)
        )
        parts.append((x, extra) if form == "places" else {"extra": extra, "x": x})
        parts.append(torch.randint(0, 3, (3, count), generator=generator))
    return TaskBatch(*parts)


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("form", ["names", "places"])
@pytest.mark.parametrize(
    ("answer", "output"), [(None, None), ("object", None), ("key", "found"), ("place", 1)]
)
def test_such_models_are_meta_trained_exactly(form, answer, output, batching):
    torch.manual_seed(0)
    plain = Sum().double()
    model = Sum(answer).double()
    model.load_state_dict(plain.state_dict())
    batch = batch_of(form)
    learner = MetaLearner(model, inner_lr=0.3, inner_steps=2, output=output, task_batching=batching)
    exact = loop(plain, batch)
    assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
    x = batch.tasks(slice(0, 1)).query_x
    prediction = learner.engine.evaluate(batch, 2).query_predictions[0]
    torch.testing.assert_close(prediction, exact.tasks[0].prediction.detach())
    alone = {k: v[0] for k, v in x.items()} if form == "names" else tuple(v[0] for v in x)
    assert call_model(model, alone, output).shape == (4, 3)


def test_a_model_without_these_arguments_is_told_by_name():
    class Other(Sum):
        def forward(self, x, more):
            return super().forward(x, more)

    with pytest.raises(RequestError) as error:
        MetaLearner(Other().double()).meta_gradients(batch_of("names"))
    assert str(error.value) == (
        "the model fails on the support examples of a task, ['extra'] of shape (5, 2), "
        "torch.float64 on cpu, ['x'] of shape (5, 4), torch.float64 on cpu (TypeError: "
        "test_a_model_without_these_arguments_is_told_by_name.<locals>.Other.forward() got an "
        "unexpected keyword argument 'extra'): give a model whose forward takes 'extra', 'x'"
    )


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        ({"values": ONE, "other": OTHER}, "values"),  # a mapping has a method of this name, too
        ({0: OTHER, 1: ONE}, 1),
        (torch.return_types.max((ONE, OTHER)), "values"),
    ],
)
def test_a_part_is_found_under_names_that_are_also_methods(answer, output):
    assert prediction_of(answer, output) is ONE
