"""Stock Axolotl's own commands on a pico chat model, with and without our plugin."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from packaging.version import Version
from safetensors.torch import load_file

pytest.importorskip("axolotl.cli", reason="axolotl is not installed; run scripts/test_axolotl.sh")

PLUGIN = "qtuning_peft.integrations.axolotl.QTuningPlugin"
FINDS_PLUGINS = Version(version("axolotl")) >= Version("0.21")
QST = {"adapter": "qst", "qst": {"reduction_factor": 4}}
LORA = {
    "adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_mlp_kernel": False,
    "lora_qkv_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("axolotl")
    pico.save_model(here / "model")
    pico.write_chat(here / "train.jsonl")
    pico.write_chat(here / "test.jsonl", 16, seed=1)
    return here


def config(folder: Path, name: str, **keys: Any) -> Path:
    """A configuration that trains on a CPU, written to a file."""
    data = {"ds_type": "json", "type": "chat_template"}
    content = {
        "base_model": str(folder / "model"), "plugins": [PLUGIN],
        "datasets": [data | {"path": str(folder / "train.jsonl")}],
        "test_datasets": [data | {"path": str(folder / "test.jsonl"), "split": "train"}],
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / name),
        "sequence_len": 64, "sample_packing": False, "micro_batch_size": 4, "gradient_accumulation_steps": 1,
        "num_epochs": 4, "optimizer": "adamw_torch", "lr_scheduler": "constant", "learning_rate": 0.02,
        "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": True, "logging_steps": 1,
        "save_strategy": "epoch", "eval_strategy": "epoch", "seed": 0,
    } | keys  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return file


def axolotl(command: str, file: Path, *arguments: str, stdin: str = "", fails: bool = False) -> str:
    """What a command of Axolotl prints."""
    done = subprocess.run(
        ["axolotl", command, str(file), *arguments], input=stdin, capture_output=True, text=True,
        cwd=file.parent,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def train(file: Path, *arguments: str) -> str:
    return axolotl("train", file, "--launcher", "python", *arguments)


def history(folder: Path, name: str, key: str) -> list[float]:
    """Logged values of a run, from its last checkpoint."""
    last = max((folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return [e[key] for e in json.loads((last / "trainer_state.json").read_text())["log_history"] if key in e]


def loss_outside(folder: Path, adapter: Path) -> float:
    """Loss of the adapter on the test rows with nothing but PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qtuning_peft import score

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=quantization)
    rows = Dataset.from_list([pico.messages(row) for row in pico.rows(16, seed=1)])
    scored = score(
        rows, PeftModel.from_pretrained(base, adapter), AutoTokenizer.from_pretrained(adapter), progress=False
    )
    tokens = scored["supervised_tokens"][:]
    return sum(error * count for error, count in zip(scored["error"], tokens, strict=True)) / sum(tokens)


def test_preprocess_train_resume_evaluate_and_inference(folder: Path) -> None:
    pruning = {"sample_ratio": 0.5, "token_ratio": 0.7}
    qst = {"reduction_factor": 4, "hidden_state_cache_gib": 1}
    file = config(folder, "qst", **QST | {"qst": qst}, eu_pruning=pruning, load_in_4bit=True)
    axolotl("preprocess", file)
    output = train(file)
    out = folder / "qst"
    assert "kept 32 of 64 samples" in output
    assert "(4-bit)" in output
    assert "32 steps of pruned data" in output
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.eval_results[-1].metric_value == pytest.approx(history(folder, "qst", "eval_loss")[-1], abs=1e-3)
    section = card.text.partition("training metadata")[2].partition("training metadata")[0]
    for known in ("| pruning | kept 32 of 64 samples", "| steps | 32 |", "sample_ratio: 0.5", "micro_batch_size: 4"):
        assert known in section
    assert str(folder) not in section
    assert not card.data.datasets
    assert (out / "eu_report.html").is_file()
    assert all("qst_side_network" in name for name in load_file(out / "adapter_model.safetensors"))
    losses = history(folder, "qst", "eval_loss")
    assert losses[-1] < losses[0] - 0.1
    # Axolotl averages its batches' means, and its labels end with a line break.
    assert loss_outside(folder, out) == pytest.approx(losses[-1], abs=0.15)

    # Other ratios: nothing is scored again, and nothing of the other ratio is used.
    scores = {part: part.stat().st_mtime_ns for part in (folder / "prepared" / "eu_scores").iterdir()}
    file = config(folder, "qst", **QST, eu_pruning=pruning | {"sample_ratio": 0.25}, load_in_4bit=True)
    output = train(file, "--resume-from-checkpoint", str(out / "checkpoint-32"), "--num-epochs", "10")
    assert "kept 16 of 64 samples" in output
    assert scores == {part: part.stat().st_mtime_ns for part in (folder / "prepared" / "eu_scores").iterdir()}
    assert len(history(folder, "qst", "loss")) == 40

    output = axolotl("evaluate", file, "--launcher", "python", "--lora-model-dir", str(out))
    (found,) = [float(line.split()[-1]) for line in output.splitlines() if "eval_loss: " in line]
    assert found == pytest.approx(history(folder, "qst", "eval_loss")[-1], abs=1e-3)
    output = axolotl("inference", file, "--launcher", "python", "--lora-model-dir", str(out), stdin="w1 w2 w3\n")
    # It samples, without a seed.
    assert re.search(r"user w1 w2 w3 <\|im_end\|> <\|im_start\|> assistant (w\d|<\|im_end)", " ".join(output.split()))

    output = axolotl("merge-lora", file, "--lora-model-dir", str(out), fails=True)
    assert "which cannot be merged" in output


