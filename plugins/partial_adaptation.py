"""Partial adaptation: the inner loop adapts only the head (ANIL), only the body (BOIL), or what name patterns say."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from metaplug import Plugin, PluginConfig, RequestError, hookimpl


class PartialAdaptation(Plugin):
    """Adapt one part of the model in the inner loop; the other part is the same for all tasks, and still meta-learned.

        θ[t,k+1] = θ[t,k] − α g[t,k] for the adapted part,  θ[t,k+1] = θ for the rest

    No inner gradient is computed for what is not adapted.

    Source: Raghu et al. 2020 (arXiv 1909.09157), section 4, for the head alone (ANIL); Oh et al. 2021 (arXiv 2008.08882), section 3, for
    the body alone (BOIL).
    """

    class Config(PluginConfig):
        """Which part adapts, and what the head is."""

        adapts: Literal["head", "body"] = Field(
            "head", description="head: what `head` names; body: everything else."
        )
        head: tuple[str, ...] | None = Field(
            None,
            min_length=1,
            description="Patterns of the head's parameter names, such as fc.*; null: the last module of the model that has parameters.",
        )

    config: Config

    @hookimpl
    def select_adapted(self, names: tuple[str, ...]) -> tuple[str, ...]:
        patterns = self.config.head or (_last_module(names),)
        unmatched = [
            pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if unmatched:
            raise RequestError(
                f"plugin '{self.name}': the pattern '{unmatched[0]}' matches none of the parameters that may adapt "
                f"({', '.join(names[:6])}{', …' if len(names) > 6 else ''}): correct head"
            )
        head = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
        selected = tuple(name for name in names if (name in head) == (self.config.adapts == "head"))
        if not selected:
            raise RequestError(
                f"plugin '{self.name}' would adapt the body, but all that may adapt is the head: correct head"
            )
        return selected


def _last_module(names: tuple[str, ...]) -> str:
    module, dot, _ = names[-1].rpartition(".")
    return f"{module}.*" if dot else names[-1]
