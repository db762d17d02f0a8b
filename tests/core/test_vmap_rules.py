"""All tasks in one call: what layers answer when they fold the tasks is what torch.vmap's own rules
give, derivatives included."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from metaplug.core import batch_norm
from metaplug.core import vmap_rules as folding
from metaplug.core.vmap_rules import TaskRules, for_all_tasks
from metaplug.execution.graph_rewrites import _widen_products

LAYERS = {
    "linear": (F.linear, (6, 4), (6,), (5, 4)),
    "linear without bias": (lambda x, w, b: F.linear(x, w) + 0 * b.sum(), (6, 4), (6,), (5, 4)),
    "linear of matrices": (F.linear, (6, 4), (6,), (5, 3, 4)),
    "linear of one vector": (lambda x, w, b: F.linear(x[0], w, b), (6, 4), (6,), (5, 4)),
    "linear to one number": (
        lambda x, w, b: F.linear(x, w[0])[:, None] + b,
        (6, 4),
        (6,),
        (5, 4),
    ),
    "a row as the input": (lambda x, w, b: F.linear(w, x) + b[:, None], (6, 4), (6,), (5, 4)),
    "convolution": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, groups=2),
        (6, 1, 3, 3),
        (6,),
        (5, 2, 4, 4),
    ),
    "convolution of one image": (
        lambda x, w, b: F.conv2d(x, w, b, padding="same"),
        (3, 2, 3, 3),
        (3,),
        (2, 4, 4),
    ),
    "attention": (
        lambda x, w, b: F.multi_head_attention_forward(
            *[x] * 3, 4, 2, w, b, None, None, False, 0.0, torch.eye(4).to(x), None
        )[0],
        (12, 4),
        (12,),
        (3, 5, 4),
    ),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (3,),
        (3,),
        (5, 3, 2, 2),
    ),
    "max-pooling": (
        lambda x, w, b: F.max_pool2d(x * w[:, None, None], 2) + b[:, None, None],
        (3,),
        (3,),
        (5, 3, 4, 4),
    ),
    "max-pooling of ReLU": (
        lambda x, w, b: F.max_pool2d(F.relu(x * w[:, None, None] + b[:, None, None]), 2),
        (3,),
        (3,),
        (5, 3, 4, 4),
    ),
    "vmap within": (
        lambda x, w, b: torch.vmap(lambda row: F.linear(row, w, b))(x),
        (6, 4),
        (6,),
        (5, 3, 4),
    ),
}


def with_pooling_by_channels(*arguments):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(folding, "LARGE", 0)
        return for_all_tasks(*arguments)


def second_derivative(losses, leaves):
    """The gradient of the squared gradients' sum: what a meta-gradient is made of."""
    gradients = torch.autograd.grad(losses.sum(), leaves, create_graph=True, allow_unused=True)
    return torch.autograd.grad(
        sum(gradient.square().sum() for gradient in gradients if gradient is not None),
        leaves,
        allow_unused=True,
    )


