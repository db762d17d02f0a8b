"""Processes that train one model together, each with tasks of its own, and what they exchange.

A rank computes with its own tasks alone. What crosses ranks in a meta-step is one operation, the
mean weighted by the ranks' tasks:

    M(x) = Σ_r s[r] · x[r]        s[r] = tasks of rank r / tasks of all ranks

In the inner product Σ_r s[r] · ⟨x[r], y[r]⟩ it is its own adjoint, so its backward pass is M again:
every rank differentiates the mean loss of its own tasks, and M of the ranks' gradients is exactly
the gradient of the mean over all tasks, however unequal the shares are. torch's all_reduce inside
the graph, with gradients weighted afterwards, is not exact.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from metaplug.errors import MetaplugError, RankError, RequestError, RunError
from metaplug.execution.rank_store import store_of_this_start

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that a rank waits for another; METAPLUG_RANK_TIMEOUT of the environment overrides it."""

_END = "metaplug/end"


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one among them. A world of one exchanges nothing.

    Every rank must make the same calls in the same order. Each call raises RankError where another
    rank has ended, or does not answer.

    Attributes:
        rank: of this process, 0 to size − 1.
        size: the number of processes.
        local_rank: the number of this process on its machine, which says what device it takes.
        store: where the first rank to fail says why, for the others.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes, prints and draws."""
        return self.rank == 0

    @property
    def salt(self) -> tuple[int, ...]:
        """Mixed into a rank's random stream, so ranks draw different numbers; empty for rank 0."""
        return (self.rank,) if self.rank else ()

    def shard(self, indices: range) -> range:
        """Return this rank's part: every `size`-th."""
        return indices[self.rank :: self.size]

    def share(self, tasks: int) -> Share | None:
        """Return this rank's share of a meta-batch with `tasks` of its own; None if it is alone."""
        return None if self.size == 1 else Share(self, tasks)

    def sum(self, x: Tensor) -> Tensor:
        """Return Σ over ranks, the same bits on all; into `x` itself, where that is contiguous."""
        if self.size == 1:
            return x
        x = x.contiguous()
        self._exchange(dist.all_reduce, x)
        return x

    def any(self, *flags: bool) -> list[bool]:
        """Return by place whether the flag is set on some rank."""
        if self.size == 1:
            return list(flags)
        _, *columns = zip(*self.table(0, *flags), strict=True)
        return [any(column) for column in columns]

    def table(self, *numbers: int) -> list[list[int]]:
        """Return the whole numbers of every rank, by rank; each gives as many."""
        rows = torch.zeros(self.size, len(numbers), dtype=torch.int64)
        rows[self.rank] = torch.tensor(numbers)
        found: list[list[int]] = self.sum(rows).tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """Return the value of every rank, by rank: of plain Python, as it is pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, found, value)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """Return or raise everywhere what `make` does on rank 0; the other ranks do not call it."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [make()]
            except MetaplugError as error:
                answer = [error]
        self._exchange(dist.broadcast_object_list, answer)
        if isinstance(answer[0], MetaplugError):
            raise answer[0]
        made: T = answer[0]
        return made

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let a machine's first process go before its others, which find what it downloads."""
        if self.local_rank > 0:
            self.any()
        yield
        if self.local_rank == 0:
            self.any()

    def align(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank rank 0's values, in place."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.detach().contiguous()
            self._exchange(dist.broadcast, values, 0)
            tensor.detach().copy_(values)

    def tell(self, error: BaseException) -> bool:
        """Say what ends this rank; return whether it is the first, whose text the others repeat."""
        if self.store is None:
            return True
        kind = "" if isinstance(error, MetaplugError) else f"{type(error).__name__}: "
        try:
            first: bytes = self.store.compare_set(_END, "", f"{self.rank} {kind}{error}")
        except RuntimeError:  # the store has ended with the process that held it
            return True
        return first.startswith(f"{self.rank} ".encode())

    def lost(self, otherwise: str) -> RankError:
        """Return the error of a rank whose run another ended: what that told, or `otherwise`."""
        with suppress(RuntimeError):  # the store has ended too
            if self.store is not None and self.store.check([_END]):
                rank, _, text = self.store.get(_END).decode().partition(" ")
                return RankError(f"rank {rank} ended the run: {text}")
        return RankError(otherwise)

    def _exchange(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments)
        except RuntimeError as error:
            otherwise = (
                "has waited for another rank in vain, which hangs or is slower than the limit "
                f"(METAPLUG_RANK_TIMEOUT, else {TIMEOUT:g} seconds): go on with --resume, with a "
                "higher limit if it was only slow"
                if "timed out" in str(error).lower()
                else "lost another rank, whose process ended without a word, killed or out of "
                "memory: go on with --resume, on as many ranks as you like"
            )
            raise self.lost(f"rank {self.rank} of {self.size} {otherwise}") from error


ALONE = World()
"""The world of one process."""


@dataclass
class Share:
    """A rank's part of a meta-batch.

    Attributes:
        world: of the ranks that have its tasks.
        tasks: of this rank, at least 1.
        total: of all ranks; None until it is known.
    """

    world: World
    tasks: int
    total: int | None = None

    @property
    def weight(self) -> float:
        """This rank's tasks / the tasks of all ranks; where it is not known yet, they exchange."""
        if self.total is None:
            self.total = int(self.world.sum(torch.tensor(self.tasks)))
        return self.tasks / self.total

    def agree(self, *flags: bool, form: str) -> list[bool]:
        """Return by place whether the flag is set on some rank; afterwards the weight is known.

        Args:
            form: describes what the ranks are about to exchange.

        Raises:
            RunError: `form` is not the same on all ranks.
        """
        rows = self.world.table(self.tasks, zlib.crc32(form.encode()), *flags)
        tasks, codes, *columns = zip(*rows, strict=True)
        if len({*codes}) > 1:
            raise RunError(
                f"the ranks' plugins kept different statistics (rank {self.world.rank}: {form}), "
                "which have no mean: keep the same names and shapes in every iteration"
            )
        self.total = sum(tasks)
        return [any(column) for column in columns]

    def mean(self, x: Tensor) -> Tensor:
        """Return M(x), differentiable to any order; x has one shape and dtype on all ranks."""
        mean: Tensor = _Mean.apply(x, self)
        return mean

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return M of each, detached; one exchange for all that share a dtype."""
        found = [tensor.detach() for tensor in tensors]
        kinds = [(tensor.dtype, tensor.device) for tensor in found]
        for kind in dict.fromkeys(kinds):
            places = [place for place, own in enumerate(kinds) if own == kind]
            flat = self.mean(torch.cat([found[place].flatten() for place in places]))
            parts = flat.split([found[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                found[place] = part.view(found[place].shape)
        return found


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return share.world.sum(x * share.weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.share.mean(gradient), None


@contextmanager
def joined(timeout: float | None = None) -> Iterator[World]:
    """Join this process and those that `torchrun` started; one started alone is its own World.

    Numbers go through gloo on a CPU, and through NCCL on CUDA, where a rank's device is
    cuda:LOCAL_RANK. The group is left in every case; an error that leaves is told to the others.

    Args:
        timeout: seconds that a rank waits for another one; default: METAPLUG_RANK_TIMEOUT of the
            environment, else TIMEOUT.

    Raises:
        RequestError: the environment is not whole.
        RunError: the others did not come.
    """
    environment = os.environ
    size, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "")
    if size == "1":
        yield ALONE
        return
    if timeout is None:
        timeout = float(environment.get("METAPLUG_RANK_TIMEOUT", TIMEOUT))
    wait, local_rank = timedelta(seconds=timeout), int(environment.get("LOCAL_RANK", rank or 0))
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda and local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    try:
        shared, own, count = next(rendezvous("env://", timeout=wait))
        store = store_of_this_start(shared, own, count, timeout)
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=wait)
    except ValueError as error:
        raise RequestError(
            f"WORLD_SIZE = {size} asks for several processes, but {error}: start them with torchrun"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f"rank {rank} of {size} does not reach the others ({reason}): see that torchrun "
            "started all of them"
        ) from error
    world = World(own, count, local_rank, store)
    try:
        yield world
    except BaseException as error:
        world.tell(error)
        raise
    finally:
        dist.destroy_process_group()
