"""`qtuning train`: from a recipe and a folder of states to an adapter; views that copy no states."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from typer.testing import CliRunner

from qtuning_peft import EUPruner, StatesCollator, load_states, prune_states
from qtuning_peft.cli import app
from qtuning_peft.stored import VIEW

RECIPE = {"qst": {"reduction_factor": 4, "tap_every": 1}, "validation": 0.25, "num_train_epochs": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    pico.save_model(folder / "model")
    pico.write_chat(folder / "chat.jsonl")
    run("states", folder / "chat.jsonl", folder / "model", "-o", folder / "states", "--tap-every", "1")
    return folder


def run(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: Any) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def recipe(folder: Path, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / "adapter")} | changes))
    return file


def test_a_recipe_trains_an_adapter(made: Path, tmp_path: Path) -> None:
    file = recipe(tmp_path, eu_pruning={"sample_ratio": 0.5})
    output = run("train", made / "states", "--config", file)
    assert "for validation" in output
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "reduction_factor" in card
    assert "holds an adapter already" in refused("train", made / "states", "--config", file)
    run("train", made / "states", "--config", file, "--overwrite", "--learning_rate", "2e-3", "--max_steps=2")
    state = max((tmp_path / "adapter").glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    assert json.loads(state.read_text())["global_step"] == 2


def test_a_sweep_saves_the_best_with_a_table_and_a_plot(made: Path, tmp_path: Path) -> None:
    output = run("train", made / "states", "--config", recipe(tmp_path, sweep={"learning_rate": ["1e-3", 1e-2]}))
    assert "network_1" in output
    rows = json.loads((tmp_path / "adapter" / "sweep.json").read_text())
    assert [row["learning_rate"] for row in rows] == [1e-3, 1e-2]
    assert (tmp_path / "adapter" / "sweep.png").stat().st_size > 1000
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_killed_training_goes_on(made: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL behind its first checkpoint, and started again: the adapter of an uninterrupted run.

    Checkpoints that were being written when it was killed are none.
    """
    settings = {"num_train_epochs": 8, "save_strategy": "steps", "save_steps": 4, "data_seed": 1}
    whole = recipe(tmp_path, **settings)
    run("train", made / "states", "--config", whole, "--output_dir", tmp_path / "whole")
    command = [sys.executable, "-m", "qtuning_peft.cli", "train", str(made / "states"), "--config", str(whole)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    begun = time.monotonic()
    while not list((tmp_path / "adapter").glob("checkpoint-*/trainer_state.json")) and time.monotonic() - begun < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    last = max((tmp_path / "adapter").glob("checkpoint-*/trainer_state.json"), key=lambda file: file.stat().st_mtime)
    for number, state in (("900", None), ("1000", last.read_text()[:100])):
        (tmp_path / "adapter" / f"checkpoint-{number}").mkdir()
        if state is not None:
            (tmp_path / "adapter" / f"checkpoint-{number}" / last.name).write_text(state)
    said = "".join(run("train", made / "states", "--config", whole).split())
    assert f"goingonfrom{tmp_path / 'adapter' / 'checkpoint-'}" in said
    assert "checkpoint-900" not in said
    assert "checkpoint-1000" not in said
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "whole"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "learning_rat is no key of a recipe for states; did you mean learning_rate?"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"validation": 2}, "validation is 2; give a share"),
        ({"validation": 0.001}, "which is 0 of"),
        ({"validation": 0, "eval_strategy": "steps"}, "eval_strategy is set, but validation is not"),
        ({"validation": 0, "sweep": {"seed": [0, 1]}}, "sweep needs validation"),
        ({"sweep": [1]}, "sweep is [1]; give settings"),
        ({"qst": {"reduction": 4}}, "qst.reduction is no field"),
        ({"qst": {"reduction_factor": 4, "tap_every": 2, "layers_to_transform": None}}, ""),
        ({"eu_pruning": {"sample_ratio": 0.5, "mode": "dynamic"}}, "eu_pruning.mode is 'dynamic'"),
        ({"eu_pruning": {"sample_ratio": 0.5, "cache_path": "x"}}, "eu_pruning.cache_path has no effect"),
        ({"remove_unused_columns": True}, "remove_unused_columns is True"),
        ({"lora_r": 8}, "lora_r is 8"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(changes: dict[str, Any], message: str, made: Path, tmp_path: Path) -> None:
    if message:
        assert message in refused("train", made / "states", "--config", recipe(tmp_path, **changes))
        assert not (tmp_path / "adapter").exists()
    else:  # every second block of what is stored
        run("train", made / "states", "--config", recipe(tmp_path, max_steps=1, **changes))


def test_pruned_states_are_a_view(made: Path, tmp_path: Path) -> None:
    """Small, with the rows and labels of pruning, and refused when the states have changed."""
    rows, pruner = load_states(made / "states"), EUPruner(sample_ratio=0.5, token_ratio=0.5)
    kept = prune_states(made / "states", pruner, tmp_path / "kept")
    expected = rows.map(pruner, batched=True, keep_in_memory=True)
    assert kept.to_dict() == {name: expected.to_dict()[name] for name in kept.column_names}
    size = sum(file.stat().st_size for file in (tmp_path / "kept").iterdir())
    assert size < sum(file.stat().st_size for file in (made / "states").glob("*.arrow")) / 4
    batch = StatesCollator(tmp_path / "kept")(list(kept))
    assert batch["row_tokens"].sum() == len(batch["labels"]) - 1 == batch["states"].shape[1]
    run("train", tmp_path / "kept", "--config", recipe(tmp_path, max_steps=1))
    command = ("prune", tmp_path / "kept", "-o", tmp_path / "more", "--sample-ratio", "0.5")
    assert "is pruned already" in refused(*command)
    view = tmp_path / "kept" / VIEW
    view.write_text(view.read_text().replace('"manifest": "', '"manifest": "0'))
    with pytest.raises(ValueError, match="is missing or has changed"):
        load_states(tmp_path / "kept")
    view.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_states(tmp_path / "kept")


def test_prune_from_a_shell_makes_a_view_and_files(made: Path, tmp_path: Path) -> None:
    run("prune", made / "states", "-o", tmp_path / "kept", "--sample-ratio", "0.5")
    assert (tmp_path / "kept" / VIEW).is_file()
    run("prune", made / "states", "-o", tmp_path / "kept.jsonl", "--sample-ratio", "0.5")
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == len(load_states(tmp_path / "kept"))
    assert "is there already" in refused("prune", made / "states", "-o", tmp_path / "kept", "--sample-ratio", "0.5")
