"""Exported models: the programs give what the adapted module gives, wherever they run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from support.tiny_language_models import save_language_models
from support.tiny_runs import tiny
from support.tiny_tokenizer import save_tokenizer, write_texts
from torch import nn

from metaplug import MetaLearner, RequestError, RunError
from metaplug.cli.main import main
from metaplug.experiments import export
from metaplug.experiments.export import digest_of, export_adapted, export_run
from metaplug.experiments.runs import load, train
from metaplug.experiments.support_sets import read_support
from metaplug.files import replacing
from metaplug.models import Conv4
from metaplug.tasks import Glyphs
from metaplug.tasks.text.source import Text


def draw(folder, classes, count=3, size=28, shade=200):
    """Class folders of bright noise, another one in each image."""
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = np.random.default_rng([*name.encode(), index]).integers(0, 55, (size, size))
            Image.fromarray((shade + noise).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of conv4 on 3-way tasks of images, with a support set of new classes beside it."""
    folder = tmp_path_factory.mktemp("export")
    for split in ("train", "val", "test"):
        draw(folder / "images" / split, [f"{split}{label}" for label in range(3)])
    draw(folder / "support", ["ash", "birch", "cedar"], count=2)
    config = tiny(
        plugins=[],
        model={"name": "conv4", "settings": {"filters": 4}},
        tasks={"source": f"folder:{folder}/images", "ways": 3, "shots": 1, "queries": 1},
        learner={"inner_lr": 0.1, "inner_steps": 2},
        training__iterations=1,
        training__validation_tasks=2,
        training__test_tasks=2,
    )
    train(config, folder / "run")
    return folder


@pytest.fixture(scope="module")
def exported(runs):
    pytest.importorskip("onnxscript")
    return export_run(load(runs / "run"), runs / "support", runs / "out", formats=["torch", "onnx"])


def pictures(folder, inverted=True):
    """Images as labels.json tells anyone to read them."""
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
    pixels = 255 - pixels if inverted else pixels
    return torch.from_numpy(pixels).float()[:, None] / 255


@pytest.fixture(scope="module")
def adapted(runs):
    x = pictures(runs / "support")
    return load(runs / "run").learner.adapt(x, torch.tensor([0, 0, 1, 1, 2, 2]))


QUERY = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(1))

RUN = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
query = torch.load(sys.argv[2])
torch.save([program(query[:1]), program(query)], sys.argv[3])
assert not [name for name in sys.modules if name.startswith("metaplug")]
"""


def test_the_program_gives_the_same_in_a_process_without_metaplug(exported, adapted, tmp_path):
    torch.save(QUERY, tmp_path / "query.pt")
    names = (exported["model.pt2"], tmp_path / "query.pt", tmp_path / "found.pt")
    subprocess.run([sys.executable, "-c", RUN, *names], check=True, cwd=tmp_path)
    alone, together = torch.load(tmp_path / "found.pt")
    assert torch.equal(alone, adapted(QUERY[:1]))
    assert torch.equal(together, adapted(QUERY))
    # Batch norm: what an example gets depends on the others, in the program as in the module.
    assert not torch.allclose(alone[0], together[0])


def test_the_onnx_model_gives_the_same(exported, adapted):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(exported["model.onnx"], providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["x"]
    assert [each.name for each in session.get_outputs()] == ["prediction"]
    for count in (1, 7):
        [found] = session.run(None, {"x": QUERY[:count].numpy()})
        expected = adapted(QUERY[:count])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_the_state_is_that_of_the_adapted_module(exported, adapted):
    found = safetensors.torch.load_file(exported["model.safetensors"])
    assert found.keys() == adapted.state_dict().keys()
    assert all(torch.equal(found[name], each) for name, each in adapted.state_dict().items())


def test_labels_say_what_goes_in_and_comes_out(exported):
    values = json.loads(exported["labels.json"].read_text())
    assert values.pop("sha256") == {
        name: digest_of(path) for name, path in exported.items() if name != "labels.json"
    }
    assert values == {
        "labels": ["ash", "birch", "cedar"],
        "inputs": {"x": {"shape": [1, 28, 28], "dtype": "float32"}},
        "least_examples": 1,
        "depends_on_batch": True,
        "preprocessing": {
            "kind": "images",
            "mode": "grey",
            "height": 28,
            "width": 28,
            "inverted": True,
            "values": "(255 - pixel) / 255 where inverted, else pixel / 255",
        },
        "support_examples": 6,
        "inner_steps": 2,
        "transductive": ["batch norm uses the statistics of each task's own batch"],
    }


def test_fewer_ways_leave_outputs_out(runs, tmp_path):
    support = draw(tmp_path / "two", ["ash", "birch"])
    run = load(runs / "run")
    files = export_run(run, support, tmp_path / "out", ways=2, inner_steps=1)
    target = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = run.learner.adapt(pictures(support), target, ways=2, inner_steps=1)(QUERY)
    program = torch.export.load(files["model.pt2"]).module()
    assert torch.equal(program(QUERY), expected[:, :2])


class Sum(nn.Module):
    """Answers with several parts, from several inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, left, right):
        return {"other": left, "scores": self.layer(left + right.float())}


