"""Recipes open with what a reader needs, hold what their trainer knows, and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, read_block
from qtuning_peft.integrations.trl import main
from safetensors.torch import load_file
from typer.testing import CliRunner

from qtuning_peft import recipes
from qtuning_peft.cli import app


def blocks(content: Any) -> dict[str, Any]:
    """Every `qst` and `eu_pruning` in a recipe, at whatever depth its trainer wants them."""
    if not isinstance(content, dict):
        return {}
    found = {name: block for name, block in content.items() if name in ("qst", "eu_pruning")}
    for value in content.values():
        found |= blocks(value)
    return found


@pytest.mark.parametrize("name", recipes.names())
def test_it_opens_with_what_a_reader_needs(name: str) -> None:
    text = recipes.path(name).read_text()
    heads = [line.split(":")[0] for line in text.splitlines() if line.startswith("# ") and line[2] != " "]
    assert heads[:3] == ["# What", "# Needs", "# Run"]
    assert "# Change one thing" in heads
    assert max(len(line) for line in text.splitlines()) <= 120
    for kind, block in blocks(recipes.load(name)).items():
        read_block(kind, {"qst": QSTBlock, "eu_pruning": EUPruningBlock}[kind], block)


@pytest.mark.parametrize(
    "name", [name for name in recipes.names() if name.startswith("trl/") and "pictures" not in name]
)
def test_it_runs_in_trl(name: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "model")
    pico.write_chat(tmp_path / "chat" / "train.jsonl")
    recipe = recipes.load(name)
    # The pico model and its rows, on a CPU, for two steps; everything else is the recipe's.
    recipe |= {
        "model_name_or_path": str(tmp_path / "model"), "dtype": "float32", "output_dir": str(tmp_path / "out"),
        "datasets": [entry | {"path": str(tmp_path / "chat"), "split": "train"} for entry in recipe["datasets"]],
        "use_cpu": True, "bf16": False, "max_steps": 2, "optim": "adamw_torch", "max_length": 64,
    }  # fmt: skip
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    main(["--config", str(file)])
    assert all("qst_side_network" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_it_trains_from_states(tmp_path: Path) -> None:
    pico.save_model(tmp_path / "model")
    pico.write_chat(tmp_path / "chat.jsonl")
    recipe, runner = str(recipes.path("train/sweep")), CliRunner()
    taps = ["--tap-every", str(recipes.load("train/sweep")["qst"]["tap_every"])]
    for command in (
        ["states", tmp_path / "chat.jsonl", tmp_path / "model", "-o", tmp_path / "states", *taps],
        ["train", tmp_path / "states", "--config", recipe, "--max_steps", 2, "--output_dir", tmp_path / "out"],
    ):
        result = runner.invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    assert all("qst_side_network" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_the_command_lists_shows_and_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    listed = runner.invoke(app, ["recipes", "list"], env={"COLUMNS": "200"}).output
    assert all(name in listed for name in recipes.names())

    name = "trl/smollm2-135m-cpu"
    text = recipes.path(name).read_text()
    assert runner.invoke(app, ["recipes", "show", name]).output == text
    assert runner.invoke(app, ["recipes", "copy", name]).exit_code == 0
    copied = tmp_path / "smollm2-135m-cpu.yaml"
    assert copied.read_text() == text

    copied.write_text("mine")
    refused = runner.invoke(app, ["recipes", "copy", name])
    assert refused.exit_code == 1
    assert "exists; choose another name" in refused.output
    assert copied.read_text() == "mine"
    assert runner.invoke(app, ["recipes", "copy", name, "--force"]).exit_code == 0
    assert copied.read_text() == text
    (tmp_path / "folder").mkdir()
    runner.invoke(app, ["recipes", "copy", name, "folder"])
    assert (tmp_path / "folder" / "smollm2-135m-cpu.yaml").read_text() == text

    for wrong in ("trl/llama", "../pyproject", "/etc/passwd"):
        refused = runner.invoke(app, ["recipes", "show", wrong])
        assert refused.exit_code == 1
        assert "There is no recipe" in refused.output
