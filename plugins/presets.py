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

ANIL = Preset(
    name="anil",
    summary="Almost no inner loop: only the head adapts, the body is meta-learned for all tasks.",
    source="Raghu et al. 2020, arXiv 1909.09157, section 4",
    plugins=(PluginUse(plugin="partial-adaptation", settings={"adapts": "head"}),),
)

BOIL = Preset(
    name="boil",
    summary="Body only update in the inner loop: the body adapts, the head is the same for all.",
    source="Oh et al. 2021, arXiv 2008.08882, section 3",
    plugins=(PluginUse(plugin="partial-adaptation", settings={"adapts": "body"}),),
)

REPTILE = Preset(
    name="reptile",
    summary="Move the weights a step towards the mean of the inner loops' ends; no query loss.",
    source="Nichol et al. 2018, arXiv 1803.02999, sections 2 and 5",
    plugins=(PluginUse(plugin="derivative-order"), PluginUse(plugin="reptile")),
    defaults={"learner": {"meta_optimizer": "sgd", "meta_lr": 1.0}},
)

IMAML = Preset(
    name="imaml",
    summary="Implicit MAML: meta-gradients from where proximal inner loops end; no graph of steps.",
    source="Rajeswaran et al. 2019, arXiv 1909.04630; settings of the authors' code",
    plugins=(PluginUse(plugin="imaml"),),
    defaults={"learner": {"inner_lr": 0.1, "inner_steps": 16}},
)

META_SGD = Preset(
    name="meta-sgd",
    summary="MAML with a learned inner learning rate for every weight.",
    source="Li et al. 2017, arXiv 1707.09835",
    plugins=(PluginUse(plugin="meta-sgd"),),
)

ALFA = Preset(
    name="alfa",
    summary="MAML whose inner rates and weight decay a network generates for each task and step.",
    source="Baik et al. 2020, arXiv 2011.00209",
    plugins=(PluginUse(plugin="alfa"),),
)

L2F = Preset(
    name="l2f",
    summary="MAML whose tasks first forget a part of the start, layer by layer, by their gradient.",
    source="Baik et al. 2020, arXiv 1906.05895",
    plugins=(PluginUse(plugin="l2f"),),
)

MR_MAML = Preset(
    name="mr-maml",
    summary="Meta-regularised MAML: the body is drawn from learned Gaussians, the head adapts.",
    source="Yin et al. 2020, arXiv 1912.03820, section 4.2 (on weights)",
    plugins=(
        PluginUse(plugin="partial-adaptation", settings={"adapts": "head"}),
        PluginUse(plugin="mr-maml"),
    ),
)

TAML = Preset(
    name="taml",
    summary="Task-agnostic meta-learning: unsure predictions before adaptation, sure ones after.",
    source="Jamal and Qi 2019, arXiv 1805.07722, section 3.1",
    plugins=(PluginUse(plugin="taml"),),
)

CAVIA = Preset(
    name="cavia",
    summary="Only a context adapts, in two steps of rate 1; it modulates what all tasks share.",
    source="Zintgraf et al. 2019, arXiv 1810.03642; inner steps and rate of the authors' code",
    plugins=(PluginUse(plugin="cavia"),),
    defaults={"learner": {"inner_lr": 1.0, "inner_steps": 2}},
)

PROTO_MAML = Preset(
    name="proto-maml",
    summary="MAML whose head starts, in every task, from the mean features of its classes.",
    source="Triantafillou et al. 2020, arXiv 1903.03096, section 3",
    plugins=(PluginUse(plugin="proto-maml"),),
)

WARP_GRAD = Preset(
    name="warp-grad",
    summary="Warp layers, which do not adapt, learn from each inner step by itself.",
    source="Flennerhag et al. 2020, arXiv 1909.00025, section 2",
    plugins=(PluginUse(plugin="warp-grad"),),
)

MAML_PLUS_PLUS = Preset(
    name="maml++",
    summary="MAML++ as published; its schedules, in hundredths of training, follow the run.",
    source="Antoniou et al. 2019, arXiv 1810.09502",
    plugins=(
        PluginUse(plugin="per-step-batch-norm"),
        PluginUse(plugin="per-step-learning-rates"),
        PluginUse(
            plugin="multi-step-loss",
            settings={"annealing_epochs": 10, "iterations_per_epoch": None},
        ),
        PluginUse(plugin="derivative-order", settings={"switch": 50, "iterations_per_epoch": None}),
        PluginUse(plugin="cosine-meta-lr", settings={"final_factor": 0.01}),
    ),
)

MAML_PLUS_PLUS_REFERENCE = Preset(
    name="maml++-reference",
    summary="MAML++ as its authors' code runs on Omniglot: second order, 100 epochs of 500.",
    source="Antoniou et al. 2019, arXiv 1810.09502; settings of the authors' code",
    plugins=(
        PluginUse(plugin="per-step-batch-norm"),
        PluginUse(plugin="per-step-learning-rates"),
        PluginUse(
            plugin="multi-step-loss", settings={"annealing_epochs": 10, "iterations_per_epoch": 500}
        ),
        PluginUse(
            plugin="cosine-meta-lr", settings={"final_factor": 0.01, "iterations_per_epoch": 500}
        ),
    ),
    defaults={
        "model": {
            "name": "conv4",
            "settings": {
                "filters": 64,
                "pooling": "max",
                "leaky_slope": 0.01,
                "initialisation": "xavier",
            },
        },
        "learner": {"inner_lr": 0.1, "inner_steps": 5, "meta_optimizer": "adam", "meta_lr": 0.001},
        "training": {
            "iterations": 50_000,
            "tasks_per_batch": 8,
            "validate_every": 500,
            "validation_tasks": 600,
            "test_tasks": 600,
        },
    },
)
