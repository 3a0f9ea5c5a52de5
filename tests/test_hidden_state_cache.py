"""Hidden states cached from epoch to epoch: the base runs once for each row, and what is learned is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids, word_tokenizer
from datasets import Dataset
from peft import get_peft_model
from test_prefix_caching import PREFIX, batch, loss_and_gradients, passed_lengths, rows_of
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from qtuning_peft import HiddenStateCacheCallback, SideTuningConfig, SideTuningTrainer, compute_states
from qtuning_peft.states import cache_states, reuse_of
from qtuning_peft.trainer import store_in

PLENTY = 2**30


def side_tuned(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    config = SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM", **{"tap_every": 1, **fields})
    model = get_peft_model(tiny().to(dtype), config).train()
    randomize_side_network(model)
    return model


@pytest.mark.parametrize("prefix", [0, PREFIX])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_base_runs_once_for_each_row(dtype: torch.dtype, prefix: int) -> None:
    """Loss and gradient of the second pass are the first's: exactly of a 16-bit base, rounded of one in float32."""
    model, inputs = side_tuned(dtype), batch()
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :prefix].tolist())
    expected = loss_and_gradients(model, inputs)
    cache_states(model, PLENTY)
    lengths = passed_lengths(model)
    for attempt in range(2):
        loss, gradients = loss_and_gradients(model, inputs)
        # Only what is read again is rounded.
        tolerance = 1e-6 if dtype == torch.bfloat16 or not attempt else 5e-3
        assert loss == pytest.approx(expected[0], rel=tolerance)
        for name, gradient in gradients.items():
            assert (gradient - expected[1][name]).norm() <= 10 * tolerance * expected[1][name].norm() + 1e-6
    assert lengths == [32 - prefix]


def test_rows_are_found_again_in_other_batches() -> None:
    """In another order, with other neighbours, and so with other padding; a new row brings its whole batch back."""
    model, inputs = side_tuned(torch.bfloat16), batch()
    lengths = passed_lengths(model)
    cache_states(model, PLENTY)
    loss_and_gradients(model, inputs)
    for chosen in ([2, 0], [1, 2], [2]):
        length = int(inputs["attention_mask"][chosen].sum(1).max())
        part = {name: tensor[chosen, :length] for name, tensor in inputs.items()}
        loss, _ = loss_and_gradients(model, part)
        reuse_of(model).cache, cache = None, reuse_of(model).cache
        assert loss == pytest.approx(loss_and_gradients(model, part)[0], rel=2e-2)
        reuse_of(model).cache = cache
    assert lengths == [32, 32, 29, 25]  # the first, and those that were to compare
    part["input_ids"][0, 1] += 1
    loss_and_gradients(model, part)
    assert lengths[4:] == [25]


def test_a_row_is_not_another_that_begins_with_the_prefix() -> None:
    """Their tokens are the same once the prefix is left out, their states are not."""
    model, inputs = side_tuned(torch.bfloat16), batch()
    reuse_of(model).cache_prefix(inputs["input_ids"][0, :PREFIX].tolist())
    without = {name: tensor[:, PREFIX:] for name, tensor in inputs.items()}
    expected = [loss_and_gradients(model, part)[0] for part in (inputs, without)]
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    cache_states(model, PLENTY)
    for _ in range(2):
        assert [loss_and_gradients(model, part)[0] for part in (inputs, without)] == pytest.approx(expected, rel=1e-6)
    # A row is the same row behind another prefix, or none.
    lengths = passed_lengths(model)
    for prefix in (PREFIX - 1, 0):
        reuse_of(model).cache_prefix(inputs["input_ids"][0, :prefix].tolist())
        assert [loss_and_gradients(model, part)[0] for part in (inputs, without)] == pytest.approx(expected, rel=1e-6)
    assert lengths == [PREFIX - 1]


def test_states_are_those_of_one_adapters_taps() -> None:
    """An adapter that taps other blocks has the base run."""
    model, inputs = side_tuned(), batch()
    model.add_adapter(
        "other", SideTuningConfig(reduction_factor=4, tap_every=1, layers_to_transform=[0], task_type="CAUSAL_LM")
    )
    cache_states(model, PLENTY)
    loss_and_gradients(model, inputs)
    model.set_adapter("other")
    lengths = passed_lengths(model)
    for _ in range(2):
        loss_and_gradients(model, inputs)
    assert lengths == [32, 32]


def test_a_budget_is_kept_to() -> None:
    """What does not fit is computed again, every time."""
    model, inputs = side_tuned(), batch()
    one_row = 2 * 5 * 11 * 64  # embeddings, three taps and the norm, where the loss reads them
    cache_states(model, one_row)
    lengths = passed_lengths(model)
    for _ in range(2):
        loss_and_gradients(model, inputs)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    loss_and_gradients(model, first)
    assert reuse_of(model).cache.used == one_row
    assert lengths == [32, 32]


