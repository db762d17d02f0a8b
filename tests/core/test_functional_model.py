"""The model as a function of its weights: what it shares, and what it leaves alone."""

from functools import partial

import pytest
import torch
from torch import nn

from metaplug import RequestError, RunError
from metaplug.core.functional_model import Attributes, FunctionalModel, clone


def weights_of(model, factor=1.0):
    return [factor * parameter.detach() for parameter in model.parameters()]


def test_a_clone_shares_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    shared, apart = clone(model), clone(model, shared=False)
    for name, parameter in model.named_parameters():
        assert shared.get_parameter(name) is apart.get_parameter(name) is parameter
    assert shared[1].running_mean is model[1].running_mean
    assert apart[1].running_mean is not model[1].running_mean


class Hooked(nn.Module):
    """Its hooks are methods, bare and with an argument that comes first."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.seen = nn.Linear(2, 2), 2.0, []
        self.layer.register_forward_hook(self.scaled)
        self.layer.register_forward_hook(partial(self.note, self), with_kwargs=True)

    def scaled(self, module, given, output):
        return self.scale * output

    def note(self, owner, module, given, named, output):
        owner.seen.append(module)

    def forward(self, x):
        return self.layer(x)


def test_hooks_that_are_methods_are_those_of_the_clone():
    model, x = Hooked(), torch.ones(3, 2)
    for shared in (True, False):
        own = clone(model, shared=shared)
        own.scale = 6.0
        torch.testing.assert_close(own(x), 3 * model(x))
        assert (own.seen, model.seen) == ([own.layer], [model.layer])
        model.seen.clear()


def test_a_functional_model_has_the_hooks_that_its_model_has_now():
    model, x = Hooked(), torch.ones(3, 2)
    functional, apart = FunctionalModel(model, "batch"), clone(model, shared=False)
    functional.module.scale = 6.0
    functional.watch(())
    expected = functional(weights_of(model), x)
    handles = [
        model.layer.register_forward_hook(lambda module, given, output: output + 1),
        model.layer.register_forward_hook(model.scaled, prepend=True),
    ]
    functional.begin(True)
    torch.testing.assert_close(functional(weights_of(model), x), 6 * expected + 1)
    for handle in handles:
        handle.remove()
    functional.begin(True)
    assert torch.equal(functional(weights_of(model), x), expected)
    torch.testing.assert_close(3 * apart(x), expected)
    assert model.seen == functional.module.seen == []


def test_a_module_at_two_places_gets_one_weight():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    functional, x = FunctionalModel(model, "batch"), torch.ones(1, 2)
    expected = model(x)
    doubled = functional(weights_of(model, 2.0), x)
    assert not torch.equal(doubled, expected)
    assert torch.equal(functional(weights_of(model), x), expected)
    assert isinstance(functional.module[0].weight, nn.Parameter)
    assert model[0].weight is model[2].weight is layer.weight


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.kept, self.log = nn.Linear(2, 2), None, {"sizes": [1]}

    def forward(self, x):
        self.kept = x
        self.new = x
        self.log["last"] = x
        return self.layer(x)


def test_what_forward_writes_is_put_back_after_each_call():
    model = Writing()
    functional = FunctionalModel(model, "batch")
    functional(weights_of(model), torch.ones(1, 2))
    for module in (model, functional.module):
        assert module.kept is None
        assert module.log == {"sizes": [1]}
        assert not hasattr(module, "new")


def test_every_module_has_the_mode_that_was_set_last():
    model = Writing()
    functional, x = FunctionalModel(model, "batch"), torch.ones(1, 2)
    for training in (False, True, True, False):
        functional.begin(training)
        for _ in range(2):
            functional(weights_of(model), x)
            assert {module.training for module in functional.module.modules()} == {training}
    assert {module.training for module in model.modules()} == {True}


def test_attributes_are_put_back_in_the_containers_that_held_them():
    model = Writing()
    log, attributes = model.log, Attributes([model])
    model.log["more"] = 1
    model.kept = model.log = 0
    del model.training
    attributes.put_back()
    assert model.log is log
    assert log == {"sizes": [1]}
    assert model.training
    assert model.kept is None


def test_buffers_that_are_replaced_are_taken_over():
    model = nn.BatchNorm1d(2)
    functional, x = FunctionalModel(model, "frozen"), torch.ones(1, 2)
    model.running_mean = torch.tensor([3.0, 3.0])
    functional.begin(True)
    assert torch.equal(functional(weights_of(model), x), model.eval()(x))


def test_a_write_to_the_users_tensors_is_an_error():
    model = nn.BatchNorm1d(2)
    functional = FunctionalModel(model, "batch")
    with functional.unwritten():
        functional(weights_of(model), torch.ones(3, 2))
    with pytest.raises(RunError) as error, functional.unwritten():
        model.running_mean.add_(1)
    assert str(error.value) == (
        "the model wrote to its own 'running_mean' in forward, as no pass before it did, and its "
        "value is no longer the trained one: go on from a checkpoint, and let forward make new "
        "tensors"
    )


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason():
    model = nn.Linear(2, 2)
    model.held = (each for each in "abc")
    with pytest.raises(RequestError) as refusal:
        FunctionalModel(model, "batch")
    assert str(refusal.value) == (
        "the model cannot be copied (TypeError: cannot pickle 'generator' object), but tasks run "
        "on a copy of its structure, so that yours stays as it is: leave out of its attributes "
        "what copy.deepcopy refuses, or give its class a __deepcopy__"
    )
