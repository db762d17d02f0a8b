"""Broken and hostile files of a run: nothing in them is executed, memory and time stay bounded, and the file is named in one line."""

import copy
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import OrderedDict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from metaplug_plugins.gradient_sharing import GradientSharing
from metaplug_plugins.meta_sgd import MetaSgd
from support.fuzz import amount, fuzz
from torch import nn

from metaplug import MetaLearner, Plugin, checkpoint, hookimpl
from metaplug.checkpoint import archive, structure
from metaplug.cli.main import main
from metaplug.contract.presets import find_preset, parse_plugin, read_scalar
from metaplug.errors import RequestError, RunError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import load, read_metrics, read_summary, train
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
    return checkpoint.read(run / "last.pt")


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


def test_what_is_read_is_what_torch_reads(run):
    for name in ("last.pt", "best.pt"):
        assert same(checkpoint.read(run / name), torch.load(run / name, weights_only=True))


def test_tensors_of_every_form_come_back(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    tied = torch.randn(3)
    value = {
        **{str(dtype): torch.ones(3).to(dtype) for dtype in archive.DTYPES.values()},
        "transposed": base.transpose(0, 2),
        "part": base[1, 1:],
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "one": tied,
        "other": tied,
        "repeated": torch.ones(1).expand(5),
        "plain": [1, -1, 2**100, 0.1, float("nan"), "ä", None, True, (1, [2, {}])],
        "many": {index: str(index) for index in range(1000)},
    }
    torch.save(value, tmp_path / "a.pt")
    archive.check(value)
    read = archive.load(tmp_path / "a.pt")
    assert same(read, torch.load(tmp_path / "a.pt"))
    assert read["one"].data_ptr() == read["other"].data_ptr()
    with pytest.raises(archive.ArchiveError, match="holds a set"):
        archive.check({"a": {1}})
    with pytest.raises(
        archive.ArchiveError, match=r"a tensor of torch\.float32, torch\.sparse_coo"
    ):
        archive.check([base.to_sparse()])


def test_a_mutated_checkpoint_is_refused_or_is_the_same(run, request, tmp_path):
    seeds = [(run / name).read_bytes() for name in ("last.pt", "best.pt")]
    wholes = [checkpoint.read(run / name) for name in ("last.pt", "best.pt")]
    path = tmp_path / "in" / "last.pt"
    path.parent.mkdir()

    def read():
        found = checkpoint.read(path)
        assert any(same(found, whole) for whole in wholes)

    report = fuzz(read, path, seeds, amount(request, 100, 5000))
    assert not report.failures, report
    assert report.refused > report.loaded


def test_every_flipped_byte_of_a_tensor_is_found(run, tmp_path):
    """torch.load takes such a file: another weight, in silence."""
    whole, path = (run / "last.pt").read_bytes(), tmp_path / "last.pt"
    with zipfile.ZipFile(run / "last.pt") as opened:
        member = max(
            opened.infolist(), key=lambda one: one.file_size if "/data/" in one.filename else 0
        )
        place = whole.index(opened.read(member))
    damaged = bytearray(whole)
    damaged[place + 1] ^= 4
    path.write_bytes(damaged)
    assert not same(torch.load(path, weights_only=True), checkpoint.read(run / "last.pt"))
    assert refusal(lambda: checkpoint.read(path)) == (
        f"{path} is not a whole metaplug checkpoint (Bad CRC-32 for file '{member.filename}'): use another one of the run"
    )


def rewritten(path, change, packing=zipfile.ZIP_STORED):
    """The members of a checkpoint, changed, in a zip with the right checksums."""
    with zipfile.ZipFile(path) as opened:
        members = {name: opened.read(name) for name in opened.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", packing) as file:
        for name, content in members.items():
            file.writestr(name, content)


class Marks:
    """Pickles to code that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def described(pickled):
    return lambda members: members.update(
        {next(name for name in members if name.endswith("data.pkl")): pickled}
    )


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (
            b"\x80\x02cos\nsystem\nX\x04\0\0\0exit\x85R.",
            "it names os.system, and no code is loaded from it",
        ),
        (
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            "it names builtins.bytearray, and no code is loaded from it",
        ),
        (b"\x80\x02ctorch\nTensor\n)R.", "it names torch.Tensor, and no code is loaded from it"),
        (b"\x80\x02}r\xff\xff\xff\x7f.", "its description is out of order"),
        (
            b"\x80\x04\x8c\x01a.",
            "it is described by SHORT_BINUNICODE, which torch.save does not use",
        ),
        (b"\x80\x02]q\0h\0a.", "it holds more than 500000 values, or more than 50 in one another"),
        (
            b"\x80\x02"
            + b"]q\0"
            + b"".join(
                b"]%b(%be" % (b"q" + bytes([i]), (b"h" + bytes([i - 1])) * 10) for i in range(1, 30)
            )
            + b".",
            None,
        ),
        (
            b"\x80\x02" + b"]" * 300 + b"a" * 299 + b".",
            "it holds more than 500000 values, or more than 50 in one another",
        ),
        (b"\x80\x02ctorch\nFloatStorage\n.", "it holds a dtype"),
        (
            b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.",
            "'torch.dtype' object is not callable",
        ),
    ],
)
def test_what_a_description_may_not_do(run, tmp_path, pickled, reason):
    path = tmp_path / "last.pt"
    shutil.copy(run / "last.pt", path)
    rewritten(path, described(pickled))
    begun = time.monotonic()
    text = refusal(lambda: checkpoint.read(path))
    assert time.monotonic() - begun < 5
    if reason is not None:
        assert (
            text
            == f"{path} is not a whole metaplug checkpoint ({reason}): use another one of the run"
        )


def with_tensor(size, stride, count=4):
    """The description of one tensor as torch.save would write it, with claims of one's own."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return (
                ("storage", torch.FloatStorage, "0", "cpu", count)
                if isinstance(value, Storage)
                else None
            )

        def reducer_override(self, value):
            if isinstance(value, Tensor):
                return torch._utils._rebuild_tensor_v2, (
                    Storage(),
                    0,
                    size,
                    stride,
                    False,
                    OrderedDict(),
                )
            return NotImplemented

    class Tensor:
        pass

    file = io.BytesIO()
    Pickler(file, 2).dump({"format": 2, "a": Tensor()})
    return file.getvalue()


@pytest.mark.parametrize(
    ("size", "stride", "count", "reason"),
    [
        ((5,), (1,), 4, "a tensor in it reaches beyond its bytes"),
        ((2, 2), (3, 1), 4, "a tensor in it reaches beyond its bytes"),
        ((2**40,), (0,), 4, "its tensors claim more than 8 times the bytes that are there"),
        ((-1,), (1,), 4, "a tensor in it has no shape"),
        ((4,), (1, 1), 4, "a tensor in it has no shape"),
        ((2**62,) * 60, (0,) * 60, 4, "a tensor in it has no shape"),
        ((8,), (1,), 8, "a tensor's bytes are more or fewer than it describes"),
    ],
)
def test_a_tensor_that_claims_what_is_not_there(tmp_path, size, stride, count, reason):
    path = tmp_path / "a.pt"
    torch.save({"format": 2, "a": torch.zeros(4)}, path)
    rewritten(path, described(with_tensor(size, stride, count)))
    assert (
        refusal(lambda: checkpoint.read(path))
        == f"{path} is not a whole metaplug checkpoint ({reason}): use another one of the run"
    )


def test_files_that_are_no_such_zip_are_refused(run, tmp_path):
    path = tmp_path / "last.pt"

    def reason():
        return (
            refusal(lambda: checkpoint.read(path))
            .removeprefix(f"{path} is not a whole metaplug checkpoint ")
            .removesuffix(": use another one of the run")
        )

    shutil.copy(run / "last.pt", path)
    rewritten(path, lambda _: None, zipfile.ZIP_DEFLATED)
    assert reason() == "('archive/data.pkl' in it is compressed, which torch never does)"
    shutil.copy(run / "last.pt", path)
    rewritten(path, lambda members: members.update({"archive/code/a.py": b"x"}))
    assert reason() == "('archive/code/a.py' in it is nothing that torch.save writes)"
    shutil.copy(run / "last.pt", path)
    rewritten(path, lambda members: members.update({"archive/data/77": b"x"}))
    assert reason() == "(its tensors are not those that it describes)"
    shutil.copy(run / "last.pt", path)
    rewritten(path, lambda members: members.update({"archive/byteorder": b"big"}))
    assert reason() == "(it is from a machine of another byte order)"
    path.write_bytes(pickle.dumps({"format": 2, "a": Marks(tmp_path / "mark")}))
    assert reason() == "(it is no zip, as which torch saves)"
    torch.save({"format": 2}, path, _use_new_zipfile_serialization=False)
    assert reason() == "(it is no zip, as which torch saves)"
    path.unlink()
    os.mkfifo(path)
    assert reason() == "(it is no regular file)"
    assert not (tmp_path / "mark").exists()


def test_a_file_larger_than_the_free_memory_is_refused_before_it_is_read(run, monkeypatch):
    monkeypatch.setattr(archive, "available", lambda _: 1000)
    size = archive.size_text((run / "last.pt").stat().st_size)
    assert refusal(lambda: checkpoint.read(run / "last.pt")) == (
        f"{run / 'last.pt'} is not a whole metaplug checkpoint (it has {size}, more than the 1000 bytes of memory that are free): "
        "use another one of the run"
    )


# Checkpoints: content, in files that are whole.


def test_states_that_were_tampered_with_are_refused_or_load(run, request, tmp_path):
    """Every part of a state exchanged, taken away or added to; the learner is then whole, or nothing was loaded."""
    whole = checkpoint.read(run / "last.pt")
    path, number = tmp_path / "forged.pt", tmp_path / "in" / "number"
    number.parent.mkdir()
    learner = load(run / "last.pt").learner

    def forged():
        torch.save(tampered(whole, random.Random(number.read_bytes())), path)
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
                torch.zeros(1).expand(2**40),
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
        (lambda state: state["plugins"].pop(), "(its plugins are not those whose states it has)"),
        (lambda state: state.pop("optimizer"), ", as it lacks 'optimizer'"),
        (
            lambda state: state["model_spec"].update(name="\x1b[2J"),
            r"(its content: model_spec.name = '\x1b[2J': a name has control characters)",
        ),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, state, change, reason):
    path = tmp_path / "forged.pt"
    change(state)
    torch.save(state, path)
    assert refusal(lambda: checkpoint.read(path)).startswith(
        f"{path} is not a whole metaplug checkpoint{'' if reason[0] == ',' else ' '}{reason}"
    )


