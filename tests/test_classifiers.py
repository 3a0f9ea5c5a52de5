"""Classifiers of rows: the side network runs at the last token alone, and reuses the base's work as elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import config_of, randomize_side_network, token_ids
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from qtuning_peft import HiddenStateCacheCallback, SideTuningConfig, SideTuningTrainer
from qtuning_peft.states import cache_states, reuse_of

PADDING, PREFIX = 0, 20


def classifier(**fields: Any) -> Any:
    """With a side network that does something, and centers, so that no step measures them."""
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=3))
    base.config.pad_token_id = PADDING
    config = SideTuningConfig(reduction_factor=4, tap_every=1, task_type="SEQ_CLS", **fields)
    model: Any = get_peft_model(base, config).train()
    randomize_side_network(model)
    return model


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    """Four rows that begin alike, two of them padded; the padding token is also one of the text."""
    ids = token_ids(4, 30).clamp_min(1)
    ids[:, :PREFIX] = ids[0, :PREFIX]
    ids[:, 3] = PADDING
    mask = torch.ones_like(ids)
    for row, length in ((1, 27), (2, 24)):
        ids[row] = torch.cat([ids.new_zeros(30 - length), ids[row, :length]]) if left else ids[row]
        mask[row, : 30 - length] = 0 if left else 1
        if not left:
            ids[row, length:], mask[row, length:] = PADDING, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 1])}


def positions_run(model: Any) -> list[int]:
    """Gets the number of positions of every later pass of the side network."""
    found: list[int] = []
    norm = next(module for name, module in model.named_modules() if name.endswith("qst_side_network.default.norm"))
    norm.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[:-1].numel()))
    return found


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: own.grad.clone() for name, own in model.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("left", [False, True])
def test_one_position_of_a_row_is_enough(left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients are those of a side network that runs everywhere, wherever rows are padded."""
    model, inputs = classifier(), batch(left)
    found = positions_run(model)
    own, logits = gradients(model, inputs), model(**inputs).logits
    with torch.no_grad():
        evaluated = model.eval()(**inputs).logits
    assert found == [4, 4, 4]
    monkeypatch.setattr("qtuning_peft.side_tuning.peft.layer.read_positions", lambda: None)
    expected = gradients(model.train(), inputs)
    assert found[3:] == [120]
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(evaluated, logits, rtol=1e-5, atol=1e-6)
    assert own.keys() == expected.keys()
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [False, True])
def test_examples_in_front_are_computed_once(training: bool) -> None:
    """In evaluation too, as nobody reads them."""
    model, inputs = classifier().train(training), batch()
    expected = model(**inputs).logits
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    lengths: list[int] = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.set_grad_enabled(training):
        for _ in range(2):
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert lengths == [PREFIX, 10, 10]


@pytest.mark.parametrize("training", [False, True])
def test_a_row_that_ends_with_the_prefix(training: bool) -> None:
    """Its class is read within the prefix, of which no side network knows."""
    model, inputs = classifier().train(training), batch()
    inputs["attention_mask"][0, PREFIX:] = 0
    inputs["input_ids"][0, PREFIX:] = model.config.pad_token_id
    expected = gradients(model, inputs), model(**inputs).logits
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(model(**inputs).logits, expected[1], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[0][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_cache_holds_one_position_of_a_row() -> None:
    model, inputs = classifier(), batch()
    expected = gradients(model, inputs)
    cache_states(model, 2**20)
    for _ in range(2):
        for name, gradient in gradients(model, inputs).items():
            torch.testing.assert_close(gradient, expected[name], rtol=5e-2, atol=5e-3, msg=name)
    taps = len(reuse_of(model).cache.layers)
    assert reuse_of(model).cache.used == 4 * (taps + 2) * model.config.hidden_size * 2


def test_a_folder_of_states_is_any_classifiers_of_the_base(tmp_path: Path) -> None:
    """The head is new in every run; the base's states are not."""
    inputs = batch()
    rows = [
        {"input_ids": ids[:length].tolist(), "labels": int(label)}
        for ids, length, label in zip(inputs["input_ids"], (30, 27, 24, 30), inputs["labels"], strict=True)
    ]

    def train(seed: int) -> list[int]:
        model = classifier()
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.get_base_model().score.weight)
        passes: list[int] = []
        model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], save_strategy="no", num_train_epochs=2,
            per_device_train_batch_size=2, disable_tqdm=True, seed=seed,
        )  # fmt: skip

        def collate(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            longest = max(len(row["input_ids"]) for row in found)
            ids = [row["input_ids"] + [PADDING] * (longest - len(row["input_ids"])) for row in found]
            mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in found]
            return {name: torch.tensor(values) for name, values in (
                ("input_ids", ids), ("attention_mask", mask), ("labels", [row["labels"] for row in found]),
            )}  # fmt: skip

        SideTuningTrainer(
            model, arguments, train_dataset=Dataset.from_list(rows), data_collator=collate,
            callbacks=[HiddenStateCacheCallback(folder=tmp_path / "cache")],
        ).train()  # fmt: skip
        return passes

    assert train(0) == [1, 2, 2]  # the prefix, and what follows it
    assert train(1) == [1, 2]  # a run's first batch shows what the base returns
