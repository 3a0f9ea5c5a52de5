"""Pruning every mini-batch while training, and the base's states that a side network shares with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EVERY_PART, FAMILIES, randomize_side_network, side_parameters, tiny, token_ids, word_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from qtuning_peft import EUPruner, EUPruningCallback, EUScorer, SideTuningConfig
from qtuning_peft.eu_plane.training import PruningCollator
from qtuning_peft.side_tuning.follow import record_states
from qtuning_peft.side_tuning.network.block import SideBlock
from qtuning_peft.states import reuse_of


def rows_of_tokens(count: int = 32, seed: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    rows = [[draw.randrange(3, 100) for _ in range(draw.randrange(6, 20))] for _ in range(count)]
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in rows]


def adapted(method: str) -> Any:
    torch.manual_seed(0)
    config = (
        LoraConfig(task_type="CAUSAL_LM")
        if method == "lora"
        else SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM")
    )
    return get_peft_model(tiny(), config)


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 1, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "use_cpu": True,
        "disable_tqdm": True, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingArguments(**settings | overrides)


def batch_sizes(model: torch.nn.Module, kind: type | str) -> list[int]:
    """Fills, as the model runs, with the batch sizes that the first module of a kind, or path, saw."""
    seen: list[int] = []
    modules = [m for n, m in model.named_modules() if (n.endswith(kind) if isinstance(kind, str) else type(m) is kind)]
    modules[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    return seen


@pytest.mark.parametrize("method", ["lora", "qst"])
def test_every_batch_is_pruned_as_its_scores_say(method: str) -> None:
    model, rows = adapted(method), rows_of_tokens(8)
    pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5, per_batch=True)
    batch = PruningCollator(DataCollatorForSeq2Seq(word_tokenizer()), model, pruner)(rows)
    with model.disable_adapter():
        scored = EUScorer(model)({name: [row[name] for row in rows] for name in rows[0]})
    expected = pruner({**scored, "index": list(range(8))})
    assert batch["labels"].shape[0] == len(expected["labels"]) == 4
    for ours, mask, input_ids, labels in zip(
        batch["labels"], batch["attention_mask"], expected["input_ids"], expected["labels"], strict=True
    ):
        assert ours[mask.bool()].tolist() == list(labels)
        assert mask.sum() == len(input_ids)


@pytest.mark.parametrize("method", ["lora", "qst"])
def test_trainer_trains_on_what_is_kept(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    base_batches, side_batches = batch_sizes(model, "layers.0"), []
    if method == "qst":
        side_batches = batch_sizes(model, SideBlock)
    callback = EUPruningCallback(EUPruner(sample_ratio=0.5, token_ratio=0.5))
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows_of_tokens(32),
        eval_dataset=rows_of_tokens(8, seed=1),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        callbacks=[callback],
    )
    trainer.train()
    if method == "qst":
        # One pass of the base for each batch of eight; the side network sees the kept half alone.
        assert base_batches == [8] * 4
        assert side_batches == [4] * 4
        assert reuse_of(model).waiting == []
    else:
        assert sorted(base_batches) == [4] * 4 + [8] * 4
    logs = [entry for entry in trainer.state.log_history if "kept_samples" in entry]
    assert logs
    assert all(entry["kept_samples"] == 0.5 and 0 < entry["kept_tokens"] < 0.6 for entry in logs)
    assert callback.collator.kept_samples == 16
    # Evaluation sees everything.
    side_batches.clear()
    trainer.evaluate()
    assert trainer.get_train_dataloader().collate_fn is not callback.collator
    if method == "qst":
        assert side_batches == [8]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_divides_by_the_tokens_that_were_kept(accumulation: int, tmp_path: Path) -> None:
    rows, ratio = rows_of_tokens(16), {"sample_ratio": 0.5, "token_ratio": 0.5}

    def trained(model: Any, data: list[Any], batch: int, steps: int, callbacks: list[Any]) -> Any:
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "max_steps": 1}
        settings |= {"train_sampling_strategy": "sequential", "optim": "sgd", "max_grad_norm": 0.0}
        Trainer(
            model,
            arguments(tmp_path, **settings),
            train_dataset=data,
            data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
            callbacks=callbacks,
        ).train()
        return {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}

    model = adapted("qst")
    randomize_side_network(model)
    pruned = trained(model, rows, 16 // accumulation, accumulation, [EUPruningCallback(EUPruner(**ratio))])
    # The same by hand: each batch pruned under the base, then one step over all that was kept.
    by_hand = adapted("qst")
    randomize_side_network(by_hand)
    with by_hand.disable_adapter():
        scored = Dataset.from_dict(EUScorer(by_hand)({name: [row[name] for row in rows] for name in rows[0]}))
    kept = scored.map(EUPruner(**ratio, per_batch=True), batched=True, batch_size=16 // accumulation)
    data = [{name: row[name] for name in ("input_ids", "labels")} for row in kept]
    expected = trained(by_hand, data, len(data), 1, [])
    for name, value in pruned.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4)


def test_packed_samples_are_dropped_with_their_tokens() -> None:
    model, rows = adapted("lora"), rows_of_tokens(8)
    pruner = EUPruner(sample_ratio=0.5, per_batch=True)
    collate = DataCollatorWithFlattening(return_position_ids=True, separator_id=-100)
    packed = PruningCollator(collate, model, pruner)(rows)
    padded = PruningCollator(DataCollatorForSeq2Seq(word_tokenizer()), model, pruner)(rows)
    expected = [
        row[mask.bool()].tolist() for row, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
    ]
    assert packed["input_ids"][0].tolist() == [token for row in expected for token in row]
    assert packed["position_ids"][0].tolist() == [p for row in expected for p in range(len(row))]
    assert (packed["labels"] != -100).sum() == (padded["labels"] != -100).sum()


def test_trl_trains_with_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")

    callback = EUPruningCallback(EUPruner(sample_ratio=0.5, token_ratio=0.5))
    trainer = trl.SFTTrainer(
        tiny(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=4, report_to="none", use_cpu=True,
            logging_steps=1, learning_rate=1e-2, save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows_of_tokens(16)),
        processing_class=word_tokenizer(),
        peft_config=SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM"),
        callbacks=[callback],
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in side_parameters(trainer.model).items()}
    trainer.train()
    assert callback.collator.kept_samples * 2 == callback.collator.samples >= 16
    assert callback.collator.kept_tokens < callback.collator.tokens / 2 + 4
    assert any((p != before[name]).any() for name, p in side_parameters(trainer.model).items())


def test_pruned_data_trains_in_trl_with_its_labels(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")

    scored = Dataset.from_list(rows_of_tokens(16)).map(EUScorer(tiny()), batched=True)
    kept = scored.map(EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(scored), batched=True)
    trainer = trl.SFTTrainer(
        tiny(),
        args=trl.SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=8, report_to="none", use_cpu=True),
        train_dataset=kept,
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum() == sum(kept["supervised_tokens"])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "bloom"])
def test_recorded_states_give_the_same_step_as_the_base(family: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        tiny(family), SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM", **EVERY_PART)
    ).train()
    randomize_side_network(model)
    input_ids = token_ids(4, 9)
    mask = torch.ones_like(input_ids)
    mask[1, 6:] = mask[3, 4:] = 0
    labels = input_ids.masked_fill(mask == 0, -100)
    chosen = torch.tensor([1, 2])

    def step() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(input_ids=input_ids[chosen], attention_mask=mask[chosen], labels=labels[chosen]).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in side_parameters(model).items() if p.grad is not None}

    loss, gradients = step()
    states = record_states(model, input_ids, attention_mask=mask)
    ran = batch_sizes(model, "layers.0" if family not in ("gpt2",) else "h.0")
    reuse_of(model).serve_next(states.rows(chosen))
    replayed_loss, replayed = step()
    assert ran == []
    torch.testing.assert_close(replayed_loss, loss)
    assert gradients.keys() == replayed.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(replayed[name], gradient, atol=1e-5, rtol=1e-4)
    step()
    assert len(ran) == 1


@pytest.mark.parametrize("method", ["lora", "qst"])
def test_a_batch_of_equal_samples_trains(method: str, tmp_path: Path) -> None:
    rows = rows_of_tokens(1) * 8
    callback = EUPruningCallback(EUPruner(sample_ratio=0.25, token_ratio=0.5))
    Trainer(
        adapted(method),
        arguments(tmp_path),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        callbacks=[callback],
    ).train()
    assert callback.collator.kept_samples > 0


@pytest.mark.parametrize("method", ["lora", "qst"])
def test_an_interrupted_training_leaves_nothing_to_the_next(method: str, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, callback = adapted(method), EUPruningCallback(EUPruner(sample_ratio=0.5))
    base_batches = batch_sizes(model, "layers.0")

    class SameLoader(Trainer):
        loader: Any = None

        def get_train_dataloader(self) -> Any:
            SameLoader.loader = SameLoader.loader or super().get_train_dataloader()
            return SameLoader.loader

    def trainer(*callbacks: TrainerCallback) -> Trainer:
        return SameLoader(
            model,
            arguments(tmp_path),
            train_dataset=rows_of_tokens(32),
            data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
            callbacks=list(callbacks),
        )

    with pytest.raises(KeyboardInterrupt):
        trainer(callback, Interrupt()).train()
    base_batches.clear()
    again = trainer(callback)
    again.train()
    # Pruned once, and with a side network no pass of the base is wasted.
    assert callback.collator.kept_samples * 2 == callback.collator.samples == 32
    assert sorted(base_batches) == ([8] * 4 if method == "qst" else [4] * 4 + [8] * 4)
    assert all(entry["kept_samples"] == 0.5 for entry in again.state.log_history if "kept_samples" in entry)


def test_states_are_for_the_same_input_and_outputs_alone() -> None:
    model = adapted("qst").train()
    input_ids, mask = token_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    ran = batch_sizes(model, "layers.0")
    reuse_of(model).serve_next(record_states(model, input_ids, attention_mask=mask))
    ran.clear()
    model(input_ids=input_ids)
    model(input_ids=input_ids, attention_mask=torch.ones_like(mask))
    assert len(model(input_ids=input_ids, attention_mask=mask, output_hidden_states=True).hidden_states) == 4
    assert len(ran) == 3
    model(input_ids=input_ids, attention_mask=mask)
    assert len(ran) == 3


def test_at_most_two_states_wait() -> None:
    model = adapted("qst")
    for seed in range(4):
        reuse_of(model).serve_next(record_states(model, token_ids(2, 8, seed=seed)))
    waiting = reuse_of(model).waiting
    assert [states.input_ids.tolist() for states in waiting] == [token_ids(2, 8, seed=s).tolist() for s in (2, 3)]


def test_packed_batches_of_trl_lose_their_dropped_tokens(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    model = adapted("lora")
    lengths: list[int] = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1]) if module.training else None
    )
    callback = EUPruningCallback(EUPruner(sample_ratio=0.5))
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=64, packing=True, report_to="none",
            use_cpu=True, save_strategy="no", max_steps=2,
        ),
        train_dataset=Dataset.from_list(rows_of_tokens(32)),
        processing_class=word_tokenizer(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert callback.collator.samples > 8
    assert callback.collator.kept_samples * 2 == pytest.approx(callback.collator.samples, abs=3)
    assert max(lengths) < 100


def test_states_of_other_tokens_wait_and_generation_ignores_them() -> None:
    model = adapted("qst").train()
    reuse = reuse_of(model)
    first, second, third = (token_ids(2, 8, seed=s) for s in (1, 2, 3))
    for input_ids in (first, second):
        reuse_of(model).serve_next(record_states(model, input_ids))
    ran = batch_sizes(model, "layers.0")
    model(input_ids=third)
    assert (len(reuse.waiting), len(ran)) == (2, 1)
    model.eval()
    model(input_ids=second)
    assert (len(reuse.waiting), len(ran)) == (2, 2)
    model.train()
    model(input_ids=second)
    assert (len(reuse.waiting), len(ran)) == (0, 2)


def test_recorded_states_are_the_base_alone() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM", **EVERY_PART))
    randomize_side_network(model)
    input_ids = token_ids()
    states = record_states(model, input_ids)
    with torch.no_grad(), model.disable_adapter():
        output = model(input_ids=input_ids, output_hidden_states=True)
    torch.testing.assert_close(states.normed, output.hidden_states[-1], rtol=0, atol=0)
    torch.testing.assert_close(states.embeddings, output.hidden_states[0], rtol=0, atol=0)
    torch.testing.assert_close(states.taps()[1], output.hidden_states[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match="no active side network"):
        record_states(tiny(), input_ids)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_samples": 3}, "sample_ratio is None"),
        ({"sample_ratio": 0.5, "keep_dropped": True}, "keep_dropped is True"),
        ({"sample_ratio": 0.5, "strategy": "ifd"}, "ifd needs a pass of its own"),
        ({"sample_ratio": 0.5, "token_strategy": "rho1"}, "token_reference_error needs a pass of its own"),
        ({"sample_ratio": 0.5, "max_repetition": 0.5}, "max_repetition is 0.5"),
    ],
)
def test_what_a_batch_cannot_do_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EUPruningCallback(EUPruner(**options))


def test_data_loaded_in_other_processes_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        adapted("qst"),
        arguments(tmp_path, dataloader_num_workers=1),
        train_dataset=rows_of_tokens(8),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer()),
        callbacks=[EUPruningCallback(EUPruner(sample_ratio=0.5))],
    )
    with pytest.raises(ValueError, match="dataloader_num_workers is 1"):
        trainer.train()


def test_el2n_can_choose_in_a_batch() -> None:
    model, rows = adapted("qst"), rows_of_tokens(6)
    batch = PruningCollator(
        DataCollatorForSeq2Seq(word_tokenizer()), model, EUPruner(sample_ratio=0.5, strategy="el2n", per_batch=True)
    )(rows)
    with model.disable_adapter():
        scored = EUScorer(model, scores=("el2n",))({name: [row[name] for row in rows] for name in rows[0]})
    best = sorted(np.argsort(scored["el2n"])[-3:])
    assert [
        row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ] == [rows[index]["input_ids"] for index in best]
