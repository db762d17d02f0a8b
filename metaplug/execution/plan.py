"""In which way meta-steps are computed: whole or in chunks, compiled, captured, recomputed; and which of these go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from metaplug.errors import RequestError, quoted
from metaplug.execution.chunks import ChunkedDerivation
from metaplug.execution.cuda_graphs import PATIENCE, capturing
from metaplug.execution.engine import Derivation, Engine
from metaplug.execution.traced import CompiledDerivation


@dataclass(frozen=True)
class StepWay:
    """What MetaLearner's arguments of these names ask for.

    Raises:
        RequestError: a value out of bounds, or two that exclude each other.
    """

    checkpoint_steps: int | None
    chunk_size: int | None
    compile: bool
    capture: bool | Literal["auto"]

    def __post_init__(self) -> None:
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise RequestError(
                f"checkpoint_steps = {self.checkpoint_steps}: give at least 1, or None to keep the graph of all inner steps"
            )
        if self.chunk_size is not None and self.chunk_size < 1:
            raise RequestError(
                f"chunk_size = {self.chunk_size}: give at least 1, or None to take all tasks of a batch at once"
            )
        if self.capture not in (True, False, "auto"):
            raise RequestError(f"unknown capture {self.capture!r}: give True, False or 'auto'")
        if self._traced and (self.checkpoint_steps is not None or self.chunk_size is not None):
            option = self._traced[0]
            raise RequestError(
                f"a {option}d step decides itself what it keeps: leave {option} out, or checkpoint_steps and chunk_size"
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse capture where there are no CUDA graphs.

        Raises:
            RequestError: it was asked for, and not by "auto".
        """
        if "capture" in self._traced and device.type != "cuda":
            raise RequestError(
                f"capture is for steps on a CUDA device, but the model is on {device.type}: "
                "leave it out, or give 'auto', which does nothing there"
            )

    def derivation(self, engine: Engine) -> Derivation | None:
        """What takes the place of the engine's own; None where nothing does.

        Raises:
            RequestError: a plugin couples tasks, and this way takes them apart.
        """
        coupled, ranks = (
            [plugin.name for plugin in engine.chain.plugins if plugin.couples_tasks],
            engine.world.size,
        )
        waits = bool(coupled) and ranks > 1
        if self._traced and waits:
            option = self._traced[0]
            raise RequestError(
                f"{option} on {ranks} ranks: plugin {quoted(coupled)} takes means over all of their tasks in the inner loop, "
                f"for which a {option}d step cannot wait: leave {option} out, or use one rank"
            )
        if self.chunk_size is not None:
            if coupled:
                raise RequestError(
                    f"chunk_size = {self.chunk_size} takes a few tasks at a time, but plugin {quoted(coupled)} couples all tasks of a "
                    "batch: leave one of the two out, or use checkpoint_steps, which saves memory with every plugin"
                )
            return ChunkedDerivation(engine, self.chunk_size)
        auto = (
            self.capture == "auto"
            and engine.device.type == "cuda"
            and self.checkpoint_steps is None
            and not waits
        )
        if auto or "capture" in self._traced:
            return capturing(engine, compiles=self.compile, patience=PATIENCE if auto else 0)
        return CompiledDerivation(engine) if self.compile else None

    @property
    def _traced(self) -> list[str]:
        """What is asked for that traces a step, "auto" left out."""
        return [
            option
            for option, wanted in (("compile", self.compile), ("capture", self.capture is True))
            if wanted
        ]
