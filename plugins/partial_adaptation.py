"""Partial adaptation: the inner loop adapts the head (ANIL), the body (BOIL), or a pattern."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from metaplug import Plugin, PluginConfig, RequestError, hookimpl


class PartialAdaptation(Plugin):
    """Adapt one part of the model; the other is the same for all tasks, and still meta-learned.

        θ[t,k+1] = θ[t,k] − α g[t,k] for the adapted part,  θ[t,k+1] = θ for the rest

    No inner gradient is computed for what is not adapted.

    Source: Raghu et al. 2020 (arXiv 1909.09157), section 4, for the head alone (ANIL);
    Oh et al. 2021 (arXiv 2008.08882), section 3, for the body alone (BOIL).
    """

    class Config(PluginConfig):
        """Which part adapts, and what the head is."""

        adapts: Literal["head", "body"] = Field(
            "head", description="head: what `head` names; body: everything else."
        )
        head: tuple[str, ...] | None = Field(
            None,
            min_length=1,
            description="Patterns of the head's parameter names, as fc.*; null: the last module's.",
        )

    config: Config

    @hookimpl
    def select_adapted(self, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise RequestError(
                f"plugin '{self.name}' has nothing to choose from, as the plugins before it adapt "
                "none of the model's own parameters: leave it out"
            )
        if self.config.head is None:
            head: tuple[str, ...] = tuple(
                name for name in names if fnmatchcase(name, _last_module(names))
            )
        else:
            head = self.matching("head", names, "parameters that may adapt")
        selected = tuple(name for name in names if (name in head) == (self.config.adapts == "head"))
        if not selected:
            raise RequestError(
                f"plugin '{self.name}' would adapt the body, but all that may adapt is the head: "
                "correct head"
            )
        return selected


def _last_module(names: tuple[str, ...]) -> str:
    module, dot, _ = names[-1].rpartition(".")
    return f"{module}.*" if dot else names[-1]
