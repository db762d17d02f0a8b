"""Wrong in starts, task parameters, updates, more passes and order 0."""

import torch
from torch import nn

from metaplug import Plugin, hookimpl


def _shift(context):
    return nn.Parameter(torch.zeros(3, dtype=context.dtype, device=context.device))


class ReadsQueryLabels(Plugin):
    """Descends the query loss, which the step's own passes would give."""

    caught_by = "query-unseen"
    says = "when only query labels are replaced, so tasks are adapted to what they are measured by"

    @hookimpl
    def transform_inner_losses(self, losses, step):
        return losses + step.passes.forward(step, {}, "query")[0]


class ReadsQueryInputs(Plugin):
    """Uses query predictions past the step that refuses them."""

    caught_by = "query-unseen"
    says = "when only query inputs are replaced"

    @hookimpl
    def transform_inner_losses(self, losses, step):
        predictions = step.passes.forward(step, {}, "query")[1]
        return losses + 0.1 * predictions.square().mean((1, 2))


class SaysNotThatItIsTransductive(Plugin):
    """Asks for query predictions, and does not declare it."""

    caught_by = "query-unseen"
    says = (
        "plugin 'says-not-that-it-is-transductive' reads the query examples in the inner loop, "
        "but does not say that results are transductive"
    )

    @hookimpl
    def initialize_parameters(self, parameters, step):
        predictions = step.forward(parameters, "query")
        return {**parameters, "2.bias": parameters["2.bias"] - predictions.mean(1)}


class LeavesAMetaGradientOut(Plugin):
    """Answers for weights, and not for biases."""

    caught_by = "complete-meta-gradients"
    says = "its answer has no gradient of '0.bias', '2.bias', which would then never learn"

    @hookimpl
    def compute_meta_gradients(self, outcome, outer_loss, meta_parameters):
        names = [name for name in meta_parameters if name.endswith("weight")]
        taken = torch.autograd.grad(outer_loss, [meta_parameters[name] for name in names])
        return dict(zip(names, taken, strict=True))


class AsksForOrderZeroAlone(Plugin):
    """Leaves the graph out, and nobody makes meta-gradients without."""

    caught_by = "complete-meta-gradients"
    says = "derivative order 0 leaves no way from the outer loss to what tasks start from"

    @hookimpl
    def derivative_order(self):
        return 0


class KnowsItselfByOneName(Plugin):
    """Finds its task parameter by the class's name, not by its own."""

    caught_by = "another-name"
    says = "under the name other-knows-itself-by-one-name: find what is yours by self.name"

    @hookimpl
    def setup(self, context):
        self.shift = _shift(context)

    @hookimpl
    def task_parameters(self):
        return {"shift": self.shift}

    @hookimpl
    def transform_parameters(self, parameters):
        shift = parameters["knows-itself-by-one-name.shift"]
        return {**parameters, "2.bias": parameters["2.bias"] + shift}


class CountsPadding(Plugin):
    """Takes a mean over targets, of which some are of no example."""

    caught_by = "unequal-sizes"
    says = "alone and beside a task of more examples: count no target of -100"

    @hookimpl
    def initialize_parameters(self, parameters, step):
        bias = parameters["2.bias"]
        return {**parameters, "2.bias": bias + 0.1 * step.targets.to(bias.dtype).mean(1, True)}


class NeverUsesItsVariable(Plugin):
    """Names two variables, and uses one."""

    caught_by = "task-parameters-adapt"
    says = "no inner gradient reaches its task parameter 'never-uses-its-variable.code'"

    @hookimpl
    def setup(self, context):
        self.shift = _shift(context)

    @hookimpl
    def task_parameters(self, context):
        code = torch.zeros(2, dtype=context.dtype, device=context.device)
        return {"shift": self.shift, "code": code}

    @hookimpl
    def transform_parameters(self, parameters):
        shift = parameters[f"{self.name}.shift"]
        return {**parameters, "2.bias": parameters["2.bias"] + shift}


class DividesByTheSteps(Plugin):
    """Takes a mean over steps, of which a loop may have none."""

    caught_by = "no-inner-steps"
    says = "the outer loss is NaN or Inf, with inner_steps = 0: divide by no number of steps"

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        return losses / len(outcome.support_losses)


class StartsAllTasksAsOne(Plugin):
    """A start without the task axis."""

    caught_by = "names-and-shapes"
    says = "in initialize_parameters (link 1 of 1, iteration 1, inner step 0) returned shape (3,)"

    @hookimpl
    def initialize_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["2.bias"].mean(0)}


class UpdatesSomeNames(Plugin):
    """Answers only what it changes."""

    caught_by = "names-and-shapes"
    says = (
        "in update_parameters (link 1 of 1, iteration 1, inner step 0) returned other names than "
        "it was given: missing '0.bias', '2.bias', not known none"
    )

    @hookimpl
    def update_parameters(self, parameters, gradients):
        names = [name for name in parameters if name.endswith("weight")]
        return {name: parameters[name] - 0.1 * gradients[name] for name in names}


class UpdatesWhatHasAGradient(Plugin):
    """Leaves out of its answer what no loss reaches."""

    caught_by = "names-and-shapes"
    says = (
        "in update_parameters (link 1 of 1, iteration 1, inner step 0) returned other names than "
        "it was given: missing 'unused', not known none"
    )

    @hookimpl
    def update_parameters(self, parameters, gradients):
        return {n: parameters[n] - 0.1 * gradients[n] for n in parameters if n in gradients}


class CountsOnEveryGradient(Plugin):
    """Looks up a gradient that is not there."""

    caught_by = "names-and-shapes"
    says = "of a model whose trainable parameter 'unused' no loss reaches: gradients lack its name"

    @hookimpl
    def update_parameters(self, parameters, gradients):
        return {name: each - 0.1 * gradients[name] for name, each in parameters.items()}


