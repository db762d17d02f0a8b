"""The first-party plugins, option by option, on given gradients; and the presets."""

import itertools
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.derivative_order import DerivativeOrder
from metaplug_plugins.gradient_clipping import GradientClipping
from metaplug_plugins.gradient_sharing import GradientSharing
from torch import nn

from metaplug import Context, InnerStep, MetaLearner, PluginUse, Preset, RequestError, TaskBatch
from metaplug.contract import registry
from metaplug.contract.chain import Chain
from metaplug.contract.presets import find_preset
from metaplug.experiments.variant_texts import parse_plugin, parse_variant
from metaplug.testing import Stream, adapted, assert_close, problem
from metaplug.testing.strategies import seeds

SHAPES = {"w": torch.Size([2, 3]), "b": torch.Size([2])}
SIZES = [6, 2]
STEPS = 3
NORMALISATIONS = ("unit", "none", "mean-unit")


def set_up(plugin):
    """A chain of this one plugin, for two tensors and three steps."""
    chain = Chain([plugin])
    chain.setup(context_of())
    return chain


def context_of(**given):
    values = {
        "shapes": SHAPES,
        "parameters": {
            name: torch.ones(shape, dtype=torch.float64) for name, shape in SHAPES.items()
        },
        "layers": dict.fromkeys(SHAPES, nn.Linear),
        "adapted": tuple(SHAPES),
        "dtype": torch.float64,
        "device": torch.device("cpu"),
        "inner_steps": STEPS,
        "inner_lr": 0.1,
        "kind": "classification",
    }
    return Context(**{**values, **given})


def step_of(index=0, training=True):
    return InnerStep(index, STEPS, STEPS, meta_iteration=0, meta_iterations=0, training=training)


def gradients_of(seed=0, tasks=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, sum(SIZES), dtype=dtype, generator=generator)


def transformed(chain, flat, step=None):
    """The flat gradients (T, 8) after the chain."""
    parts = flat.split(SIZES, 1)
    given = {
        name: part.reshape(-1, *shape)
        for part, (name, shape) in zip(parts, SHAPES.items(), strict=True)
    }
    folded = chain.fold("transform_gradients", MappingProxyType(given), step=step or step_of())
    return torch.cat([folded[name].flatten(1) for name in SHAPES], 1)


# Gradient sharing.


def lengths_of(flat, scope):
    """Every column's norm, (T, 8)."""
    if scope == "all":
        return flat.norm(dim=1, keepdim=True).expand_as(flat)
    return torch.cat(
        [part.norm(dim=1, keepdim=True).expand_as(part) for part in flat.split(SIZES, 1)], 1
    )


def by_hand(flat, gate, momentum, past=None, *, normalisation="unit", scope="all"):
    """d and r from the equations, option by option."""
    lengths = lengths_of(flat, scope)
    mean = (flat / lengths if normalisation == "unit" else flat).mean(0)
    if normalisation == "mean-unit":
        mean = mean / lengths_of(mean[None], scope)[0]
    running = mean if past is None else momentum * past + (1 - momentum) * mean
    scale = 1 if normalisation == "none" else lengths
    return (1 - gate) * flat + gate * scale * running, running


@pytest.mark.parametrize(
    ("normalisation", "scope"), list(itertools.product(NORMALISATIONS, ["all", "tensor"]))
)
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_every_normalisation_and_scope_is_its_equation(normalisation, scope, seed, gate, momentum):
    plugin = GradientSharing(gate=gate, momentum=momentum, normalisation=normalisation, scope=scope)
    chain, past = set_up(plugin), None
    for batch in range(3):
        flat, step = gradients_of(seed + batch), step_of(1)
        expected, past = by_hand(
            flat, gate, momentum, past, normalisation=normalisation, scope=scope
        )
        assert_close(transformed(chain, flat, step).detach(), flat if gate == 0 else expected)
        if gate > 0:
            assert_close(step.statistics["gradient-sharing"]["1"], past)
            chain.commit(step.statistics)
    test = gradients_of(seed + 10, tasks=2)
    lengths = 1 if normalisation == "none" else lengths_of(test, scope)
    assert_close(
        transformed(chain, test, step_of(1, training=False)).detach(),
        (1 - gate) * test + gate * lengths * past,
    )
    assert torch.equal(transformed(chain, test, step_of(2, training=False)), test), (
        "nothing was stored for that step"
    )


