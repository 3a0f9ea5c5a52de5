"""Several networks on one pass: each becomes what it would be by itself, live and from stored states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import side_parameters, tiny, token_ids, word_tokenizer
from peft import PeftModel, get_peft_model
from test_stored import base, data, stored
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from qtuning_peft import SideTuningConfig, StatesCollator, SweepTrainer, candidates, model_from_states
from qtuning_peft.sweep import Candidate

CONFIG = SideTuningConfig(reduction_factor=4, layers_to_transform=[0, 2], task_type="CAUSAL_LM")
VALUES = {"learning_rate": [1e-3, 3e-2], "reduction_factor": [4, 8], "seed": [1]}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "use_cpu": True, "remove_unused_columns": False, "logging_steps": 1, "seed": 0, "disable_tqdm": True,
        "prediction_loss_only": True, "save_strategy": "no", "max_grad_norm": 0.5, "weight_decay": 0.1,
    }  # fmt: skip
    return TrainingArguments(folder, **given | settings)


def alone(candidate: Candidate, folder: Path, **settings: Any) -> PeftModel:
    """The same network, trained by itself with plain `Trainer`."""
    model: Any = get_peft_model(base(folder / "base"), candidate.config)
    torch.manual_seed(candidate.seed)  # behind what else draws while a model is made
    model.base_model.model.model.norm.update_layer("default", candidate.config)
    model.set_adapter("default")
    collator = DataCollatorForSeq2Seq(word_tokenizer())
    run = arguments(folder / "alone", learning_rate=candidate.learning_rate, **settings)
    Trainer(model, run, train_dataset=data(), data_collator=collator).train()
    return model


def in_a_sweep(kind: str, folder: Path, sweep: list[Candidate], **settings: Any) -> SweepTrainer:
    run = arguments(folder / "sweep", **settings)
    if kind == "stored":
        states, rows = stored(folder)
        model = model_from_states(states, {candidate.name: candidate.config for candidate in sweep})
        return SweepTrainer(
            model, run, train_dataset=rows, eval_dataset=rows, data_collator=StatesCollator(states), sweep=sweep
        )
    live = get_peft_model(base(folder / "base"), CONFIG)
    collator = DataCollatorForSeq2Seq(word_tokenizer())
    return SweepTrainer(live, run, train_dataset=data(), eval_dataset=data(), data_collator=collator, sweep=sweep)


@pytest.mark.parametrize("kind", ["live", "stored"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_each_becomes_what_it_would_be_alone(kind: str, accumulated: int, tmp_path: Path) -> None:
    """Rates, sizes, clipping and weight decay are each network's own."""
    sweep = candidates(CONFIG, VALUES, 1e-2, 0)
    settings = {} if accumulated == 1 else {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    trainer = in_a_sweep(kind, tmp_path, sweep, **settings)
    trainer.train()
    for candidate in sweep:
        expected = side_parameters(alone(candidate, tmp_path, **settings))
        own = trainer.model.base_model.model.model.norm.qst_side_network[candidate.name].named_parameters()
        found = dict(own)
        assert len(found) == len(expected)
        for name, parameter in expected.items():
            short = name.partition("qst_side_network.default.")[2]
            torch.testing.assert_close(found[short], parameter, rtol=1e-2, atol=1e-3)
    losses = trainer.evaluate()
    assert losses["eval_loss"] == min(losses[f"eval_loss_{candidate.name}"] for candidate in sweep)


def test_live_and_stored_sweeps_agree(tmp_path: Path) -> None:
    sweep = candidates(CONFIG, {"learning_rate": [1e-3, 1e-2], "data_share": [1, 0.5]}, 1e-2, 3)
    live, from_states = (in_a_sweep(kind, tmp_path / kind, sweep) for kind in ("live", "stored"))
    for each in (live, from_states):
        each.train()
    for candidate in sweep:
        key = f"loss_{candidate.name}"
        losses = [[log[key] for log in trainer.state.log_history if key in log] for trainer in (live, from_states)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    # Half of the rows is another training.
    assert live.evaluate()["eval_loss_network_0"] != pytest.approx(live.losses["network_1"], rel=1e-6)


def test_the_best_is_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    sweep = candidates(CONFIG, VALUES, 1e-2, 0)
    trainer = in_a_sweep("stored", tmp_path, sweep)
    trainer.keep_all = True
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    rows = json.loads((tmp_path / "adapter" / "sweep.json").read_text())
    assert [row["best"] for row in rows].count(True) == 1
    assert {row["name"] for row in rows} == {folder.name for folder in (tmp_path / "adapter").glob("network_*")}
    best = min(rows, key=lambda row: row["eval_loss"])
    assert best["best"]
    logits = []
    for folder in (tmp_path / "adapter", tmp_path / "adapter" / best["name"]):
        loaded = PeftModel.from_pretrained(base(tmp_path / "base"), folder)
        with torch.no_grad():
            logits.append(loaded(token_ids()).logits)
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], tiny()(token_ids()).logits)


def test_a_sweep_is_resumed(tmp_path: Path) -> None:
    sweep = candidates(CONFIG, VALUES, 1e-2, 0)
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = in_a_sweep("live", tmp_path, sweep, **settings)
    whole.train()
    again = in_a_sweep("live", tmp_path, sweep, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "sweep" / "checkpoint-3"))
    for name, parameter in side_parameters(whole.model).items():
        torch.testing.assert_close(side_parameters(again.model)[name], parameter)
        assert side_parameters(again.model)[name].requires_grad


def test_the_best_checkpoint_is_refused(tmp_path: Path) -> None:
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="load_best_model_at_end is True, but each network"):
        in_a_sweep("live", tmp_path, candidates(CONFIG, VALUES, 1e-2, 0), **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": [1, 2]}, r"sweep.rank is no setting; choose from learning_rate, seed, data_share, "),
        ({"learning_rate": 1e-3}, "sweep.learning_rate is 0.001; give a list"),
        ({"learning_rate": [1e-3]}, "sweep describes one network"),
        ({"learning_rate": [0, 1]}, "sweep.learning_rate has 0"),
        ({"data_share": [0.5, 2]}, "sweep.data_share has 2"),
        ({"reduction_factor": [4, 0]}, "reduction_factor is 0"),
        ({"side_attention": [False, True]}, "side_attention is true"),
    ],
)
def test_a_wrong_sweep_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(CONFIG, values, 1e-3, 0)
