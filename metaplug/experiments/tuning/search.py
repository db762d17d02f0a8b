"""The search itself: propose, train, note, until there are as many trials as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from metaplug.errors import RunError, at_least_one
from metaplug.evaluation.history import Record
from metaplug.evaluation.scores import as_score
from metaplug.experiments.build import Experiment, build_tasks
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.plugin_files import recorded
from metaplug.experiments.runs.data import TRAINED, digests_of
from metaplug.experiments.tuning.folder import BEGUN, TuningFolder
from metaplug.experiments.tuning.outcome import Outcome
from metaplug.experiments.tuning.proposals import Proposals, import_optuna
from metaplug.experiments.tuning.space import Asked, changed, check_space, read_space
from metaplug.experiments.tuning.trials import Watch, run_trial


def tune(
    config: ExperimentConfig,
    asked: Sequence[Asked],
    folder: Path,
    *,
    trials: int,
    on_start: Callable[[Outcome], None] = lambda outcome: None,
    on_build: Callable[[Experiment], None] = lambda experiment: None,
    on_record: Callable[[int, Record], None] = lambda number, record: None,
    on_trial: Callable[[Outcome], None] = lambda outcome: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """Search for the values of some fields that validate best; test tasks are never drawn.

    Every trial is a run with the same seed, hence on the same tasks, in `folder`/trials. The
    sampler (TPE, Bergstra et al. 2011) draws from the seed and the trial's number, so the same
    search gives the same trials, whether it was killed and gone on with or not. From a quarter of
    the iterations on, a trial ends that is worse than the median of the complete ones at the same
    validation. One that fails, as by NaN, counts as a trial, and the search goes on.

    Args:
        config: what all trials share.
        asked: the fields and their ranges.
        folder: made here; a search that is there already goes on.
        trials: how many there shall be, those of earlier processes included.
        on_start: called once, with what earlier processes found.
        on_build: called before a trial is trained, with what it trains.
        on_record: called after every iteration, with the trial's number.
        on_trial: called after every trial.
        stop: asked after every iteration; True ends the search, to go on later.

    Returns:
        What came of it; None where it was stopped.

    Raises:
        RequestError: Optuna is missing, a field or range is wrong, `folder` holds another search,
            or another process searches there.
        RunError: a file cannot be written or read, or no trial was completed.
    """
    at_least_one(trials=trials)
    import_optuna()
    config = recorded(config)
    space = read_space(config, asked)
    search = {path: str(values) for path, values in space.items()}
    tasks = build_tasks(config)
    score = as_score(config.training.score, tasks.kind)
    if not (folder / BEGUN).exists():  # or it was checked when it began
        check_space(config, space, asked, tasks)
    with TuningFolder(folder) as place:
        place.begin(config, search, digests_of(tasks, TRAINED))
        proposals = Proposals(
            place.log,
            space,
            more_is_better=score.more_is_better,
            seed=config.seed,
            prune_from=config.training.iterations // 4,
        )

        def note() -> Outcome:
            found = proposals.trials()
            made = Outcome(score.name, search, config, found, trials, proposals.importance())
            best = made.best
            place.keep(made, None if best is None else changed(config, best.values))
            return made

        on_start(made := note())
        while (number := len(made.trials)) < trials:
            proposal = proposals.propose(number, place.begun(number, space))
            watch = Watch(proposal.is_poor, score.name)
            ended = run_trial(
                watch,
                changed(config, proposal.values),
                tasks,
                place.trial(number),
                on_build=on_build,
                on_record=partial(on_record, number),
                stop=stop,
            )
            if ended is None:
                return None
            state, error = ended
            proposals.keep(proposal, state, {**_found(watch), "error": error})
            on_trial(made := note())
    if made.best is None:
        first = next(trial for trial in made.trials if trial.error is not None)
        raise RunError(
            f"no trial of {len(made.trials)} in {folder} was completed; trial {first.number} "
            f"failed: {first.error}; search other ranges, under another --name"
        )
    return made


def _found(watch: Watch) -> dict[str, Any]:
    best = watch.best
    return {
        "mean": None if best is None else best["mean"],
        "interval": None if best is None else best["interval"],
        "iteration": watch.iteration,
        "iterations": watch.iterations,
    }