class RegistersAnotherName(Plugin):
    """Names a variable otherwise than its meta-parameter."""

    caught_by = "names-and-shapes"
    says = "answered 'code', a parameter that the plugin does not have by this name: call it"

    @hookimpl
    def setup(self, context):
        self.shift = _shift(context)

    @hookimpl
    def task_parameters(self):
        return {"code": self.shift}

    @hookimpl
    def transform_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["2.bias"] + parameters[f"{self.name}.code"]}


class AsksForAPassOfOneTask(Plugin):
    """Gives a pass the weights of the first task."""

    caught_by = "names-and-shapes"
    says = "gives a forward pass '2.bias' of shape (3,)"

    @hookimpl
    def transform_gradients(self, gradients, step):
        losses, _ = step.forward({"2.bias": step.parameters["2.bias"][0]})
        return {name: gradient + 0 * losses.sum() for name, gradient in gradients.items()}


class UpdatesInPlace(Plugin):
    """An optimizer as it is written elsewhere."""

    caught_by = "no-mutation"
    says = "update_parameters (iteration 1, inner step 0) wrote into parameters['0.weight']"

    @hookimpl
    def update_parameters(self, parameters, gradients):
        for name, gradient in gradients.items():
            parameters[name].data.sub_(0.1 * gradient)
        return parameters


class ScalesItsOuterPassInPlace(Plugin):
    """Writes into what the loop made, to ask for a pass with other values."""

    caught_by = "no-mutation"
    says = "transform_outer_losses wrote into outcome.adapted_parameters['0.weight']"

    @hookimpl
    def transform_outer_losses(self, losses, outcome):
        outcome.adapted_parameters["0.weight"].data.mul_(0.9)
        return losses + outcome.forward({})[0]


class RemembersItsStart(Plugin):
    """Stores a start where a kept statistic belongs."""

    caught_by = "no-state-in-loop"
    says = "initialize_parameters (iteration 1, inner step 0) changed self.seen"

    @hookimpl
    def initialize_parameters(self, parameters, step):
        losses, _ = step.forward(parameters)
        self.seen = losses.detach().mean()
        return {**parameters, "2.bias": parameters["2.bias"] + 0.1}


class StartsByPlace(Plugin):
    """The second task starts further away than the first."""

    caught_by = "task-permutation"
    says = "the start of '2.bias' of task"

    @hookimpl
    def initialize_parameters(self, parameters):
        bias = parameters["2.bias"]
        place = torch.arange(len(bias), dtype=bias.dtype, device=bias.device)
        return {**parameters, "2.bias": bias + 0.1 * place.view(-1, 1)}


class StartsFromAllTasks(Plugin):
    """A start down the mean gradient of all tasks of the batch."""

    caught_by = "tasks-apart"
    says = "the start of '2.bias' of task 0"

    @hookimpl
    def initialize_parameters(self, parameters, step):
        if not step.training:
            return None
        bias = parameters["2.bias"]
        losses, _ = step.forward(parameters)
        taken = step.gradients(losses, {"2.bias": bias})["2.bias"]
        return {**parameters, "2.bias": bias - taken.mean(0)}


class StartsFromAllTestTasks(Plugin):
    """Declared as coupling, and starts test tasks from each other too."""

    caught_by = "test-tasks-apart"
    says = "the start of '2.bias' of task 0"
    couples_tasks = True

    @hookimpl
    def initialize_parameters(self, parameters, step):
        losses, _ = step.forward(parameters)
        return {**parameters, "2.bias": parameters["2.bias"] + losses.mean()}


class UpdatesByTheLargestTask(Plugin):
    """A step of the length that the largest gradient of all tasks allows."""

    caught_by = "tasks-apart"
    says = "the adapted weight '0.weight' of task 0"

    @hookimpl
    def update_parameters(self, parameters, gradients):
        largest = max(gradient.abs().max() for gradient in gradients.values()) + 1
        moved = {name: parameters[name] - 0.1 * each / largest for name, each in gradients.items()}
        return {**parameters, **moved}


class DetachesItsStart(Plugin):
    """A start that tasks share no more."""

    caught_by = "meta-gradients"
    says = "along a random direction of '2.bias' the outer loss rises by"

    @hookimpl
    def initialize_parameters(self, parameters):
        return {**parameters, "2.bias": 0.9 * parameters["2.bias"].detach()}


class StartsFromACopy(Plugin):
    """A meta-parameter whose copy the loop adapts, so that it never learns itself."""

    caught_by = "meta-parameters-learn"
    says = "no meta-gradient reaches its meta-parameter 'starts-from-a-copy.shift'"

    @hookimpl
    def setup(self, context):
        self.shift = _shift(context)

    @hookimpl
    def task_parameters(self):
        return {"shift": self.shift.detach()}

    @hookimpl
    def transform_parameters(self, parameters):
        return {**parameters, "2.bias": parameters["2.bias"] + parameters[f"{self.name}.shift"]}


class StartsBothFactorsAtZero(Plugin):
    """A code and its decoder that start at zero: a saddle, where neither moves."""

    caught_by = "task-parameters-adapt"
    says = "or a factor on its way is zero as well: let one of the two start away from zero"

    @hookimpl
    def setup(self, context):
        self.decoder = _shift(context)

    @hookimpl
    def task_parameters(self, context):
        return {"code": torch.zeros(3, dtype=context.dtype, device=context.device)}

    @hookimpl
    def transform_parameters(self, parameters, step):
        shift = self.decoder * parameters[f"{self.name}.code"]
        return {**parameters, "2.bias": parameters["2.bias"] + shift}
