"""Which part of a model's answer is the prediction."""

import pytest
import torch

from metaplug import RequestError
from metaplug.core.model_calls import prediction_of

ONE, OTHER = torch.zeros(2), torch.ones(2)


@pytest.mark.parametrize(
    ("answer", "output"),
    [
        ({"values": ONE, "other": OTHER}, "values"),
        ({0: OTHER, 1: ONE}, 1),
        ((OTHER, ONE), 1),
        (torch.return_types.max((ONE, OTHER)), "values"),
    ],
)
def test_a_part_is_found_by_its_name_or_place(answer, output):
    assert prediction_of(answer, output) is ONE


def test_a_tensor_has_no_parts():
    refused = (
        "^output='data' asks for a part of the model's answer, a Tensor with no named or numbered "
        "tensors: name a part that is a tensor$"
    )
    with pytest.raises(RequestError, match=refused):
        prediction_of(ONE, "data")
