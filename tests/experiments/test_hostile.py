"""Broken and hostile files of a run execute nothing, take bounded memory, and are named."""

import copy
import hashlib
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
import yaml
from metaplug_plugins.gradient_sharing import GradientSharing
from metaplug_plugins.meta_sgd import MetaSgd
from safetensors import safe_open
from safetensors.torch import save_file
from support.fuzz import amount, fuzz, mutated
from torch import nn

from metaplug import MetaLearner, Plugin, checkpoint, hookimpl
from metaplug.checkpoint.encoding import DTYPES
from metaplug.cli.main import main
from metaplug.contract.presets import find_preset
from metaplug.errors import RequestError, RunError
from metaplug.execution.free_memory import size_text
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import load, read_metrics, read_summary, train
from metaplug.experiments.variant_texts import parse_plugin, read_scalar
from metaplug.models import Mlp
from metaplug.models.factories import make_model
from metaplug.settings import validated
from metaplug.tasks import Sinusoid, identities
from metaplug.tasks.identities import TrainedOn, digest
from metaplug.yaml_text import read_yaml

SINE = {
    "tasks": {"source": "sinusoid", "shots": 5, "queries": 5},
    "model": {"name": "mlp", "settings": {"hidden": [8]}},
    "learner": {"inner_lr": 0.01, "inner_steps": 2},
    "training": {
        "iterations": 2,
        "tasks_per_batch": 2,
        "validate_every": 1,
        "validation_tasks": 4,
        "test_tasks": 4,
    },
    "runtime": {"device": "cpu"},
    "plugins": ["gradient-sharing", "meta-sgd"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(validated(ExperimentConfig, SINE, "here"), folder)
    return folder


@pytest.fixture
def state(run):
    return checkpoint.read(run / "last.safetensors")


def refusal(call, kind=RunError):
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert text.isprintable()
    return text


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(one, other):
    """Equal in every type, name and bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        versions = getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
        return (
            versions and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bits(one) == bits(other)
    return (
        struct.pack("d", one) == struct.pack("d", other) if isinstance(one, float) else one == other
    )


# Checkpoints: bytes.


def forge(path, state):
    """A file with the right digest, whatever the state."""
    path.write_bytes(b"".join(checkpoint.packed(state)))
    return path


def sealed(content):
    """The bytes with the digest that they should have."""
    place = 8 + len(START)
    zeros = content[:place] + b"0" * 64 + content[place + 64 :]
    return zeros[:place] + hashlib.sha256(zeros).hexdigest().encode() + zeros[place + 64 :]


START = b'{"__metadata__":{"metaplug":"{\\"sha256\\":\\"'


def test_other_tools_read_the_weights_under_their_own_names(run):
    with safe_open(run / "last.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["metaplug"])
    learner = load(run / "last.safetensors").learner
    parts = {"model": learner.model}
    parts |= {f"plugins.{plugin.name}": plugin for plugin in learner.chain.plugins}
    own = {
        f"{at}.{name}": value
        for at, one in parts.items()
        for name, value in one.state_dict().items()
    }
    assert same(own, {name: found[name] for name in own})
    rest = found.keys() - own.keys()
    assert "meta_optimizer.state.0.exp_avg" in rest
    assert all(name.startswith("meta_optimizer.state.") for name in rest)
    assert (about["format"], about["state"]["iteration"]) == (checkpoint.FORMAT, 2)
    content = (run / "last.safetensors").read_bytes()
    assert sealed(content) == content


def test_equal_states_are_equal_files(run, tmp_path):
    path, whole = tmp_path / "a", (run / "last.safetensors").read_bytes()
    for _ in range(5):  # safetensors orders several keys of metadata by chance
        checkpoint.write(path, checkpoint.read(run / "last.safetensors"))
        assert path.read_bytes() == whole


def test_tensors_and_values_of_every_form_come_back(tmp_path, state):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tied = torch.randn(3)
    ordered = OrderedDict(a=torch.ones(1), b=2)
    ordered._metadata = {"": {"version": 2}}
    state["model"] = {
        **{str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES},
        **{f"{dtype} scalar": torch.tensor(1).to(dtype) for dtype in DTYPES},
        **{f"{dtype} empty": torch.empty(0, 4, dtype=dtype) for dtype in DTYPES},
        "strange": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "transposed": base.transpose(0, 2),
        "part": base[1, 1:],
        "one": tied,
        "other": tied,
        "repeated": torch.ones(1).expand(5),
        "plain": [1, -1, 2**100, 0.1, -0.0, 5e-324, "ä\ud800\0", None, True, (1, [2, {}])],
        "strange floats": [math.nan, math.inf, -math.inf],
        "many": {index: str(index) for index in range(1000)},
        "$tensor": {"$tuple": 1, "a": {"$float": "x"}},
        "ordered": ordered,
        "a.b": {"c": torch.ones(1)},
        "a": {"b.c": torch.zeros(1)},
        "\ud800": torch.ones(1),
    }
    checkpoint.write(tmp_path / "a", state)
    read = checkpoint.read(tmp_path / "a")
    read["model"] = dict(read["model"])
    assert same(read, state)


def test_a_mutated_checkpoint_is_refused_or_is_the_same(run, request, tmp_path):
    names = ("last.safetensors", "best.safetensors")
    seeds = [(run / name).read_bytes() for name in names]
    wholes = [checkpoint.read(run / name) for name in names]
    path = tmp_path / "in" / "last.safetensors"
    path.parent.mkdir()

    def read():
        found = checkpoint.read(path)
        assert any(same(found, whole) for whole in wholes)

    report = fuzz(read, path, seeds, amount(request, 100, 5000))
    assert not report.failures, report
    assert report.refused > report.loaded


def test_every_flipped_bit_is_found(tmp_path):
    """Of every byte one bit; the digest's own too."""
    MetaLearner(nn.Linear(1, 1), kind="regression").save(tmp_path / "whole")
    whole, path = (tmp_path / "whole").read_bytes(), tmp_path / "a"
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert refusal(lambda: checkpoint.read(path)).startswith(f"{path} is not a ")


def test_every_truncated_file_is_found(run, tmp_path):
    whole, path = (run / "last.safetensors").read_bytes(), tmp_path / "a"
    for length in [*range(200), *range(200, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert refusal(lambda: checkpoint.read(path)).startswith(f"{path} is not a ")


def test_a_forged_file_with_the_right_digest_is_refused_or_loads(run, request, tmp_path):
    """Behind the digest stand the readers of safetensors and JSON, and the check of the form."""
    whole, path = (run / "last.safetensors").read_bytes(), tmp_path / "last.safetensors"
    number = tmp_path / "in" / "number"
    number.parent.mkdir()

    def forged():
        path.write_bytes(sealed(mutated([whole], crc32(number.read_bytes()))))
        checkpoint.read(path)

    report = fuzz(
        forged,
        number,
        [bytes(range(256))],
        amount(request, 100, 2000),
        says=[str(path)],
        owned=[tmp_path],
    )
    assert not report.failures, report


REFERS = '{"$tensor":"a"}'
TENSOR = ',"a":{"dtype":"F32","shape":SHAPE,"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "state", "reason"),
    [
        (TENSOR.replace("SHAPE", "[1]"), "{}", "nothing in it refers to 'a'"),
        (TENSOR.replace("SHAPE", "[2]"), "{}", None),
        (TENSOR.replace("SHAPE", "[4611686018427387904,4]"), "{}", None),
        (TENSOR.replace("SHAPE", "[-1]"), "{}", None),
        (TENSOR.replace("[0,4]", "[0,400]").replace("SHAPE", "[100]"), "{}", None),
        (
            TENSOR.replace("F32", "BOOL").replace("SHAPE", "[4]"),
            REFERS,
            "a truth value is neither 0 nor 1",
        ),
        ("", REFERS, "'a'"),
        (TENSOR.replace("SHAPE", "[1]"), f"[{REFERS},{REFERS}]", "'a'"),
        ("", "[" * 100_000, None),
        ("", "[" * 100_000 + "]" * 100_000, None),
        ("," * 100, "{}", None),
        (',"b":' + "[" * 100_000, "{}", None),
        ("", "9" * 5000, None),
        ("", "[]", "it lacks 'iteration', "),
        ("", "{}", "it lacks 'iteration', "),
    ],
)
def test_what_a_header_may_not_do(tmp_path, header, state, reason):
    path = tmp_path / "a"
    text = '{"__metadata__":{"metaplug":"{\\"sha256\\":\\"' + "0" * 64
    text += '\\",\\"format\\":3,\\"state\\":' + state.replace('"', '\\"') + '}"}' + header + "}"
    content = text.encode()
    path.write_bytes(sealed(len(content).to_bytes(8, "little") + content + b"abcd" * bool(header)))
    begun = time.monotonic()
    text = refusal(lambda: checkpoint.read(path))
    assert time.monotonic() - begun < 5
    assert text.startswith(f"{path} is not a whole metaplug checkpoint ({reason or ''}")
    assert text.endswith("): use another one of the run")


class Marks:
    """Pickles to code that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_files_that_are_no_checkpoint_are_refused(run, tmp_path):
    path = tmp_path / "last.safetensors"

    def said():
        return refusal(lambda: checkpoint.read(path)).removeprefix(f"{path} is ")

    torch.save({"format": 2, "a": Marks(tmp_path / "mark")}, path)
    assert said() == (
        "of torch.save (.pt), as older versions of metaplug wrote: "
        "use the version that wrote it, or train again"
    )
    path.write_bytes(pickle.dumps({"format": 2, "a": Marks(tmp_path / "mark")}))
    long = "it is no safetensors file, or its header is too long"
    whole = "not a whole metaplug checkpoint ({}): use another one of the run"
    assert said() == whole.format(long)
    path.write_bytes((2**24).to_bytes(8, "little") + b"{" + b" " * 2**24)
    assert said() == whole.format(long)
    save_file({"weight": torch.ones(2)}, path)
    assert said() == (
        "not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug train` wrote"
    )
    path.unlink()
    os.mkfifo(path)
    assert said() == whole.format("it is no regular file")
    assert not (tmp_path / "mark").exists()


def test_a_file_larger_than_the_free_memory_is_refused_before_it_is_read(run, monkeypatch):
    monkeypatch.setattr(checkpoint.file, "available", lambda _: 1000)
    path = run / "last.safetensors"
    size = size_text(2 * path.stat().st_size)
    assert refusal(lambda: checkpoint.read(path)) == (
        f"{path} is not a whole metaplug checkpoint (it takes {size} to read, more than the "
        f"1000 bytes of memory that are free): "
        "use another one of the run"
    )


# Checkpoints: content, in files that are whole.


def test_states_that_were_tampered_with_are_refused_or_load(run, request, tmp_path):
    """Whatever part of a state is exchanged, gone or new: it loads whole, or nothing of it does."""
    whole = checkpoint.read(run / "last.safetensors")
    path, number = tmp_path / "forged.safetensors", tmp_path / "in" / "number"
    number.parent.mkdir()
    learner = load(run / "last.safetensors").learner

    def forged():
        forge(path, tampered(whole, random.Random(number.read_bytes())))
        before = copy.deepcopy(learner.state_dict())
        for call in (
            lambda: learner.load_state_dict(checkpoint.read(path), str(path)),
            lambda: MetaLearner.load(path),
        ):
            try:
                call()
            except (RunError, RequestError):
                assert same(before, learner.state_dict())
                raise
            learner.load_state_dict(whole)

    report = fuzz(
        forged,
        number,
        [bytes(range(256))],
        amount(request, 100, 1500),
        says=[str(path)],
        owned=[tmp_path],
        modules=["torch"],
    )
    assert not report.failures, report


def tampered(state, choice):
    state = copy.deepcopy(state)
    for _ in range(choice.choice((1, 1, 2))):
        place, path = state, []
        while isinstance(place, dict | list) and place:
            key = choice.choice(list(place) if isinstance(place, dict) else range(len(place)))
            path.append((place, key))
            place = place[key]
            if choice.random() < 0.15:
                break
        holder, key = path[-1]
        strange = (
            *(
                None,
                True,
                -1,
                2**62,
                10**300,
                0.5,
                float("nan"),
                float("inf"),
                "",
                "x" * 5000,
                "os:system",
                "\x1b[2J\n",
                [],
                {},
                (),
                {"a": 1},
            ),
            *(
                torch.zeros(3),
                torch.zeros(()),
                torch.full((8,), float("nan")),
                torch.zeros(2, dtype=torch.bool),
            ),
            *([[]] * 50, [65536] * 2000, {"hidden": [65536, 65536]}, {1: 2}, [place, place], place),
        )
        kind = choice.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[choice.choice(("other", 7, "weight", "\n"))] = choice.choice(strange)
        elif kind == 2 and isinstance(place, torch.Tensor):
            holder[key] = choice.choice(
                (
                    place.double(),
                    place.flatten()[:1],
                    place.unsqueeze(0),
                    place.clone().fill_(float("nan")),
                )
            )
        else:
            holder[key] = choice.choice(strange)
    return state


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.update(other=1), "(its content: unknown field 'other': known: "),
        (
            lambda state: state.update(iteration="3"),
            "(its content: iteration = '3': input should be a valid integer)",
        ),
        (
            lambda state: state.update(seconds=-1.0),
            "(its content: seconds = -1.0: input should be greater than or equal to 0)",
        ),
        (
            lambda state: state["plugins"].pop(),
            "(its content: its plugins are not those whose states it has)",
        ),
        (lambda state: state.pop("optimizer"), "(it lacks 'optimizer')"),
        (
            lambda state: state["model_spec"].update(name="\x1b[2J"),
            r"(its content: model_spec.name = '\x1b[2J': a name has control characters)",
        ),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, state, change, reason):
    path = tmp_path / "forged.safetensors"
    change(state)
    forge(path, state)
    assert refusal(lambda: checkpoint.read(path)).startswith(
        f"{path} is not a whole metaplug checkpoint {reason}"
    )


def test_a_model_larger_than_its_weights_is_refused_before_it_takes_memory(tmp_path, state):
    path = tmp_path / "forged.safetensors"
    for hidden in ([65536] * 40, [1] * 100_000):
        state["model_spec"]["settings"]["hidden"] = hidden
        forge(path, state)
        begun = time.monotonic()
        assert refusal(lambda: MetaLearner.load(path)) == (
            f"{path} belongs to another model: it asks for more weights than it has; use "
            f"another one of the run"
        )
        assert time.monotonic() - begun < 5
    state["config"] = state["config"].replace("- 8\n", "- 65536\n    - 65536\n")
    forge(path, state)
    assert refusal(lambda: load(path)) == (
        f"{path} belongs to another model: it asks for more weights than it has; use another "
        f"one of the run"
    )


class Late(nn.Module):
    """Refuses a state only after its weights were loaded."""

    def __init__(self):
        super().__init__()
        self.layer, self.strange = nn.Linear(1, 1), 0

    def forward(self, x):
        return self.layer(x)

    def get_extra_state(self):
        return {"strange": self.strange}

    def set_extra_state(self, state):
        if state["strange"]:
            raise LookupError("it is strange,\nand more")


def test_nothing_is_loaded_of_what_a_module_refuses_late():
    tasks = Sinusoid(shots=5, queries=5)
    one, other = (
        MetaLearner(nn.Sequential(nn.Linear(1, 1), Late()), kind="regression", inner_lr=0.01)
        for _ in range(2)
    )
    other.fit(tasks.train, iterations=1, tasks_per_batch=2)
    other.model[1].strange = 1
    before = copy.deepcopy(one.state_dict())
    assert refusal(lambda: one.load_state_dict(other.state_dict(), "it")) == (
        "it is refused by the model or a plugin (it is strange, and more): make them as they were"
    )
    assert same(before, one.state_dict())


def test_learners_that_took_over_a_state_share_nothing():
    """torch's optimizers keep the tensors that they are given: two learners would share moments."""
    tasks = Sinusoid(shots=5, queries=5)

    def learner():
        return MetaLearner(
            Mlp(tasks.input_shape, tasks.outputs, hidden=[8]), kind="regression", inner_lr=0.01
        )

    one, other = learner(), learner()
    one.fit(tasks.train, iterations=1, tasks_per_batch=2)
    other.load_state_dict(one.state_dict())
    before = copy.deepcopy(one.state_dict())
    other.fit(tasks.train, iterations=2, tasks_per_batch=2)
    assert same(before, one.state_dict())


def test_moments_and_weights_of_another_kind_are_refused(run, state):
    learner = load(run / "last.safetensors").learner
    for change, reason in (
        (
            lambda: state["model"].update({"head.bias": state["model"]["head.bias"].double()}),
            "'head.bias' is torch.float64 there and torch.float32 here",
        ),
        (
            lambda: state["model"].update({"head.bias": 3}),
            "'head.bias' is no tensor there and a tensor here",
        ),
    ):
        kept = dict(state["model"])
        change()
        assert (
            refusal(lambda: learner.load_state_dict(state, "it"))
            == f"it belongs to another model: {reason}; build the model as it was"
        )
        state["model"].update(kept)
    mend = "use the meta-optimizer, model and plugins as they were"
    original = state["optimizer"]
    for change, reason in (
        (lambda it: it["param_groups"].pop(), ": its setting 'amsgrad' is another one"),
        (lambda it: it["param_groups"][0]["params"].pop(), ": its setting 'params' is another one"),
        (lambda it: it["param_groups"][0].pop("lr"), ": its setting 'lr' is another one"),
        (
            lambda it: it["param_groups"][0].update(lr=float("nan")),
            ": its setting 'lr' is another one",
        ),
        (
            lambda it: it["param_groups"][0].update(weight_decay=0.5),
            ": its setting 'weight_decay' is another one",
        ),
        (lambda it: it["state"].update({99: {}}), ": it has moments of a parameter 99 beside"),
        (
            lambda it: it["state"][0].pop("step"),
            ", parameter 0: it lacks 'step' and has none beside",
        ),
        (
            lambda it: it["state"][0].update(exp_avg=torch.zeros(1)),
            ", parameter 0: 'exp_avg' is (1,) there and (8, 1) here",
        ),
        (
            lambda it: it["state"][0].update(step=torch.tensor(-1.0)),
            ", parameter 0: its 'step' is no count",
        ),
    ):
        state["optimizer"] = copy.deepcopy(original)
        change(state["optimizer"])
        assert (
            refusal(lambda: learner.load_state_dict(state, "it"))
            == f"it belongs to another optimizer{reason}; {mend}"
        )


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x)

        def get_extra_state(self):
            return {1, 2}

        def set_extra_state(self, state):
            pass

    learner = MetaLearner(Odd(), kind="regression")
    assert refusal(lambda: learner.save(tmp_path / "a.safetensors")) == (
        f"cannot write {tmp_path / 'a.safetensors'}: model._extra_state is a set, which no "
        f"checkpoint keeps; {MEND}"
    )
    assert not list(tmp_path.iterdir())


def learner_with(state):
    """A learner whose plugin keeps such a state."""

    class Keeping(Plugin):
        @hookimpl
        def commit(self):
            pass

        def state_dict(self, *given, **named):
            return state

        def load_state_dict(self, state, *given, **named):
            pass

    return MetaLearner(nn.Linear(1, 1), kind="regression", plugins=[Keeping()])


def two_dtypes():
    base = torch.arange(4.0)
    return [base, base.view(torch.int32)]


MEND = "change that in the model or plugin"
LARGE = "it has more than 16 MiB beside its tensors' values, most of it in plugin_states"
DEEP = []
DEEP.append(DEEP)


def one_memory():
    base = np.arange(5.0)
    return [torch.from_numpy(base), torch.from_numpy(base[:2])]


def test_tensors_that_require_a_gradient_or_carry_more_are_written_as_their_values(tmp_path):
    base = torch.arange(6.0)
    tagged = torch.ones(2)
    tagged.tag = "mine"
    state = {
        "parameter": nn.Parameter(base.clone()),
        "wanted": base.clone().requires_grad_(),
        "computed": base.clone().requires_grad_() * 2,
        "tagged": tagged,
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    learner, path = learner_with(state), tmp_path / "a.safetensors"
    learner.save(path)
    read = checkpoint.read(path)["plugin_states"]["keeping"]
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in read.values())
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert state["parameter"].requires_grad, "the learner's own is as it was"
    learner.load_state_dict(checkpoint.read(path))


@pytest.mark.parametrize(
    "tensors",
    [
        lambda: [torch.full((1,), 3.0).expand(100_000)],
        lambda: [torch.arange(3.0)] * 20,
        two_dtypes,
        lambda: [torch.arange(10, dtype=torch.uint8)[:8].view(torch.float32)],
        one_memory,
    ],
    ids=["expanded", "many times", "two dtypes", "a rest", "one memory"],
)
def test_tensors_that_overlap_are_written_apart(tmp_path, tensors):
    """Or torch would not write them, or we not read them."""
    state, path = dict(enumerate(tensors())), tmp_path / "a.safetensors"
    state = {str(name): value for name, value in state.items()}
    learner_with(state).save(path)
    read = checkpoint.read(path)["plugin_states"]["keeping"]
    assert same(read, {name: value.contiguous() for name, value in state.items()})


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"a": {1}}, "plugins.keeping.a is a set, which no checkpoint keeps"),
        (
            {"a": [{1.5: 2}]},
            "plugins.keeping.a.0 is a dict with a key that is no text, which no checkpoint keeps",
        ),
        (
            {"a": torch.empty(2, device="meta")},
            "plugins.keeping.a is a Tensor of torch.float32, torch.strided, on meta, which no "
            "checkpoint keeps",
        ),
        (
            {"a": torch.eye(2).to_sparse()},
            "plugins.keeping.a is a Tensor of torch.float32, torch.sparse_coo, on cpu, which "
            "no checkpoint keeps",
        ),
        ({"a": "x" * 2**24}, LARGE),
        ({"a": ["x" * 200] * 100_000}, LARGE),
        ({"a": 2**20_000}, "plugins.keeping.a is a int, which no checkpoint keeps"),
        ({"a": DEEP}, f"plugins.keeping.a{'.0' * 48} nests more than 50 deep"),
        (
            {0: torch.ones(1)},
            "its content: plugin_states.keeping.0.[key] = 0: input should be a valid string",
        ),
    ],
)
def test_what_a_plugin_keeps_and_no_file_can_is_refused_by_name(tmp_path, state, reason):
    path = tmp_path / "a.safetensors"
    assert (
        refusal(lambda: learner_with(state).save(path)) == f"cannot write {path}: {reason}; {MEND}"
    )
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_file_can_have_is_refused_when_it_is_written(tmp_path):
    path, name = tmp_path / "a.safetensors", "a" * 201
    learner = MetaLearner(nn.Linear(1, 1), kind="regression", plugins=[GradientSharing(name=name)])
    assert refusal(lambda: learner.save(path)) == (
        f"cannot write {path}: its content: plugins.0.name = '{name[:97]}...{name[-98:]}': "
        f"string should have at most 200 characters; " + MEND
    )
    assert not list(tmp_path.iterdir())


