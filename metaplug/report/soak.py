"""Long runs that were watched, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from metaplug.bench.soak import MOST_MEMORY, WARM_UP, Soaked
from metaplug.report.figures import COLOURS, DPI, FAINT, save, style


def soak_figure(runs: Sequence[Soaked], path: Path) -> None:
    """Draw a column for each run: memory with its allowed band, open files, the time of a step.

    Args:
        runs: one or more.
        path: the PNG to write.
    """
    figure = Figure(figsize=(5.0 * len(runs), 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(3, len(runs), sharex="col", squeeze=False)
    for (memory, files, times), each in zip(grid.T, runs, strict=True):
        style(memory, "", "", f"{each.workload}: memory, MiB; band: {100 * MOST_MEMORY:g} %")
        warm = [sample.iteration for sample in each.warm]
        for colour, (what, values) in zip(COLOURS[1:], each.memory.items(), strict=False):
            memory.plot(warm, values, color=colour, linewidth=1.6, label=what)
            low, high = (each.memory_after_warm_up[what] * (1 + s * MOST_MEMORY) for s in (-1, 1))
            memory.axhspan(low, high, color=colour, alpha=0.1, linewidth=0)
        if each.memory:
            memory.legend(frameon=False, fontsize=8, loc="best")
        style(files, "", "", "open files, threads")
        known = [sample for sample in each.samples if sample.open_files is not None]
        iterations = [sample.iteration for sample in known]
        for colour, name in zip(COLOURS[1:], ("open_files", "threads"), strict=False):
            counts, label = [getattr(sample, name) for sample in known], name.replace("_", " ")
            files.plot(iterations, counts, color=colour, linewidth=1.6, label=label)
        files.legend(frameon=False, fontsize=8, loc="best")
        style(times, "meta-iterations; grey: warm-up", "", "milliseconds of a step")
        pairs = [(sample.iteration, sample.milliseconds) for sample in each.samples]
        times.plot(*zip(*pairs, strict=True), color=COLOURS[3], linewidth=1.2)
        for axes in (files, times):
            axes.set_ylim(bottom=0)
        for axes in (memory, files, times):
            axes.axvspan(0, WARM_UP * each.steps, color=FAINT, alpha=0.6, linewidth=0)
    save(figure, path)
