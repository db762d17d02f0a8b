"""Models of Hugging Face, timm and PEFT, called as they are, against plain loops in float64.

Their inputs are given by name and their answers are objects; masks pad texts; targets are classes,
tokens or several labels. All stack their tasks.
"""

import pytest
import torch
from support.plain_loop import loop, off
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, TaskBatch

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")  # the libraries' own
    for kind in ("UserWarning", "FutureWarning", "DeprecationWarning")
]

CLASSES, VOCABULARY, TOKENS = 3, 11, 6
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": CLASSES,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 12}


def transformers_model(name, attention, layers=1):
    transformers = pytest.importorskip("transformers")
    given = {"num_hidden_layers": layers, "attn_implementation": attention, **SIZES}
    if name.startswith("Bert"):
        config = transformers.BertConfig(**given, **TEXT)
    elif name.startswith("Roberta"):
        config = transformers.RobertaConfig(**given, **TEXT)
    elif name.startswith("ViT"):
        config = transformers.ViTConfig(**given, image_size=8, patch_size=4)
    elif name.startswith("Llama"):
        # With one layer, the last token's answer is the same with and without what comes after it.
        config = transformers.LlamaConfig(**{**given, "num_hidden_layers": 2}, **TEXT)
    else:
        drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        given["num_hidden_layers"] = 2
        config = transformers.GPT2Config(bos_token_id=1, eos_token_id=2, **drops, **given, **TEXT)
    model = getattr(transformers, name)(config)
    for path, module in [*model.named_modules()]:  # theirs rounds to float32
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(path, nn.RMSNorm(8, eps=module.variance_epsilon))
    return model


def with_lora(model, *targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[*targets], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # peft's zeros stop the gradient of lora_A
            nn.init.normal_(weight, std=0.5)
    return model


TEXT_MODELS = {
    "bert": ("BertForSequenceClassification", "class"),
    "roberta": ("RobertaForSequenceClassification", "class"),
    "llama": ("LlamaForSequenceClassification", "class"),
    "gpt2": ("GPT2ForSequenceClassification", "class"),
    "bert, several labels": ("BertForSequenceClassification", "labels"),
    "bert, labels of tokens": ("BertForTokenClassification", "tokens of classes"),
    "bert, masked words": ("BertForMaskedLM", "tokens"),
    "llama, next tokens": ("LlamaForCausalLM", "tokens"),
    "gpt2, next tokens": ("GPT2LMHeadModel", "tokens"),
    "bert with lora": ("BertForSequenceClassification", "class"),
    "llama with lora": ("LlamaForSequenceClassification", "class"),
}
"""The class of each, and what its targets are."""


def text_model(name, attention="sdpa"):
    torch.manual_seed(0)
    model = transformers_model(TEXT_MODELS[name][0], attention)
    if name == "bert with lora":
        model = with_lora(model, "query", "value")
    if name == "llama with lora":
        model = with_lora(model, "q_proj", "v_proj")
    return model.double()


def texts(targets="class", *, padded, sizes=((4, 3),) * 2):
    generator = torch.Generator().manual_seed(1)
    tasks = []
    for size in sizes:
        parts = []
        for count in size:
            ids = torch.randint(1, VOCABULARY, (1, count, TOKENS), generator=generator)
            lengths = torch.randint(2, TOKENS + 1, (1, count, 1), generator=generator)
            mask = (torch.arange(TOKENS) < (lengths if padded else TOKENS)).long()
            mask = mask.expand_as(ids).clone()
            y = torch.randint(0, CLASSES, (1, count), generator=generator)
            if targets == "labels":
                y = torch.randint(0, 2, (1, count, CLASSES), generator=generator).double()
            elif targets != "class":
                most = VOCABULARY if targets == "tokens" else CLASSES
                y = torch.randint(0, most, ids.shape, generator=generator)
                y = y.masked_fill(mask == 0, -100)
            parts += [{"input_ids": ids * mask, "attention_mask": mask}, y]
        tasks.append(TaskBatch(*parts))
    return TaskBatch.from_tasks(tasks, ways=[None] * len(tasks))


def of_tokens(prediction, target):
    return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


LOSSES = {
    "class": F.cross_entropy,
    "labels": F.binary_cross_entropy_with_logits,
    "tokens": of_tokens,
    "tokens of classes": of_tokens,
}


def learner_of(model, **given):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **given})


@pytest.mark.parametrize(
    ("attention", "preset", "batching"),
    [
        ("sdpa", "maml", "auto"),
        ("eager", "fomaml", "auto"),
        ("eager", "maml", "sequential"),
    ],
)
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_models_of_text(name, attention, preset, batching):
    model, targets = text_model(name, attention), TEXT_MODELS[name][1]
    loss = LOSSES[targets] if targets == "labels" else None  # the rest by default
    learner = learner_of(model, preset=preset, task_batching=batching, loss=loss)
    order = 2 if preset == "maml" else 1
    for padded in (False, True):
        batch = texts(targets, padded=padded)
        exact = loop(model, batch, order=order, loss=LOSSES[targets])
        assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
    wanted = "vectorized" if batching == "auto" else "sequential"
    assert learner.batching.batching == wanted, learner.batching.reason
    predictions = learner.engine.evaluate(batch, 2).query_predictions
    expected = torch.stack([each.prediction for each in exact.tasks]).detach()
    torch.testing.assert_close(predictions, expected, rtol=1e-10, atol=1e-10)