@pytest.mark.parametrize(
    ("function", "squash"),
    [
        ("sigmoid", torch.sigmoid),
        ("hard-sigmoid", lambda x: ((x + 3) / 6).clamp(0, 1)),
        ("clamp", lambda x: x.clamp(0, 1)),
    ],
)
@pytest.mark.parametrize("value", [0.01, 0.3, 0.5, 0.99])
def test_gate_functions_start_at_the_gate_and_stay_between_their_ends(function, squash, value):
    plugin = GradientSharing(gate=value, momentum=value, gate_function=function)
    chain = set_up(plugin)
    figures = chain.figures()
    assert set(figures) == {
        f"gradient-sharing.{name}/{slot}" for name in ("gate", "momentum") for slot in range(STEPS)
    }
    assert all(figure == pytest.approx(value, abs=1e-12) for figure in figures.values())
    flat = gradients_of()
    for parameter in (-10.0, -0.2, 0.4, 10.0):
        plugin.gate.data.fill_(parameter)
        gate = squash(torch.tensor(parameter, dtype=torch.float64))
        assert_close(transformed(chain, flat).detach(), by_hand(flat, gate, value)[0])


def test_granularities_give_each_step_and_tensor_its_own():
    flat, values = (
        gradients_of(),
        torch.tensor([[-1.0, 0.5], [2.0, 0.0], [0.3, -3.0]], dtype=torch.float64),
    )
    columns = torch.tensor([0] * 6 + [1] * 2)
    for granularity, shape, gate_at in (
        ("step", (3, 1), lambda k: torch.sigmoid(values[k, 0])),
        ("step-and-tensor", (3, 2), lambda k: torch.sigmoid(values[k])[columns]),
        ("one", (1, 1), lambda k: torch.sigmoid(values[0, 0])),
    ):
        plugin = GradientSharing(granularity=granularity)
        chain = set_up(plugin)
        assert plugin.gate.shape == plugin.momentum.shape == shape
        plugin.gate.data = values[: shape[0], : shape[1]].clone()
        for index in range(STEPS):
            expected, _ = by_hand(flat, gate_at(index), 0.5)
            assert_close(transformed(chain, flat, step_of(index)).detach(), expected)


@pytest.mark.parametrize("through", [True, False])
def test_through_mean_says_whether_gradients_flow_into_the_other_tasks(through):
    flat = gradients_of().requires_grad_()
    chain = set_up(GradientSharing(gate=0.5, momentum=0.0, through_mean=through))
    (ours,) = torch.autograd.grad(transformed(chain, flat)[0].square().sum(), flat)
    assert bool((ours[1:] != 0).any()) == through
    mean = (flat / lengths_of(flat, "all")).mean(0)
    by_equation = 0.5 * flat + 0.5 * lengths_of(flat, "all") * (mean if through else mean.detach())
    (expected,) = torch.autograd.grad(by_equation[0].square().sum(), flat)
    assert_close(ours, expected)


@pytest.mark.parametrize("name", ["gate", "momentum"])
def test_what_does_not_learn_stays(name):
    for options in ({f"learn_{name}": False}, {name: 0.0}, {name: 1.0}):
        plugin = GradientSharing(**{"gate": 0.4, "momentum": 0.4, **options})
        learner = problem().learner(plugins=[plugin])
        before = {
            key: value for key, value in learner.chain.figures().items() if f".{name}/" in key
        }
        learner.fit(Stream(), iterations=3, tasks_per_batch=2)
        assert f"gradient-sharing.{name}" not in learner.meta_gradients(problem().batch)
        after = learner.chain.figures()
        assert {key: after[key] for key in before} == before
        other = "momentum" if name == "gate" else "gate"
        if options.get("gate") != 0.0:
            assert after[f"gradient-sharing.{other}/0"] != 0.4


def test_gates_of_exactly_zero_and_one_are_exact():
    flat = gradients_of()
    assert torch.equal(transformed(set_up(GradientSharing(gate=0.0)), flat), flat)
    chain = set_up(GradientSharing(gate=1.0, momentum=0.0, normalisation="none"))
    moved = transformed(chain, flat)
    assert torch.equal(moved, moved[:1].expand_as(moved)), (
        "of a gate of 1 nothing of a task's own gradient is left"
    )


@pytest.mark.parametrize(
    ("normalisation", "scope"), list(itertools.product(NORMALISATIONS, ["all", "tensor"]))
)
@pytest.mark.parametrize("nothing", ["one task", "one tensor", "everything"])
def test_a_gradient_of_exactly_zero_makes_no_nan(normalisation, scope, nothing):
    flat = gradients_of()
    {"one task": flat[0], "one tensor": flat[:, 6:], "everything": flat}[nothing].zero_()
    flat.requires_grad_()
    plugin = GradientSharing(gate=0.5, momentum=0.5, normalisation=normalisation, scope=scope)
    chain = set_up(plugin)
    directions = transformed(chain, flat)
    first = torch.autograd.grad(directions.sin().sum(), [flat, plugin.gate], create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), flat)
    assert all(bool(torch.isfinite(each).all()) for each in (directions, *first, *second))
    if nothing == "everything":
        assert float(directions.detach().abs().max()) < 1e-11