def test_a_run_whose_state_cannot_be_written_is_refused_before_its_first_step(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(MetaSgd, "state_dict", lambda self: {"a": {1}}, raising=False)
    stepped = []
    text = refusal(
        lambda: train(
            validated(ExperimentConfig, SINE, "here"), tmp_path / "run", on_record=stepped.append
        )
    )
    assert text == (
        f"cannot write {tmp_path / 'run' / 'last.safetensors'}: plugins.meta-sgd.a is a set, "
        f"which no checkpoint keeps; " + MEND
    )
    assert not stepped
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [3, 5_000, 5_001, 300_000])
def test_a_learner_may_have_trained_on_any_number_of_classes(tmp_path, count):
    learner, path = MetaLearner(nn.Linear(1, 1), kind="regression"), tmp_path / "a.safetensors"
    names = [f"{number} {'ä' * 190}" for number in range(count)]
    stream = SimpleNamespace(identities={name: digest(name) for name in names}, split="train")
    learner.trained_on = TrainedOn().and_by(stream)
    learner.save(path)
    loaded = MetaLearner.load(path, model=nn.Linear(1, 1)).trained_on
    assert list(loaded.classes) == list(learner.trained_on.classes)
    assert list(loaded.classes.values())[:5_000] == names[:5_000]
    assert loaded.complete
    assert loaded.shared(stream) == count
    assert loaded.shared(SimpleNamespace(identities={"new": digest("new")}, split="test")) == 0
    again = {**learner.state_dict(), "trained_on": loaded.and_by(stream).to_state()}
    assert same(again, learner.state_dict())