def test_a_model_larger_than_its_weights_is_refused_before_it_takes_memory(tmp_path, state):
    path = tmp_path / "forged.pt"
    for hidden in ([65536] * 40, [1] * 100_000):
        state["model_spec"]["settings"]["hidden"] = hidden
        torch.save(state, path)
        begun = time.monotonic()
        assert refusal(lambda: MetaLearner.load(path)) == (
            f"{path} belongs to another model: it asks for more weights than it has; use another one of the run"
        )
        assert time.monotonic() - begun < 5
    state["config"] = state["config"].replace("- 8\n", "- 65536\n    - 65536\n")
    torch.save(state, path)
    assert refusal(lambda: load(path)) == (
        f"{path} belongs to another model: it asks for more weights than it has; use another one of the run"
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
    """torch's optimizers keep the tensors that they are given: two learners would train on one another's moments."""
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
    learner = load(run / "last.pt").learner
    for change, reason in (
        (
            lambda: state["model"].update({"head.bias": state["model"]["head.bias"].double()}),
            "'head.bias' is torch.float64 there and torch.float32 here",
        ),
        (
            lambda: state["model"].update({"head.bias": 3}),
            "'head.bias' is a int there and a Tensor here",
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
        (lambda it: it["param_groups"].pop(), "it has other groups of parameters"),
        (
            lambda it: it["param_groups"][0].update(lr=float("nan")),
            "its setting 'lr' is another one",
        ),
        (
            lambda it: it["param_groups"][0].update(weight_decay=0.5),
            "its setting 'weight_decay' is another one",
        ),
        (
            lambda it: it["state"].update({99: {}}),
            "it has moments of another kind for parameter 99",
        ),
        (lambda it: it["state"][0].pop("step"), "it has moments of another kind for parameter 0"),
        (
            lambda it: it["state"][0].update(exp_avg=torch.zeros(1)),
            "'exp_avg' of parameter 0 has another form",
        ),
        (
            lambda it: it["state"][0].update(step=torch.tensor(-1.0)),
            "'step' of parameter 0 has another form",
        ),
    ):
        state["optimizer"] = copy.deepcopy(original)
        change(state["optimizer"])
        assert (
            refusal(lambda: learner.load_state_dict(state, "it"))
            == f"it belongs to another optimizer: {reason}; {mend}"
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
    assert refusal(lambda: learner.save(tmp_path / "a.pt")) == (
        f"cannot write {tmp_path / 'a.pt'}: it holds a set, which no checkpoint keeps; keep plain values and tensors in the model"
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
    learner, path = learner_with(state), tmp_path / "a.pt"
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
    state, path = dict(enumerate(tensors())), tmp_path / "a.pt"
    state = {str(name): value for name, value in state.items()}
    learner_with(state).save(path)
    read = checkpoint.read(path)["plugin_states"]["keeping"]
    assert same(read, {name: value.contiguous() for name, value in state.items()})


def test_weights_that_are_tied_stay_tied_in_the_file(tmp_path):
    tied = torch.arange(3.0)
    learner_with({"one": tied, "other": tied}).save(tmp_path / "a.pt")
    read = checkpoint.read(tmp_path / "a.pt")["plugin_states"]["keeping"]
    assert read["one"].data_ptr() == read["other"].data_ptr()


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            {"a": {1}},
            "it holds a set, which no checkpoint keeps; keep plain values and tensors in plugin 'keeping'",
        ),
        (
            {"a": torch.empty(2, device="meta")},
            "it holds a tensor of torch.float32, torch.strided without values, which no checkpoint keeps; "
            "keep plain values and tensors in plugin 'keeping'",
        ),
        (
            {"a": "x" * 2**24},
            "it describes its tensors in more than 16777216 bytes, which no checkpoint keeps; "
            "keep fewer values, or tensors of them, in plugin 'keeping'",
        ),
        (
            {"a": [0] * 500_000},
            "it holds more than 500000 values, or more than 50 in one another, which no checkpoint keeps; "
            "keep fewer values, or tensors of them, in plugin 'keeping'",
        ),
        (
            {"a": 2**5000},
            "it is described by LONG4, which torch.save does not use, which no checkpoint keeps; "
            "keep plain values and tensors in plugin 'keeping'",
        ),
        (
            {0: torch.ones(1)},
            "its content: plugin_states.keeping.0.[key] = 0: input should be a valid string; "
            "change that in the model or plugin, as no such checkpoint can be read",
        ),
    ],
)
def test_what_a_plugin_keeps_and_no_file_can_is_refused_by_name(tmp_path, state, reason):
    path = tmp_path / "a.pt"
    assert refusal(lambda: learner_with(state).save(path)) == f"cannot write {path}: {reason}"
    assert not list(tmp_path.iterdir())


def test_a_name_that_no_file_can_have_is_refused_when_it_is_written(tmp_path):
    path, name = tmp_path / "a.pt", "a" * 201
    learner = MetaLearner(nn.Linear(1, 1), kind="regression", plugins=[GradientSharing(name=name)])
    assert refusal(lambda: learner.save(path)) == (
        f"cannot write {path}: its content: plugins.0.name = '{name[:97]}...{name[-98:]}': string should have at most 200 characters; "
        "change that in the model or plugin, as no such checkpoint can be read"
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
        f"cannot write {tmp_path / 'run' / 'last.pt'}: it holds a set, which no checkpoint keeps; "
        "keep plain values and tensors in plugin 'meta-sgd'"
    )
    assert not stepped
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [3, 5_000, 5_001, 300_000])
def test_a_learner_may_have_trained_on_any_number_of_classes(tmp_path, count):
    learner, path = MetaLearner(nn.Linear(1, 1), kind="regression"), tmp_path / "a.pt"
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
    learner, path = MetaLearner(nn.Linear(1, 1), kind="regression"), tmp_path / "a.pt"
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
    torch.save(state, tmp_path / "a.pt")
    text = refusal(lambda: checkpoint.read(tmp_path / "a.pt"))
    assert "(its content: trained_on.others = " in text
    assert text.endswith(": no digests of 16 bytes each): use another one of the run")


