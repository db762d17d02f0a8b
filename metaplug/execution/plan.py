"""The plan of a meta-step: whole or in chunks, compiled, captured, recomputed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from metaplug.errors import RequestError, quoted
from metaplug.execution.chunks import ChunkedDerivation
from metaplug.execution.cuda_graphs import capturing
from metaplug.execution.engine import Derivation, Engine
from metaplug.execution.precision import Precision
from metaplug.execution.traced import PATIENCE, CompiledDerivation


class Computing(TypedDict, total=False):
    """The arguments of MetaLearner that say how it computes, and not what."""

    checkpoint_steps: int | None
    chunk_size: int | None
    cache_frozen: bool
    compile: bool | Literal["auto"]
    capture: bool | Literal["auto"]
    metrics_every: int
    precision: Precision
    deterministic: bool


@dataclass(frozen=True)
class StepPlan:
    """What MetaLearner's arguments of these names ask for.

    Raises:
        RequestError: a value out of bounds, or two that exclude each other.
    """

    checkpoint_steps: int | None
    chunk_size: int | None
    compile: bool | Literal["auto"]
    capture: bool | Literal["auto"]
    cache_frozen: bool = False

    def __post_init__(self) -> None:
        for name, without in (
            ("checkpoint_steps", "keep the graph of all inner steps"),
            ("chunk_size", "take all tasks of a batch at once"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} = {value}: give at least 1, or None to {without}")
        if self.cache_frozen and self.checkpoint_steps is not None:
            raise RequestError(
                "cache_frozen keeps what checkpoint_steps recomputes: leave one of the two out"
            )
        for name in ("compile", "capture"):
            if (value := getattr(self, name)) not in (True, False, "auto"):
                raise RequestError(f"unknown {name} {value!r}: give True, False or 'auto'")
        if self.compile == "auto" and self.capture:
            raise RequestError(
                "compile = 'auto' decides in the course of the run, and capture records what is "
                "there: give compile True or False beside it, or leave capture out"
            )
        if self._traced and (self.checkpoint_steps is not None or self.chunk_size is not None):
            raise RequestError(
                f"a {self._traced}d step decides itself what it keeps: leave {self._traced} out, "
                "or checkpoint_steps and chunk_size"
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse capture where there are no CUDA graphs.

        Raises:
            RequestError: it was asked for, and not by "auto".
        """
        if self.capture not in (False, "auto") and device.type != "cuda":
            raise RequestError(
                f"capture is for steps on a CUDA device, but the model is on {device.type}: "
                "leave it out, or give 'auto', which does nothing there"
            )

    def derivation(self, engine: Engine) -> Derivation | None:
        """Return what stands in for the engine's own derivation; None for that itself.

        Raises:
            RequestError: a plugin couples tasks, and this plan takes them apart.
        """
        coupled = [plugin.name for plugin in engine.chain.plugins if plugin.couples_tasks]
        waits = bool(coupled) and engine.world.size > 1
        if self._traced and waits:
            raise RequestError(
                f"{self._traced} on {engine.world.size} ranks: plugin {quoted(coupled)} takes "
                f"means over all of their tasks in the inner loop, for which a {self._traced}d "
                f"step cannot wait: leave {self._traced} out, or use one rank"
            )
        if self.chunk_size is not None:
            if coupled:
                raise RequestError(
                    f"chunk_size = {self.chunk_size} takes a few tasks at a time, but plugin "
                    f"{quoted(coupled)} couples all tasks of a batch: leave one of the two out, or "
                    "use checkpoint_steps, which saves memory with every plugin"
                )
            return ChunkedDerivation(engine, self.chunk_size)
        may_trace = self.checkpoint_steps is None and not waits
        auto = self.capture == "auto" and engine.device.type == "cuda" and may_trace
        if auto or self.capture not in (False, "auto"):
            patience = PATIENCE if auto else 0
            return capturing(engine, compiles=bool(self.compile), patience=patience)
        if self.compile == "auto":
            # When a process beside the run is done is chance, and from then on rounding differs.
            alone = may_trace and engine.world.size == 1 and not engine.deterministic
            return CompiledDerivation(engine, patience=PATIENCE, auto=True) if alone else None
        return CompiledDerivation(engine) if self.compile else None

    @property
    def _traced(self) -> str:
        """The option that asks for a traced step, "auto" left out; "" for none."""
        names = ("compile", "capture")
        return next((name for name in names if getattr(self, name) not in (False, "auto")), "")