def test_names_and_digests_of_others_streams_may_be_any_text(tmp_path):
    learner, path = MetaLearner(nn.Linear(1, 1), kind="regression"), tmp_path / "a.safetensors"
    stream = SimpleNamespace(
        identities={"\ud800" * 300: "\ud800", "x" * 10**6: "y" * 2**24, "": ""}, split="train"
    )
    learner.trained_on = TrainedOn().and_by(stream)
    learner.save(path)
    loaded = MetaLearner.load(path, model=nn.Linear(1, 1)).trained_on
    assert list(loaded.classes.values()) == ["?" * 200, "x" * 200, ""]
    assert loaded.shared(stream) == 3
    older = {"classes": {"any text": "a class"}, "complete": True}
    assert (
        TrainedOn.from_state(older).shared(
            SimpleNamespace(identities={"it": "any text"}, split="test")
        )
        == 1
    )


def test_beyond_the_most_classes_it_is_not_claimed_that_others_are_new(monkeypatch):
    monkeypatch.setattr(identities, "MOST_NAMED", 2)
    monkeypatch.setattr(identities, "MOST_KNOWN", 3)
    known = TrainedOn({digest(name): name for name in "abcd"})
    loaded = TrainedOn.from_state(known.to_state())
    assert loaded == TrainedOn(
        {digest("a"): "a", digest("b"): "b", digest("c"): digest("c")}, complete=False
    )
    assert loaded.shared(SimpleNamespace(identities={"d": digest("d")})) is None


