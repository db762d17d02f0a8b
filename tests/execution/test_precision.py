"""float32, TF32 and bfloat16: what is rounded, what that moves, and that nothing is left set."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from metaplug import MetaLearner, RequestError
from metaplug.execution.precision import arithmetic, check_precision
from metaplug.execution.traced import CompiledDerivation
from metaplug.models.factories import make_model
from metaplug.tasks import Glyphs
from metaplug.testing import Stream, found, problem

BATCHINGS = ["vectorized", "sequential"]


def cosine(ours, theirs):
    """Of two meta-gradients, all tensors in one vector."""
    assert ours.keys() == theirs.keys()
    return float(
        cosine_similarity(
            *(torch.cat([each[name].flatten() for name in theirs]) for each in (ours, theirs)),
            dim=0,
        )
    )


def products(learner, batch):
    """How often each product ran in each dtype, over a meta-step's gradients."""
    counts = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kind = next(
                (
                    kind
                    for kind in ("convolution", "mm", "norm")
                    if kind in func.overloadpacket.__name__
                ),
                None,
            )
            if kind and args[0].is_floating_point():
                counts[kind, args[0].dtype] += 1
            return func(*args, **(kwargs or {}))

    learner.meta_gradients(batch)  # the model is tried out before the first
    with Watch():
        learner.meta_gradients(batch)
    return counts


