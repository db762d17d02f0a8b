"""What a report knows so far, kept as JSON and as a page that is always whole."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaplug.files import replacing
from metaplug.gpu_report.plan import Part
from metaplug.report.gpu_page import page

PAGE, VALUES = "report.md", "report.json"
PAUSE = 1.0
"""Seconds between two writings while the rows of one unit come in."""


class Record:
    """Collects results, and writes them.

    Args:
        head: what stands above the parts: device, command, versions, ...
        parts: all that are to be run.
        begun: by time.monotonic.
    """

    def __init__(self, head: dict[str, Any], parts: Sequence[Part], begun: float) -> None:
        self.folder: Path | None = None
        """Where to; None as long as nothing is to be written."""
        self.begun, self._written = begun, -math.inf
        self.values: dict[str, Any] = {
            "state": "running",
            "seconds": 0.0,
            **head,
            "parts": [_part(part) for part in parts],
        }

    def units(self, part: Part) -> dict[str, dict[str, Any]]:
        """Return what is known of the units of a part, by name."""
        found = next(each for each in self.values["parts"] if each["name"] == part.name)
        return {unit["name"]: unit for unit in found["units"]}

    def every_unit(self) -> list[dict[str, Any]]:
        """Return what is known of all units."""
        return [unit for part in self.values["parts"] for unit in part["units"]]

    def save(self, *, soon: bool = False) -> None:
        """Write both files, each whole or not at all; `soon`: unless that was just done.

        Raises:
            RunError: the disk is full, or the folder cannot be written.
        """
        now = time.monotonic()
        if self.folder is None or (soon and now - self._written < PAUSE):
            return
        self._written = now
        self.values["seconds"] = round(now - self.begun, 1)
        values = _finite(self.values)
        text = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        for name, content in ((VALUES, text), (PAGE, page(values))):
            with replacing(self.folder / name) as file:
                file.write(content.encode())


def _part(part: Part) -> dict[str, Any]:
    units = [unit for job in part.jobs for unit in job]
    return {
        "name": part.name,
        "left_out": part.left_out,
        "units": [
            {
                "name": unit.name,
                "state": "waiting",
                "reason": None,
                "seconds": None,
                "work": unit.work,
                "rows": [],
            }
            for unit in units
        ],
    }


def _finite(value: Any) -> Any:
    """Values with None for NaN and Inf, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
