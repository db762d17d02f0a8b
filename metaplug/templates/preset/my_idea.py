"""my-idea: an algorithm as a list of plugins."""

from metaplug import PluginUse, Preset

MY_IDEA = Preset(
    name="my-idea",
    summary="MAML whose inner gradients are clipped, each task's by itself, and then shared.",
    source="Finn et al. 2017, arXiv 1703.03400; Pascanu et al. 2013, section 3.2",
    plugins=(
        PluginUse(plugin="gradient-clipping", settings={"max_norm": 10.0}),
        PluginUse(plugin="gradient-sharing", settings={"gate": 0.5}),
    ),
    defaults={"learner": {"inner_lr": 0.1, "inner_steps": 5}},
)
"""The list is the order of application. What the user sets goes before `defaults`."""