@pytest.mark.parametrize("named", [True, False])
def test_models_of_several_inputs(named, tmp_path):
    module, whole = Sum(), torch.arange(5)[:, None].expand(5, 3)
    x = {"right": whole, "left": torch.rand(5, 3)} if named else (torch.rand(5, 3), whole)
    before = [each.clone() for each in module.parameters()]
    files = export_adapted(module, x, tmp_path / "out", output="scores", about={"by": "me"})
    program = torch.export.load(files["model.pt2"]).module()
    for count in (1, 4):
        own = {name: each[:count] for name, each in x.items()} if named else None
        found = program(**own) if named else program(*(each[:count] for each in x))
        expected = module(**own) if named else module(*(each[:count] for each in x))
        assert torch.equal(found, expected["scores"])
    assert all(map(torch.equal, before, module.parameters()))
    assert all(each.requires_grad for each in module.parameters())
    values = json.loads(files["labels.json"].read_text())
    assert [*values["inputs"]] == (["right", "left"] if named else ["x0", "x1"])
    assert (values["labels"], values["by"]) == (None, "me")


def test_a_model_that_refuses_one_example_has_a_program_for_two(tmp_path):
    """Batch norm after the last stride sees one value a channel."""
    model = Conv4((1, 16, 16), 3, filters=2)
    x, y = torch.rand(3, 1, 16, 16), torch.arange(3)
    module = MetaLearner(model, inner_steps=1).adapt(x, y)
    files = export_adapted(module, x, tmp_path / "out")
    assert json.loads(files["labels.json"].read_text())["least_examples"] == 2
    program = torch.export.load(files["model.pt2"]).module()
    assert torch.equal(program(x[:2]), module(x[:2]))


def test_glyphs_are_bright_on_dark_as_in_training(tmp_path):
    paper, ink = draw(tmp_path / "paper", ["a", "b"]), draw(tmp_path / "ink", ["a", "b"], shade=0)
    tasks = Glyphs(ways=2, shots=1, queries=1)
    read = [read_support(tasks, folder) for folder in (paper, ink)]
    assert [each.preprocessing["inverted"] for each in read] == [True, False]
    assert torch.equal(read[0].x, pictures(paper))
    assert torch.equal(read[1].x, pictures(ink, inverted=False))
    assert read[0].y.tolist() == [0, 0, 0, 1, 1, 1]


def texts(folder, **settings):
    """A run's tasks, of texts with their intents."""
    tokenizer = save_tokenizer(folder / "tokenizer")
    write_texts(folder / "texts.csv", classes=12, count=2)
    sizes = {"ways": 2, "shots": 1, "queries": 1}
    return Text(folder / "texts.csv", **sizes, tokenizer=str(tokenizer), **settings)


def test_texts_have_the_tokens_of_the_run(tmp_path):
    tasks = texts(tmp_path, max_length=5)
    (tmp_path / "new.csv").write_text("text,intent\nred,b\nbig blue,a\nold one two three,b\n")
    read = read_support(tasks, tmp_path / "new.csv")
    assert read.labels == ("a", "b")
    assert read.y.tolist() == [1, 0, 1]
    assert read.x["input_ids"].tolist() == [[1, 4, 2, 3, 3], [1, 7, 6, 2, 3], [1, 9, 11, 12, 2]]
    assert read.x["attention_mask"].sum(1).tolist() == [3, 4, 5]


def test_labels_of_a_support_set_are_in_the_column_of_the_run(tmp_path):
    tasks = texts(tmp_path)
    rows = "text,label,intent,category,group,domain\nred,x,b,u,v,w\nbig,y,a,u,v,w\n"
    (tmp_path / "new.csv").write_text(rows)
    assert read_support(tasks, tmp_path / "new.csv").labels == ("a", "b")