@pytest.mark.parametrize(
    "others",
    [
        3,
        torch.zeros(2, 16),
        torch.zeros(16, dtype=torch.uint8),
        torch.zeros(2, 15, dtype=torch.uint8),
    ],
)
def test_digests_of_another_form_are_refused(tmp_path, state, others):
    state["trained_on"]["others"] = others
    forge(tmp_path / "a.safetensors", state)
    text = refusal(lambda: checkpoint.read(tmp_path / "a.safetensors"))
    assert "(its content: trained_on.others = " in text
    assert text.endswith(": no digests of 16 bytes each): use another one of the run")


# YAML.

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}, *{a}]}}\n"
    for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
IN_BASE = "'{}' is read in base {}: write the number in base 10, or put it in quotes to have text"
OCTAL = ["010", "-010", "+07", "00"]
SEXAGESIMAL = ["1:30", "-1:30", "12:30:45", "1:30.5"]
TOO_MUCH = "its aliases stand for more than 100000 values, or nest more than 50 deep"


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        (LAUGHS, ", line 6", TOO_MUCH),
        (MERGES, ", line 9", TOO_MUCH),
        ("a: &a [*a]", ", line 1", "an alias stands for something that it is itself a part of"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100)),
            ", line 49",
            TOO_MUCH,
        ),
        ("a: " + "[" * 100_000, ", line 1", "nested more than 50 deep"),
        ("- " * 1000, ", line 1", "nested more than 50 deep"),
        (
            "seed: 2001-99-99",
            ", line 1",
            "'2001-99-99' is read as a timestamp, which no setting is: put it in quotes to "
            "have text",
        ),
        (
            "seed: !!binary aaaa",
            ", line 1",
            "'aaaa' is read as a binary, which no setting is: put it in quotes to have text",
        ),
        (
            "seed: !!python/object/apply:os.system [ls]",
            ", line 1",
            "'[...]' is read as a python/object/apply:os.system, which no setting is: put it "
            "in quotes to have text",
        ),
        *((f"seed: {text}", ", line 1", IN_BASE.format(text, 8)) for text in OCTAL),
        *((f"seed: {text}", ", line 1", IN_BASE.format(text, 60)) for text in SEXAGESIMAL),
        ("a: 1\nb: [1, {c: 0_7}]", ", line 2", IN_BASE.format("0_7", 8)),
        ("seed: 0b_", ", line 1", "'0b_' cannot be read as int; in quotes it is text"),
        (
            "x: 1\nseed: " + "9" * 5000,
            ", line 2",
            f"'{'9' * 40}' cannot be read as int; in quotes it is text",
        ),
        (
            "seed: 0x" + "f" * 20,
            ", line 1",
            f"'0x{'f' * 20}' is a whole number of more than 64 bits",
        ),
        ("1: 2", ", line 1", "the key '1' is no text: put it in quotes"),
        ("learner: {true: 2}", ", line 1", "the key 'true' is no text: put it in quotes"),
        ("? [a]\n: 2", ", line 1", "the key '[...]' is no text: put it in quotes"),
        ("a: 1\na: 2", ", line 2", "the key 'a' stands twice"),
    ],
)
def test_yaml_that_is_more_than_settings(tmp_path, text, where, reason):
    path = tmp_path / "e.yaml"
    path.write_text(text)
    begun = time.monotonic()
    assert (
        refusal(lambda: read_yaml(path), RequestError)
        == f"{path}{where} is not valid YAML: {reason}; correct it there"
    )
    assert (
        refusal(lambda: find_preset(str(path)), RequestError)
        == f"{path}{where} is not valid YAML: {reason}; correct it there"
    )
    assert time.monotonic() - begun < 4


