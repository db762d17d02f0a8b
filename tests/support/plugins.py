"""Every first-party plugin, ready to be put into a chain; and one that looks at what passes."""

import itertools
import re
from functools import cache

import torch

from metaplug import Plugin, hookimpl
from metaplug.contract import registry
from metaplug.contract.hookspecs import KINDS

SETTINGS = {
    "gradient-clipping": {"max_norm": 1.0, "max_meta_norm": 1.0},
    "mr-maml": {"weights": ["*"]},
}
"""What a plugin cannot do without."""

DRAWING = ("drop-grad", "gradient-noise", "meta-mix", "mr-maml")
"""Those that draw random numbers: others for another place in a batch, or for another chunk."""

COUPLING = ("gradient-sharing", "sharp-maml")
"""Those that couple tasks by their default settings."""

OFF = {
    "alfa": {"rates": False, "factors": False},
    "cosine-meta-lr": {"final_factor": 1.0},
    "derivative-order": {"switch": 0},
    "drop-grad": {"rate": 0.0},
    "gradient-clipping": {"max_norm": 1e9, "max_meta_norm": 1e9},
    "gradient-noise": {"scale": 0.0},
    "gradient-sharing": {"gate": 0.0},
    "l2f": {"strength": 0.0},
    "label-smoothing": {"smoothing": 0.0},
    "meta-mix": {"alpha": 0.0},
    "metal": {"strength": 0.0},
    "mr-maml": {"beta": 0.0, "deviation": 0.0},
    "multi-step-loss": {"annealing_epochs": 0},
    "partial-adaptation": {"head": ["*"]},
    "sharp-maml": {"lower_rho": 0.0, "upper_rho": 0.0},
    "taml": {"strength": 0.0},
    "weight-decay-to-init": {"strength": 0.0},
}
"""Settings at which a plugin adds nothing: the conformance suite holds it to that, bit for bit."""

NAMES = registry.names("plugin")


def make(kind, /, **settings):
    """A new instance of the installed plugin."""
    return registry.load("plugin", kind)(**{**SETTINGS.get(kind, {}), **settings})


def compatible(names):
    """Whether no plugin of these refuses another, nor two answer what only one may."""
    one = {hook for hook, kind in KINDS.items() if kind == "choose"}
    return all(
        other not in conflicts(name) and not hooks(name) & hooks(other) & one
        for name, other in itertools.permutations(names, 2)
    )


@cache
def conflicts(name):
    """The kinds of plugins that one refuses."""
    return make(name).conflicts_with


def covering(size, names=NAMES):
    """Chains of plugins that go together: every pair of these names that does is in one of them.

    Hundreds of pairs are tried in some dozens of chains; a fault of a pair shows in its chain.
    """
    pairs = [pair for pair in itertools.combinations(names, 2) if compatible(pair)]
    left, chains = dict.fromkeys(pairs), []
    while left:
        chain = list(next(iter(left)))
        while len(chain) < size:
            gains = {
                name: sum(tuple(sorted((name, other))) in left for other in chain)
                for name in names
                if name not in chain and compatible([*chain, name])
            }
            if not gains or not max(gains.values()):
                break
            chain.append(max(gains, key=gains.get))
        for pair in itertools.combinations(sorted(chain), 2):
            left.pop(pair, None)
        chains.append(in_order(chain))
    return chains


def in_order(names):
    """The same plugins, those that must run after others behind them."""
    return sorted(names, key=lambda name: len({*_runs_after(name)} & {*names}))


@cache
def _runs_after(name):
    return make(name).runs_after


@cache
def hooks(name):
    """The hooks through which a plugin changes what is computed."""
    kind = registry.load("plugin", name)
    return {hook for hook in dir(kind) if getattr(getattr(kind, hook), "metaplug_impl", None)} - {
        "setup",
        "commit",
        "end_meta_step",
    }


def placeless(error):
    """The text of an error without the file and line of the plugin that made it."""
    return re.sub(r" at \w+\.py:\d+", "", str(error))


class Spy(Plugin):
    """Remembers the gradients that pass its place in the chain, flat (T, P) by step."""

    @hookimpl
    def setup(self):
        self.seen = {}

    @hookimpl
    def transform_gradients(self, gradients, step):
        self.seen[step.index] = torch.cat(
            [gradient.detach().flatten(1) for gradient in gradients.values()], 1
        )