def test_texts_are_no_longer_than_the_model_takes(tmp_path):
    tasks = texts(tmp_path, max_length=9)
    (tmp_path / "new.csv").write_text("text,intent\nred,b\nbig blue,a\n")
    for most, length in ((None, 9), (12, 9), (4, 4), (3, 9)):  # 3: the model refuses them
        read = read_support(tasks, tmp_path / "new.csv", most=most)
        assert read.x["input_ids"].shape == (2, length)
        assert read.preprocessing["max_length"] == length


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "causal"])
def test_a_language_model_runs_as_a_program(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    save_language_models(tmp_path)
    rows = write_texts(tmp_path / "texts.csv", classes=24).read_text().splitlines()
    (tmp_path / "new.csv").write_text("\n".join([rows[0], *rows[1:6], *rows[8:16]]) + "\n")
    settings = {"max_length": 12, "tokenizer": f"{tmp_path}/model"}
    config = tiny(
        plugins=[],
        model={"name": f"transformers:{tmp_path}/{name}"},
        tasks={"source": f"text:{tmp_path}/texts.csv", "ways": 3, "settings": settings},
        learner={"inner_steps": 1},
        training={"iterations": 1, "validation_tasks": 2, "test_tasks": 2, "tasks_per_batch": 1},
    )
    train(config, tmp_path / "run")
    run, support = load(tmp_path / "run"), tmp_path / "new.csv"
    files = export_run(run, support, tmp_path / "out", formats=["torch", "onnx"])
    given = read_support(run.tasks, support)
    module = run.learner.adapt(given.x, given.y)
    program = torch.export.load(files["model.pt2"]).module()
    session = runtime.InferenceSession(files["model.onnx"], providers=["CPUExecutionProvider"])
    for count in (1, 7):
        x = {key: each[:count] for key, each in given.x.items()}
        expected = module(**x)
        torch.testing.assert_close(program(**x), expected)
        [found] = session.run(None, {key: each.numpy() for key, each in x.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# Refusals.


class Draws(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_program_that_gives_other_outputs_is_not_written(tmp_path):
    with pytest.raises(RunError) as error:
        export_adapted(Draws(), torch.zeros(2, 3), tmp_path / "out")
    text = str(error.value)
    assert text.startswith("the program of the model gives other outputs than the model, by up to ")
    assert text.endswith(
        " for 1 examples: see whether forward draws random numbers or branches on the number of "
        "examples, or write the state alone (--format state)"
    )
    assert not (tmp_path / "out").exists()


def test_what_torch_cannot_export_is_said_in_one_line(tmp_path):
    with pytest.raises(RequestError) as error:
        export_adapted(Branches(), torch.ones(2, 3), tmp_path / "out")
    text = str(error.value)
    assert text.startswith("torch.export cannot make a program of the model (")
    assert "\n" not in text
    export_adapted(Branches(), torch.ones(2, 3), tmp_path / "out", formats=["state"])


def test_what_cannot_be_of_use_is_refused(tmp_path):
    def refusal(module, **given):
        with pytest.raises((RequestError, RunError)) as error:
            export_adapted(module, torch.ones(2, 3), tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert refusal(nn.Linear(3, 1), labels=["a", "b"]) == (
        "2 labels for predictions of the shape (2, 1): give at most one for each output"
    )
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, torch.nan)
    assert refusal(module, formats=["state"]) == (
        "the model gives NaN or Inf for the examples that it is exported with: adapt it with fewer "
        "inner steps, or train with a lower inner_lr"
    )


def test_a_disk_that_fills_up_leaves_no_half_export(tmp_path, monkeypatch):
    def replacing_until_full(path):
        if path.name == "labels.json":
            raise RunError(f"cannot write {path}: No space left on device")
        return replacing(path)

    monkeypatch.setattr(export, "replacing", replacing_until_full)
    with pytest.raises(RunError):
        export_adapted(nn.Linear(3, 2), torch.ones(2, 3), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_format_without_its_library_or_of_another_name_is_refused(tmp_path, monkeypatch):
    def refusal(name):
        with pytest.raises(RequestError) as error:
            export_adapted(nn.Linear(2, 2), torch.ones(2, 2), tmp_path / "out", formats=[name])
        return str(error.value)

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert refusal("onnx") == "the format onnx needs onnxscript: pip install 'metaplug[export]'"
    assert refusal("onx") == "unknown format of an export 'onx': did you mean 'onnx'?"


def wrong(runs, folder):
    """By case, the command line and its error."""
    (folder / "none").mkdir()
    (folder / "file").write_text("")
    draw(folder / "two", ["ash", "birch"], count=1)
    draw(folder / "four", ["ash", "birch", "cedar", "elm"], count=1)
    run, support, out = f"{runs}/run", f"{runs}/support", f"{folder}/out"
    suffixes = ".bmp, .gif, .jpeg, .jpg, .pgm, .png, .ppm, .tif, .tiff, .webp"
    return {
        "a missing run": (
            [f"{folder}/gone", "--support", support, "--out", out],
            f"there is no run {folder}/gone: give the folder of a run that `metaplug train` has "
            "validated at least once",
        ),
        "a missing folder": (
            [run, "--support", f"{folder}/gone", "--out", out],
            f"tasks from the folder {folder}/gone: there is no such folder or zip; give the path "
            "of one",
        ),
        "no images": (
            [run, "--support", f"{folder}/none", "--out", out],
            f"tasks from the folder {folder}/none: it holds no images ({suffixes}); give a folder, "
            "or a zip, with a folder of images for each class",
        ),
        "too few classes": (
            [run, "--support", f"{folder}/two", "--out", out],
            f"--support {folder}/two has 2 classes, but the run's model has 3 outputs: give 3 "
            "classes; or give --ways 2, and the other outputs are left out",
        ),
        "too many classes": (
            [run, "--support", f"{folder}/four", "--out", out],
            f"--support {folder}/four has 4 classes, more than the 3 outputs of the run's model: "
            "give at most 3, or train with --ways 4",
        ),
        "other ways": (
            [run, "--support", f"{folder}/two", "--out", out, "--ways", "3"],
            f"--ways 3: --support {folder}/two has 2 classes; give --ways 2, or other examples",
        ),
        "a full folder": (
            [run, "--support", support, "--out", str(folder)],
            f"the folder {folder} for the export has something in it already: give a new one",
        ),
        "a file": (
            [run, "--support", support, "--out", f"{folder}/file"],
            f"{folder}/file is a file, not a folder for an export: give a new folder",
        ),
        "a wrong format": (
            [run, "--support", support, "--out", out, "--format", "tflite"],
            "unknown format of an export 'tflite': known: 'torch', 'onnx', 'state'",
        ),
    }


CASES = ["a missing run", "a missing folder", "no images", "too few classes", "too many classes"]
CASES += ["other ways", "a full folder", "a file", "a wrong format"]


@pytest.mark.parametrize("case", CASES)
def test_wrong_requests_are_one_line(case, runs, tmp_path, capfd):
    words, text = wrong(runs, tmp_path)[case]
    assert command(*words) == 2
    assert capfd.readouterr() == ("", f"metaplug: {text}\n")
    assert not (tmp_path / "out").exists()


def test_tasks_that_are_no_files_of_examples_are_refused(tmp_path):
    train(tiny(training__iterations=1), tmp_path / "run")
    with pytest.raises(RequestError) as error:
        export_run(load(tmp_path / "run"), Path("new.csv"), tmp_path / "out")
    assert str(error.value) == (
        "--support new.csv: the run's tasks are from 'sinusoid', and only images and texts are "
        "read from files here: in Python, give learner.adapt the support tensors, and what it "
        "returns to metaplug.experiments.export.export_adapted"
    )


def command(*words):
    with pytest.raises(SystemExit) as stopped:
        main(["export", *words])
    return stopped.value.code


def test_the_command_writes_and_says_so(runs, tmp_path, capfd, adapted):
    out = tmp_path / "new" / "out"
    support = str(runs / "support")
    assert command(str(runs / "run"), "--support", support, "--out", str(out)) == 0
    assert capfd.readouterr().out.splitlines() == [
        f"{out} has the model, adapted to {support}:",
        "- model.safetensors",
        "- model.pt2",
        "- labels.json",
        "batch norm uses the statistics of the examples that are given together, so an output "
        "depends on the others of its batch, as in training",
    ]
    assert torch.equal(torch.export.load(out / "model.pt2").module()(QUERY), adapted(QUERY))
    values = json.loads((out / "labels.json").read_text())
    assert (values["run"], values["iteration"]) == (str(runs / "run"), 1)
    assert values["checkpoint_sha256"] == digest_of(runs / "run" / "best.safetensors")


def test_weights_of_any_layout_are_saved_whole(tmp_path):
    # A head that proto-maml makes has such ones; torch warns of them, and a warning fails a test.
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(torch.rand(5, 3, 2)[0].t())
    files = export_adapted(model, torch.ones(2, 3), tmp_path / "out")
    program = torch.export.load(files["model.pt2"]).module()
    x = QUERY[:, 0, 0, :3]
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)
