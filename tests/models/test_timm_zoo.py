"""Models of timm by name: fitted to the tasks, with local weights, trained in part, and refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from metaplug import MetaLearner, TaskBatch
from metaplug.errors import RequestError
from metaplug.models.factories import is_own, make_model
from metaplug.testing import Problem, assert_close, reference

timm: Any = pytest.importorskip("timm")

SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"embed_dim": 12, "depth": 2, "num_heads": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]},
}
VIT = "vit_tiny_patch16_224"


def made(name: str = VIT, shape: tuple[int, ...] = (3, 32, 32), **settings: Any) -> Any:
    torch.manual_seed(0)
    return make_model(f"timm:{name}", shape, 3, {**SMALL.get(name, {}), **settings})


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def trained(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_a_model_has_the_tasks_channels_size_and_outputs(name: str, channels: int) -> None:
    model = made(name, (channels, 32, 32))
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 3)
    assert trained(model) == {name for name, _ in model.named_parameters()}
    assert model.training


def test_settings_reach_timm() -> None:
    assert made(drop_rate=0.25).body.head_drop.p == 0.25
    model = made(dynamic_img_size=True, drop_path_rate=0.5)
    assert model.body.pos_embed.shape[1] == 14 * 14 + 1
    assert model.body.blocks[1].drop_path1.drop_prob == 0.5
    assert model(torch.rand(2, 3, 48, 32)).shape == (2, 3)


def test_the_head_alone_or_with_adapters_is_trained() -> None:
    pytest.importorskip("peft")
    head = {"body.head.weight", "body.head.bias"}
    assert trained(made(train="head")) == head
    model = made(train="lora", rank=2)
    adapters = {
        f"body.blocks.{block}.attn.qkv.lora_{side}.default.weight"
        for block in range(2)
        for side in "AB"
    }
    assert trained(model) == head | adapters
    assert model.body.blocks[0].attn.qkv.lora_A["default"].weight.shape == (2, 12)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_from_a_local_file_but_those_of_another_head(
    tmp_path: Path, ending: str
) -> None:
    source = timm.create_model(VIT, num_classes=7, img_size=64, **SMALL[VIT])
    path = tmp_path / f"weights.{ending}"
    state = source.state_dict()
    if ending == "pth":
        torch.save({"state_dict": state}, path)
    else:
        safetensors.torch.save_file(state, path)
    body = made(shape=(3, 64, 64), pretrained=str(path)).body
    for name, value in body.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, state[name]), name
    # Places between those of the file's patches are timm's own work.
    resized = made(pretrained=str(path)).body
    assert resized.pos_embed.shape == (1, 5, 12)
    assert torch.equal(resized.patch_embed.proj.weight, state["patch_embed.proj.weight"])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    name = f"the model 'timm:{VIT}'"
    missing = (
        f"{name} asks for the weights {path} (model.settings.pretrained), which is not there: put "
        "model.safetensors of the model there, or leave the setting out"
    )
    assert refusal(lambda: made(pretrained=str(path))) == missing
    assert refusal(lambda: made(pretrained=f"{path}.npz")) == (
        f"{name} asks for the weights {path}.npz (model.settings.pretrained), which ends in none "
        "of '.safetensors', '.pth', '.pt', '.bin': put model.safetensors of the model there, or "
        "leave the setting out"
    )
    safetensors.torch.save_file(made().body.state_dict(), path)
    assert refusal(lambda: made(shape=(1, 32, 32), pretrained=str(path))) == (
        f"the weights {path} do not fit {name} at 'patch_embed.proj.weight': give those of this "
        "model and number of channels"
    )
    assert refusal(lambda: made(depth=1, pretrained=str(path))) == (
        f"the weights {path} do not fit {name} at 'blocks.1.attn.proj.bias', "
        "'blocks.1.attn.proj.weight', 'blocks.1.attn.qkv.bias': give those of this model and "
        "number of channels"
    )
    path.write_bytes(b"no weights")
    assert refusal(lambda: made(pretrained=str(path))).startswith(
        f"the weights {path} of {name} cannot be read ("
    )


class Code:
    """A pickle that runs something when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_no_pickle_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": Code()}, path)
    said = refusal(lambda: made(pretrained=str(path)))
    assert said.startswith(f"the weights {path} of the model 'timm:{VIT}' cannot be read (")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("resnet81", (3, 32, 32), {}, "unknown timm model 'resnet81': did you mean 'resnet18'?"),
        (
            VIT,
            (6,),
            {},
            "timm:{} takes images (channels, height, width) to at least one output, but the tasks "
            "have inputs (6,) and 3 outputs: choose other tasks, or the model mlp",
        ),
        (
            "resnet10t",
            (3, 32, 32),
            {"widht": 3},
            "the model 'timm:{}' cannot be made with the settings {{'widht': 3}} (TypeError: "
            "ResNet.__init__() got an unexpected keyword argument 'widht'): correct "
            "model.settings, or what the factory takes",
        ),
        (
            VIT,
            (3, 32, 32),
            {"checkpoint_path": "weights.pth"},
            "timm:{}: checkpoint_path follows from the tasks and from pretrained: leave it out",
        ),
        (
            VIT,
            (3, 32, 32),
            {"rank": 2},
            "timm:{}: rank is read by train = lora, not by all",
        ),
        (
            VIT,
            (3, 32, 32),
            {"train": "lora", "targets": ["qvk"]},
            "the model 'timm:{}' has no layer 'qvk' for an adapter (model.settings.targets): did "
            "you mean 'qkv'?",
        ),
        (
            VIT,
            (3, 32, 32),
            {"img_size": 64},
            "timm:{} fails on an image of the tasks' form (3, 32, 32) (AssertionError: Input "
            "height (32) doesn't match model (64).): choose another size of images, or another "
            "model",
        ),
        (
            "convnext_atto",
            (3, 32, 32),
            {"global_pool": ""},
            "timm:{} does not answer with 3 logits for an image: choose a classifier, without "
            "arguments that change what it gives",
        ),
    ],
)
def test_what_timm_cannot_make_is_refused(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    assert refusal(lambda: made(name, shape, **settings)) == message.format(name)


def test_without_timm_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refusal(made) == (f"the model 'timm:{VIT}' needs timm: pip install 'metaplug[vision]'")


@pytest.mark.parametrize("name", SMALL)
def test_meta_gradients_through_timm_equal_a_plain_loop(name: str) -> None:
    """Stacked and one task at a time; attention, layer norms and grouped convolutions."""
    model = made(name).double()
    x, y = torch.randn(2, 2, 4, 3, 32, 32, dtype=torch.float64), torch.randint(3, (2, 2, 4))
    case = Problem(model, TaskBatch(x[0], y[0], x[1], y[1]), lr=0.1, steps=1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = reference.maml(case.model, case.batch, steps=1, lr=0.1).gradients
    for batching in ("vectorized", "sequential"):
        taken = case.learner(task_batching=batching).meta_gradients(case.batch)
        assert_close(taken, expected, rtol=1e-10, atol=1e-10)


def test_a_learner_is_loaded_by_the_name_of_its_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert not is_own(f"timm:{VIT}")
    model, path = made(train="lora", drop_path_rate=0.0), tmp_path / "learner.safetensors"
    MetaLearner(model, inner_lr=0.1).save(path)
    loaded = MetaLearner.load(path).model
    assert loaded.config == model.config
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert trained(loaded) == trained(model)
