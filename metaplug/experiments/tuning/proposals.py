"""Optuna: what it keeps of the trials that have ended, and what it proposes to try next."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaplug.errors import RequestError, RunError, reason, said_by
from metaplug.experiments.tuning.outcome import State, Trial
from metaplug.experiments.tuning.space import Space
from metaplug.random_streams import mix

if TYPE_CHECKING:
    import optuna

DRAWN_AT_RANDOM = 10
"""Trials before the sampler learns from those that were."""

COMPLETE_BEFORE_PRUNING = 5
"""Trials whose median a later one is held to."""

_COMPLETE_FOR_IMPORTANCE = 10
_STATES: Mapping[str, State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


class Proposals:
    """The trials in a journal, and proposals that follow from them and a seed.

    Args:
        log: the journal, made where there is none; this process alone may write it.
        space: the fields and their ranges.
        more_is_better: of the values.
        seed: of the sampler, mixed with a trial's number.
        prune_from: the iteration from which a trial may be pruned.

    Raises:
        RequestError: Optuna is missing.
        RunError: the journal cannot be read or written.
    """

    def __init__(
        self, log: Path, space: Space, *, more_is_better: bool, seed: int, prune_from: int
    ) -> None:
        self._optuna = import_optuna()
        self._log, self._space, self._seed, self._prune_from = log, space, seed, prune_from
        self._direction = "maximize" if more_is_better else "minimize"
        journal = self._optuna.storages.journal
        with self._naming():
            lock = journal.JournalFileOpenLock(str(log))
            storage = self._optuna.storages.JournalStorage(
                journal.JournalFileBackend(str(log), lock)
            )
            self._kept: optuna.Study = self._optuna.create_study(
                storage=storage, study_name="tuning", direction=self._direction, load_if_exists=True
            )

    def trials(self) -> tuple[Trial, ...]:
        """Those that have ended, in their order."""
        return tuple(map(self._trial, self._kept.get_trials(deepcopy=False)))

    def propose(self, number: int, begun: Mapping[str, Any] | None) -> Proposal:
        """Choose the values of the next trial.

        Args:
            number: of the trial.
            begun: the values with which an earlier process began it. Another machine might draw
                others, as digits differ from one to another.
        """
        # In memory, as of a trial on the disk a kill might leave half the values and no end.
        study = self._optuna.create_study(
            direction=self._direction,
            sampler=self._optuna.samplers.TPESampler(
                n_startup_trials=DRAWN_AT_RANDOM, seed=mix(self._seed, number) % 2**32
            ),
            pruner=self._optuna.pruners.MedianPruner(
                n_startup_trials=COMPLETE_BEFORE_PRUNING, n_warmup_steps=self._prune_from
            ),
        )
        study.add_trials(self._kept.get_trials(deepcopy=False))
        if begun is not None:
            study.enqueue_trial({path: of.as_kept(begun[path]) for path, of in self._space.items()})
        trial = study.ask()
        values = {path: of.suggest(trial, path) for path, of in self._space.items()}
        return Proposal(study, trial, values)

    def keep(self, proposal: Proposal, state: State, found: Mapping[str, Any]) -> None:
        """Write a trial that has ended into the journal, whole or not at all.

        Args:
            proposal: of the trial.
            state: how it ended.
            found: the other fields of its `Trial`.

        Raises:
            RunError: it cannot be written.
        """
        states = self._optuna.trial.TrialState
        for key, value in found.items():
            proposal.trial.set_user_attr(key, value)
        if state == "complete":
            proposal.study.tell(proposal.trial, found["mean"])
        else:
            ended = states.PRUNED if state == "pruned" else states.FAIL
            proposal.study.tell(proposal.trial, state=ended)
        with self._naming():
            self._kept.add_trial(proposal.study.get_trials(deepcopy=False)[-1])

    def importance(self) -> dict[str, float]:
        """By field, the share of the spread that it explains (PED-ANOVA, arXiv 2304.10255)."""
        if sum(trial.state == "complete" for trial in self.trials()) < _COMPLETE_FOR_IMPORTANCE:
            return {}
        return dict(self._optuna.importance.get_param_importances(self._kept))

    def _trial(self, found: optuna.trial.FrozenTrial) -> Trial:
        values = {path: of.from_kept(found.params[path]) for path, of in self._space.items()}
        return Trial(found.number, _STATES[found.state.name], values, **found.user_attrs)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write {self._log}: {reason(error)}; make room, and the same command goes "
                "on"
            ) from error
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise RunError(
                f"{self._log} is not what a search writes ({said_by(error)}): bring it back, or "
                "give another --name"
            ) from error


class Proposal:
    """A trial to run: its values, by path, and whether it is worth going on with."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, values: dict[str, Any]) -> None:
        self.study, self.trial, self.values = study, trial, values

    def is_poor(self, iteration: int, mean: float) -> bool:
        """Whether a validation leaves the trial worse than the median of the complete ones."""
        self.trial.report(mean, iteration)
        return self.trial.should_prune()


def import_optuna() -> Any:
    """Optuna, silent.

    Raises:
        RequestError: it is not installed, or does not load.
    """
    try:
        library = importlib.import_module("optuna")
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "optuna"
        why = "" if is_missing else f", which does not load ({said_by(error)})"
        raise RequestError(f"a search needs optuna{why}: pip install 'metaplug[tune]'") from error
    library.logging.set_verbosity(library.logging.ERROR)
    return library
