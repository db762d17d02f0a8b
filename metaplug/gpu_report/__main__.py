"""Run `metaplug gpu-report` by Python alone: `python -m metaplug.gpu_report`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metaplug.errors import MetaplugError
from metaplug.gpu_report.command import BUDGET, report
from metaplug.gpu_report.running import say


def main() -> int:
    """Read the options of `metaplug gpu-report`, where not even its own packages may be there."""
    parser = argparse.ArgumentParser(
        prog="python -m metaplug.gpu_report",
        description="Write one page about a GPU: tests, times, memory and a short training.",
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help=f"seconds at most (default: {BUDGET:g})"
    )
    parser.add_argument("--out", type=Path, help="a folder (default: a new one in runs/)")
    parser.add_argument(
        "--part", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    parser.add_argument("--small", action="store_true", help="small works: to try the report")
    asked = parser.parse_args()
    try:
        return report(
            device=asked.device,
            budget=asked.budget,
            out=asked.out,
            only=asked.part,
            small=asked.small,
        )
    except MetaplugError as error:
        say(f"metaplug: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
