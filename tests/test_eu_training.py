"""Pruning every mini-batch while training: by the pass that trains beside a side network, by one more for LoRA."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, word_tokenizer
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from qtuning_peft import (
    EUPruner,
    EUPruningCallback,
    EUScorer,
    HiddenStateCacheCallback,
    PrefixCachingCallback,
    SideTuningConfig,
    SideTuningTrainer,
)
from qtuning_peft.head import causal_model
from qtuning_peft.side_tuning.network.block import SideBlock

TRAINERS = pytest.mark.parametrize(
    ("method", "kind"), [("lora", Trainer), ("qst", Trainer), ("qst", SideTuningTrainer)]
)
METHODS = pytest.mark.parametrize("method", ["lora", "qst"])


def rows_of_tokens(count: int = 32, seed: int = 0, prefix: int = 0) -> list[dict[str, list[int]]]:
    draw = random.Random(seed)
    begin = [draw.randrange(3, 98) for _ in range(prefix)]
    rows = [[draw.randrange(3, 98) for _ in range(draw.randrange(8, 20))] for _ in range(count)]
    return [{"input_ids": begin + row, "labels": [-100] * (prefix + 3) + row[3:]} for row in rows]


def adapted(method: str) -> Any:
    """A model whose adapter changes what it predicts."""
    torch.manual_seed(0)
    config = (
        LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
        if method == "lora"
        else SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM")
    )
    model = get_peft_model(tiny(), config)
    randomize_side_network(model, scale=0.5)
    return model


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 8, "num_train_epochs": 1, "logging_steps": 1,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**settings | overrides)


def trainer_of(
    model: nn.Module, folder: Path, rows: list[Any], pruner: EUPruner | None, kind: type[Trainer] = Trainer,
    callbacks: Iterable[TrainerCallback] = (), **overrides: Any,
) -> Trainer:  # fmt: skip
    collator = overrides.pop("data_collator", None) or DataCollatorForSeq2Seq(word_tokenizer())
    trainer = kind(
        model, arguments(folder, **overrides), train_dataset=rows, data_collator=collator, callbacks=[*callbacks]
    )
    if pruner is not None:
        trainer.add_callback(EUPruningCallback(trainer, pruner))
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def batch_sizes(model: nn.Module, kind: type | str) -> list[int]:
    """Fills, as the model runs, with the batch sizes that the first module of a kind, or path, saw."""
    seen: list[int] = []
    modules = [m for n, m in model.named_modules() if (n.endswith(kind) if isinstance(kind, str) else type(m) is kind)]
    modules[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    return seen


def kept_of(model: nn.Module, rows: list[Any], pruner: EUPruner) -> list[dict[str, Any]]:
    """What the pruner keeps of a batch under the model as it is now."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    scored = EUScorer(model, scores=pruner.scores)(columns)
    options = {"sample_ratio": pruner.sample_ratio, "token_ratio": pruner.token_ratio, "strategy": pruner.strategy}
    kept = EUPruner(**options, per_batch=True)({**scored, "index": [*range(len(rows))]})
    return [dict(zip(kept, values, strict=True)) for values in zip(*kept.values(), strict=True)]


