"""A learner's state in one safetensors file, which other tools read too, with a digest over it.

Tensors stand under names: `model.NAME`, `plugins.PLUGIN.NAME`, `meta_optimizer...`. The rest is
JSON in the file's metadata, "metaplug": {"sha256", "format", "state"}; the digest is that of the
file with zeros in its place. Reading executes nothing, and checks everything before using it.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import safetensors.torch
import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from torch import Tensor, nn
from torch.nn.modules import module as registration

from metaplug.contract import registry
from metaplug.contract.chain import Chain
from metaplug.contract.plugin_files import is_file
from metaplug.contract.presets import PluginLike, PluginUse
from metaplug.contract.values import Kind
from metaplug.errors import MetaplugError, RequestError, RunError, one_line, quoted
from metaplug.evaluation.evaluator import Evaluator
from metaplug.evaluation.score_names import ScoreName
from metaplug.evaluation.scores import ScoreLike, option_of
from metaplug.execution.batching import Batching
from metaplug.execution.engine import Engine
from metaplug.execution.free_memory import available, size_text
from metaplug.execution.ranks import World
from metaplug.execution.settings import LearnerSettings
from metaplug.files import replacing
from metaplug.models.factories import is_own, make_model, name_of, without_download
from metaplug.settings import Settings, validated
from metaplug.tasks.identities import TrainedOn

FORMAT = 3
"""The number of the layout; 1 and 2 were files of torch.save."""
MOST_HEADER, MOST_DEPTH = 16 * 2**20, 50
"""The bytes that a file may have beside the values of tensors, and how deep it may nest."""
DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
_START, _ZEROS = b'{"__metadata__":{"metaplug":"{\\"sha256\\":\\"', b"0" * 64
"""How a header begins, up to its digest; and what is in the digest's place while it is computed."""


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state as a whole or not at all.

    Raises:
        RunError: as `check_writable`, or the disk is full; an older file at `path` is as it was.
    """
    check_writable(path, state)
    with replacing(path) as file:
        file.writelines(packed(state))


def check_writable(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what `read` would refuse, without writing.

    Raises:
        RunError: names `path` and what cannot be kept.
    """
    try:
        validated(State, state, "its content")
        _split(state)
    except (_UnfitError, RequestError) as error:
        raise RunError(
            f"cannot write {path}: {error}; change that in the model or plugin"
        ) from None
    except RuntimeError as error:  # torch has no memory to lay out an expanded tensor
        raise RunError(f"cannot write {path}: {one_line(error)}; keep smaller tensors") from None