def test_aliases_and_merges_of_honest_size_work(tmp_path):
    path = tmp_path / "e.yaml"
    path.write_text("a: &a {k: 1, l: [2]}\nb: {<<: *a, m: 3}\nc: *a\n")
    assert read_yaml(path) == {
        "a": {"k": 1, "l": [2]},
        "b": {"k": 1, "l": [2], "m": 3},
        "c": {"k": 1, "l": [2]},
    }


def test_a_configuration_may_be_a_pipe_but_not_endless(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write(text):
        try:
            with path.open("w") as file:
                file.write(text)
        except BrokenPipeError:
            pass

    for text in ("seed: 3\n", "a" * 2**20):
        writer = threading.Thread(target=write, args=(text,))
        writer.start()
        if text[0] == "s":
            assert read_yaml(path) == {"seed": 3}
        else:
            assert refusal(lambda: read_yaml(path), RequestError) == (
                f"{path} has more than 256 KiB, and no configuration is so long: give a YAML "
                f"file of settings"
            )
        writer.join()


@pytest.mark.slow
def test_the_longest_configuration_is_read_or_refused_in_bounded_time(tmp_path):
    path = tmp_path / "e.yaml"
    for text in (
        "a: [" + "a," * 100_000,
        "".join(f"k{i}: 1\n" for i in range(20_000)),
        "- " + "- 1\n" * 50_000,
        "a: " + "'" * 200_000,
        "?" * 200_000,
    ):
        path.write_text(text)
        begun = time.monotonic()
        try:
            read_yaml(path)
        except RequestError as error:
            assert str(error).startswith(str(path))
        assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "2001-99-99",
            "'2001-99-99' is read as a timestamp, which no setting is: put it in quotes to "
            "have text",
        ),
        *((text, IN_BASE.format(text, 8)) for text in OCTAL),
        *((text, IN_BASE.format(text, 60)) for text in SEXAGESIMAL),
        ("[" * 60, "nested more than 50 deep; put it in quotes to have text"),
        ("0b_", "'0b_' cannot be read as int; in quotes it is text"),
    ],
)
def test_values_on_the_command_line_are_as_strict(text, reason):
    assert (
        refusal(lambda: read_scalar(text), RequestError)
        == f"'{text}' cannot be read as a value: {reason}"
    )
    assert f"cannot be read as a value: {reason}" in refusal(
        lambda: parse_plugin(
            f"meta-sgd:init={text.replace('[', '(')}" if "[" not in text else f"a:b={text}"
        ),
        RequestError,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-0", 0),
        ("0.10", 0.1),
        ("00.5", 0.5),
        ("0x10", 16),
        ("0b11", 3),
        ("1_000", 1000),
        ("'010'", "010"),
        ("'1:30'", "1:30"),
        ("my_models:make", "my_models:make"),
        ("cuda:0", "cuda:0"),
    ],
)
def test_numbers_whose_base_is_plain_are_read(text, value):
    assert repr(read_scalar(text)) == repr(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.5e3", 1500.0),
        ("[-2E+1, .5e1]", [-20.0, 5.0]),
        ("'1e-3'", "1e-3"),
        ("1e-3x", "1e-3x"),
        ("-e", "-e"),
    ],
)
def test_a_power_of_ten_on_the_command_line_is_a_number(text, value):
    assert repr(read_scalar(text)) == repr(value)


