"""Deliberately wrong plugins, one mistake each; `caught_by` is the clause that must catch it."""

from mutants import forms, memory, numbers, starts, tasks, together, traces

MUTANTS = [
    kind
    for module in (forms, memory, tasks, numbers, starts, together, traces)
    for kind in vars(module).values()
    if isinstance(kind, type) and hasattr(kind, "caught_by")
]