@pytest.mark.parametrize("name", ["padded at the left", "packed", "attention", "evaluation"])
def test_what_is_not_kept(name: str) -> None:
    """Rows whose states depend on more than their tokens; side blocks that need more than states; evaluation."""
    model, inputs = side_tuned(side_attention=name == "attention"), batch()
    cache_states(model, PLENTY)
    lengths = passed_lengths(model)
    if name == "padded at the left":
        inputs["attention_mask"][2] = inputs["attention_mask"][2].flip(0)
    elif name == "packed":
        del inputs["attention_mask"]
        inputs["position_ids"] = torch.cat([torch.arange(24), torch.arange(8)]).expand(3, -1)
    for _ in range(2):
        with torch.set_grad_enabled(name != "evaluation"):
            model(**inputs)
    assert lengths == [32, 32]
    assert reuse_of(model).cache.used == 0


def test_the_callback_keeps_for_several_epochs_alone(tmp_path: Any) -> None:
    """Three epochs with states cache end where three without end, and nothing is held afterwards."""
    rows = rows_of(batch(prefix=0))
    rows += [{**row, "input_ids": [5, *row["input_ids"][1:]]} for row in rows]
    weights = []
    for callbacks, passes in (([HiddenStateCacheCallback(1)], 2), ([], 6)):
        model = side_tuned(torch.bfloat16)
        trainer = SideTuningTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=3, learning_rate=1e-3,
                use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False, seed=3,
            ),
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
            callbacks=list(callbacks),
        )  # fmt: skip
        lengths = passed_lengths(model)
        trainer.train()
        assert len(lengths) == passes
        assert reuse_of(model).cache is None
        weights.append({name: value.detach().clone() for name, value in side_parameters(model).items()})
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-2, atol=1e-3)


def test_a_budget_of_nothing_is_refused() -> None:
    """One sentence."""
    with pytest.raises(ValueError, match="gibibytes is 0; give a number above 0"):
        HiddenStateCacheCallback(0)


def test_a_mask_of_floating_point_numbers_counts_tokens_too() -> None:
    model, ids = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM")).train(), token_ids()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    losses = []
    for kind in (torch.int64, torch.float32):
        cache_states(model, 2**30)
        losses.append([model(input_ids=ids, attention_mask=mask.to(kind), labels=ids).loss for _ in range(2)])
    assert losses[0] == losses[1]


def folder_rows() -> Dataset:
    ids = token_ids(8, 16).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids])


def trained_from(folder: Path, output: Path, **fields: Any) -> tuple[Any, list[int]]:
    model = side_tuned(torch.bfloat16, center_taps=False, **fields)
    lengths = passed_lengths(model)
    arguments = TrainingArguments(
        output, num_train_epochs=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        seed=0, save_strategy="no",
    )  # fmt: skip
    trainer = SideTuningTrainer(
        model, arguments, train_dataset=folder_rows(), data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        callbacks=[HiddenStateCacheCallback(folder=folder)],
    )  # fmt: skip
    trainer.train()
    return model, lengths


def test_a_folder_outlives_the_run(tmp_path: Path) -> None:
    """Filled in the first epoch, read by every run that follows; a damaged file is computed anew."""
    folder = tmp_path / "cache"
    first, lengths = trained_from(folder, tmp_path / "out")
    assert len(lengths) == 2  # two batches, in the first epoch alone
    files = sorted(folder.glob("*/*.states"))
    assert len(files) == 8
    second, lengths = trained_from(folder, tmp_path / "out")
    assert len(lengths) == 1  # which shows what the decoder returns
    for name, parameter in side_parameters(first).items():
        torch.testing.assert_close(side_parameters(second)[name], parameter, rtol=1e-3, atol=1e-5)
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    trained_from(folder, tmp_path / "out")
    assert files[0].read_bytes() == whole
    # Other taps are other states.
    trained_from(folder, tmp_path / "out", tap_every=2)
    assert len(list(folder.iterdir())) == 2


def test_stored_states_are_read_by_a_live_trainer(tmp_path: Path) -> None:
    """A folder of `compute_states` serves the first epoch too; one of another base or of other taps is refused."""
    config = SideTuningConfig(reduction_factor=4, tap_every=1)
    base = tiny().to(torch.bfloat16)
    compute_states(folder_rows(), base, None, config, tmp_path / "states", progress=False)
    _, lengths = trained_from(tmp_path / "states", tmp_path / "out")
    assert len(lengths) == 1
    with pytest.raises(ValueError, match=r"are of blocks \[0, 1, 2\], not of \[0, 2\]"):
        trained_from(tmp_path / "states", tmp_path / "out", tap_every=2)
    other = get_peft_model(tiny(), config).train()
    with pytest.raises(ValueError, match="whose weights are not this base's"):
        store_in(tmp_path / "states", other)


def test_memory_or_a_folder() -> None:
    with pytest.raises(ValueError, match="gibibytes is None and folder None; give one"):
        HiddenStateCacheCallback()
    with pytest.raises(ValueError, match="gibibytes is 1 and folder x; give one"):
        HiddenStateCacheCallback(1, "x")
