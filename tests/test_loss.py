"""The chunked loss equals the model's own, in value and gradient, and holds no logits."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qtuning_peft import SideTuningConfig, SideTuningTrainer
from qtuning_peft import loss as losses
from qtuning_peft.loss import chunked_cross_entropy


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces in every batch, the last not full."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * tiny().config.vocab_size)


def batch() -> dict[str, Tensor]:
    ids, labels = token_ids(3, 10), token_ids(3, 10)
    labels[:, :4] = -100
    labels[1, 7:] = -100
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def side_tuned(family: str = "llama") -> PeftModel:
    model = get_peft_model(tiny(family), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2"])
def test_equals_the_models_own_loss_and_gradient(family: str) -> None:
    model = side_tuned(family).double()
    results = []
    for loss in (model(**batch()).loss, chunked_cross_entropy(model, **batch())):
        gradient = torch.autograd.grad(loss, list(side_parameters(model).values()))
        results.append((loss, gradient))
    # The model's own takes the logits' softmax in float32.
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_equals_the_models_own_where_the_head_is_trained() -> None:
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    weights = [p for p in model.parameters() if p.requires_grad]
    results = [
        (loss, torch.autograd.grad(loss, weights))
        for loss in (model(**batch()).loss, chunked_cross_entropy(model, **batch()))
    ]
    torch.testing.assert_close(*results)


def test_holds_no_logits_for_backward() -> None:
    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive.add(self)

    alive: WeakSet[Held] = WeakSet()
    model = side_tuned()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        loss = chunked_cross_entropy(model, **batch())
        assert alive
        assert not any(model.config.vocab_size in held.tensor.shape for held in alive)
        naive = model(**batch()).loss
        assert any(model.config.vocab_size in held.tensor.shape for held in alive)
    assert loss.item() == pytest.approx(naive.item())


def test_divides_by_what_the_trainer_counts() -> None:
    model, ids = tiny(), token_ids(2, 6)
    assert chunked_cross_entropy(model, ids, ids, num_items=5).item() == pytest.approx(
        chunked_cross_entropy(model, ids, ids).item() * 2
    )


def test_nothing_supervised_is_zero() -> None:
    ids, labels = token_ids(), torch.full((2, 12), -100)
    assert chunked_cross_entropy(tiny(), ids, labels).item() == 0.0
    loss = chunked_cross_entropy(side_tuned(), ids, labels)
    loss.backward()
    assert loss.item() == 0.0


def test_the_models_own_forward_takes_it_on_request() -> None:
    model = side_tuned()
    output = model(**batch(), chunked_loss=True, num_items_in_batch=7)
    torch.testing.assert_close(output.loss, chunked_cross_entropy(model, **batch(), num_items=7))
    assert output.logits is None
    assert model(input_ids=token_ids(), chunked_loss=True).logits is not None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_learns_as_the_stock_one_does(tmp_path: Path, accumulation: int) -> None:
    rows = Dataset.from_list(
        [{"input_ids": i.tolist(), "labels": [-100] * n + i.tolist()[n:]} for n, i in enumerate(token_ids(8, 10))]
    )
    weights, losses_seen = [], []
    for kind in (Trainer, SideTuningTrainer):
        torch.manual_seed(0)
        model = side_tuned()
        trainer = kind(
            model=model,
            args=TrainingArguments(
                str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
                learning_rate=1e-2, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True,
            ),
            train_dataset=rows, eval_dataset=rows,
        )  # fmt: skip
        trainer.train()
        losses_seen.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        losses_seen[-1].append(trainer.evaluate()["eval_loss"])
        weights.append(torch.cat([p.detach().flatten() for p in side_parameters(model).values()]))
        assert trainer.predict(rows).predictions.shape == (8, 10, model.config.vocab_size)
    assert losses_seen[1] == pytest.approx(losses_seen[0], rel=1e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