def mean_loss(model: nn.Module, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Over the supervised tokens of `rows`, row by row, with all logits."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1]
        targets = torch.tensor([int(label) for label in row["labels"]])[1:]
        losses.append(nn.functional.cross_entropy(logits[targets != -100], targets[targets != -100], reduction="none"))
    return torch.cat(losses).mean()


def supervised(rows: list[dict[str, Any]]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"])


@TRAINERS
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_is_that_of_the_kept_tokens_alone(
    method: str, kind: type[Trainer], accumulation: int, tmp_path: Path
) -> None:
    rows, pruner, rate = rows_of_tokens(16), EUPruner(sample_ratio=0.5, token_ratio=0.5), 1e-2
    model = adapted(method)
    batches = [rows[start::accumulation] for start in range(accumulation)]
    data = [row for batch in batches for row in batch]
    trained = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in trained.items() if p.requires_grad}
    # By hand: each batch's mean over what is kept of it, weighted by the tokens it had.
    kept = [kept_of(model, batch, pruner) for batch in batches]
    assert any(row["quadrant"] == "misconception" for batch in kept for row in batch)
    assert supervised([row for batch in kept for row in batch]) < 0.5 * supervised(rows)
    weights = [supervised(batch) / supervised(rows) for batch in batches]
    loss = sum(w * mean_loss(model, batch) for w, batch in zip(weights, kept, strict=True))
    gradients = dict(zip(before, torch.autograd.grad(loss, [trained[name] for name in before]), strict=True))

    trainer = trainer_of(
        model, tmp_path, data, pruner, kind, per_device_train_batch_size=16 // accumulation, max_steps=1,
        gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0.0, learning_rate=rate,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([loss.item()], rel=1e-3)
    for name, gradient in gradients.items():
        step = (before[name] - trained[name].detach()) / rate
        torch.testing.assert_close(step, gradient, atol=1e-4, rtol=1e-3, msg=lambda said, name=name: f"{name}: {said}")


@TRAINERS
def test_keeping_everything_is_no_pruning(method: str, kind: type[Trainer], tmp_path: Path) -> None:
    losses = []
    for pruner in (None, EUPruner(sample_ratio=1.0, token_ratio=1.0)):
        trainer = trainer_of(
            adapted(method), tmp_path, rows_of_tokens(32), pruner, kind, gradient_accumulation_steps=2, seed=3,
            per_device_train_batch_size=4,
        )  # fmt: skip
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert logged(trainer, "kept_tokens") == [1.0] * 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@METHODS
def test_scores_are_those_of_the_current_model(method: str, tmp_path: Path) -> None:
    """Not the base's: its choice is another, and a later step's is another than the first's."""
    rows, pruner, model = rows_of_tokens(16), EUPruner(sample_ratio=0.5), adapted(method)
    seen: list[list[list[int]]] = []
    expected = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            expected.append(sorted(row["labels"][3:] for row in map(listed, kept_of(model, rows, pruner))))

    trainer = trainer_of(
        model, tmp_path, rows, pruner, callbacks=[Look()], per_device_train_batch_size=16, max_steps=4,
        learning_rate=0.3,
    )  # fmt: skip
    # What the loss reads of the labels.
    loss_function = causal_model(model).loss_function
    causal_model(model).loss_function = lambda logits, labels, *args, **kwargs: (
        seen.append(sorted([label for label in row if label != -100] for row in labels.tolist() if max(row) > -100)),
        loss_function(logits, labels, *args, **kwargs),
    )[1]
    with model.disable_adapter():
        of_base = sorted(row["labels"][3:] for row in map(listed, kept_of(model, rows, pruner)))
    trainer.train()
    assert seen == expected
    assert of_base != seen[0] != seen[-1]


def listed(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"labels": [int(label) for label in row["labels"]]}


@METHODS
def test_nothing_runs_twice_beside_a_side_network_and_once_more_with_lora(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    base_batches = batch_sizes(model, "layers.0")
    side_batches = batch_sizes(model, SideBlock) if method == "qst" else []
    trainer = trainer_of(model, tmp_path, rows_of_tokens(32), EUPruner(sample_ratio=0.5, token_ratio=0.5))
    read: list[torch.Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(lambda gradient: read.append(gradient.ne(0).any(-1)))

    causal_model(model).get_decoder().register_forward_hook(look)
    step = trainer.training_step
    trainer.train()
    assert base_batches == ([8] * 4 if method == "qst" else [8, 4] * 4)
    # One pass over the supervised positions of all rows, one behind the other.
    assert side_batches == ([1] * 4 if method == "qst" else [])
    # The loss has a gradient at the kept rows' tokens, and nowhere else.
    assert [int(positions.any(-1).sum()) for positions in read] == [4] * 4
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EUPruningCallback))
    kept, samples, kept_tokens, tokens = callback.counts
    assert (kept, samples, tokens) == (16, 32, supervised(rows_of_tokens(32)))
    assert kept_tokens == sum(int(positions.sum()) for positions in read)
    assert logged(trainer, "kept_samples") == [0.5] * 4
    assert len(logged(trainer, "kept_tokens")) == 4
    # Evaluation sees everything, and the trainer has its own step back.
    base_batches.clear()
    assert trainer.evaluate(rows_of_tokens(8, seed=1))["eval_loss"] == pytest.approx(
        mean_loss(model.eval(), rows_of_tokens(8, seed=1)).item(), rel=1e-4
    )
    assert base_batches[0] == 8
    assert trainer.training_step == step


def test_caches_change_nothing(tmp_path: Path) -> None:
    """A prompt prefix that is left out, and states from an earlier epoch, give the same choice and the same steps."""
    losses = []
    for caches in ((), (PrefixCachingCallback(), HiddenStateCacheCallback(0.01))):
        model = adapted("qst").to(torch.bfloat16)
        ran = batch_sizes(model, "layers.0")
        trainer = trainer_of(
            model, tmp_path, rows_of_tokens(16, prefix=20), EUPruner(sample_ratio=0.5, token_ratio=0.5),
            callbacks=caches, num_train_epochs=3,
        )  # fmt: skip
        trainer.train()
        losses.append(logged(trainer, "loss"))
    # The prefix once, each row once.
    assert ran == [1, 8, 8]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@METHODS
def test_packed_samples_are_told_apart(method: str, tmp_path: Path) -> None:
    """As many rows padded: the same samples are kept, and the loss is the same."""
    flat = DataCollatorWithFlattening(return_position_ids=True, separator_id=-100)
    losses, lengths = [], []
    for collate in (None, flat):
        model = adapted(method)
        model.get_base_model().model.layers[0].register_forward_pre_hook(
            lambda module, args: lengths.append(args[0].shape[1]) if torch.is_grad_enabled() else None
        )
        trainer = trainer_of(
            model, tmp_path, rows_of_tokens(8), EUPruner(sample_ratio=0.5), data_collator=collate, max_steps=1
        )
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    if method == "lora":
        # Dropped samples are gone from the row.
        assert lengths[-1] < 0.7 * sum(len(row["input_ids"]) for row in rows_of_tokens(8))


def test_trl_trains_with_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")

    model, rows, pruner = adapted("qst"), rows_of_tokens(16), EUPruner(sample_ratio=0.5, token_ratio=0.5)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=1,
            report_to="none", use_cpu=True, logging_steps=1, save_strategy="no",
            train_sampling_strategy="sequential", bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    trainer.add_callback(EUPruningCallback(trainer, pruner))
    batches = rows[:8], rows[8:]
    weights = [supervised(batch) / supervised(rows) for batch in batches]
    kept = [kept_of(model, batch, pruner) for batch in batches]
    expected = sum(w * mean_loss(model, batch) for w, batch in zip(weights, kept, strict=True))
    before = {name: p.detach().clone() for name, p in side_parameters(trainer.model).items()}
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected.item()], rel=1e-3)
    assert logged(trainer, "kept_samples") == [0.5]
    assert any((p != before[name]).any() for name, p in side_parameters(trainer.model).items())


