"""The page of `metaplug gpu-report`, in Markdown that reads well as it is.

It needs Python alone, and takes what a report has at any moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from metaplug.report.gpu_sections import SECTIONS, Values
from metaplug.report.markdown import bullets, plain, table

_LACKING = {
    "failed": "failed",
    "stopped": "stopped midway",
    "waiting": "not begun",
    "running": "not finished",
}


def page(values: Values) -> str:
    """Write the page about what a report has so far, and what it lacks.

    Args:
        values: the content of its report.json.
    """
    parts = {part["name"]: part for part in values["parts"]}
    machine: Values = next((row for unit in parts["machine"]["units"] for row in unit["rows"]), {})
    asked = [part for part in values["parts"] if part["name"] in SECTIONS]
    blocks = [f"# metaplug on {machine.get('device', values['asked'])}", _head(values, machine)]
    blocks += [_state(values, asked), _overview(asked)]
    for part in asked:
        title, section = SECTIONS[part["name"]]
        blocks += [f"## {title}", *section(part["units"]), bullets(_lacks(part))]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(values: Values, machine: Values) -> str:
    """List what it was measured on, as far as that is known."""

    def named(*pairs: tuple[str, str]) -> str:
        return ", ".join(form.format(machine[name]) for name, form in pairs if machine.get(name))

    commit = f", commit {values['commit']}" if values.get("commit") else ""
    known = {
        "Measured": f"{values['began'][:16].replace('T', ' ')} UTC, by `{values['command']}`",
        "metaplug": f"{values['metaplug']}{commit}",
        "torch": named(
            ("torch", "{}"), ("cuda", "CUDA {}"), ("cudnn", "cuDNN {}"), ("driver", "driver {}")
        ),
        "Device": named(("memory_mib", "{:,} MiB"), ("capability", "compute capability {}")),
        "Computer": named(("processor", "{}"), ("processors", "{} cores"), ("python", "Python {}")),
        "Not installed here": ", ".join(f"`{name}`" for name in machine.get("missing", ())),
    }
    return bullets(f"**{name}:** {text}" for name, text in known.items() if text)


def _state(values: Values, parts: Sequence[Values]) -> str:
    """Say in one paragraph how far it came."""
    units = [unit for part in parts for unit in part["units"]]
    running = [unit["name"] for unit in units if unit["state"] == "running"]
    if values["state"] == "running":
        return (
            f"**Not finished.** This was written {values['seconds']:.0f} s after the start, at "
            f"{'; '.join(running) or 'its beginning'}. If nothing runs any more, it was killed "
            "there; what stands below is as it was measured."
        )
    count = Counter(unit["state"] for unit in units)
    told = values["state"][0].upper() + values["state"][1:]
    lost = [f"{count[state]} {text}" for state, text in _LACKING.items() if count[state]]
    return (
        f"**{told}** after {values['seconds']:.0f} of {values['budget']:.0f} seconds: "
        f"{count['done']} of {len(units)} pieces of work are whole"
        f"{''.join(f', {text}' for text in lost)}."
    )


def _overview(parts: Sequence[Values]) -> str:
    rows = []
    for part in parts:
        units = part["units"]
        count = Counter(unit["state"] for unit in units)
        counts = [str(count[state] or "") for state in ("failed", "stopped", "running", "waiting")]
        done = f"{count['done']} of {len(units)}" if units else "left out"
        seconds = sum(unit["seconds"] or 0 for unit in units)
        rows.append((SECTIONS[part["name"]][0], done, *counts, f"{seconds:.0f}" if units else ""))
    head = ("part", "whole", "failed", "stopped", "running", "not begun", "seconds of work")
    return table(head, rows)


def _lacks(part: Values) -> list[str]:
    """List what is not there, and why: what has one cause together."""
    causes: dict[str, list[str]] = {}
    for unit in part["units"]:
        if unit["state"] != "done":
            told = _LACKING.get(unit["state"], unit["state"])
            reason = f": {plain(unit['reason'])}" if unit["reason"] else ""
            causes.setdefault(f"**{told}**{reason}.", []).append(unit["name"])
    whole = len(part["units"]) if len(part["units"]) > 1 else -1
    lines = [
        f"{'all of it' if len(names) == whole else '; '.join(names)}: {cause}"
        for cause, names in causes.items()
    ]
    return lines + [f"{name}: left out: {reason}." for name, reason in part["left_out"].items()]
