"""An adapted model in files that run without metaplug: its state, a program, and an ONNX model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from metaplug.contract.inputs import Inputs, map_inputs
from metaplug.core.model_calls import Output, arguments
from metaplug.errors import RequestError, RunError, one_line, unknown
from metaplug.experiments.build import Experiment
from metaplug.experiments.json_values import to_json
from metaplug.experiments.programs import (
    Predictor,
    as_onnx,
    check_onnx,
    make_program,
    named_inputs,
    saved,
)
from metaplug.experiments.support_sets import read_support
from metaplug.files import make_folder, replacing

FORMATS = ("torch", "onnx", "state")
STATE, PROGRAM, ONNX, LABELS = "model.safetensors", "model.pt2", "model.onnx", "labels.json"
"""The files of an export; the first and last are always there."""


def export_adapted(
    module: nn.Module,
    example: Inputs,
    folder: str | Path,
    *,
    formats: Sequence[str] = ("torch",),
    labels: Sequence[str] | None = None,
    output: Output = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Write an adapted model, such as `learner.adapt` returns, to a new folder.

    The files are `model.safetensors`, its state dict; `model.pt2`, a program of torch.export;
    `model.onnx`; and `labels.json`, which says what goes in and what comes out. A program takes any
    number of examples of one shape, on the CPU, and is compared with the module before anything is
    written.

    Args:
        module: in the mode that it is to run in; it stays as it is.
        example: inputs (n, *input), or several by name or place, with at least 1 example.
        folder: a new or empty one.
        formats: "torch" for model.pt2, "onnx" for model.onnx; "state" adds nothing.
        labels: the class of each output; outputs beyond them are left out of programs.
        output: the part of the module's answer that is its prediction, as for MetaLearner.
        about: more fields for labels.json, ready for JSON.

    Returns:
        The paths by name of the file.

    Raises:
        RequestError: a format is unknown, or needs a library that is missing; the folder holds
            something; there are more labels than outputs; or torch cannot make a program of the
            module.
        RunError: the module gives NaN or Inf, a program gives other outputs than the module, or a
            file cannot be written, and then none is left.

    Example:
        >>> import tempfile
        >>> adapted = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = export_adapted(adapted, torch.ones(2, 3), folder, labels=["cat", "dog"])
        ...     program = torch.export.load(files["model.pt2"]).module()
        >>> bool((program(torch.ones(5, 3)) == adapted(torch.ones(5, 3))).all())
        True
    """
    folder = Path(folder)
    _check(folder, formats)
    inputs = map_inputs(lambda each: each.detach().cpu(), example)
    ways = None if labels is None else len(labels)
    model = Predictor(module, output, ways, list(named_inputs(inputs)))
    _check_prediction(model, inputs, labels)
    contents: dict[str, bytes] = {STATE: _state(model.module)}
    least = None
    if {"torch", "onnx"} & set(formats):
        program, least = make_program(model, inputs)
        if "torch" in formats:
            contents[PROGRAM] = saved(program)
        if "onnx" in formats:
            contents[ONNX] = as_onnx(program, inputs)
    values = {
        "labels": None if labels is None else list(labels),
        "inputs": _forms(inputs),
        "least_examples": least,
        "depends_on_batch": _depends_on_batch(model),
        **(about or {}),
        "sha256": {name: hashlib.sha256(each).hexdigest() for name, each in contents.items()},
    }
    contents[LABELS] = f"{to_json(values, indent=2)}\n".encode()
    return _written(folder, contents)