def packed(state: Mapping[str, Any], layout: int = FORMAT) -> list[bytes | memoryview]:
    """The bytes of a file, in pieces."""
    tensors, values = _split(state)
    text = f'{{"sha256":"{_ZEROS.decode()}","format":{layout},"state":{values}}}'
    # A single key: safetensors orders several by chance, and equal states should be equal files.
    content = safetensors.torch.save(tensors, {"metaplug": text})
    place = content.index(_START) + len(_START)
    digest = hashlib.sha256(content).hexdigest().encode()
    return [memoryview(content)[:place], digest, memoryview(content)[place + len(_ZEROS) :]]


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote, on the CPU. Executes nothing, and verifies every byte.

    Raises:
        RunError: there is no such file, or it is truncated, damaged, forged or of another version.
    """
    try:
        saved, tensors = _verified(path)
        state: dict[str, Any] = _joined(saved, tensors)
        if tensors:
            raise _UnfitError(f"nothing in it refers to {quoted(map(one_line, [*tensors][:3]))}")
    except FileNotFoundError:
        raise RunError(
            f"there is no checkpoint {path}: train first, or give another path"
        ) from None
    except RunError as error:
        raise RunError(f"{path} {error}") from None
    except Exception as error:  # forged bytes can lead the readers into any error
        raise _not_whole(path, str(error) or type(error).__name__) from None
    check_form(state, str(path))
    return state


def _verified(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The JSON of a state and its tensors, from bytes that have the digest that they say."""
    size, free = path.stat().st_size, available(torch.device("cpu"))
    if not path.is_file():  # a pipe or device may have no end
        raise _UnfitError("it is no regular file")
    if free is not None and 2 * size > free:  # its bytes and its tensors
        most = f"the {size_text(free)} of memory that are free"
        raise _UnfitError(f"it takes {size_text(2 * size)} to read, more than {most}")
    content = path.read_bytes()
    if content.startswith(b"PK\3\4"):
        how = "use the version that wrote it, or train again"
        raise RunError(f"is of torch.save (.pt), as older versions of metaplug wrote: {how}")
    end, place = 8 + int.from_bytes(content[:8], "little"), 8 + len(_START)
    if end > min(len(content), MOST_HEADER):
        raise _UnfitError("it is no safetensors file, or its header is too long")
    if content[8:place] != _START:
        how = "give a file that MetaLearner.save or `metaplug train` wrote"
        raise RunError(f"is not a metaplug checkpoint: {how}")
    digest = hashlib.sha256(content[:place] + _ZEROS)
    digest.update(memoryview(content)[place + len(_ZEROS) :])
    if content[place : place + len(_ZEROS)] != digest.hexdigest().encode():
        raise _UnfitError("its content has another digest than it says")
    saved = json.loads(json.loads(content[8:end])["__metadata__"]["metaplug"])
    if saved["format"] != FORMAT:
        found, how = one_line(saved["format"]), "use the version of metaplug that wrote it"
        raise RunError(f"has layout {found}, this metaplug reads {FORMAT}: {how}")
    return saved["state"], safetensors.torch.load(content)


class _UnfitError(Exception):
    """Why a value cannot be in a file, or a file is none; goes on from "it"."""


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """A state's tensors by name, and JSON that refers to them.

    Raises:
        _UnfitError: it holds something else than plain values and tensors, or too much.
    """
    prefixes = {"plugin_states": "plugins", "optimizer": "meta_optimizer"}
    tensors: dict[str, Tensor] = {}
    values = {key: _value(state[key], prefixes.get(key, key), tensors) for key in state}
    text, storages = json.dumps(values), set[int]()
    for name, tensor in tensors.items():  # of tied ones, safetensors wants each with its own bytes
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in storages else tensor
        storages.add(place)
    if len(json.dumps([text, *tensors])) + 150 * len(tensors) + 200 > MOST_HEADER:
        most = max(values, key=lambda key: len(json.dumps(values[key])))
        size = f"{size_text(MOST_HEADER)} beside its tensors' values"
        raise _UnfitError(f"it has more than {size}, most of it in {most}")
    return tensors, text


def _value(part: Any, name: str, tensors: dict[str, Tensor], depth: int = 1) -> Any:
    """A part as JSON; objects with keys such as "$tuple" stand for what JSON does not have."""
    kind = type(part)
    if part is None or kind in (bool, str) or (kind is int and part.bit_length() < 10_000):
        return part
    if kind is float:
        return part if math.isfinite(part) else {"$float": repr(part)}
    if isinstance(part, Tensor):
        return _tensor(part, name, tensors)
    if depth > MOST_DEPTH:
        raise _UnfitError(f"{one_line(name)} nests more than {MOST_DEPTH} deep")
    if kind in (list, tuple):
        items = [_value(one, f"{name}.{i}", tensors, depth + 1) for i, one in enumerate(part)]
        return items if kind is list else {"$tuple": items}
    if kind in (dict, OrderedDict) and {*map(type, part)} <= {str, int}:
        pairs = [
            [key, _value(one, f"{name}.{key}", tensors, depth + 1)] for key, one in part.items()
        ]
        is_plain = all(type(key) is str and key[:1] != "$" for key in part)
        values = dict(pairs) if is_plain else {"$items": pairs}
        if kind is dict:
            return values
        versions = vars(part).get("_metadata")  # of a module's state: those of its submodules
        return {"$ordered": values, "versions": _value(versions, name, tensors, depth + 1)}
    keys = " with a key that is no text" * isinstance(part, dict)
    raise _UnfitError(f"{one_line(name)} is a {kind.__name__}{keys}, which no checkpoint keeps")