def test_the_installed_torch_writes_what_is_read(run, state, tmp_path):
    """Whatever its version: in the protocol that is asked for, and in that which it takes by itself."""
    for name, options in (("ours.pt", {"pickle_protocol": structure.PROTOCOL}), ("own.pt", {})):
        torch.save(state, tmp_path / name, **options)
        assert same(checkpoint.read(tmp_path / name), state)
    with zipfile.ZipFile(run / "last.pt") as opened:
        [described] = [
            opened.read(name) for name in opened.namelist() if name.endswith("/data.pkl")
        ]
    assert described[:2] == b"\x80\x02"
    expected = structure.parse(structure.describe(state))
    assert structure.parse(described).claimed == expected.claimed
    assert abs(len(described) - len(structure.describe(state))) < 64 * len(expected.storages), (
        "what is measured is what is written"
    )


# YAML.

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [*{a}, *{a}, *{a}, *{a}]}}\n"
    for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
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
            "'2001-99-99' is read as a timestamp, which no setting is: put it in quotes to have text",
        ),
        (
            "seed: !!binary aaaa",
            ", line 1",
            "'aaaa' is read as a binary, which no setting is: put it in quotes to have text",
        ),
        (
            "seed: !!python/object/apply:os.system [ls]",
            ", line 1",
            "'[...]' is read as a python/object/apply:os.system, which no setting is: put it in quotes to have text",
        ),
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
                f"{path} has more than 256 KiB, and no configuration is so long: give a YAML file of settings"
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
            "'2001-99-99' is read as a timestamp, which no setting is: put it in quotes to have text; put it in quotes to have text",
        ),
        ("[" * 60, "nested more than 50 deep; put it in quotes to have text"),
        ("0b_", "'0b_' cannot be read as int; in quotes it is text; put it in quotes to have text"),
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


