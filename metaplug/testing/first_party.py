"""The plugins of metaplug, with settings under which each acts within two iterations."""

from __future__ import annotations

from typing import Any

FIRST_PARTY: dict[str, dict[str, Any]] = {
    "alfa": {},
    "aruba": {"zeta": 0.1},
    "cavia": {"size": 5},
    "cosine-meta-lr": {},
    "derivative-order": {},
    "drop-grad": {"rate": 0.3},
    "gradient-clipping": {"max_norm": 0.3, "max_meta_norm": 0.3},
    "gradient-noise": {"scale": 0.01},
    "gradient-sharing": {},
    "imaml": {},
    "l2f": {},
    "label-smoothing": {},
    "lora": {"targets": ["*weight"], "rank": 2},
    "meta-curvature": {},
    "meta-mix": {},
    "meta-sgd": {},
    "metal": {"query": True},
    "mr-maml": {"weights": ["*"], "beta": 0.01},
    "multi-step-loss": {},
    "partial-adaptation": {},
    "per-step-batch-norm": {},
    "per-step-learning-rates": {},
    "proto-maml": {},
    "reptile": {},
    "sharp-maml": {},
    "taml": {"measure": "theil"},
    "warp-grad": {},
    "weight-decay-to-init": {"strength": 0.5},
}
"""By entry-point name, fields of the plugin's Config."""
