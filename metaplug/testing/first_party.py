"""The plugins of metaplug, with settings under which each acts within two iterations."""

from __future__ import annotations

from typing import Any

FIRST_PARTY: dict[str, dict[str, Any]] = {
    "cosine-meta-lr": {},
    "derivative-order": {},
    "gradient-clipping": {"max_norm": 0.3, "max_meta_norm": 0.3},
    "gradient-noise": {"scale": 0.01},
    "gradient-sharing": {},
    "imaml": {},
    "label-smoothing": {},
    "meta-curvature": {},
    "meta-sgd": {},
    "multi-step-loss": {},
    "partial-adaptation": {},
    "per-step-batch-norm": {},
    "per-step-learning-rates": {},
    "reptile": {},
    "sharp-maml": {},
    "warp-grad": {},
    "weight-decay-to-init": {"strength": 0.5},
}
"""By entry-point name, fields of the plugin's Config."""