# bfloat16.


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(
    "name", ["mlp", "softplus", "batch-norm", "layer-norm", "group-norm", "tied"]
)
def test_smooth_models_keep_the_direction_of_their_meta_gradient_in_bfloat16(name, batching):
    """bfloat16 rounds by up to 0.4 %, over two inner steps and their second derivatives."""
    case = problem(name, dtype=torch.float32, lr=0.1, support=8)
    plain, ours = (
        case.learner(task_batching=batching, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    expected, actual = found(plain, case.batch), found(ours, case.batch)
    assert cosine(actual.gradients, expected.gradients) > 0.999
    assert 0 < float((actual.outer_loss - expected.outer_loss).abs()) < 0.02
    assert {gradient.dtype for gradient in actual.gradients.values()} == {torch.float32}
    assert actual.outcome.query_predictions.dtype == actual.losses.dtype == torch.float32


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(
    ("model", "settings", "least"), [("mlp", {}, 0.99), ("conv4", {"filters": 8}, 0.95)]
)
def test_models_of_the_field_move_no_further_than_by_rounding_their_weights_alone(
    model, settings, least, batching
):
    """Kinks and batch norm over few images move conv4's meta-gradient where its weights move."""
    batch, gradients = Glyphs(ways=5, shots=5, queries=5).train.batch(0, range(4)), {}
    for name in ("float32", "bfloat16", "rounded"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = make_model(model, (1, 28, 28), 5, settings)
        if name == "rounded":
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter.copy_(parameter.bfloat16())
        precision = "bfloat16" if name == "bfloat16" else "float32"
        learner = MetaLearner(made, inner_lr=0.01, task_batching=batching, precision=precision)
        gradients[name] = learner.meta_gradients(batch)
    ours, rounded = (
        cosine(gradients[name], gradients["float32"]) for name in ("bfloat16", "rounded")
    )
    assert ours > least
    assert 1 - ours < 3 * (1 - rounded)


@pytest.mark.parametrize("batching", BATCHINGS)
def test_products_run_in_bfloat16_and_normalisations_in_float32(batching):
    case = problem("conv4", dtype=torch.float32)
    counts = products(case.learner(task_batching=batching, precision="bfloat16"), case.batch)
    assert counts.keys() == {
        ("convolution", torch.bfloat16),
        ("mm", torch.bfloat16),
        ("norm", torch.float32),
    }
    assert {dtype for _, dtype in products(case.learner(task_batching=batching), case.batch)} == {
        torch.float32
    }


@pytest.mark.parametrize("batching", BATCHINGS)
@pytest.mark.parametrize(
    "options", [{"checkpoint_steps": 1}, {"chunk_size": 2}, {"traced": True}], ids=str
)
@pytest.mark.parametrize("name", ["layer-norm", "max-pool"])
def test_steps_that_are_recomputed_chunked_or_traced_round_alike(name, options, batching):
    case = problem(name, dtype=torch.float32)
    options = dict(options)
    traced = options.pop("traced", False)
    whole, ours = (
        case.learner(task_batching=batching, precision="bfloat16", **some) for some in ({}, options)
    )
    if traced:
        ours.engine.derivation = CompiledDerivation(ours.engine, lambda graph, _: graph)
    expected, actual = found(whole, case.batch), found(ours, case.batch)
    assert not traced or ours.engine.derivation.refusal is None
    assert (
        cosine(actual.gradients, expected.gradients) > 1 - 1e-4
    )  # a chunk's mean is another number to round
    torch.testing.assert_close(actual.outer_loss, expected.outer_loss, rtol=1e-3, atol=1e-3)


def test_training_evaluating_and_adapting_in_bfloat16_leave_a_model_in_float32():
    case = problem("batch-norm", dtype=torch.float32)
    learner = case.learner(preset="maml++", plugins=["gradient-sharing"], precision="bfloat16")
    history = learner.fit(
        Stream("batch-norm", dtype=torch.float32), iterations=3, tasks_per_batch=2
    )
    assert all(torch.isfinite(torch.tensor(record.step.outer_loss)) for record in history.records)
    assert (
        learner.evaluate(
            Stream("batch-norm", split="test", dtype=torch.float32), num_tasks=3
        ).num_tasks
        == 3
    )
    adapted = learner.adapt(case.batch.support_x[0], case.batch.support_y[0])
    assert {
        tensor.dtype for module in (learner.model, adapted) for tensor in module.parameters()
    } == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_a_surrounding_autocast_finds_its_settings_again():
    case = problem("mlp", dtype=torch.float32)
    learner = case.learner(precision="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learner.meta_gradients(case.batch)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()


# TF32, whose settings torch has without a device too.


def readings():
    """What torch says of its settings, by both interfaces."""

    def read(get):
        try:
            return get()
        except RuntimeError:
            return "unreadable"

    backends = torch.backends
    old = [
        lambda: backends.cudnn.allow_tf32,
        lambda: backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    settings = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cudnn,
        backends,
        backends.mkldnn.matmul,
    )
    return [read(get) for get in old], [setting.fp32_precision for setting in settings]


def old_on():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True


def old_off():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def new_conv():
    torch.backends.cudnn.conv.fp32_precision = "ieee"


def new_matmul():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def new_everywhere():
    torch.backends.fp32_precision = "tf32"


@pytest.fixture
def defaults():
    """torch's settings as they are when it is imported, and again after the test."""

    def restore():
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = (
            "none"
        )
        torch.backends.cudnn.allow_tf32 = True

    restore()
    yield
    restore()


NEW_SETTINGS = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has the old settings alone"
)


@NEW_SETTINGS
@pytest.mark.parametrize("before", [None, old_on, old_off, new_conv, new_matmul, new_everywhere])
@pytest.mark.parametrize("wide", ["highest", "high", "medium"])
def test_tf32_is_as_asked_inside_and_as_it_was_outside(before, wide, defaults):
    torch.set_float32_matmul_precision(wide)
    if before:
        before()
    old, new = readings()
    for precision, inside in (("float32", False), ("bfloat16", False), ("tf32", True)):
        with pytest.raises(KeyError), arithmetic(precision, torch.device("cuda")):
            assert readings()[0] == [inside, inside, "high" if inside else "highest"]
            assert readings()[1][:3] == ["tf32" if inside else "ieee"] * 3
            raise KeyError
        assert readings()[1] == new
        # What the old interface could not read, as the caller had mixed the two, it may read now.
        assert all(
            value in (was, True, False, "high", "highest") if was == "unreadable" else value == was
            for was, value in zip(old, readings()[0], strict=True)
        )


@NEW_SETTINGS
def test_a_cpu_is_left_alone(defaults):
    torch.backends.cuda.matmul.allow_tf32 = True
    with arithmetic("float32", torch.device("cpu")):
        assert torch.backends.cuda.matmul.allow_tf32


# What cannot be had.


def refused(precision, dtype=torch.float32, device="cpu"):
    with pytest.raises(RequestError) as error:
        check_precision(precision, dtype, torch.device(device))
    return str(error.value)


def test_what_a_model_or_a_device_does_not_have_is_refused(monkeypatch):
    for precision in ("tf32", "bfloat16"):
        with pytest.raises(RequestError) as error:
            problem().learner(precision=precision)
        assert str(error.value) == (
            f"precision '{precision}' is for models in float32, but this one is in float64: leave "
            f"precision out, or call model.float()"
        )
    assert (
        refused("tf32")
        == "precision 'tf32' is for CUDA devices, but the model is on cpu: leave precision out, "
        "or use bfloat16"
    )
    assert refused("float16") == "unknown precision 'float16': did you mean 'bfloat16'?"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert refused("bfloat16", device="cuda") == (
        "precision 'bfloat16' cannot be had, as this CUDA device does not support it: use float32 "
        "or tf32"
    )
    check_precision("tf32", torch.float32, torch.device("cuda"))
    check_precision("float32", torch.float64, torch.device("cpu"))
    assert isinstance(problem().learner().meta_gradients(problem().batch)["0.weight"], Tensor)
