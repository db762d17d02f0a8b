"""Programs of torch.export and ONNX models of a module, which run without its code."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from metaplug.contract.inputs import Inputs, count_of, map_inputs
from metaplug.core.functional_model import clone, give_parameters
from metaplug.core.model_calls import Output, arguments, prediction_of
from metaplug.errors import RequestError, RunError, said_by


class Predictor(nn.Module):
    """The prediction of a copy of a module on the CPU, from where programs run anywhere.

    Args:
        module: stays as it is.
        output: the part of its answer that is the prediction.
        ways: leave out outputs beyond these; None keeps all.
        names: of its inputs, as `named_inputs` gives them.

    Attributes:
        module: the copy.
    """

    def __init__(
        self, module: nn.Module, output: Output, ways: int | None, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.module, self.output, self.ways = _on_cpu(module), output, ways

        def forward(*positional: Tensor, **named: Tensor) -> Tensor:
            return self._predict(*positional, **named)

        # torch.export names a program's inputs by the signature, and with ** it names them wrongly.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in names]
        vars(forward)["__signature__"] = inspect.Signature(parameters)
        self.forward = forward

    def _predict(self, *positional: Tensor, **named: Tensor) -> Tensor:
        """(n, *input) → (n, *output)."""
        found: Tensor = prediction_of(self.module(*positional, **named), self.output)
        return found if self.ways in (None, found.shape[1]) else found[:, : self.ways]


def named_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors of inputs by the names that they have in files: x, or x0, x1, ..."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, tuple):
        return {f"x{place}": each for place, each in enumerate(inputs)}
    return {"x": inputs}


def make_program(model: Predictor, inputs: Inputs) -> tuple[torch.export.ExportedProgram, int]:
    """Return a program for any number of examples, and the fewest that it takes, 1 or 2.

    With batch norm, a model may refuse one example alone.

    Args:
        inputs: (n, *input), or several by name or place; n at least 1.

    Raises:
        RequestError: torch.export cannot make a program of the model.
        RunError: the program gives other outputs than the model.
    """
    least = 1 if _takes_one(model, inputs) else 2
    axis = torch.export.Dim("batch", min=least)
    # Of 2 at least, as torch takes a batch of 1 for a constant.
    inputs = map_inputs(partial(_examples, max(2, count_of(inputs))), inputs)
    positional, named = arguments(inputs)
    shapes = {name: {0: axis} for name in named_inputs(inputs)}
    try:
        # Its warnings are for torch's authors; what counts is compared below.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, positional, named, dynamic_shapes=shapes)
            run = program.module()
    except Exception as error:  # any operation of any model may fail, in any way
        raise RequestError(
            f"torch.export cannot make a program of the model ({said_by(error)}): leave out what "
            "it names from forward, or write the state alone (--format state)"
        ) from error
    _check_program(run, model, inputs, least)
    return program, least


def _takes_one(model: nn.Module, inputs: Inputs) -> bool:
    positional, named = arguments(map_inputs(partial(_examples, 1), inputs))
    try:
        with torch.no_grad():
            model(*positional, **named)
    except ValueError:  # of batch norm, for a single value
        return False
    return True


def _check_program(run: Callable[..., Any], model: nn.Module, inputs: Inputs, least: int) -> None:
    """Compare a program with its model, at the fewest examples and at one more than it has seen."""
    for count in (least, count_of(inputs) + 1):
        own = map_inputs(partial(_examples, count), inputs)
        positional, named = arguments(own)
        with torch.no_grad():
            ours, theirs = model(*positional, **named), run(*positional, **named)
        size = float(ours.double().abs().max())
        error = float((ours.double() - theirs.double()).abs().max())
        eps = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0
        # Programs add in another order: as many roundings as a sum over 1000 inputs may make.
        if not error <= 1000 * eps * max(1.0, size):
            raise RunError(
                f"the program of the model gives other outputs than the model, by up to "
                f"{error:.1e} for {count} examples: see whether forward draws random numbers or "
                "branches on the number of examples, or write the state alone (--format state)"
            )


def _examples(count: int, x: Tensor) -> Tensor:
    """So many examples of those that are there, over again where they are fewer."""
    return x.repeat(-(-count // len(x)), *[1] * (x.ndim - 1))[:count]


def saved(program: torch.export.ExportedProgram) -> bytes:
    """Return the bytes of a file that torch.export.load reads."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def as_onnx(program: torch.export.ExportedProgram, inputs: Inputs) -> bytes:
    """Return the bytes of an ONNX model with the inputs' names, and one output, `prediction`.

    Raises:
        RequestError: an operation has no counterpart in ONNX, or the model has 2 GiB and more.
    """
    names = list(named_inputs(inputs))
    try:
        with warnings.catch_warnings(), _quiet("onnxscript"):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=names, output_names=["prediction"]
            )
        assert made is not None
        content: bytes = made.model_proto.SerializeToString()
    except Exception as error:  # any operation may have no counterpart
        raise RequestError(
            f"torch.onnx cannot write the model as ONNX ({said_by(error)}): leave --format onnx out"
        ) from error
    return content


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Inside, a library's warnings are not logged: of constants that it could not fold, say."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_onnx() -> None:
    """Refuse ONNX where its libraries are not installed."""
    for name in ("onnx", "onnxscript"):
        try:
            import_module(name)
        except ImportError:
            raise RequestError(
                f"the format onnx needs {name}: pip install 'metaplug[export]'"
            ) from None


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy on the CPU. Programs run anywhere from there, and the module stays as it is."""
    copied = clone(module, shared=False)
    give_parameters(
        copied,
        # Cloned, as a part of a larger tensor would be saved with the whole of it.
        {
            id(each): nn.Parameter(
                each.detach().cpu().clone(memory_format=torch.contiguous_format), False
            )
            for each in module.parameters()
        },
    )
    return copied.cpu()
