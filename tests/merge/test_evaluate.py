"""How a model is measured."""

import pytest
import torch
from twa.merge.evaluate import mean_over


def test_a_loss_that_raises_leaves_the_model_as_it_was():
    model = torch.nn.Dropout()
    seen = []

    def loss(model, batch):
        seen.append(model.training)
        raise ArithmeticError("of the task")

    for training in (True, False):
        model.train(training)
        with pytest.raises(ArithmeticError, match="of the task"):
            mean_over(model, loss, [torch.ones(2)])
        assert model.training == training
    assert seen == [False, False]
