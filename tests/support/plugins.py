"""Every first-party plugin, ready to be put into a chain; and one that looks at what passes."""

import itertools
import re

import torch

from metaplug import Plugin, hookimpl
from metaplug.contract import registry

SETTINGS = {
    "gradient-clipping": {"max_norm": 1.0, "max_meta_norm": 1.0},
    "mr-maml": {"weights": ["*"]},
}
"""What a plugin cannot do without."""

DRAWING = ("drop-grad", "gradient-noise", "meta-mix", "mr-maml")
"""Those that draw random numbers: others for another place in a batch, or for another chunk."""

NAMES = registry.names("plugin")


def make(kind, /, **settings):
    """A new instance of the installed plugin."""
    return registry.load("plugin", kind)(**{**SETTINGS.get(kind, {}), **settings})


def compatible(names):
    """Whether no plugin of these refuses another."""
    return all(
        other not in make(name).conflicts_with for name, other in itertools.permutations(names, 2)
    )


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