def test_mutated_configurations_and_presets(run, request, tmp_path):
    preset = b"plugins:\n  - plugin: gradient-sharing\n    settings: {gate: 0.3}\n  - meta-sgd\ndefaults: {learner: {inner_steps: 2}}\n"
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
        (b"[]", "it: input should be a valid dictionary or instance of _Line"),
        (b"NaN", "NaN is no number in JSON"),
    ],
)
def test_a_broken_line_of_metrics_is_named(run, tmp_path, text, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((run / "metrics.jsonl").read_bytes() + text)
    assert refusal(lambda: read_metrics(tmp_path)) == (
        f"{path}, line 3, is not what a run writes ({reason}): take it from a backup, or train the run anew"
    )
    assert read_metrics(run)[0]["iteration"] == 1
    assert refusal(lambda: read_summary(tmp_path)) == (
        f"cannot read {tmp_path / 'summary.json'}: No such file or directory; it is in the folder of a run that has begun"
    )


# Code by name, downloads, and other files.

OWN = """
import torch
from pathlib import Path
Path("ran").write_text("")
def make(input_shape, outputs, width=4):
    return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Linear(width, outputs))
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
        "metaplug: runs/own/best.pt names code for its model, 'own_models:make', which nobody lets run because a file says so: "
        "if it is your own, give --model own_models:make, or runs.load(..., model=...)\n",
    )
    code, words = evaluate(capfd, "runs/own", "--model", "own_models:other")
    assert (code, words) == (
        2,
        "metaplug: runs/own/best.pt has the model 'own_models:make', not 'own_models:other': give the model that it was trained with\n",
    )
    assert "own_models" not in sys.modules
    assert not Path("ran").exists()
    code, words = evaluate(capfd, "runs/own", "--model", "own_models:make")
    assert code == 0
    assert (
        f"the model is made by own_models:make in {own.parent.parent / 'own_models.py'} with the settings {{'width': 3}}\n"
        in words
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
    path = forged_config(state, tmp_path / "a.pt", model={"name": "\x1b[2Jmlp\n", "settings": {}})
    assert refusal(lambda: load(path), RequestError).startswith(
        f"{path}: unknown model '?[2Jmlp': known: 'conv4', "
    )


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:exec", "a.b:c\x1b[2J"])
def test_a_checkpoint_names_code_in_vain(tmp_path, state, name):
    config = yaml.safe_load(state["config"])
    config["model"] = {"name": name, "settings": {"args": f"touch {tmp_path}/mark"}}
    state["config"] = yaml.safe_dump(config)
    torch.save(state, tmp_path / "a.pt")
    assert "names code for its model" in refusal(lambda: load(tmp_path / "a.pt"), RequestError)
    assert not (tmp_path / "mark").exists()


def test_a_preset_names_no_code(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("defaults: {model: {name: 'os:system'}}\n")
    assert refusal(lambda: find_preset(str(path)), RequestError) == (
        f"{path}: defaults = {{'model': {{'name': 'os:system'}}}}: a preset contains no code, as its model 'os:system' is: "
        "give that by --model, or in a configuration"
    )


def test_a_folder_that_somebody_sent_installs_nothing(tmp_path, monkeypatch, capfd):
    """As the current folder it is at the end of Python's path, for MODULE:FACTORY, and Python would find its packages."""
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
    torch.save(state, path)
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
    path = forged_config(state, tmp_path / "a.pt", tasks=source)
    assert "its data are not in" in refusal(lambda: load(path), RequestError)
    assert not fetched
    assert not (tmp_path / "root").exists()
    path = forged_config(state, tmp_path / "a.pt", preset="/etc/passwd.yaml")
    assert (
        refusal(lambda: load(path))
        == f"{path} names the file /etc/passwd.yaml as its preset, which no run does: use another checkpoint of the run"
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
    """The whole of it in a process of its own, with an address space that a bomb would not fit into."""
    state["model_spec"]["settings"]["hidden"] = [65536] * 40
    forged = forged_config(
        state, tmp_path / "a.pt", model={"name": "mlp", "settings": {"hidden": [65536] * 40}}
    )
    line = f"ulimit -v 6000000; exec {sys.executable} -m metaplug evaluate {forged}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"metaplug: {forged} belongs to another model: it asks for more weights than it has; use another one of the run\n"
    )
    assert json.loads((run / "summary.json").read_text())["iterations"] == 2
