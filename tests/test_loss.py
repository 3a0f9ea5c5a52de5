"""The loss over supervised positions equals the model's own."""

from __future__ import annotations

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import get_peft_model

from qtuning_peft import SideTuningConfig
from qtuning_peft.loss import supervised_loss


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_equals_the_models_own_loss_and_gradient(family: str) -> None:
    ids, labels = token_ids(3, 10), token_ids(3, 10)
    labels[:, :4] = -100
    labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    model = get_peft_model(tiny(family), SideTuningConfig(r=4, task_type="CAUSAL_LM")).double()
    randomize_side_network(model)
    results = []
    for loss in (
        model(input_ids=ids, labels=labels, attention_mask=mask).loss,
        supervised_loss(model, ids, labels, attention_mask=mask),
    ):
        gradient = torch.autograd.grad(loss, list(side_parameters(model).values()))
        results.append((loss, gradient))
    # Both take the logits' softmax in float32.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_divides_by_what_the_trainer_counts() -> None:
    model, ids = tiny(), token_ids(2, 6)
    assert supervised_loss(model, ids, ids, num_items=5).item() == pytest.approx(
        supervised_loss(model, ids, ids).item() * 2
    )


def test_nothing_supervised_is_zero() -> None:
    assert supervised_loss(tiny(), token_ids(), torch.full((2, 12), -100)).item() == 0.0
