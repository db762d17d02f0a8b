"""Which axis of an output is that of the classes, where its shape fits two of them."""

import pytest
import torch
from support.plain_loop import loop, off
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, RequestError, TaskBatch

CLASSES = 5


class OfTokens(nn.Module):
    """Answers (n, tokens, classes), as classifiers of tokens and language models do."""

    def __init__(self):
        super().__init__()
        self.rows, self.head = nn.Embedding(CLASSES, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.rows(x)))


class OfPlaces(OfTokens):
    """Answers (n, classes, tokens), as torch's losses have it."""

    def forward(self, x):
        return super().forward(x).movedim(2, 1)


class OfAFewPlaces(OfPlaces):
    """Takes texts of one length alone, so a shorter one tells nothing."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        return super().forward(x) + self.places


def texts(length):
    generator = torch.Generator().manual_seed(length)
    return TaskBatch(
        *(torch.randint(0, CLASSES, (2, 3, length), generator=generator) for _ in range(4))
    )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        (OfTokens, (CLASSES, 3, 7)),
        (OfTokens, (3, CLASSES)),
        (OfPlaces, (CLASSES, 3)),
        (OfAFewPlaces, (CLASSES,)),
    ],
)
def test_classes_are_told_from_as_many_tokens(model, lengths, batching):
    torch.manual_seed(0)
    model = model().double()
    axis = 2 if type(model) is OfTokens else 1
    learner = MetaLearner(model, inner_lr=0.3, inner_steps=2, task_batching=batching)
    for length in lengths:
        batch = texts(length)
        exact = loop(model, batch, loss=lambda p, y: F.cross_entropy(p.movedim(axis, 1), y))
        assert off(learner.meta_gradients(batch), exact.gradients) < 1e-10
        scores = [float(each.losses[-1].detach().exp()) for each in exact.tasks]
        found = learner.evaluate([batch], score="perplexity").mean
        assert found == pytest.approx(sum(scores) / len(scores))


@pytest.mark.parametrize(
    ("model", "y"),
    [
        (nn.Linear(4, 1), torch.tensor([[[0.0], [1.0], [1.0]]])),  # one logit
        (nn.Linear(4, 3), torch.tensor([[[0.0, 1.0, 1.0]] * 3])),  # several labels
        (nn.Linear(4, 2), torch.randn(1, 3, 2)),  # numbers
    ],
)
def test_targets_that_cross_entropy_would_misread_are_refused(model, y):
    x = torch.randn(1, 3, 4)
    with pytest.raises(RequestError) as error:
        MetaLearner(model).meta_gradients(TaskBatch(x, y, x, y))
    assert str(error.value) == (
        "cross-entropy reads floating-point targets as probabilities of classes, but those of a "
        "task do not sum to 1: for labels of 0 and 1 give "
        "loss=torch.nn.functional.binary_cross_entropy_with_logits, for numbers "
        "kind='regression', and for class indices targets.long()"
    )
    soft = torch.randn(1, 3, 3).softmax(2)
    MetaLearner(nn.Linear(4, 3)).meta_gradients(TaskBatch(x, soft, x, soft))
