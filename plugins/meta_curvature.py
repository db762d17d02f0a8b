"""Meta-curvature: a learned, Kronecker-factored linear transform of the inner gradients."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from metaplug import Context, Gradients, LearnedPluginConfig, Plugin, RequestError, hookimpl, key_of

_AXES = ("out", "in", "place")


class MetaCurvature(Plugin):
    """Multiply every inner gradient (outputs, inputs, places) by a learned matrix along each axis.

        g[t,k] ← g[t,k] ×₁ M_out ×₂ M_in ×₃ M_place        vec(g) ← (M_out ⊗ M_in ⊗ M_place) vec(g)

    A linear layer has no places, and a vector such as a bias only outputs. The matrices are square,
    one set for each adapted parameter, the same in all inner steps; they start as the identity,
    which is the algorithm without this plugin, bit for bit.

    Source: Park and Oliva 2019, "Meta-Curvature" (arXiv 1902.03356), section 3.2 (MC2).
    """

    class Config(LearnedPluginConfig):
        """How fast the matrices are learned, and how large they may be."""

        largest: int = Field(
            2048, ge=1, description="The longest axis that may get a matrix, of its length squared."
        )

    config: Config

    @hookimpl
    def setup(self, context: Context) -> None:
        sizes = {name: _sizes(context.shapes[name]) for name in context.adapted}
        longest = max(sizes, key=lambda name: max(sizes[name]))
        if max(sizes[longest]) > self.config.largest:
            raise RequestError(
                f"plugin '{self.name}' would learn a matrix of {max(sizes[longest])} x "
                f"{max(sizes[longest])} numbers for '{longest}', more than largest = "
                f"{self.config.largest} allows: raise it, or adapt less with partial-adaptation"
            )
        self.matrices = nn.ParameterDict(
            {
                f"{key_of(name)}/{axis}": torch.eye(
                    size, dtype=context.dtype, device=context.device
                )
                for name in context.adapted
                for axis, size in zip(_AXES, sizes[name], strict=False)
            }
        )

    @hookimpl
    def transform_gradients(self, gradients: Gradients) -> Gradients:
        return {name: self._curved(name, gradient) for name, gradient in gradients.items()}

    @hookimpl
    def end_meta_step(self) -> dict[str, float]:
        distances = [
            (matrix.detach() - torch.eye(len(matrix)).to(matrix)).square().mean()
            for matrix in self.matrices.values()
        ]
        return {"distance": float(torch.stack(distances).mean().sqrt())}

    def _curved(self, name: str, gradient: Tensor) -> Tensor:
        keys = [f"{key_of(name)}/{axis}" for axis in _AXES]
        matrices = [self.matrices[key] for key in keys if key in self.matrices]
        curved = gradient.reshape(len(gradient), *(len(matrix) for matrix in matrices))
        for axis, matrix in enumerate(matrices, 1):
            curved = (curved.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
        return curved.reshape(gradient.shape)


def _sizes(shape: torch.Size) -> tuple[int, ...]:
    """(outputs, inputs, places) of a parameter, as far as it has them."""
    return (*shape[:2], shape[2:].numel()) if len(shape) > 2 else tuple(shape) or (1,)
