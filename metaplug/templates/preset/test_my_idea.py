"""What every preset promises, and the order of this one."""

from typing import Any

import torch
from metaplug import MetaLearner
from metaplug.models import Mlp
from metaplug.tasks import Sinusoid

from my_idea import MY_IDEA


def learner_of(**settings: Any) -> MetaLearner:
    torch.manual_seed(0)
    tasks = Sinusoid()
    model = Mlp(tasks.input_shape, tasks.outputs, hidden=(8,))
    preset = MY_IDEA
    return MetaLearner(model, preset=preset, kind="regression", **settings)


def test_it_says_what_it_is() -> None:
    preset = MY_IDEA
    assert preset.name == "my-idea"
    assert preset.summary
    assert preset.source


def test_its_plugins_are_installed_and_take_their_settings_in_this_order() -> None:
    learner = learner_of()
    assert learner.chain.order()["transform_gradients"] == ("gradient-clipping", "gradient-sharing")


def test_its_defaults_give_way_to_what_is_set() -> None:
    assert (learner_of().settings.inner_lr, learner_of().settings.inner_steps) == (0.1, 5)
    assert learner_of(inner_lr=0.01).settings.inner_lr == 0.01


def test_a_model_learns_with_it() -> None:
    tasks, learner = Sinusoid(), learner_of(inner_lr=0.01, inner_steps=2, meta_lr=0.01)
    before = learner.evaluate(tasks.test, num_tasks=16).mean
    learner.fit(tasks.train, iterations=50, tasks_per_batch=4)
    assert learner.evaluate(tasks.test, num_tasks=16).mean < before
