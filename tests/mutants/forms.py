"""Wrong in form: the Config, the arguments of a hook, and what it returns."""

import torch
from pydantic import Field, field_validator, model_validator

from metaplug import Plugin, PluginConfig, hookimpl


class TakesAnySetting(Plugin):
    """A validator takes out what it does not know, before pydantic could refuse it."""

    caught_by = "strict-config"
    says = (
        "Config accepts the unknown field 'no_such_setting', so that a misspelt setting "
        "would pass unseen"
    )

    class Config(PluginConfig):
        scale: float = Field(0.5, description="Factor.")

        @model_validator(mode="before")
        @classmethod
        def _known(cls, values):
            return {name: value for name, value in values.items() if name in cls.model_fields}

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * self.config.scale


class SaysNothingOfItsFields(Plugin):
    """A field without a description."""

    caught_by = "strict-config"
    says = "the field 'scale' says nothing of itself"

    class Config(PluginConfig):
        scale: float = 0.5

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * self.config.scale


class ReadsItsSettingTwice(Plugin):
    """A percentage that a validator divides by 100 whenever it is read."""

    caught_by = "config-round-trip"
    says = "the field 'percent' is 0.5 and comes back from YAML as 0.005"

    class Config(PluginConfig):
        percent: float = Field(50.0, description="Share, in percent.")

        @field_validator("percent")
        @classmethod
        def _share(cls, value):
            return value / 100

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * self.config.percent


class HasASettingThatNoFileHolds(Plugin):
    """Bytes that are no text."""

    caught_by = "config-round-trip"
    says = "its Config does not survive YAML"

    class Config(PluginConfig):
        key: bytes = Field(b"\xff\xfe", description="Bytes.")

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses * self.config.key[0]


class TakesWhateverComes(Plugin):
    """Arguments by their number and place."""

    caught_by = "future-arguments"
    says = "has the argument arguments after a star, which the hook would never fill"

    @hookimpl
    def transform_inner_losses(self, *arguments):
        losses, _step = arguments
        return losses * 2


class ForgetsAName(Plugin):
    """Biases are left out of what it returns."""

    caught_by = "names-and-shapes"
    says = "missing '0.bias'"

    @hookimpl
    def transform_gradients(self, gradients):
        return {
            name: gradient * 2 for name, gradient in gradients.items() if name.endswith("weight")
        }


class ChangesTheDtype(Plugin):
    """Computes in double for accuracy, and does not come back."""

    caught_by = "names-and-shapes"
    says = "torch.float64 on cpu; it was given shape"

    @hookimpl
    def transform_gradients(self, gradients):
        return {name: gradient.double() / 3 for name, gradient in gradients.items()}


class LosesTheTaskAxis(Plugin):
    """Returns the mean of the losses, and not the losses."""

    caught_by = "names-and-shapes"
    says = "returned shape ()"

    @hookimpl
    def transform_inner_losses(self, losses):
        return losses.mean()


class MakesOtherExamples(Plugin):
    """Turns the examples of training into another dtype, which the chain does not look at."""

    caught_by = "names-and-shapes"
    says = "of support_x"

    @hookimpl
    def transform_tasks(self, batch):
        return type(batch)(
            batch.support_x.to(torch.float16),
            batch.support_y,
            batch.query_x.to(torch.float16),
            batch.query_y,
        )
