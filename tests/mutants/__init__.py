"""Deliberately wrong plugins, a mistake each, by what they do wrong; `caught_by` is the clause that has to catch it."""

from mutants import forms, memory, numbers, tasks, together, traces

MUTANTS = [
    kind
    for module in (forms, memory, tasks, numbers, together, traces)
    for kind in vars(module).values()
    if isinstance(kind, type) and hasattr(kind, "caught_by")
]