def test_mutated_configurations_and_presets(run, request, tmp_path):
    preset = (
        b"plugins:\n  - plugin: gradient-sharing\n    settings: {gate: 0.3}\n  - "
        b"meta-sgd\ndefaults: {learner: {inner_steps: 2}}\n"
    )
    seeds = [
        (run / "config.yaml").read_bytes(),
        LAUGHS.encode(),
        b"a: &a {k: 1}\nb: {<<: *a}\nc: 2001-01-01\n",
        preset,
    ]
    path = tmp_path / "in" / "e.yaml"
    path.parent.mkdir()

    def configuration():
        values = validated(ExperimentConfig, read_yaml(path), str(path)).model_dump(mode="json")
        assert read_scalar(yaml.safe_dump(values, default_flow_style=True, width=10**9)) == values

    for reader in (configuration, lambda: find_preset(str(path))):
        report = fuzz(reader, path, seeds, amount(request, 60, 1500), text=True, seconds=20)
        assert not report.failures, report


# JSON.


def test_mutated_metrics_and_summaries(run, request, tmp_path):
    for name, reader in (("metrics.jsonl", read_metrics), ("summary.json", read_summary)):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        report = fuzz(
            lambda reader=reader, path=path: reader(path.parent),
            path,
            [(run / name).read_bytes()],
            amount(request, 60, 1000),
            text=True,
        )
        assert not report.failures, report


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"iteration": 1', "Expecting ',' delimiter: line 1 column 16 (char 15)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"iteration": \xff}', "not UTF-8 text"),
        (b"[]", "it: input should be a valid dictionary or instance of MetricsLine"),
        (b"NaN", "NaN is no number in JSON"),
    ],
)
def test_a_broken_line_of_metrics_is_named(run, tmp_path, text, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((run / "metrics.jsonl").read_bytes() + text)
    assert refusal(lambda: read_metrics(tmp_path)) == (
        f"{path}, line 3, is not what a run writes ({reason}): take it from a backup, or train "
        f"the run anew"
    )
    assert read_metrics(run)[0]["iteration"] == 1
    assert refusal(lambda: read_summary(tmp_path)) == (
        f"cannot read {tmp_path / 'summary.json'}: No such file or directory; it is in the "
        f"folder of a run that has begun"
    )


# Code by name, downloads, and other files.

OWN = """
import torch
from pathlib import Path
Path("ran").write_text("")
def make(input_shape, outputs, width=4):
    layers = torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, outputs)
    return torch.nn.Sequential(*layers)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A run of a factory in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_models.py").write_text(OWN)
    config = {**SINE, "model": {"name": "own_models:make", "settings": {"width": 3}}, "plugins": []}
    train(validated(ExperimentConfig, config, "here"), tmp_path / "runs" / "own")
    Path("ran").unlink()
    yield tmp_path / "runs" / "own"
    sys.modules.pop("own_models", None)


def evaluate(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", *arguments])
    return stopped.value.code, capfd.readouterr().err


def test_a_factory_is_imported_only_where_the_user_names_it(own, capfd):
    sys.modules.pop("own_models")
    code, words = evaluate(capfd, "runs/own")
    assert (code, words) == (
        2,
        "metaplug: runs/own/best.safetensors names code for its model, 'own_models:make', "
        "which nobody lets run because a file says so: "
        "if it is your own, give --model own_models:make, or runs.load(..., model=...)\n",
    )
    code, words = evaluate(capfd, "runs/own", "--model", "own_models:other")
    assert (code, words) == (
        2,
        "metaplug: runs/own/best.safetensors has the model 'own_models:make', not "
        "'own_models:other': give the model that it was trained with\n",
    )
    assert "own_models" not in sys.modules
    assert not Path("ran").exists()
    code, words = evaluate(capfd, "runs/own", "--model", "own_models:make")
    assert code == 0
    assert (
        f"the model is made by own_models:make in {own.parent.parent / 'own_models.py'} with "
        f"the settings {{'width': 3}}\n" in words
    )
    assert load(own, model="own_models:make").learner.iteration >= 1


def test_training_says_which_code_makes_the_model(own, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "runs/own/config.yaml", "--name", "again", "--out", "runs"])
    assert stopped.value.code == 0
    assert (
        f"the model is made by own_models:make in {own.parent.parent / 'own_models.py'}"
        in capfd.readouterr().err
    )


def test_names_in_a_checkpoint_are_shown_without_control_characters(tmp_path, state):
    path = forged_config(
        state, tmp_path / "a.safetensors", model={"name": "\x1b[2Jmlp\n", "settings": {}}
    )
    assert refusal(lambda: load(path), RequestError).startswith(
        f"{path}: unknown model '?[2Jmlp': known: 'conv4', "
    )


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:exec", "a.b:c\x1b[2J"])
def test_a_checkpoint_names_code_in_vain(tmp_path, state, name):
    config = yaml.safe_load(state["config"])
    config["model"] = {"name": name, "settings": {"args": f"touch {tmp_path}/mark"}}
    state["config"] = yaml.safe_dump(config)
    forge(tmp_path / "a.safetensors", state)
    assert "names code for its model" in refusal(
        lambda: load(tmp_path / "a.safetensors"), RequestError
    )
    assert not (tmp_path / "mark").exists()


def test_a_preset_names_no_code(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("defaults: {model: {name: 'os:system'}}\n")
    assert refusal(lambda: find_preset(str(path)), RequestError) == (
        f"{path}: defaults = {{'model': {{'name': 'os:system'}}}}: a preset contains no code, "
        f"as its model 'os:system' is: "
        "give that by --model, or in a configuration"
    )


def test_a_folder_that_somebody_sent_installs_nothing(tmp_path, monkeypatch, capfd):
    """The current folder ends Python's path, for MODULE:FACTORY; its packages would be found."""
    folder = tmp_path / "evil-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[metaplug.plugins]\nevil = evil:Evil\n")
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path), ""])
    assert any(entry.name == "evil" for entry in metadata.entry_points(group="metaplug.plugins"))
    with pytest.raises(SystemExit):
        main(["explain", "--with", "evil"])
    assert capfd.readouterr().err.startswith("metaplug: unknown plugin 'evil': ")
    assert not Path("ran").exists()


