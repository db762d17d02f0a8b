"""Ranks that are killed and started again, as by torchrun, end with the run of ranks left alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.dying_rank import die_at
from support.ranks import kept_store, on_ranks
from support.tiny_runs import assert_same_run, tiny

from metaplug import checkpoint
from metaplug.errors import RankError
from metaplug.experiments.runs import train

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

CONFIG = tiny(training__tasks_per_batch=3, runtime__save_every=3)
KILLS = {
    "before the first checkpoint": (0, "step", 2, None),
    "in a step": (1, "step", 7, 4),
    "after a checkpoint between validations": (0, "step", 8, 7),
    "in a validation": (1, "validation", 2, 7),
    "while it writes the checkpoint": (0, "checkpoint", 3, 4),
}
"""The rank, the moment, how often it comes, and the iteration of the checkpoint that is left.

Checkpoints come after iterations 3, 4 (a validation), 7, 8, 11 and 12.
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(CONFIG, folder.with_name("alone"))  # or each forked rank imports all that it needs anew
    on_ranks(lambda world: train(CONFIG, folder, world=world))
    return folder


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_started_again_a_run_is_that_of_nobody_killed(whole, tmp_path, kill):
    rank, moment, number, left = KILLS[kill]
    folder, (_, kept) = tmp_path / "run", kept_store()

    def begin(world):
        if world.rank == rank:
            die_at(moment, number)
        train(CONFIG, folder, world=world, resume=True)

    answers = on_ranks(begin, **kept)
    assert answers[rank] is None
    assert isinstance(answers[1 - rank], RankError)
    last = folder / "last.safetensors"
    assert (checkpoint.read(last)["iteration"] if last.exists() else None) == left
    on_ranks(lambda world: train(CONFIG, folder, world=world, resume=True), **kept)
    assert_same_run(whole, folder)


OPTIONS = (
    "train --resume --tasks sinusoid --model mlp --shots 3 --queries 3 --inner-steps 1 "
    "--inner-lr 0.01 --tasks-per-batch 3 --iterations 12 --device cpu --set runtime.threads=1 "
    "--set training.validate_every=4 --set training.test_tasks=18 --set model.settings.hidden=[4] "
    "--set runtime.save_every=3"
)


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS)
def test_torchrun_starts_a_killed_run_again(tmp_path, kill):
    rank, moment, number, left = KILLS[kill]
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 3"
    script = [str(Path(__file__).parents[1] / "support" / "dying_rank.py"), str(rank), moment]
    for name, at in (("whole", 10**6), ("killed", number)):
        done = subprocess.run(
            [sys.executable, *launch.split(), *script, f"{at}", *OPTIONS.split(), "--name", name],
            cwd=tmp_path,
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    said = re.findall("^metaplug: .*|^going on .*|^a new run .*", done.stderr, re.MULTILINE)
    again = "a new run in runs/killed" if left is None else None
    again = again or f"going on in runs/killed after iteration {left}"
    assert said == [
        "a new run in runs/killed",
        f"metaplug: rank {1 - rank} of 2 lost another rank, whose process ended without a word, "
        "killed or out of memory: go on with --resume, on as many ranks as you like",
        again,
    ]
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/killed")