@pytest.mark.parametrize("layer", LAYERS)
@given(
    tasks=st.integers(1, 4), shared=st.tuples(st.booleans(), st.booleans()), seed=st.integers(0, 99)
)
def test_folded_layers_are_vmaps(layer, tasks, shared, seed):
    function, *shapes = LAYERS[layer]
    generator = torch.Generator().manual_seed(seed)
    *parameters, x = (
        torch.randn(tasks, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    parameters = [
        value[:1].expand_as(value) if same else value
        for value, same in zip(parameters, shared, strict=True)
    ]

    def task(values, x, y):
        out = function(x, *values)
        return (out.sin() * y).sum(), out

    answers = []
    for call in (
        lambda *given: for_all_tasks(task, given[:2], shared, *given[2:]),
        lambda *given: with_pooling_by_channels(task, given[:2], shared, *given[2:]),
        lambda *given: torch.vmap(task)(list(given[:2]), *given[2:]),
    ):
        leaves = [value.detach().requires_grad_() for value in (*parameters, x)]
        losses, outputs = call(*leaves, torch.ones(tasks, 1, dtype=torch.float64))
        if any(
            shared
        ):  # the first row stands for all, so that the others have no gradient of their own
            answers.append((losses, outputs))
        else:
            answers.append((losses, outputs, *second_derivative(losses, leaves)))
    *answers, theirs = answers
    for ours, their in [pair for answer in answers for pair in zip(answer, theirs, strict=True)]:
        torch.testing.assert_close(ours, their, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("channels", [3, 130])
@given(
    kernel=st.integers(2, 3),
    stride=st.sampled_from([None, 1, 2]),
    ceil=st.booleans(),
    seed=st.integers(0, 99),
)
def test_pooling_by_channels_is_torchs_bit_for_bit(channels, kernel, stride, ceil, seed):
    """Ties too, and second derivatives."""
    x = (
        torch.randint(4, (2, channels, 7, 6), generator=torch.Generator().manual_seed(seed))
        .double()
        .requires_grad_()
    )
    settings = {"stride": stride, "padding": 1, "ceil_mode": ceil}
    answers = []
    for mode in (TaskRules, nullcontext):
        with mode(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(folding, "LARGE", 0)
            pooled = F.max_pool2d(x, kernel, **settings)
        gradient = torch.autograd.grad(pooled.pow(3).sum(), x, create_graph=True)[0]
        answers.append((pooled, gradient, torch.autograd.grad(gradient.square().sum(), x)[0]))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*answers, strict=True))
    assert answers[0][0].grad_fn.name() == "_MaxPool2dBackward"


ACTIVATIONS = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "method": torch.Tensor.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.25),
    "by name": lambda x: F.leaky_relu(input=x, negative_slope=0.25),
    "in place": lambda x: F.relu(x + 0, inplace=True),
    "read again": lambda x: F.relu(x) + 0,
    "of slope 0": lambda x: F.leaky_relu(x, 0.0),
    "falling": lambda x: F.leaky_relu(x, -0.5),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kernel", [(2, 2), (3, 1)], ids=["apart", "overlapping"])
def test_activation_and_pooling_are_torchs_bit_for_bit(activation, kernel):
    """Ties and zeros too, derivatives to third order, and where the activation is used twice."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randint(7, (2, 3, 7, 6), generator=generator) - 3).double().requires_grad_()
    size, stride = kernel
    answers = []
    for mode in (TaskRules, nullcontext):
        with mode(), pytest.MonkeyPatch.context() as patched:
            patched.setattr(folding, "LARGE", 0)
            activated = ACTIVATIONS[activation](x)
            pooled = F.max_pool2d(activated, size, stride)
        found = [pooled, activated]
        total = pooled.pow(4).sum() + activated.pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, x, create_graph=True)
            found.append(gradient)
            total = gradient.square().sum()
        answers.append(found)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*answers, strict=True))


def test_pooling_right_after_an_activation_keeps_neither():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved
    )
    with pytest.MonkeyPatch.context() as patched, TaskRules():
        patched.setattr(folding, "LARGE", 0)
        activated = F.relu(x)
        with hooks:
            pooled = F.max_pool2d(activated, 2)
    assert max(sizes) == pooled.numel()
    assert pooled.grad_fn.next_functions[1][0].variable is x


def test_layers_within_attention_follow_the_rules(monkeypatch):
    """vmap's own rule would copy the projection's weights for every token."""
    shapes, rule = [], folding._RULES[F.linear]
    monkeypatch.setitem(
        folding._RULES, F.linear, lambda x, w, b: shapes.append(w.shape) or rule(x, w, b)
    )
    layer, x = nn.MultiheadAttention(4, 2), torch.rand(2, 3, 5, 4)
    weights = [each.detach().expand(2, *each.shape) for each in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def task(own, x, y):
        call = torch.func.functional_call(layer, dict(zip(names, own, strict=True)), (x, x, x))
        return call[0], y

    found, _ = for_all_tasks(task, weights, [False] * 4, x, x)
    assert shapes == [(12, 4), (4, 4)]
    torch.testing.assert_close(found[1], layer(*[x[1]] * 3)[0])


@pytest.mark.parametrize("activation", ["relu", "leaky", "none"])
@pytest.mark.parametrize("stacked", [True, False])
def test_what_follows_a_pooling_may_write_to_its_result(activation, stacked, monkeypatch):
    """As an activation in place does, or a position that is added."""
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x = x.requires_grad_()
    function = ACTIVATIONS.get(activation, lambda x: x)

    def task(values, x, y):
        return y, F.relu(F.max_pool2d(function(x), 2).add_(1), inplace=True)

    gradients = []
    for large in (0, folding.LARGE):
        monkeypatch.setattr(folding, "LARGE", large)
        if stacked:
            _, result = for_all_tasks(task, [], [], x, torch.zeros(2))
        else:
            with TaskRules():
                _, result = task([], x[0], None)
        gradients.append(torch.autograd.grad(result.pow(2).sum(), x)[0])
    assert torch.equal(*gradients)


def in_two(x, function):
    return torch.vmap(lambda s: function(x * s))(torch.arange(1, 3).to(x))


def in_forward_mode(x, function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def torchs_norm(x):
    return F.batch_norm(x, None, None, training=True)


LEFT_TO_TORCH = {
    "ReLU in a vmap": lambda x: in_two(x, F.relu),
    "pooling in a vmap": lambda x: in_two(x, lambda x: F.max_pool2d(F.relu(x), 2)),
    "batch norm in a vmap": lambda x: in_two(x, torchs_norm),
    "a constant in a vmap": lambda x: in_two(x, lambda s: F.max_pool2d(x, 2) + s[:, :, 1::2, ::2]),
    "pooling in a derivative": torch.func.grad(lambda x: F.max_pool2d(F.relu(x), 2).sin().sum()),
    "pooling, from its input on": lambda x: in_forward_mode(x, lambda x: F.max_pool2d(x, 2)),
    "ReLU, from its input on": lambda x: in_forward_mode(x, F.relu),
    "batch norm, from its input on": lambda x: in_forward_mode(x, torchs_norm),
    "16 bits": lambda x: F.max_pool2d(x.bfloat16(), 3, 1, 1),
    "a stride of 0": lambda x: F.max_pool2d(x, 2, 0),
    "a slope in a tensor": lambda x: F.leaky_relu(x, torch.tensor(0.2)),
}


# torch loads the rules of its forward mode by what it warns of itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("case", LEFT_TO_TORCH)
@pytest.mark.parametrize("stacked", [True, False])
def test_what_own_derivatives_do_not_know_is_left_to_torch(case, stacked, monkeypatch):
    x = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    x = x.requires_grad_()

    def answer(large):
        for module, name in ((folding, "LARGE"), (batch_norm, "LARGE")):
            monkeypatch.setattr(module, name, large)
        try:
            if stacked:
                task = lambda values, x, y: (y, LEFT_TO_TORCH[case](x))  # noqa: E731
                _, result = for_all_tasks(task, [], [], x, torch.zeros(2))
            else:
                with nullcontext() if large else TaskRules():
                    result = LEFT_TO_TORCH[case](x[0])
        except RuntimeError as error:
            return str(error)
        return result, *torch.autograd.grad(result.double().pow(2).sum(), x)

    ours, theirs = answer(0), answer(2**16)
    if isinstance(theirs, str):
        assert ours == theirs
    else:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "leaky"])
def test_a_batch_of_gradients_is_taken_at_once(activation, monkeypatch):
    monkeypatch.setattr(folding, "LARGE", 0)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gradients = torch.randn(5, 2, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    answers = []
    for mode in (TaskRules, nullcontext):
        with mode():
            pooled = F.max_pool2d(ACTIVATIONS[activation](x), 2)
        answers += torch.autograd.grad(pooled, x, gradients, is_grads_batched=True)
    assert torch.equal(*answers)


@pytest.mark.parametrize("wait", ["retain_grad", "register_hook"])
def test_the_gradient_of_an_activation_before_a_pooling_may_be_waited_for(wait, monkeypatch):
    monkeypatch.setattr(folding, "LARGE", 0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).requires_grad_()
    seen = []
    with TaskRules():
        hidden = F.relu(x)
        if wait == "retain_grad":
            hidden.retain_grad()
        else:
            hidden.register_hook(seen.append)
        F.max_pool2d(hidden, 2).sum().backward()
    (found,) = [hidden.grad] if wait == "retain_grad" else seen
    assert int(found.sum()) == 2 * 3 * 4


@pytest.mark.parametrize(
    ("shape", "dim"), [((5, 4, 3), dim) for dim in (0, 1, 2, -2, -1)] + [((5,), 0)]
)
def test_weight_norm_is_torchs_with_a_right_second_derivative(shape, dim):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    g = 1 + torch.norm_except_dim(v, 2, dim).detach().requires_grad_()

    def by_rule(v, g):
        with TaskRules():
            return torch._weight_norm(v, g, dim)

    torch.testing.assert_close(by_rule(v, g), torch._weight_norm(v, g, dim), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(by_rule, (v, g))
    assert torch.autograd.gradgradcheck(by_rule, (v, g))
    torchs = torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, dim), (v, g), raise_exception=False
    )
    assert torchs is (dim not in {0, len(shape) - 1})  # else the rule is no longer needed


def test_random_numbers_differ_from_task_to_task():
    x = torch.ones(3, 50)
    _, outputs = for_all_tasks(lambda values, x, y: (x.sum(), F.dropout(x)), [], [], x, x)
    assert not torch.equal(outputs[0], outputs[1])


def test_an_error_inside_leaves_no_vmap_behind():
    x = torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="vmap"):
        for_all_tasks(lambda values, x, y: (x.sum().item(), x), [], [], x, x)
    assert maybe_current_level() is None


def test_a_module_that_answers_no_tensor_of_the_tasks_is_stacked_all_the_same():
    x = torch.ones(3, 2)
    losses, outputs = for_all_tasks(
        lambda values, x, y: (torch.zeros(()), nn.Identity()(x)), [], [], x, x
    )
    assert losses.shape == (3,)
    assert outputs.shape == (3, 2)


def test_a_graph_for_the_cpu_has_no_product_with_more_rows_than_columns():
    def function(a, b):
        return torch.bmm(torch.bmm(a, b), torch.bmm(b.mT, a.mT)[:, :, :2]).sin()

    inputs = [torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)]
    graph = make_fx(function)(*inputs)
    _widen_products(graph)
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.bmm.default]
    ShapeProp(graph).propagate(*inputs)
    assert len(products) == 3
    assert all(
        node.meta["tensor_meta"].shape[1] <= node.meta["tensor_meta"].shape[2] for node in products
    )
    torch.testing.assert_close(graph(*inputs), function(*inputs), rtol=1e-13, atol=1e-13)
