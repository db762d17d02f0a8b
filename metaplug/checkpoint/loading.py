"""Make the learner of a file from what is installed, or from what a caller gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from metaplug.checkpoint.file import read
from metaplug.checkpoint.giving import give_state
from metaplug.checkpoint.rehearsal import rehearse
from metaplug.checkpoint.state import Learner
from metaplug.contract.plugin_files import is_file
from metaplug.contract.presets import PluginLike, PluginUse
from metaplug.errors import MetaplugError, RequestError, one_line
from metaplug.evaluation.scores import ScoreLike
from metaplug.execution.ranks import World
from metaplug.models.factories import is_own, make_model, without_download

L = TypeVar("L", bound=Learner)


def load(
    make: Callable[..., L],
    path: str | Path,
    *,
    model: nn.Module | None,
    plugins: Sequence[PluginLike] | None,
    loss: Callable[..., Tensor] | None,
    score: ScoreLike | None,
    world: World | None,
    runtime: Mapping[str, Any],
) -> L:
    """The learner of a checkpoint, as MetaLearner.load has it.

    Args:
        make: the class of the learner; is called with its arguments.
        path: of the file.
        model: the user's own, in the place of the one that the file names.
        plugins: in the place of those that the file names.
        loss: the user's own; needed where the learner was trained with one.
        score: in the place of the file's; needed where that was the user's own.
        world: the processes that train together; None is a process alone.
        runtime: further arguments of the class, which no file holds.

    Raises:
        RequestError: the file needs something that it cannot hold and nobody gave, or names code.
        RunError: as `read` and `give_state`.
    """
    state = read(Path(path))
    if loss is None and state["custom_loss"]:
        what = "was trained with a loss of your own, which a file cannot hold"
        raise RequestError(f"{path} {what}: give it as MetaLearner.load(..., loss=...)")
    given = {key: state[key] for key in ("kind", "seed", "task_batching")} | state["settings"]
    if score is None and state.get("custom_score"):
        what = "was trained with a score of your own, which a file cannot hold"
        raise RequestError(f"{path} {what}: give it as MetaLearner.load(..., score=...)")
    given["score"] = state.get("score") if score is None else score

    def made(**options: Any) -> L:
        with naming(path):
            own = _model(state["model_spec"], path) if model is None else model
            chain = plugins
            if chain is None:
                chain = [_plugin(use, path) for use in state["plugins"]]
            return make(own, plugins=chain, loss=loss, **given, **options)

    if model is None and plugins is None:  # an instance that a caller gives serves only once
        rehearse(made, state, str(path))
    learner = made(world=world, **runtime)
    give_state(learner, state, str(path))
    return learner


def _model(spec: Mapping[str, Any] | None, path: str | Path) -> nn.Module:
    if spec is None:
        what = "holds the weights of a model of your own, which a file cannot build"
        raise RequestError(f"{path} {what}: give it as MetaLearner.load(..., model=...)")
    if is_own(spec["name"]):
        how = "give it as MetaLearner.load(..., model=...)"
        raise RequestError(f"{path} names code for its model, '{one_line(spec['name'])}': {how}")
    settings = without_download(spec["settings"])
    return make_model(spec["name"], tuple(spec["input_shape"]), spec["outputs"], settings)


def _plugin(use: Mapping[str, Any], path: str | Path) -> PluginUse:
    if use["part"] is None:
        what = f"was trained with the plugin '{use['name']}', which is not an installed part"
        raise RequestError(f"{path} {what}: give MetaLearner.load(..., plugins=...)")
    if is_file(use["part"]):
        what = f"names the plugin file {one_line(use['part'])}, which nobody lets run because a"
        raise RequestError(f"{path} {what} file says so: give MetaLearner.load(..., plugins=...)")
    return PluginUse(plugin=use["part"], name=use["name"], settings=use["settings"])


@contextmanager
def naming(file: object) -> Iterator[None]:
    """Name the file in errors of what is built from it."""
    try:
        yield
    except MetaplugError as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error
