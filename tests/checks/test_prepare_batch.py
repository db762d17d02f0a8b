"""The way of a batch into the engine: what the first one showed is not believed of every other."""

import re

import pytest
import torch
from support.plain_loop import loop, off

from metaplug import MetaLearner, RequestError, TaskBatch

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 11,
    "pad_token_id": 0,
    "num_labels": 3,
}


def windowed():
    """A causal model whose tokens attend to themselves and the three before."""
    config = transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, sliding_window=4, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config).double()


def encoder(**given):
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config, **given).double()


def texts(length):
    generator = torch.Generator().manual_seed(length)
    parts = []
    for count in (3, 4):
        ids = torch.randint(1, 11, (2, count, length), generator=generator)
        kept = torch.randint(2, length + 1, (2, count, 1), generator=generator)
        kept = torch.arange(length) < kept
        parts += [
            {"input_ids": ids * kept, "attention_mask": kept.long()},
            torch.randint(0, 3, (2, count), generator=generator),
        ]
    return TaskBatch(*parts)


def without_mask(batch):
    (x, y), (query_x, query_y) = (
        (getattr(batch, f"{part}_x")["input_ids"], getattr(batch, f"{part}_y"))
        for part in ("support", "query")
    )
    return TaskBatch({"input_ids": x}, y, {"input_ids": query_x}, query_y)


@pytest.mark.parametrize("lengths", [(3, 9, 3), (9, 3, 9)])
def test_texts_beyond_a_window_of_attention_are_exact_whichever_came_first(lengths):
    model = windowed()
    learner = MetaLearner(model, inner_steps=1, inner_lr=0.1)
    first = learner.prepare_batch(texts(lengths[0]))
    assert learner.batching.batching == "vectorized"
    for length in lengths:
        exact = loop(model, texts(length), steps=1, lr=0.1).gradients
        assert off(learner.meta_gradients(texts(length)), exact) < 1e-7  # RoPE is in float32
    assert learner.batching.batching == "sequential"
    exact = loop(model, first, steps=1, lr=0.1).gradients
    assert off(learner.engine.meta_gradients(first, 0, 1).gradients, exact) < 1e-7


def test_vectorized_tasks_are_refused_beyond_a_window_of_attention():
    learner = MetaLearner(windowed(), inner_steps=1, task_batching="vectorized")
    learner.meta_gradients(texts(3))
    refused = (
        "task batching 'vectorized' cannot be had, as torch.vmap refuses the model for texts of 9 "
        "tokens: the model's attention is not what a mask that is made for all tasks gives; use "
        "'auto' or 'sequential'"
    )
    for _ in range(2):
        with pytest.raises(RequestError, match=f"^{re.escape(refused)}$"):
            learner.meta_gradients(texts(9))


def test_masks_of_other_lengths_stay_vectorized_where_they_may():
    model = encoder()
    learner = MetaLearner(model, inner_steps=1, inner_lr=0.1)
    for length in (3, 9, 4):
        exact = loop(model, texts(length), steps=1, lr=0.1).gradients
        assert off(learner.meta_gradients(texts(length)), exact) < 1e-10
    assert learner.batching.batching == "vectorized"


def test_a_batch_of_other_inputs_is_tried_anew():
    model = encoder()
    learner = MetaLearner(model, inner_steps=1, inner_lr=0.1)
    for batch in (texts(4), without_mask(texts(4)), texts(4)):
        exact = loop(model, batch, steps=1, lr=0.1).gradients
        assert off(learner.meta_gradients(batch), exact) < 1e-10


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_fit_a_frozen_body_of_another_dtype(attention):
    model = encoder(attn_implementation=attention).float()
    model.bert.requires_grad_(False).bfloat16()
    model.classifier.register_forward_pre_hook(lambda layer, given: (given[0].float(),))
    learner = MetaLearner(model, inner_steps=1, inner_lr=0.1)
    exact = loop(model, texts(4), steps=1, lr=0.1).gradients
    assert off(learner.meta_gradients(texts(4)), exact) < 1e-5


def test_masks_of_another_length_are_tried_on_tasks_that_name_their_ways():
    model = windowed()
    learner = MetaLearner(model, inner_steps=1, inner_lr=0.1)
    learner.meta_gradients(texts(9))  # no mask is made, and tasks are stacked
    batch = TaskBatch.from_tasks([texts(3)], ways=[3, None])
    exact = loop(model, texts(3), steps=1, lr=0.1).gradients
    assert off(learner.meta_gradients(batch), exact) < 1e-7