def _tensor(part: Tensor, name: str, tensors: dict[str, Tensor]) -> dict[str, str]:
    plain = part.detach()
    is_plain = type(plain) is Tensor and not (part.is_meta or part.is_nested)
    if part.dtype not in DTYPES or part.layout is not torch.strided or not is_plain:
        kind = f"{type(plain).__name__} of {part.dtype}, {part.layout}, on {part.device}"
        raise _UnfitError(f"{one_line(name)} is a {kind}, which no checkpoint keeps")
    plain = plain.resolve_conj().resolve_neg().cpu()
    name = str(name).encode(errors="replace").decode()
    while name in tensors:  # "a.b" and "c" beside "a" and "b.c"
        name += "'"
    tensors[name] = (torch.view_as_real(plain) if plain.is_complex() else plain).contiguous()
    return {"$complex" if plain.is_complex() else "$tensor": name}


def _joined(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_value`; takes what it uses out of `tensors`."""
    match value:
        case list():
            return [_joined(one, tensors) for one in value]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_joined(items, tensors))
        case {"$items": items}:
            return {key: _joined(one, tensors) for key, one in items}
        case {"$ordered": items, "versions": versions}:
            made = OrderedDict(_joined(items, tensors))
            vars(made).update(_metadata=_joined(versions, tensors))
            return made
        case {"$complex": name}:
            return torch.view_as_complex(tensors.pop(name))
        case {"$tensor": name}:
            tensor = tensors.pop(name)
            if tensor.dtype is torch.bool and (tensor.view(torch.uint8) > 1).any():
                raise _UnfitError("a truth value is neither 0 nor 1")
            return tensor
        case dict():
            return {key: _joined(one, tensors) for key, one in value.items()}
    return value


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has control characters")
    return name


def _plain(values: Any) -> Any:
    try:
        json.dumps(values)
    except TypeError:
        raise ValueError("a setting is no plain value") from None
    return values


def _digests(others: Any) -> Any:
    is_bytes = isinstance(others, Tensor) and others.dtype is torch.uint8
    if others is not None and not (is_bytes and others.shape[1:] == (16,)):
        raise ValueError("no digests of 16 bytes each")
    return others


Name = Annotated[StrictStr, Field(min_length=1, max_length=200), AfterValidator(_printable)]
ModelName = Annotated[  # with the path of a folder
    StrictStr, Field(min_length=1, max_length=4200), AfterValidator(_printable)
]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Length = Annotated[StrictInt, Field(ge=1, lt=2**31)]
Plain = Annotated[dict[StrictStr, Any], BeforeValidator(_plain)]


class ModelSpec(Settings):
    """How an installed model, or one of a zoo, is built."""

    name: ModelName
    input_shape: list[Length] = Field(max_length=8)
    outputs: Length
    settings: Plain


class SavedPlugin(Settings):
    """A plugin of the chain; `part` is None for one that is not installed."""

    part: Name | None
    name: Name
    settings: Plain


class SavedOptimizer(Settings):
    """As torch's optimizers have it."""

    state: dict[StrictInt, dict[StrictStr, Any]]
    param_groups: list[dict[StrictStr, Any]]


class SavedClasses(Settings):
    """What was trained on, as TrainedOn.to_state has it."""

    classes: dict[StrictStr, StrictStr]
    others: Annotated[Any, BeforeValidator(_digests)] = None
    complete: StrictBool


class Best(Settings):
    """The best validation of a run."""

    iteration: Count
    mean: float
    interval: float | None = Field(allow_inf_nan=True)


class State(Settings):
    """The content of a checkpoint: a learner's state, and after `skipped` what a run adds."""

    iteration: Count
    total: Count
    kind: Literal["classification", "regression"]
    seed: StrictInt
    settings: Annotated[LearnerSettings, BeforeValidator(_plain)]
    task_batching: Literal["auto", "vectorized", "sequential"]
    score: ScoreName | None = None
    custom_score: StrictBool = False
    custom_loss: StrictBool
    model_spec: ModelSpec | None
    model: dict[StrictStr, Any]
    plugins: list[SavedPlugin]
    plugin_states: dict[StrictStr, dict[StrictStr, Any]]
    optimizer: SavedOptimizer
    trained_on: SavedClasses | None = None
    skipped: list[Count] = Field([0, 0], min_length=2, max_length=2)
    best: Best | None = None
    config: StrictStr | None = None
    seconds: float = Field(0.0, ge=0)
    clock: list[Annotated[float, Field(ge=0)]] = Field([])

    @model_validator(mode="after")
    def _check_plugins(self) -> State:
        names = [plugin.name for plugin in self.plugins]
        if len(set(names)) < len(names) or set(names) != self.plugin_states.keys():
            raise ValueError("its plugins are not those whose states it has")
        return self


def check_form(state: Any, origin: str) -> None:
    """Refuse what is no State.

    Raises:
        RunError: names `origin`, and what is wrong.
    """
    lacks = [n for n, f in State.model_fields.items() if f.is_required() and n not in state]
    if lacks:
        raise _not_whole(origin, f"it lacks {quoted(lacks)}")
    try:
        validated(State, state, "its content")
    except RequestError as error:
        raise _not_whole(origin, str(error)) from None


def _not_whole(origin: object, reason: str) -> RunError:
    said = one_line(reason, 400)
    return RunError(
        f"{origin} is not a whole metaplug checkpoint ({said}): use another one of the run"
    )


@contextmanager
def naming(file: object) -> Iterator[None]:
    """Name the file in errors of what is built from it."""
    try:
        yield
    except MetaplugError as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


class Learner(Protocol):
    """What a state is taken from, and given to."""

    model: nn.Module
    chain: Chain
    engine: Engine
    settings: LearnerSettings
    kind: Kind
    seed: int
    task_batching: Batching
    custom_loss: bool
    trained_on: TrainedOn
    evaluator: Evaluator


L = TypeVar("L", bound=Learner)


def state_of(learner: Learner) -> dict[str, Any]:
    """Everything that training goes on from: tensors and plain values, as State has them."""
    engine, plugins = learner.engine, learner.chain.plugins
    model: Any = learner.model
    spec = None
    if (name := name_of(model)) is not None:
        form = {"input_shape": list(model.input_shape), "outputs": model.outputs}
        spec = {"name": name, **form, "settings": _settings(model)}
    return {
        "iteration": engine.iteration,
        "total": engine.total,
        "kind": learner.kind,
        "seed": learner.seed,
        "settings": learner.settings.model_dump(mode="json"),
        "task_batching": learner.task_batching,
        "score": option_of(learner.evaluator.score),
        "custom_score": option_of(learner.evaluator.score) is None,
        "custom_loss": learner.custom_loss,
        "model_spec": spec,
        "model": model.state_dict(),
        "plugins": [
            {
                "part": registry.name_of("plugin", type(plugin)),
                "name": plugin.name,
                "settings": _settings(plugin),
            }
            for plugin in plugins
        ],
        "plugin_states": {plugin.name: plugin.state_dict() for plugin in plugins},
        "optimizer": engine.optimizer.state_dict(),
        "trained_on": learner.trained_on.to_state(),
        "skipped": [engine.skipped, engine.skipped_in_a_row],
    }


def _settings(part: Any) -> dict[str, Any]:
    values: dict[str, Any] = part.config.model_dump(mode="json")
    return values


def give_state(learner: Learner, state: Mapping[str, Any], origin: str) -> None:
    """Let a learner go on from a state of the same model and plugins.

    Raises:
        RunError: it is of another form, model or plugins; names `origin`, and nothing was loaded.
    """
    check_form(state, origin)
    _check_fit(learner, state, origin)
    engine, optimizer = learner.engine, _copy(state["optimizer"])  # torch keeps what it is given
    for own, saved in zip(engine.optimizer.param_groups, optimizer["param_groups"], strict=True):
        saved |= {key: own[key] for key in own.keys() - {"lr", "params"}}
    parts: list[Any] = [learner.model, *learner.chain.plugins, engine.optimizer]
    before = [_copy(part.state_dict()) for part in parts]
    plugin_states = [state["plugin_states"][plugin.name] for plugin in learner.chain.plugins]
    try:
        for part, values in zip(parts, [state["model"], *plugin_states, optimizer], strict=True):
            part.load_state_dict(values)
    except Exception as error:  # of a module or plugin that loads in a way of its own
        for part, values in zip(parts, before, strict=True):
            part.load_state_dict(values)
        said = f"is refused by the model or a plugin ({one_line(error)})"
        raise RunError(f"{origin} {said}: make them as they were") from error
    engine.iteration, engine.total = state["iteration"], state["total"]
    engine.skipped, engine.skipped_in_a_row = state.get("skipped", (0, 0))
    learner.trained_on = TrainedOn.from_state(state.get("trained_on"))


def _copy(part: Any) -> Any:
    """A deep copy, also of tensors that were computed, which deepcopy refuses."""
    if isinstance(part, Tensor):
        return part.detach().clone()
    if isinstance(part, dict):
        made = copy.copy(part)  # with the versions of modules, an attribute
        made.update((key, _copy(value)) for key, value in part.items())
        return made
    return type(part)(map(_copy, part)) if type(part) in (list, tuple) else copy.deepcopy(part)


def _check_fit(learner: Learner, state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state of another model, or of other plugins or settings of them."""
    plugins, saved_plugins = learner.chain.plugins, state["plugins"]
    names, own = [one["name"] for one in saved_plugins], [one.name for one in plugins]
    if names != own:
        has = f"belongs to the plugins {quoted(names)}, this learner has {quoted(own)}"
        raise RunError(f"{origin} {has}: make it with the same list")
    pairs = zip(plugins, saved_plugins, strict=True)
    for one, saved in pairs:
        if text := _differing(saved["settings"], _settings(one)):
            has = f"has other settings of plugin '{one.name}' than this learner: {text}"
            raise RunError(f"{origin} {has}; make it with the same settings")
    what, mend = f"{origin} belongs to another model", "build the model as it was"
    _check_tensors(state["model"], learner.model.state_dict(), what, mend)
    for one in plugins:
        what, mend = f"{origin} has another form of plugin '{one.name}'", "use it as it was"
        _check_tensors(state["plugin_states"][one.name], one.state_dict(), what, mend)
    what = f"{origin} belongs to another optimizer"
    _check_optimizer(state["optimizer"], learner.engine.optimizer, what)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Write the first fields that differ, with both values: "gate is 0.5 there and 0.1 here"."""
    differing = [
        name
        for name in dict.fromkeys([*here, *there])
        if name not in there or name not in here or there[name] != here[name]
    ]

    def value(settings: Mapping[str, Any], name: str) -> str:
        return one_line(repr(settings[name])) if name in settings else "missing"

    return ", ".join(
        f"{one_line(name)} is {value(there, name)} there and {value(here, name)} here"
        for name in differing[:3]
    )


def _check_tensors(saved: Mapping[str, Any], own: Mapping[str, Any], what: str, mend: str) -> None:
    missing = [name for name in own if name not in saved][:3]
    extra = [one_line(name) for name in saved if name not in own][:3]
    if missing or extra:
        raise RunError(f"{what}: it lacks {quoted(missing)} and has {quoted(extra)} beside; {mend}")
    for name, value in own.items():
        there, here = _form(saved[name], value), _form(value, saved[name])
        if there != here:
            raise RunError(f"{what}: '{name}' is {there} there and {here} here; {mend}")


def _form(value: Any, beside: Any) -> str:
    """What two values have to have in common: the first of type, shape and dtype that differs."""
    if not (isinstance(value, Tensor) and isinstance(beside, Tensor)):
        return "a tensor" if isinstance(value, Tensor) else "no tensor"
    return str(value.dtype if value.shape == beside.shape else tuple(value.shape))


def _check_optimizer(saved: Mapping[str, Any], own: torch.optim.Optimizer, what: str) -> None:
    mend = "use the meta-optimizer, model and plugins as they were"
    groups: Any = saved["param_groups"], own.state_dict()["param_groups"]
    # A schedule changes the first of these, and the others are but how torch computes.
    free = {"lr", "foreach", "fused", "capturable", "differentiable"}
    for theirs, ours in itertools.zip_longest(*groups, fillvalue={}):
        for key in sorted({*theirs, *ours} - free):
            if repr(theirs.get(key)) != repr(ours.get(key)):
                raise RunError(f"{what}: its setting '{one_line(key)}' is another one; {mend}")
        if type(theirs.get("lr")) not in (int, float) or not 0 <= theirs["lr"] < math.inf:
            raise RunError(f"{what}: its setting 'lr' is another one; {mend}")
    parameters = [parameter for group in own.param_groups for parameter in group["params"]]
    is_adam = isinstance(own, torch.optim.Adam)
    for index, moments in saved["state"].items():
        if not 0 <= index < len(parameters):
            raise RunError(f"{what}: it has moments of a parameter {index} beside; {mend}")
        if any(value is not None for value in moments.values()):  # None is SGD's without momentum
            like = {"exp_avg": parameters[index], "exp_avg_sq": parameters[index]}
            like = {"step": torch.tensor(0.0), **like} if is_adam else {}
            _check_tensors(moments, like, f"{what}, parameter {index}", mend)
            if not 0 <= moments["step"] < math.inf:
                raise RunError(f"{what}, parameter {index}: its 'step' is no count; {mend}")


class _TooLargeError(Exception):
    """A model became larger than what was saved of it."""


def rehearse(make: Callable[[], Learner], state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state that does not fit the learner that `make` makes, before that takes memory.

    A forged file may ask for any model: here its tensors have no values, and what is made may not
    become much larger than what was saved. What cannot be made like this is refused where it is.

    Raises:
        RunError: as `give_state`.
    """
    parts = [state["model"], *state["plugin_states"].values()]
    sizes = [one.numel() for part in parts for one in part.values() if isinstance(one, Tensor)]
    room = [64 * len(sizes) + 1024, 8 * sum(sizes) + 2**20]  # of registrations, and of elements

    def took(_: nn.Module, __: str, value: object) -> None:
        room[0] -= 1
        room[1] -= value.numel() if isinstance(value, Tensor) else 0
        if min(room) < 0:
            raise _TooLargeError

    hooks = [
        registration.register_module_parameter_registration_hook(took),
        registration.register_module_buffer_registration_hook(took),
        registration.register_module_module_registration_hook(took),
    ]
    learner = None
    what = f"{origin} belongs to another model: it asks for more weights than it has"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            learner = make()
    except Exception:  # tensors without values cannot be computed with
        if min(room) < 0:  # whoever made something else of the error
            raise RunError(f"{what}; use another one of the run") from None
    finally:
        for hook in hooks:
            hook.remove()
    if learner is not None:
        _check_fit(learner, state, origin)


def load(
    make: Callable[..., L],
    path: str | Path,
    *,
    model: nn.Module | None,
    plugins: Sequence[PluginLike] | None,
    loss: Callable[..., Tensor] | None,
    score: ScoreLike | None,
    world: World | None,
) -> L:
    """The learner of a checkpoint, made by `make` from what is installed; as MetaLearner.load."""
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
    learner = made(world=world)
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