def test_packed_batches_of_trl_lose_their_dropped_tokens(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    model = adapted("lora")
    lengths: list[int] = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1]) if module.training else None
    )
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_length=64, packing=True, report_to="none",
            use_cpu=True, save_strategy="no", max_steps=2, logging_steps=1,
        ),
        train_dataset=Dataset.from_list(rows_of_tokens(32)),
        processing_class=word_tokenizer(),
    )  # fmt: skip
    callback = EUPruningCallback(trainer, EUPruner(sample_ratio=0.5))
    trainer.add_callback(callback)
    trainer.train()
    kept, samples, *_ = callback.counts
    assert samples > 8
    assert kept * 2 == pytest.approx(samples, abs=2)
    assert max(lengths) < 100


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


@METHODS
def test_of_equal_samples_the_share_is_kept(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(adapted(method), tmp_path, rows_of_tokens(1) * 8, EUPruner(sample_ratio=0.25, token_ratio=0.5))
    trainer.train()
    assert logged(trainer, "kept_samples") == [0.25]


@METHODS
def test_a_batch_without_supervised_tokens_and_one_sample_train(method: str, tmp_path: Path) -> None:
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in rows_of_tokens(8)] + rows_of_tokens(9)
    trainer = trainer_of(adapted(method), tmp_path, rows, EUPruner(sample_ratio=0.25, token_ratio=0.5))
    trainer.train()
    # The last batch has one sample, which stays.
    assert logged(trainer, "kept_samples") == [0.25, 1.0]
    assert all(loss == loss for loss in logged(trainer, "loss"))


@METHODS
def test_an_interrupted_training_leaves_nothing_to_the_next(method: str, tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model, interrupt = adapted(method), Interrupt()
    base_batches = batch_sizes(model, "layers.0")
    trainer = trainer_of(model, tmp_path, rows_of_tokens(32), EUPruner(sample_ratio=0.5), callbacks=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(interrupt)
    trainer.train()
    assert base_batches == ([8] * 4 if method == "qst" else [8, 4] * 4)
    assert logged(trainer, "kept_samples") == [0.5] * 4
    # Another trainer of the same model prunes nothing.
    base_batches.clear()
    trainer_of(model, tmp_path, rows_of_tokens(8), None).train()
    assert base_batches == [8]


def test_batches_may_be_loaded_by_other_processes(tmp_path: Path) -> None:
    trainer = trainer_of(
        adapted("qst"), tmp_path, rows_of_tokens(16), EUPruner(sample_ratio=0.5), dataloader_num_workers=1
    )
    trainer.train()
    assert logged(trainer, "kept_samples") == [0.5] * 2


@METHODS
def test_el2n_can_choose_in_a_batch(method: str, tmp_path: Path) -> None:
    rows, model, pruner = rows_of_tokens(6), adapted(method), EUPruner(sample_ratio=0.5, strategy="el2n")
    expected = mean_loss(model, kept_of(model, rows, pruner)).item()
    trainer = trainer_of(model, tmp_path, rows, pruner)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected], rel=1e-4)


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
        EUPruningCallback(None, EUPruner(**options))


@METHODS
def test_a_loss_outside_of_the_model_sees_pruned_labels_or_is_refused(method: str, tmp_path: Path) -> None:
    rows, pruner = rows_of_tokens(8), EUPruner(sample_ratio=0.5)
    trainer = trainer_of(adapted(method), tmp_path, rows, pruner, label_smoothing_factor=1e-9, max_grad_norm=0.0)
    if method == "qst":
        with pytest.raises(ValueError, match="without giving the model labels"):
            trainer.train()
        return
    expected = mean_loss(trainer.model, kept_of(trainer.model, rows, pruner)).item()
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected], rel=1e-4)


def test_output_that_is_not_finite_is_said(tmp_path: Path) -> None:
    model = adapted("qst")
    with torch.no_grad():
        model.get_base_model().lm_head.weight[:] = float("nan")
    with pytest.raises(ValueError, match="not finite for a batch"):
        trainer_of(model, tmp_path, rows_of_tokens(8), EUPruner(sample_ratio=0.5)).train()