def forged_config(state, path, **change):
    state["config"] = yaml.safe_dump({**yaml.safe_load(state["config"]), **change})
    forge(path, state)
    return path


def test_a_checkpoint_starts_no_download_and_reads_no_preset(tmp_path, state, monkeypatch):
    if find_spec("torchmeta") is None:
        pytest.skip("torchmeta is not installed")
    fetched = []
    monkeypatch.setattr(
        "metaplug.tasks.torchmeta.data._fetch", lambda *given: fetched.append(given)
    )
    source = {
        "source": "torchmeta:omniglot",
        "settings": {"download": True, "root": str(tmp_path / "root")},
    }
    path = forged_config(state, tmp_path / "a.safetensors", tasks=source)
    assert "its data are not in" in refusal(lambda: load(path), RequestError)
    assert not fetched
    assert not (tmp_path / "root").exists()
    path = forged_config(state, tmp_path / "a.safetensors", preset="/etc/passwd.yaml")
    assert (
        refusal(lambda: load(path))
        == f"{path} names the file /etc/passwd.yaml as its preset, which no run does: use "
        f"another checkpoint of the run"
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"pretrained": True},
        {"weights": "DEFAULT"},
        {"norm_layer": "os.system"},
        {"progress": True, "hub": "x"},
    ],
)
def test_torchvisions_settings_fetch_no_weights(settings, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(
        "torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads")
    )
    with pytest.raises(RequestError, match="torchvision:resnet18"):
        make_model("torchvision:resnet18", (3, 32, 32), 2, settings)


def test_the_command_line_shows_one_line_of_a_hostile_run(run, tmp_path, state):
    """In a process of its own, with an address space that a bomb would not fit into."""
    state["model_spec"]["settings"]["hidden"] = [65536] * 40
    forged = forged_config(
        state,
        tmp_path / "a.safetensors",
        model={"name": "mlp", "settings": {"hidden": [65536] * 40}},
    )
    line = f"ulimit -v 6000000; exec {sys.executable} -m metaplug evaluate {forged}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"metaplug: {forged} belongs to another model: it asks for more weights than it "
        f"has; use another one of the run\n"
    )
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2