def export_run(
    experiment: Experiment,
    support: Path,
    folder: Path,
    *,
    formats: Sequence[str] = ("torch",),
    inner_steps: int | None = None,
    ways: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Path]:
    """Adapt a run to the support examples in files, and write the adapted model.

    Args:
        experiment: of the run, as `runs.load` returns it.
        support: as for `read_support`.
        folder, formats, about: as for `export_adapted`.
        inner_steps: default: as in training.
        ways: the number of classes, where it is smaller than that of the model's outputs.

    Raises:
        RequestError: the support set has another number of classes; or as `read_support` and
            `export_adapted`.
    """
    learner, tasks = experiment.learner, experiment.tasks
    _check(folder, formats)
    # A transformer tells a number of places apart, which tasks.settings.max_length may exceed.
    given = read_support(tasks, support, most=getattr(learner.model, "most_tokens", None))
    _check_ways(support, len(given.labels), tasks.outputs, ways)
    device = learner.engine.device
    module = learner.adapt(
        map_inputs(lambda each: each.to(device), given.x),
        given.y.to(device),
        inner_steps=inner_steps,
        ways=ways if ways != tasks.outputs else None,
    )
    steps = learner.settings.inner_steps if inner_steps is None else inner_steps
    values = {
        "preprocessing": given.preprocessing,
        "support_examples": len(given.y),
        "inner_steps": steps,
        "transductive": list(learner.transductive),
        **(about or {}),
    }
    return export_adapted(
        module,
        given.x,
        folder,
        formats=formats,
        labels=given.labels,
        output=learner.settings.output,
        about=values,
    )


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_ways(support: Path, classes: int, outputs: int, ways: int | None) -> None:
    if ways is not None and ways != classes:
        raise RequestError(
            f"--ways {ways}: --support {support} has {classes} classes; give --ways {classes}, or "
            "other examples"
        )
    if classes > outputs:
        raise RequestError(
            f"--support {support} has {classes} classes, more than the {outputs} outputs of the "
            f"run's model: give at most {outputs}, or train with --ways {classes}"
        )
    if ways is None and classes < outputs:
        raise RequestError(
            f"--support {support} has {classes} classes, but the run's model has {outputs} "
            f"outputs: give {outputs} classes; or give --ways {classes}, and the other outputs are "
            "left out"
        )


def _check(folder: Path, formats: Sequence[str]) -> None:
    """Refuse what cannot be written before anything is computed."""
    if wrong := [name for name in formats if name not in FORMATS]:
        raise unknown("format of an export", wrong[0], FORMATS)
    if "onnx" in formats:
        check_onnx()
    if folder.is_dir():
        if any(folder.iterdir()):
            raise RequestError(
                f"the folder {folder} for the export has something in it already: give a new one"
            )
    elif folder.exists():
        raise RequestError(f"{folder} is a file, not a folder for an export: give a new folder")


def _check_prediction(model: Predictor, inputs: Inputs, labels: Sequence[str] | None) -> None:
    positional, named = arguments(inputs)
    with torch.no_grad():
        prediction = model(*positional, **named)
    if labels is not None and prediction.shape[1:2] < (len(labels),):
        raise RequestError(
            f"{len(labels)} labels for predictions of the shape {tuple(prediction.shape)}: give at "
            "most one for each output"
        )
    if not torch.isfinite(prediction).all():
        raise RunError(
            "the model gives NaN or Inf for the examples that it is exported with: adapt it with "
            "fewer inner steps, or train with a lower inner_lr"
        )


def _depends_on_batch(module: nn.Module) -> bool:
    """Whether batch norm takes the statistics of the examples that are given together."""
    norms = nn.modules.batchnorm._BatchNorm
    layers = [layer for layer in module.modules() if isinstance(layer, norms)]
    return any(layer.training or layer.running_mean is None for layer in layers)


def _state(module: nn.Module) -> bytes:
    # Tied tensors are written twice: the format has none, and loading gives both the same values.
    state = {name: each.detach().clone().contiguous() for name, each in module.state_dict().items()}
    return safetensors.torch.save(state, {"format": "pt"})


def _forms(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """By input, the shape of one example and the dtype."""
    return {
        name: {"shape": list(each.shape[1:]), "dtype": str(each.dtype).removeprefix("torch.")}
        for name, each in named_inputs(inputs).items()
    }


def _written(folder: Path, contents: Mapping[str, bytes]) -> dict[str, Path]:
    try:
        make_folder(folder)
    except OSError as error:
        raise RunError(
            f"cannot make the folder {folder}: {one_line(error.strerror or error)}; give another"
        ) from None
    try:
        for name, content in contents.items():
            with replacing(folder / name) as file:
                file.write(content)
    except RunError:
        for name in contents:
            (folder / name).unlink(missing_ok=True)
        raise
    return {name: folder / name for name in contents}