@pytest.mark.parametrize("preset", ["maml", "fomaml"])
@pytest.mark.parametrize("scope", ["all", "tensor"])
def test_a_task_without_gradient_makes_no_nan_in_a_whole_step(preset, scope):
    batch = problem().batch
    batch.support_x[0] = 0
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    learner = MetaLearner(
        model, preset=preset, plugins=[GradientSharing(gate=0.5, scope=scope)], inner_steps=3
    )
    assert all(
        bool(torch.isfinite(gradient).all()) for gradient in learner.meta_gradients(batch).values()
    )


def test_a_parameter_without_gradient_counts_as_zero():
    chain = set_up(GradientSharing(gate=0.5, momentum=0.0))
    weight = gradients_of()[:, :6]
    folded = chain.fold("transform_gradients", {"w": weight.reshape(-1, 2, 3)}, step=step_of())
    assert folded.keys() == {"w"}
    padded = torch.cat([weight, torch.zeros(4, 2, dtype=torch.float64)], 1)
    assert_close(folded["w"].detach().flatten(1), by_hand(padded, 0.5, 0.0)[0][:, :6])


def test_two_instances_keep_their_own_means():
    learner = problem().learner(
        plugins=[GradientSharing(), GradientSharing(name="second", normalisation="none")]
    )
    learner.fit(Stream(), iterations=1)
    one, two = learner.chain.plugins
    assert not torch.equal(one.running, two.running)
    assert bool(one.started.all())
    assert bool(two.started.all())


# Gradient clipping.


@given(seeds, st.floats(0.1, 10))
def test_clipping_shortens_each_task_to_the_bound_and_keeps_its_direction(seed, bound):
    flat = gradients_of(seed)
    clipped = transformed(set_up(GradientClipping(max_norm=bound)), flat)
    lengths = flat.norm(dim=1, keepdim=True)
    assert_close(clipped, flat * (bound / lengths).clamp(max=1))


@given(seeds, st.floats(0.01, 1000))
def test_gradients_up_to_the_bound_are_untouched_bit_for_bit(seed, bound):
    flat = gradients_of(seed, dtype=torch.float32)
    flat = flat / flat.norm(dim=1, keepdim=True) * bound * 0.99
    assert torch.equal(transformed(set_up(GradientClipping(max_norm=bound)), flat), flat)


def test_clipping_is_finite_at_zero_in_both_derivatives():
    flat = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    clipped = transformed(set_up(GradientClipping(max_norm=1.0)), flat)
    (first,) = torch.autograd.grad(clipped.exp().sum(), flat, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), flat)
    assert torch.equal(first, torch.ones_like(first))
    assert bool(torch.isfinite(second).all())


def test_meta_gradients_are_clipped_over_all_meta_parameters_together():
    case = problem()
    free = case.learner(plugins=[GradientSharing()]).meta_gradients(case.batch)
    norm = sum(float(gradient.square().sum()) for gradient in free.values()) ** 0.5
    for bound in (norm / 3, norm * 3):
        learner = case.learner(plugins=[GradientSharing(), GradientClipping(max_meta_norm=bound)])
        assert_close(
            learner.meta_gradients(case.batch),
            {name: gradient * min(1, bound / norm) for name, gradient in free.items()},
        )
        assert_close(
            adapted(learner, case.batch),
            adapted(case.learner(plugins=[GradientSharing()]), case.batch),
        )


# Bounds of settings.


@pytest.mark.parametrize(
    ("plugin", "settings", "text"),
    [
        (
            GradientSharing,
            {"gate": 1.5},
            "plugin 'gradient-sharing': gate = 1.5: input should be less than or equal to 1",
        ),
        (
            GradientSharing,
            {"momentum": -0.1},
            "plugin 'gradient-sharing': momentum = -0.1: input should be greater than or equal "
            "to 0",
        ),
        (
            GradientSharing,
            {"gate": float("nan")},
            "plugin 'gradient-sharing': gate = nan: input should be a finite number",
        ),
        (
            GradientSharing,
            {"meta_lr": 0},
            "plugin 'gradient-sharing': meta_lr = 0: input should be greater than 0",
        ),
        (
            GradientSharing,
            {"gates": 0.1},
            "plugin 'gradient-sharing': unknown field 'gates': did you mean 'gate'?",
        ),
        (
            GradientSharing,
            {"normalisation": "units", "scope": 3},
            "plugin 'gradient-sharing': normalisation = 'units': input should be 'unit', 'none' "
            "or 'mean-unit'; "
            "scope = 3: input should be 'all' or 'tensor'",
        ),
        (
            GradientClipping,
            {},
            "plugin 'gradient-clipping': neither max_norm nor max_meta_norm is set, so that "
            "nothing would be clipped: set one",
        ),
        (
            GradientClipping,
            {"max_norm": 0},
            "plugin 'gradient-clipping': max_norm = 0: input should be greater than 0",
        ),
        (
            DerivativeOrder,
            {"switch": -1},
            "plugin 'derivative-order': switch = -1: input should be greater than or equal to 0",
        ),
        (
            DerivativeOrder,
            {"switch": 1.5},
            "plugin 'derivative-order': switch = 1.5: input should be a valid integer, got a "
            "number with a fractional part",
        ),
    ],
)
def test_settings_out_of_bounds_are_named(plugin, settings, text):
    with pytest.raises(RequestError) as error:
        plugin(**settings)
    assert str(error.value) == text


