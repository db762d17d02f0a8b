"""An attention mask is expanded before the model only where that changes none of its answers."""

import pytest
import torch
from support.plain_loop import loop, off
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, TaskBatch

VOCABULARY, CLASSES, WIDTH = 9, 3, 8


class Attention(nn.Module):
    """Attends as Hugging Face's models do: "sdpa" by booleans, "eager" by what is added."""

    def __init__(self, causal, eager):
        super().__init__()
        self.causal, self.eager = causal, eager
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, rows, mask):
        if mask.dim() == 2:  # (n, L): expanded here, which branches on its values
            mask = mask.bool()
            if not self.causal and bool(mask.all()):
                mask = None
            else:
                mask = mask[:, None, None, :]
                length = rows.shape[1]
                below = mask.new_ones(length, length).tril()
                mask = mask & below if self.causal or not bool(mask.any()) else mask
                if self.eager:
                    lowest = torch.finfo(rows.dtype).min
                    mask = torch.zeros_like(mask, dtype=rows.dtype).masked_fill(~mask, lowest)
                elif bool(mask.all()):
                    mask = None
        query, key, value = (
            layer(rows).unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        if not self.eager:
            return F.scaled_dot_product_attention(query, key, value, mask)[:, 0]
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        return ((scores if mask is None else scores + mask).softmax(-1) @ value)[:, 0]


class Language(nn.Module):
    """Two layers of attention; `reads` says what else it does with the mask."""

    def __init__(self, causal=False, eager=False, reads="nothing", answers="mean"):
        super().__init__()
        self.rows, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.places = nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList([Attention(causal, eager) for _ in range(2)])
        self.reads, self.answers = reads, answers

    def forward(self, input_ids, attention_mask):
        places = torch.arange(input_ids.shape[1])
        if self.reads == "positions":
            places = (attention_mask.long().cumsum(-1) - 1).clamp(0, 7)
        rows = self.rows(input_ids) + self.places(places)
        for layer in self.layers:
            rows = rows + layer(rows, attention_mask)
        if self.reads == "pooling":
            weights = attention_mask.to(rows.dtype).unsqueeze(-1)
            return self.head((weights * rows).sum(1) / weights.sum(1).clamp_min(1))
        return self.head(rows if self.answers == "tokens" else rows.mean(1))


def model_of(**given):
    torch.manual_seed(0)
    return Language(**given).double()


def batch_of(padding="none", length=5, *, tokens=False):
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (3, 4):
        ids = torch.randint(1, VOCABULARY, (3, count, length), generator=generator)
        lengths = torch.randint(1, length + 1, (3, count, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long() if padding != "none" else ids.clamp_max(1)
        mask = mask.flip(-1) if padding == "left" else mask
        if padding == "all":
            mask[:, 0] = 0
        labels = torch.randint(0, CLASSES, ids.shape if tokens else ids.shape[:2])
        parts += [{"input_ids": ids * mask, "attention_mask": mask}, labels]
    return TaskBatch(*parts)


def learner_of(model, **given):
    return MetaLearner(model, inner_lr=0.3, inner_steps=2, **given)


def chosen(model, batch=None, **given):
    """How the mask is expanded, and how tasks are batched."""
    learner = learner_of(model, **given)
    learner.meta_gradients(batch_of() if batch is None else batch)
    return learner.engine.inner.functional.mask, learner.batching.batching


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(("causal", "form"), [(False, "keys"), (True, "causal")])
def test_the_form_is_that_of_the_models_attention(causal, eager, form):
    model = model_of(causal=causal, eager=eager)
    if causal and eager:  # which vmap takes as it is
        assert chosen(model) == (None, "vectorized")
    else:
        assert chosen(model) == ((form, eager), "vectorized")


@pytest.mark.parametrize("reads", ["pooling", "positions"])
def test_a_model_that_reads_the_mask_itself_gets_its_own(reads):
    model = model_of(reads=reads)
    assert chosen(model) == (None, "sequential")
    learner = learner_of(model)
    for padding in ("none", "right"):
        batch = batch_of(padding)
        assert off(learner.meta_gradients(batch), loop(model, batch).gradients) < 1e-10
    assert learner.batching.reason.startswith("torch.vmap refuses the model")


@pytest.mark.parametrize("causal", [False, True])
def test_examples_that_do_not_tell_the_forms_apart_choose_none(causal):
    """A single token attends to itself in both; later batches may be longer."""
    model = model_of(causal=causal, answers="tokens")
    learner = learner_of(model)
    learner.meta_gradients(batch_of(length=1, tokens=True))
    assert learner.engine.inner.functional.mask is None
    batch = batch_of("right", tokens=True)
    exact = loop(model, batch, loss=of_tokens, steps=2)
    assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10


def of_tokens(prediction, target):
    return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


@pytest.mark.parametrize("length", [2, 5])
@pytest.mark.parametrize("padding", ["none", "right", "left", "all"])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_every_padding_gives_what_the_model_gives(causal, eager, padding, length):
    """Whatever the first batch was: padding on the left, and examples of padding alone, too."""
    model = model_of(causal=causal, eager=eager, answers="tokens")
    learner = learner_of(model)
    learner.meta_gradients(batch_of(length=length, tokens=True))
    batch = batch_of(padding, tokens=True)
    exact = loop(model, batch, loss=of_tokens)
    assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
    assert learner.batching.batching == "vectorized"


def test_masks_of_other_names_and_forms_stay():
    class Renamed(Language):
        def forward(self, input_ids, mask):
            return super().forward(input_ids, mask)

    torch.manual_seed(0)
    model, batch = Renamed().double(), batch_of()
    x, y = batch.support_x, batch.support_y
    renamed = {"input_ids": x["input_ids"], "mask": x["attention_mask"]}
    assert chosen(model, TaskBatch(renamed, y, renamed, y)) == (None, "sequential")
    given = {
        "input_ids": x["input_ids"],
        "attention_mask": x["attention_mask"].bool()[:, :, None, None],
    }
    assert chosen(model_of(), TaskBatch(given, y, given, y)) == (None, "vectorized")


def test_one_task_at_a_time_has_the_same_mask():
    model, batch = model_of(), batch_of("right")
    found = chosen(model, batch, task_batching="sequential")
    assert found == (("keys", False), "sequential")
    learner = learner_of(model, task_batching="sequential")
    assert off(learner.meta_gradients(batch), loop(model, batch).gradients) < 1e-10