def vision_model(name):
    torch.manual_seed(0)
    if name.startswith("transformers"):
        return transformers_model("ViTForImageClassification", name.split()[-1]).double()
    timm = pytest.importorskip("timm").models
    if name == "timm vit":
        sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
        return timm.VisionTransformer(num_classes=CLASSES, **sizes).double()
    model = timm.ConvNeXt(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(4, 4, 4, 8))
    for key, weight in model.named_parameters():
        if key.endswith("gamma"):  # timm's start near 0, which hides the layers behind them
            nn.init.constant_(weight, 0.5)
    return model.double()


def images(name):
    side = 32 if name == "timm convnext" else 8
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (4, 3):
        x = torch.randn(2, count, 3, side, side, generator=generator, dtype=torch.float64)
        parts.append({"pixel_values": x} if name.startswith("transformers") else x)
        parts.append(torch.randint(0, CLASSES, (2, count), generator=generator))
    return TaskBatch(*parts)


@pytest.mark.parametrize(
    ("preset", "batching"), [("maml", "auto"), ("fomaml", "auto"), ("maml", "sequential")]
)
@pytest.mark.parametrize(
    "name", ["transformers vit sdpa", "transformers vit eager", "timm vit", "timm convnext"]
)
def test_models_of_images(name, preset, batching):
    model, batch = vision_model(name), images(name)
    learner = learner_of(model, preset=preset, task_batching=batching)
    exact = loop(model, batch, order=2 if preset == "maml" else 1)
    assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
    wanted = "vectorized" if batching == "auto" else "sequential"
    assert learner.batching.batching == wanted, learner.batching.reason


# Frozen bodies.


class Classifier(nn.Module):
    """A language model of any dtype under a head of its own."""

    def __init__(self, body):
        super().__init__()
        self.body, self.head = body, nn.Linear(8, CLASSES)

    def forward(self, input_ids, attention_mask):
        rows = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(rows[:, 0].to(self.head.weight.dtype))


def classifier(body, adapters):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers_model("BertModel", "sdpa", layers=2).to(body)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], layers_to_transform=[1])
    model = Classifier(peft.get_peft_model(model, config)).train()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(adapters)
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.5)
    return model


RAGGED = ((4, 3), (2, 3), (4, 3), (5, 2))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("batching", ["auto", "sequential"])
def test_adapters_of_a_frozen_body(batching, kept):
    """Texts of several lengths, tasks of several sizes, and lower layers computed once."""
    model = classifier(torch.float64, torch.float64)
    learner = learner_of(model, task_batching=batching, cache_frozen=kept)
    for padded in (False, True):
        batch = texts(padded=padded, sizes=RAGGED)
        tasks = [texts(padded=padded, sizes=RAGGED).tasks(slice(i, i + 1)) for i in range(4)]
        exact = loop(model, [unpadded(task) for task in tasks])
        ours = learner.meta_gradients(batch)
        assert off(ours, exact.gradients) < 1e-10
        assert not any("lora" not in name and "head" not in name for name in ours)
    if kept:
        paths = {path for path, _ in learner.engine.inner.features._calls}
        assert any(path.endswith("encoder.layer.0") for path in paths)


def unpadded(task):
    """A task of a batch as it was before it was joined with others."""
    (size,) = task.sizes
    cut = {"support": size.support, "query": size.query}
    parts = []
    for part, count in cut.items():
        x, y = getattr(task, f"{part}_x"), getattr(task, f"{part}_y")
        parts += [{name: each[:, :count] for name, each in x.items()}, y[:, :count]]
    return TaskBatch(*parts)


@pytest.mark.parametrize("batching", ["auto", "sequential"])
def test_a_body_of_half_precision_under_adapters_of_single(batching):
    model = classifier(torch.bfloat16, torch.float32)
    frozen = {
        name: each.clone() for name, each in model.named_parameters() if not each.requires_grad
    }
    assert {each.dtype for each in frozen.values()} == {torch.bfloat16}
    batch = texts(padded=True)
    learner = learner_of(model, task_batching=batching)
    ours, exact = learner.meta_gradients(batch), loop(model, batch).gradients
    assert {each.dtype for each in ours.values()} == {torch.float32}
    assert off(ours, exact) < 0.05  # bfloat16 has 8 bits
    assert learner.batching.batching == ("vectorized" if batching == "auto" else "sequential")
    learner.engine.update(learner.engine.meta_gradients(learner.prepare_batch(batch), 0, 1), 1)
    assert all(torch.equal(model.get_parameter(name), each) for name, each in frozen.items())


# Other parts of an answer.


def test_the_hidden_rows_of_a_model_are_its_prediction_by_name():
    torch.manual_seed(0)
    model = transformers_model("BertModel", "sdpa").double()
    batch = texts("tokens of classes", padded=True)  # 3 of its 8 hidden numbers are scores
    learner = learner_of(model, output="last_hidden_state")

    def hidden(model, weights, x):
        return torch.func.functional_call(model, weights, (), x).last_hidden_state

    exact = loop(model, batch, loss=of_tokens, predict=hidden)
    assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