def test_settings_are_frozen_and_described():
    plugin = GradientSharing()
    with pytest.raises(ValueError, match="frozen"):
        plugin.config.gate = 0.1
    for name in registry.names("plugin"):
        config = registry.load("plugin", name).Config
        assert all(field.description for field in config.model_fields.values()), name


# Presets.


@pytest.mark.parametrize("name", registry.names("preset"))
def test_every_preset_is_named_as_installed_and_can_be_learned_with(name):
    preset = find_preset(name)
    assert (preset.name, bool(preset.summary), bool(preset.source)) == (name, True, True)
    learner = problem("conv4").learner(preset=name)
    learner.fit(Stream("conv4"), iterations=1)
    assert [plugin.kind() for plugin in learner.chain.plugins] == [
        use.plugin for use in preset.plugins
    ]


@pytest.mark.parametrize("name", registry.names("plugin"))
def test_every_installed_plugin_is_called_as_it_is_installed(name):
    plugin = registry.load("plugin", name)
    assert plugin.kind() == name
    assert plugin.__doc__
    assert plugin.Config.__doc__


def test_a_preset_of_ones_own_runs_before_the_plugins():
    preset = Preset(
        name="mine",
        summary="",
        source="",
        plugins=(PluginUse(plugin="gradient-sharing", settings={"gate": 0.25}),),
    )
    learner = problem().learner(preset=preset, plugins=["derivative-order"])
    assert [plugin.name for plugin in learner.chain.plugins] == [
        "gradient-sharing",
        "derivative-order",
    ]
    assert learner.chain.plugins[0].config.gate == 0.25


def test_a_preset_holds_no_tasks_or_plugins_among_its_defaults():
    with pytest.raises(
        ValueError, match="a preset sets no tasks by default: list plugins in its own field"
    ):
        Preset(name="mine", summary="", source="", defaults={"tasks": {}})


def test_variants_are_read_as_written():
    preset, uses = parse_variant(
        "maml + gradient-sharing:gate=0.5,learn_gate=false + gradient-clipping:max_norm=1"
    )
    assert preset == "maml"
    assert [(use.plugin, use.settings) for use in uses] == [
        ("gradient-sharing", {"gate": 0.5, "learn_gate": False}),
        ("gradient-clipping", {"max_norm": 1}),
    ]
    assert parse_variant("fomaml") == ("fomaml", [])
    with pytest.raises(RequestError) as error:
        parse_variant("mamml+gradient-sharing")
    assert (
        str(error.value)
        == "unknown preset at the start of 'mamml+gradient-sharing': did you mean 'maml'?"
    )
    with pytest.raises(RequestError) as error:
        parse_plugin("gradient-sharing:gate")
    assert (
        str(error.value) == "'gate' is no setting of plugin 'gradient-sharing': write field=value"
    )
    with pytest.raises(RequestError) as error:
        parse_plugin(":gate=1")
    assert (
        str(error.value)
        == "':gate=1' names no plugin: write plugin or plugin:field=value,field=value"
    )


def test_a_batch_with_a_transposed_task_axis_is_refused():
    x, y = torch.zeros(2, 5, 4), torch.zeros(3, 5, dtype=torch.int64)
    with pytest.raises(
        RequestError, match="which do not fit: every field must stack the same number of tasks"
    ):
        TaskBatch(x, y, x, y)


def test_reptile_trains_what_is_not_adapted_in_recomputed_steps_too():
    """The outer loss trains the body; a recomputed step gives it a tensor of its own."""
    case = problem("mlp", steps=3)
    plain, recomputed = (
        case.learner(
            preset="reptile", plugins=["partial-adaptation"], checkpoint_steps=kept
        ).meta_gradients(case.batch)
        for kept in (None, 1)
    )
    assert float(plain["0.weight"].norm()) > 0.05
    assert_close(recomputed, plain)
