"""Steps that are compiled in a process beside the run, and what Inductor is given."""

import copy
import logging
import os
import pickle
import signal
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.bench.encoder import TOKENS, VOCABULARY, Encoder, with_adapters
from metaplug.contract.function_plugins import plugin_of
from metaplug.execution import compiling, traced
from metaplug.execution.compiling import Beside, inductor
from metaplug.execution.graph_file import formats_by_name, read_graph, write_graph
from metaplug.execution.graph_rewrites import rewrite
from metaplug.execution.traced import PATIENCE, CompiledDerivation
from metaplug.models.conv4 import Conv4
from metaplug.models.resnet12 import ResNet12
from metaplug.testing import Stream, assert_close, found, problem

_aten = torch.ops.aten


def graph_of(case):
    """The traced meta-step of a problem, and its inputs."""
    seen, learner = [], case.learner()
    learner.engine.derivation = CompiledDerivation(
        learner.engine, lambda graph, inputs: seen.append((graph, inputs)) or graph
    )
    learner.meta_gradients(case.batch)
    return seen[0]


@pytest.mark.parametrize("model", ["batch-norm", "layer-norm"])
def test_a_graph_comes_out_of_its_file_as_it_went_in(model, tmp_path):
    graph, inputs = graph_of(problem(model))
    write_graph(tmp_path / "graph", graph, threads=3)
    assert b"conftest" not in (tmp_path / "graph").read_bytes()  # which imports torch too
    again, more = read_graph(tmp_path / "graph")
    assert more == {"threads": 3}
    assert str(again.graph) == str(graph.graph)  # what Inductor's cache goes by
    with torch.no_grad():
        for one, other in zip(again(*inputs), graph(*inputs), strict=True):
            assert torch.equal(one, other)


def test_formats_are_pickled_alike_in_every_process():
    formats = [torch.contiguous_format, torch.channels_last, torch.preserve_format]
    before = pickle.dumps(formats)
    with formats_by_name():
        text = pickle.dumps(formats)
    assert b"conftest" not in text  # which imports torch too
    assert pickle.loads(text) == formats
    assert pickle.dumps(formats) == before


def test_a_frozen_parameter_of_the_loss_is_in_the_file(tmp_path):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
            self.weight = nn.Parameter(weight, requires_grad=False)

        def forward(self, predictions, targets):
            return nn.functional.cross_entropy(predictions, targets, weight=self.weight)

    case, seen = problem(steps=1), []
    learner = case.learner(loss=Weighted())
    learner.engine.derivation = CompiledDerivation(
        learner.engine, lambda graph, inputs: seen.append((graph, inputs)) or graph
    )
    learner.meta_gradients(case.batch)
    graph, inputs = seen[0]
    write_graph(tmp_path / "graph", graph)
    again, _ = read_graph(tmp_path / "graph")
    with torch.no_grad():
        for one, other in zip(again(*inputs), graph(*inputs), strict=True):
            assert torch.equal(one, other)


def test_a_graph_that_calls_something_else_is_not_written(tmp_path):
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    graph.graph.call_function(len, ([],))
    with pytest.raises(RuntimeError, match="the step calls <built-in function len>, which is no"):
        write_graph(tmp_path / "graph", graph)


def test_a_graph_is_rewritten_to_the_same_numbers():
    def step(x, y):
        with_vectors = y[0] @ y[1, 0], x[0, :1] @ y[0], x[0, 0] @ y[0, :, 0]
        rows = torch.linalg.vector_norm(x[0], dim=1).reciprocal()
        matrices = x.view(10, 3), (x + 1).view(10, 3)
        as_vectors = matrices[0].view(-1) @ matrices[1].view(-1)
        products = torch.bmm(x, y).view(-1), torch.bmm(y.mT, x.mT).reshape(2, -1)
        with_sum = torch.baddbmm(y[:, :1], x, y), torch.baddbmm(x, x, y[..., :3], beta=2)
        large = rows.unsqueeze(1) * torch.ones(5, 40).double(), rows @ torch.ones(5, 40).double()
        return *products, *with_vectors, as_vectors, *with_sum, *large

    x, y = (torch.rand(shape, dtype=torch.float64) for shape in ((2, 5, 3), (2, 3, 4)))
    graph = make_fx(step)(x, y)
    expected = step(x, y)
    rewrite(graph)
    for _ in range(2):  # twice is once
        called = [node.target for node in graph.graph.nodes]
        assert _aten.view.default not in called
        assert not {_aten.mv.default, _aten.mm.default, _aten.dot.default} & {*called}
        assert [
            called.count(each) for each in (_aten.baddbmm.default, _aten.as_strided.default)
        ] == [1, 1]
        assert_close(dict(enumerate(graph(x, y))), dict(enumerate(expected)))
        rewrite(graph)
        assert len(called) == len(graph.graph.nodes)


