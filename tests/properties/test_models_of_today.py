"""Meta-gradients of the models that people use, against plain loops in float64.

And what such models do beside: differentiate in forward, branch at evaluation, ignore labels.
"""

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaplug import MetaLearner, Plugin, RequestError, RunError, TaskBatch, hookimpl

CLASSES = 3
VOCABULARY = 11


class Padded(nn.Module):
    def __init__(self, *, sparse=False):
        super().__init__()
        self.rows = nn.Embedding(VOCABULARY, 6, padding_idx=0, sparse=sparse)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.rows(x))).mean(1))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(self.rows(x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, CLASSES)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        rows = self.embed(x.unsqueeze(-1))
        return self.head(self.attention(rows, rows, rows, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, CLASSES)
        self.layers = nn.TransformerEncoder(layer, 1)

    def forward(self, x):
        return self.head(self.layers(self.embed(x.unsqueeze(-1))).mean(1))


def vision_transformer():
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(8, 4, 1, 2, 8, 16, num_classes=CLASSES)
    nn.init.normal_(model.heads[0].weight)  # torchvision's zeros stop every gradient
    return model


class Energy(nn.Module):
    """Answers with its own derivative, as physics-informed models and energies do."""

    def __init__(self, derivative):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.derivative = derivative

    def forward(self, x):
        return self.layers(x) + self.derivative(self.layers, x)[:, :CLASSES]


def by_autograd(layers, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layers(x).square().sum(), x, create_graph=True)[0]


def by_func(layers, x):
    return torch.func.grad(lambda given: layers(given).square().sum())(x)


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        return F.linear(input=x, weight=self.layer.weight, bias=self.layer.bias)


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(4, CLASSES), None

    def forward(self, x):
        self.kept = self.layer(x)
        return self.kept


def called_before():
    model = Keeping().double()
    model(data().support_x[0])  # leaves a tensor with a graph, which deepcopy refuses
    return model


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        hidden = self.layer(x)
        return 2 * hidden if not self.training and hidden.sum() > 0 else hidden


class Logits(nn.Module):
    """A model of Hugging Face's, which answers with an object."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": 0}
    if name == "bert":
        config = transformers.BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **sizes,
        )
        return Logits(transformers.BertForSequenceClassification(config))
    if name == "gpt2":
        dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        config = transformers.GPT2Config(
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=8,
            bos_token_id=1,
            eos_token_id=2,
            **dropout,
            **sizes,
        )
        return Logits(transformers.GPT2ForSequenceClassification(config))
    config = transformers.LlamaConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        **sizes,
    )
    model = transformers.LlamaForSequenceClassification(config)
    for path, module in [*model.named_modules()]:  # theirs rounds to float32
        if type(module).__name__ == "LlamaRMSNorm":
            model.set_submodule(path, nn.RMSNorm(8, eps=module.variance_epsilon))
    if name == "llama":
        return Logits(model)
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, lora)
    for key, weight in model.named_parameters():
        if "lora_B" in key:  # peft's zeros stop the gradient of lora_A
            nn.init.normal_(weight, std=0.5)
    return Logits(model)


def data(kind="numbers"):
    """Three tasks of five support and six query examples."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for count in (5, 6):
        if kind == "tokens":
            x = torch.randint(1, VOCABULARY, (3, count, 6), generator=generator)
            x[:, ::2, 4:] = 0
        else:
            shape = (3, 8, 8) if kind == "images" else (4,)
            x = torch.randn(3, count, *shape, generator=generator, dtype=torch.float64)
        parts += [x, torch.randint(0, CLASSES, (3, count), generator=generator)]
    return TaskBatch(*parts)


MODELS = {
    "padded embedding": (Padded, "tokens", True),
    "sparse embedding": (lambda: Padded(sparse=True), "tokens", True),
    "lstm": (Lstm, "numbers", False),
    "attention": (Attention, "numbers", True),
    "transformer encoder": (Encoder, "numbers", True),
    "vision transformer": (vision_transformer, "images", True),
    "autograd.grad": (lambda: Energy(by_autograd), "numbers", False),
    "torch.func.grad": (lambda: Energy(by_func), "numbers", False),
    "linear by name": (ByName, "numbers", True),
    "called before": (called_before, "numbers", True),
    "a branch at evaluation": (Branching, "numbers", False),
    "bert": (lambda: hugging_face("bert"), "tokens", True),
    "llama": (lambda: hugging_face("llama"), "tokens", True),
    "gpt2": (lambda: hugging_face("gpt2"), "tokens", False),
    "lora llama": (lambda: hugging_face("lora"), "tokens", True),
}
"""Makers by name, the kind of their data, and whether "auto" stacks their tasks."""


def made(name):
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def plain(model, batch, order, loss=F.cross_entropy):
    """Meta-gradients by functional_call and autograd.grad alone, one task after the other."""
    steps, lr = 2, 0.3
    named = dict(model.named_parameters())
    trained = [name for name, weight in named.items() if weight.requires_grad]
    total = 0.0

    def loss_of(weights, x, y):
        return loss(torch.func.functional_call(model, weights, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):
        for x, y, query_x, query_y in zip(
            batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True
        ):
            fast = dict(named)
            for _ in range(steps):
                taken = torch.autograd.grad(
                    loss_of(fast, x, y),
                    [fast[name] for name in trained],
                    create_graph=order == 2,
                    allow_unused=True,
                )
                moved = {
                    name: fast[name] - lr * gradient
                    for name, gradient in zip(trained, taken, strict=True)
                    if gradient is not None
                }
                fast = {**fast, **moved}
            total = total + loss_of(fast, query_x, query_y) / batch.num_tasks
        wanted = [named[name] for name in trained]
        taken = torch.autograd.grad(total, wanted, allow_unused=True)
    return {name: each for name, each in zip(trained, taken, strict=True) if each is not None}


def off(ours, exact):
    wrong = sum((ours.get(name, 0 * each) - each).square().sum() for name, each in exact.items())
    return float((wrong / sum(each.square().sum() for each in exact.values())).sqrt())


def learner_of(model, **settings):
    return MetaLearner(model, **{"inner_lr": 0.3, "inner_steps": 2, **settings})


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # the libraries' own
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("preset", "order"), [("maml", 2), ("fomaml", 1)])
@pytest.mark.parametrize("batching", ["auto", "sequential"])
@pytest.mark.parametrize("name", MODELS)
def test_meta_gradients_are_those_of_a_plain_loop(name, batching, preset, order):
    _, kind, stacked = MODELS[name]
    model, batch = made(name), data(kind)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    exact_model = made("padded embedding" if name == "sparse embedding" else name)
    exact = plain(exact_model, batch, order)
    learner = learner_of(model, preset=preset, task_batching=batching)
    found = learner.meta_gradients(batch)
    assert off(found, exact) < 1e-10
    wanted = "vectorized" if stacked and batching == "auto" else "sequential"
    assert learner.batching.batching == wanted, learner.batching.reason
    adapted = learner.adapt(batch.support_x[0], batch.support_y[0])
    assert adapted(batch.query_x[0]).shape == (6, CLASSES)
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())


class Same:
    def __init__(self, batch):
        self.tasks = batch

    def batch(self, iteration, indices):
        rows = [index % self.tasks.num_tasks for index in indices]
        return self.tasks.tasks(rows)


def test_a_transformer_with_dropout_trains():
    torch.manual_seed(0)
    learner = learner_of(Encoder(0.1).double())
    history = learner.fit(Same(data()), iterations=2, tasks_per_batch=3)
    assert all(record.step.skipped is None for record in history.records)
    assert 0 <= learner.evaluate(Same(data()), num_tasks=3).mean <= 1


# Targets of other forms, in training and in scores.


def test_ignored_labels_count_neither_in_training_nor_in_scores():
    model, batch = made("linear by name"), data()
    labels = batch.query_y.clone()
    batch.support_y[:, 0] = batch.query_y[:, :2] = -100
    found = learner_of(model).meta_gradients(batch)
    assert off(found, plain(model, batch, 2)) < 1e-10
    whole = TaskBatch(batch.support_x, batch.support_y, batch.query_x[:, 2:], labels[:, 2:])
    scores = [
        learner_of(model).evaluate(Same(each), num_tasks=3).per_task for each in (batch, whole)
    ]
    torch.testing.assert_close(scores[0], scores[1])


def summed(prediction, target):
    """Zero, and finite, where all targets are ignored."""
    return F.cross_entropy(prediction, target, reduction="sum")


@pytest.mark.parametrize("loss", [None, summed])
def test_a_task_whose_targets_are_all_ignored_has_no_score(loss):
    batch = data()
    batch.query_y[1] = -100
    with pytest.raises(RunError) as error:
        learner_of(made("linear by name"), loss=loss).evaluate(Same(batch), num_tasks=3)
    assert str(error.value) == (
        "evaluation task 1 has no query target that counts, as all of them are -100: "
        "leave the task out, or give it others"
    )


class Reshaped(nn.Module):
    """A linear layer whose answer has another form for an example."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(4, torch.Size(shape).numel())

    def forward(self, x):
        return self.layer(x).unflatten(1, self.shape) if self.shape else self.layer(x)[:, 0]


def flat(prediction, target):
    """Cross-entropy of a language model's answer (n, length, classes)."""
    return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


def bce(prediction, target):
    return F.binary_cross_entropy_with_logits(prediction, target.to(prediction.dtype))


def right(chosen, target):
    """The share of right targets of each task, (T, n, ...)."""
    return (chosen == target).flatten(1).double().mean(1)


FORMS = {
    "one logit": ((), bce, (), 2, lambda logits: logits > 0),
    "one logit in a column": ((1,), bce, (1,), 2, lambda logits: logits > 0),
    "multi-label": ((3,), bce, (3,), 2, lambda logits: logits > 0),
    "segmentation": ((3, 2, 2), None, (2, 2), 3, lambda logits: logits.argmax(2)),
    "language": ((5, 3), flat, (5,), 3, lambda logits: logits.argmax(3)),
}


@pytest.mark.parametrize("batching", ["auto", "sequential"])
@pytest.mark.parametrize("name", FORMS)
def test_targets_of_other_forms(name, batching):
    shape, loss, target, classes, choose = FORMS[name]
    torch.manual_seed(0)
    model, batch = Reshaped(*shape).double(), data()
    y = [torch.randint(0, classes, (3, count, *target)) for count in (5, 6)]
    y = [each.double() for each in y] if name == "multi-label" else y
    batch = TaskBatch(batch.support_x, y[0], batch.query_x, y[1])
    learner = learner_of(model, loss=loss, task_batching=batching)
    exact = plain(model, batch, 2, loss or F.cross_entropy)
    assert off(learner.meta_gradients(batch), exact) < 1e-10
    learner.fit(Same(batch), iterations=2, tasks_per_batch=3)
    found = learner.evaluate(Same(batch), num_tasks=3)
    assert found.metric == "accuracy"
    predictions = []
    for task in range(3):
        adapted = learner.adapt(batch.support_x[task], batch.support_y[task])
        predictions.append(adapted(batch.query_x[task]).detach())
    expected = right(choose(torch.stack(predictions)), batch.query_y)
    torch.testing.assert_close(found.per_task, expected)


# What is refused, and what to do instead.


def test_a_loss_that_reads_the_models_weights_is_told_where_they_are():
    model, batch = made("linear by name"), data()

    def decayed(prediction, target):
        decay = sum(weight.square().sum() for weight in model.parameters())
        return F.cross_entropy(prediction, target) + 0.1 * decay

    with pytest.raises(RequestError) as refusal:
        learner_of(model, loss=decayed).meta_gradients(batch)
    assert str(refusal.value) == (
        "the loss reads the model's own 'layer.weight', 'layer.bias', not the fast weights of a "
        "task: give what it makes of weights to a plugin's transform_inner_losses, which finds "
        "them in step.parameters"
    )

    class Decay(Plugin):
        @hookimpl
        def transform_inner_losses(self, losses, step):
            squares = [weight.square().flatten(1).sum(1) for weight in step.parameters.values()]
            return losses + 0.1 * sum(squares)

    assert learner_of(model, plugins=[Decay()]).meta_gradients(batch)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_learner_is_not_copied_and_says_what_to_do(copied):
    with pytest.raises(RequestError, match=r"save\(\) it and load\(\) it in the other process"):
        copied(learner_of(made("linear by name")))


# Models of odd build.


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.layer(x)


def patched_on_the_instance():
    model = Own()

    def forward(self, x):
        return 2 * self.layer(torch.tanh(x))

    model.forward = types.MethodType(forward, model)
    return model


def copying_itself():
    class Copying(Own):
        def __deepcopy__(self, memo):
            made = Copying()
            made.__dict__.update(
                {key: copy.deepcopy(each, memo) for key, each in vars(self).items()}
            )
            return made

    return Copying()


def made_under_inference_mode():
    model = Own()
    with torch.inference_mode():
        constant = torch.ones(4)
    model.register_buffer("constant", constant)
    model.layer.register_forward_pre_hook(lambda module, given: (given[0] * 1.5,))
    return model


class Nested(Own):
    """Keeps what it computes in containers within containers."""

    def __init__(self):
        super().__init__()
        self.kept = {"hidden": [], "last": {}}

    def forward(self, x):
        hidden = self.layer(x)
        self.kept["hidden"].append(hidden)
        self.kept["last"]["output"] = hidden
        return hidden


def orthogonal():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    nn.utils.parametrizations.orthogonal(model[0])
    return model


ODD = {
    "forward patched on the instance": patched_on_the_instance,
    "a __deepcopy__ of its own": copying_itself,
    "a buffer of inference mode": made_under_inference_mode,
    "nested containers": Nested,
    "orthogonal weights": orthogonal,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("batching", ["auto", "sequential"])
@pytest.mark.parametrize("name", ODD)
def test_models_of_odd_build_are_exact(name, batching):
    torch.manual_seed(0)
    model = ODD[name]().double()
    exact = plain(copy.deepcopy(model), data(), 2)
    before = {key: each.clone() for key, each in model.state_dict().items()}
    learner = learner_of(model, task_batching=batching)
    for _ in range(2):
        assert off(learner.meta_gradients(data()), exact) < 1e-10
    learner.evaluate(Same(data()), num_tasks=3)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[key]) for key, each in model.state_dict().items())
    if name == "nested containers":
        assert model.kept == {"hidden": [], "last": {}}
