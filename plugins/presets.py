"""The algorithms, as data."""

from metaplug import PluginUse, Preset

MAML = Preset(
    name="maml",
    summary="Model-agnostic meta-learning: meta-gradients through every inner step (second order).",
    source="Finn et al. 2017, arXiv 1703.03400",
)

FOMAML = Preset(
    name="fomaml",
    summary="First-order MAML: inner gradients are constants to the meta-gradient.",
    source="Finn et al. 2017, arXiv 1703.03400, section 5.2",
    plugins=(PluginUse(plugin="derivative-order"),),
)