class Process:
    """Stands in for the process beside the run: done when it is told."""

    made, finished = 0, False

    def __init__(self, graph, inputs):
        Process.made += 1

    def done(self):
        if self.finished == "failed":
            raise RuntimeError("the process that compiled beside the run failed: no compiler")
        return self.finished


@pytest.fixture
def beside(monkeypatch):
    monkeypatch.setattr(traced, "Beside", Process)
    Process.made, Process.finished = 0, False
    return Process


def auto(learner):
    compiled = []
    learner.engine.derivation = CompiledDerivation(
        learner.engine,
        lambda graph, _: compiled.append(graph) or graph,
        patience=PATIENCE,
        auto=True,
    )
    return learner, compiled


def test_auto_compiles_beside_a_long_run_and_says_so(beside, caplog):
    case = problem(steps=1)
    plain, (learner, compiled) = case.learner(), auto(case.learner())
    with caplog.at_level(logging.INFO, logger="metaplug"):
        for each in (plain, learner):
            each.fit(Stream(), iterations=PATIENCE + 3, tasks_per_batch=2, total=10**9)
        assert (beside.made, compiled) == (1, [])
        beside.finished = True
        for each in (plain, learner):
            each.fit(Stream(), iterations=3, tasks_per_batch=2, total=10**9)
    assert len(compiled) == 1
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "steps are compiled beside the run",
        f"steps are compiled from iteration {PATIENCE + 4} on",
    ]
    assert_close(dict(learner.model.state_dict()), dict(plain.model.state_dict()))


def test_auto_leaves_a_short_run_as_it_is(beside):
    learner, compiled = auto(problem(steps=1).learner())
    learner.fit(Stream(), iterations=2 * PATIENCE, tasks_per_batch=2)
    assert (beside.made, compiled, learner.engine.derivation._traces) == (0, [], {})


def test_a_process_that_fails_is_told_and_the_run_goes_on(beside):
    learner, compiled = auto(problem(steps=1).learner())
    beside.finished = "failed"
    with pytest.warns(UserWarning) as said:
        learner.fit(Stream(), iterations=PATIENCE + 3, tasks_per_batch=2, total=10**9)
    assert [str(warning.message) for warning in said] == [
        "steps are not compiled in this form, and go on uncompiled: RuntimeError: the process that "
        "compiled beside the run failed: no compiler"
    ]
    assert not compiled


def test_auto_does_nothing_where_it_cannot_and_goes_with_no_capture():
    case = problem()
    for options in ({"chunk_size": 2}, {"checkpoint_steps": 1}, {"deterministic": True}):
        derivation = case.learner(compile="auto", **options).engine.derivation
        assert not isinstance(derivation, CompiledDerivation)
    assert case.learner(compile="auto").engine.derivation.auto
    for capture in (True, "auto"):
        with pytest.raises(
            RequestError,
            match=r"^compile = 'auto' decides in the course of the run, and capture records what "
            r"is there: give compile True or False beside it, or leave capture out$",
        ):
            case.learner(compile="auto", capture=capture)
    with pytest.raises(RequestError, match=r"^a compiled step decides itself what it keeps"):
        case.learner(compile=1, chunk_size=2)
    with pytest.raises(RequestError, match=r"^capture is for steps on a CUDA device"):
        case.learner(capture=1)
    with pytest.raises(RequestError, match=r"^unknown compile 'often': give True, False or 'auto'"):
        case.learner(compile="often")


