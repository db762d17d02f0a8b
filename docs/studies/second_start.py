"""Seconds from the start of a process to after its first compiled step, Inductor's cache warm.

`python docs/studies/second_start.py sinusoid-25x5` prints the median of five processes, after one
that fills the cache: by the clock, on the processor, and by the clock to the end of the process, in
which torch takes another second to be freed.
"""

import os
import statistics
import subprocess
import sys
import time

import torch

from metaplug import MetaLearner
from metaplug.bench.workloads import WORKLOADS

ONCE = "--once"
BEGAN = "SECOND_START_BEGAN"


def once(name: str) -> None:
    """Take the first compiled step of a workload of the bench, and print both seconds."""
    torch.set_num_threads(1)
    workload = WORKLOADS[name]
    model, batch = workload.build()
    learner = MetaLearner(
        model,
        kind=workload.kind,
        inner_lr=workload.inner_lr,
        inner_steps=workload.inner_steps,
        compile=True,
    )
    learner.meta_gradients(batch)
    if learner.engine.derivation.refusal:
        sys.exit(learner.engine.derivation.refusal)
    print(time.time() - float(os.environ[BEGAN]), time.process_time())


def main(name: str, repeats: int = 5) -> None:
    """Measure processes one after the other."""
    seconds = []
    for _ in range(repeats + 1):
        command = [sys.executable, __file__, name, ONCE]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", BEGAN: repr(time.time())}
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        whole = time.time() - float(environment[BEGAN])
        seconds.append((*map(float, ended.stdout.split()), whole))
    for what, measured in zip(
        ("clock", "processor", "clock to its end"), zip(*seconds[1:], strict=True), strict=True
    ):
        print(
            f"{name}: {statistics.median(measured):.2f} s by the {what}",
            *map("{:.2f}".format, measured),
        )


if __name__ == "__main__":
    once(sys.argv[1]) if ONCE in sys.argv else main(sys.argv[1])
