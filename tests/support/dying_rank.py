"""metaplug in a rank of torchrun that is killed at a moment of its first start.

python dying_rank.py RANK MOMENT NUMBER ARGUMENTS: at the NUMBER-th time that the moment comes.
"""

import os
import signal
import sys
from pathlib import Path

from metaplug.cli.main import main
from metaplug.evaluation.evaluator import Evaluator
from metaplug.execution.engine import Engine

MOMENTS = {
    "step": (Engine, "update", ""),
    "validation": (Evaluator, "validate", ""),
    "checkpoint": (Path, "replace", "last.safetensors"),
}
"""What is called then, and a word in the arguments of the calls that count."""


def die_at(moment, number):
    """From now on, this process is killed at the `number`-th time that a moment comes."""
    owner, name, word = MOMENTS[moment]
    called, left = getattr(owner, name), iter(range(1, number))

    def call(*arguments, **options):
        if word in str(arguments) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*arguments, **options)

    setattr(owner, name, call)


if __name__ == "__main__":
    rank, moment, number, *arguments = sys.argv[1:]
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", rank):
        die_at(moment, int(number))
    sys.exit(main(arguments))