@pytest.mark.parametrize(
    ("script", "text"),
    [("echo it; echo no compiler; exit 3", "no compiler"), ("exit 3", "status 3")],
)
def test_a_process_tells_why_it_failed(script, text, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(compiling.sys, "executable", str(program))
    process = Beside(make_fx(lambda x: x + 1)(torch.zeros(2)), [torch.zeros(2)])
    process._process.wait(60)
    with pytest.raises(RuntimeError) as failed:
        process.done()
    assert str(failed.value) == f"the process that compiled beside the run failed: {text}"


def test_a_process_ends_with_its_run():
    process = Beside(make_fx(lambda x: x + 1)(torch.zeros(2)), [torch.zeros(2)])
    folder, running = process._said.parent, process._process
    del process
    assert running.poll() is not None
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="there are no sessions on this system")
def test_a_process_finds_the_run_s_modules_and_ends_where_the_run_is_killed(tmp_path, monkeypatch):
    (tmp_path / "random.py").write_text("raise SystemExit('not the one that torch means')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    process = Beside(make_fx(lambda x: x + 1)(torch.zeros(2)), [torch.zeros(2)])
    process._process.stdin.close()  # as the end of the run does
    assert process._process.wait(60) == -signal.SIGKILL
    assert not process._said.parent.exists()


def test_a_fork_of_the_run_leaves_the_process_alone(tmp_path):
    compiling._stop(tmp_path, [], os.getpid() + 1)
    assert tmp_path.exists()


@pytest.fixture
def other_settings():
    """Settings of torch by which Inductor keeps what it compiles."""
    before = compiling._settings()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("high")
    yield
    compiling._set(before)


def test_a_process_has_the_settings_of_the_run(other_settings, tmp_path, monkeypatch):
    seen, before = [], compiling._settings()
    graph = make_fx(lambda x: x + 1)(torch.zeros(2))
    write_graph(tmp_path / "task", graph, forms=[], settings=before)
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(compiling.os, "nice", lambda by: None)
    monkeypatch.setattr(compiling, "_end_with_run", lambda folder: None)
    monkeypatch.setattr(compiling, "_compiled", lambda *_: seen.append(compiling._settings()))
    compiling._compile_for_another(tmp_path / "task")
    assert seen == [before]


@pytest.mark.slow  # half a minute of compiling
def test_what_a_process_compiled_is_in_the_cache_of_the_run(tmp_path, monkeypatch, other_settings):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    graph, inputs = graph_of(problem(steps=1, tasks=2))
    process = Beside(graph, inputs)
    assert process._process.wait(300) == 0, process._said.read_text()
    assert process.done()
    from torch._dynamo.utils import counters

    counters.clear()
    function = inductor(graph, inputs)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    with torch.no_grad():
        for one, other in zip(function(*inputs), graph(*inputs), strict=True):
            assert_close({"": one}, {"": other})


def conv4_with_pooling():
    return Conv4((1, 28, 28), 3, filters=8, pooling="max"), torch.rand(2, 3, 1, 28, 28)


def resnet12():
    return ResNet12((1, 16, 16), 3, filters=(2, 3, 4, 4)), torch.rand(2, 3, 1, 16, 16)


def encoder():
    return Encoder(8, layers=1, heads=2, ways=3), torch.randint(VOCABULARY, (2, 3, TOKENS))


def encoder_with_adapters():
    model, x = encoder()
    return with_adapters(model, rank=2), x


def packed_attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    pooled = nn.Sequential(nn.Flatten(), nn.Linear(40, 3))
    return nn.Sequential(layer, pooled), torch.rand(2, 3, 5, 8)


@pytest.mark.slow  # half a minute to minutes of compiling each
@pytest.mark.parametrize(
    "make", [conv4_with_pooling, resnet12, encoder, encoder_with_adapters, packed_attention]
)
def test_inductor_compiles_models_of_every_kind(make):
    torch.manual_seed(0)
    model, x = make()
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    y = torch.arange(3).repeat(2, 1)
    batch = TaskBatch(x, y, x.flip(1), y.flip(1))
    plain, ours = (
        MetaLearner(
            copy.deepcopy(model), inner_lr=0.05, inner_steps=2, task_batching="vectorized", **more
        )
        for more in ({}, {"compile": True})
    )
    expected, actual = plain.meta_gradients(batch), ours.meta_gradients(batch)
    assert ours.engine.derivation.refusal is None
    assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.slow  # minutes of compiling each
@pytest.mark.parametrize("name", ["conv4", "max-pool", "layer-norm"])
def test_inductor_gives_the_meta_gradients_of_models_in_float64(name):
    case = problem(name, steps=2, tasks=2)
    plain, ours = case.learner(), case.learner(compile=True)
    expected, actual = found(plain, case.batch), found(ours, case.batch)
    assert ours.engine.derivation.refusal is None
    assert_close(actual.gradients, dict(expected.gradients), rtol=1e-10, atol=1e-11)


def test_a_plugin_is_told_whether_its_step_is_recorded():
    def transform_gradients(gradients, step):
        if step.training:
            step.log("traced", float(step.traced))
        else:
            assert not step.traced

    for derivation in (None, CompiledDerivation):
        learner = problem(steps=1).learner(plugins=[plugin_of(transform_gradients)()])
        if derivation is not None:
            learner.engine.derivation = derivation(learner.engine, lambda graph, inputs: graph)
        [record] = learner.iterate(Stream(), iterations=1, tasks_per_batch=2)
        assert record.step.figures == {"transform-gradients.traced": derivation is not None}
        learner.evaluate(Stream(), num_tasks=2)