def test_the_same_file_with_lora_trains_lora(folder: Path) -> None:
    train(config(folder, "lora", **LORA, max_steps=2))
    assert all("lora" in name for name in load_file(folder / "lora" / "adapter_model.safetensors"))


def test_a_rate_for_lora_is_noticed_once(folder: Path) -> None:
    keys = QST | {"max_steps": 1, "test_datasets": None, "eval_strategy": "no"}
    sentence = "learning_rate is 0.0002, a rate for LoRA"
    assert train(config(folder, "slow", **keys, learning_rate=2e-4)).count(sentence) == 1
    assert "a rate for LoRA" not in train(config(folder, "fast", **keys, learning_rate=1e-3))


def test_packing_in_two_epochs_without_a_plugins_line(folder: Path) -> None:
    packing = {"sample_packing": True, "attn_implementation": "sdpa", "eval_sample_packing": False}
    keys = QST | packing | {"num_epochs": 2, "eu_pruning": {"sample_ratio": 0.75}}
    output = train(config(folder, "packed", **keys, plugins=None if FINDS_PLUGINS else [PLUGIN]))
    assert "kept 48 of 64 samples" in output
    losses = history(folder, "packed", "loss")
    assert losses[-1] < losses[0]
    unpruned = config(folder, "whole", **keys | {"eu_pruning": None})
    train(unpruned)
    assert len(losses) < len(history(folder, "whole", "loss"))


def test_batches_are_pruned_dynamically(folder: Path) -> None:
    pruning = {"mode": "dynamic", "sample_ratio": 0.5}
    train(config(folder, "dynamic", **QST, eu_pruning=pruning, micro_batch_size=8, num_epochs=2))
    shares = history(folder, "dynamic", "kept_samples")
    assert len(shares) == 2 * 8
    assert all(0 < share <= 0.625 for share in shares)


def test_pruning_ahead_of_training(folder: Path) -> None:
    keys = LORA | {"eu_pruning": {"sample_ratio": 0.5}, "dataset_prepared_path": str(folder / "ahead"), "max_steps": 2}
    file = config(folder, "ahead-lora", **keys)
    output = axolotl("qtuning-prune", file, "--output", str(folder / "kept.jsonl"))
    assert "32 of 64 rows are kept" in output
    scores = {part: part.stat().st_mtime_ns for part in (folder / "ahead" / "eu_scores").iterdir()}
    assert scores
    assert "kept 32 of 64 samples" in train(file)
    assert scores == {part: part.stat().st_mtime_ns for part in (folder / "ahead" / "eu_scores").iterdir()}
    # What was written is a data set that Axolotl takes as tokenized.
    kept = [{"path": str(folder / "kept.jsonl"), "ds_type": "json", "type": None}]
    train(config(folder, "kept", **LORA, max_steps=2, datasets=kept, test_datasets=None, eval_strategy="no"))


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"qst": {"rank": 4}}, "qst.rank is no field"),
        ({"qst": {"reduction_factor": 1}}, "reduction_factor is 1; give an integer of at least 2"),
        ({"adapter": "lora", "lora_r": 8}, "adapter is 'lora' beside the block qst"),
        ({"lora_r": 8}, "lora_r is 8, but adapter is 'qst'"),
        ({"lora_target_linear": True}, "lora_target_linear is true, but adapter is 'qst'"),
        (
            {"lora_alpha": 16, "lora_dropout": 0.0, "lora_r": 8, "peft_use_dora": True},
            "lora_alpha is 16 and lora_r is 8 and peft_use_dora is true, but adapter is 'qst'; remove lora_alpha, ",
        ),
        ({"merge_lora": True}, "cannot be merged"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"eu_pruning": {}}, "eu_pruning: No budget is given"),
        ({"eu_pruning": {"sample_ratio": 0.5, "ratio": 1}}, "eu_pruning.ratio is no field"),
        ({"eu_pruning": {"sample_ratio": 0.5, "mode": "both"}}, "eu_pruning.mode: "),
        ({"eu_pruning": {"sample_ratio": 0.5}, "rl": "dpo"}, "rl is 'dpo' beside eu_pruning"),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_one_sentence(keys: dict[str, Any], sentence: str, folder: Path) -> None:
    with pytest.raises(ValueError, match="(?s).*" + sentence.replace("(", r"\(")):
        validated(config(folder, "wrong", **QST | keys))


def test_quantization_without_bitsandbytes_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    from qtuning_peft.integrations.axolotl.args import QTuningArgs

    with pytest.raises(ValueError, match="bitsandbytes is not installed"):
        QTuningArgs(**QST, load_in_8bit=True)


def test_users_settings_of_quantization_count(folder: Path) -> None:
    cfg = validated(config(folder, "users", **QST, load_in_4bit=True, bnb_config_kwargs={"bnb_4bit_quant_type": "fp4"}))
    assert cfg.overrides_of_model_kwargs["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert cfg.overrides_of_model_kwargs["quantization_config"]["load_in_4bit"] is True


def test_other_adapters_are_left_alone(folder: Path) -> None:
    cfg = validated(config(folder, "other", **LORA, load_in_8bit=True))
    assert cfg.overrides_of_model_kwargs is None
    assert cfg.qst is None


def validated(file: Path) -> Any:
    """The configuration as Axolotl's commands see it."""
    from axolotl.cli.config import load_cfg

    return load_cfg(str(file))
