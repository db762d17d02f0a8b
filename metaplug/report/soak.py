"""Long runs that were watched, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from metaplug.bench.soak import MOST_MEMORY, WARM_UP, Soaked
from metaplug.report.figures import COLOURS, DPI, FAINT, save, style


def soak_figure(runs: Sequence[Soaked], path: Path) -> None:
    """A column for each run: its memory, with the band that it has to stay in after warm-up, its open files, and the time of a step.

    Args:
        runs: one or more.
        path: the PNG to write.
    """
    figure = Figure(figsize=(5.0 * len(runs), 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(3, len(runs), sharex="col", squeeze=False)
    for column, each in zip(grid.T, runs, strict=True):
        memory, files, times = column
        iterations, warm = (
            [sample.iteration for sample in each.samples],
            [sample.iteration for sample in each.warm],
        )
        style(memory, "", "", f"{each.workload}: memory, MiB; band: {100 * MOST_MEMORY:g} %")
        for index, (what, values) in enumerate(each.memory.items(), 1):
            memory.plot(warm, values, color=COLOURS[index], linewidth=1.6, label=what)
            begun = each.memory_after_warm_up[what]
            memory.axhspan(
                begun * (1 - MOST_MEMORY),
                begun * (1 + MOST_MEMORY),
                color=COLOURS[index],
                alpha=0.1,
                linewidth=0,
            )
        if each.memory:
            memory.legend(frameon=False, fontsize=8, loc="best")
        style(files, "", "", "open files, threads")
        for index, name in enumerate(("open_files", "threads"), 1):
            counts = [
                (sample.iteration, count)
                for sample in each.samples
                if (count := getattr(sample, name)) is not None
            ]
            files.plot(
                [i for i, _ in counts],
                [count for _, count in counts],
                color=COLOURS[index],
                linewidth=1.6,
                label=name.replace("_", " "),
            )
        files.set_ylim(bottom=0)
        files.legend(frameon=False, fontsize=8, loc="best")
        style(times, "meta-iterations; grey: warm-up", "", "milliseconds of a step")
        times.plot(
            iterations,
            [sample.milliseconds for sample in each.samples],
            color=COLOURS[3],
            linewidth=1.2,
        )
        times.set_ylim(bottom=0)
        for axes in column:
            axes.axvspan(0, WARM_UP * each.steps, color=FAINT, alpha=0.6, linewidth=0)
    save(figure, path)
