"""LLaMA-Factory trains on pruned data with its own command, and, in its engine v1, a side network with ours."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from peft import PeftModel
from pico import rows, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_peft import EUPruner, recipes, score
from qtuning_peft.eu_plane.files import write_data

# Not llamafactory itself: without the package, that would be the folder of this file.
pytest.importorskip("llamafactory.cli", reason="needs LLaMA-Factory: bash scripts/test_llamafactory.sh")

from qtuning_peft.integrations.llamafactory import register, register_qst, tokenized

CHAT = [
    {"user": row["question"], "assistant": row["answer"]} for row in rows(8)
]  # in the words that all formats below put in their own way
FORMATS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": row["user"], "input": "", "output": row["assistant"]} for row in CHAT],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": row["user"]}, {"from": "gpt", "value": row["assistant"]}]}
        for row in CHAT
    ],
    "messages": [{"messages": [{"role": role, "content": text} for role, text in row.items()]} for row in CHAT],
    "prompt": [{"prompt": row["user"], "completion": row["assistant"]} for row in CHAT],
}
LORA = {
    "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "lora_rank": 4,
    "template": "chatml", "cutoff_len": 128, "logging_steps": 1, "report_to": "none", "use_cpu": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("llamafactory") / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # ChatML as real models have it: two tokens that need no space around them.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def pruned(base: Path, data: list[dict[str, Any]], **ratios: float) -> Dataset:
    """What is kept of `data`, with all the columns that scoring adds."""
    model = AutoModelForCausalLM.from_pretrained(base)
    scored = score(Dataset.from_list(data), model, AutoTokenizer.from_pretrained(base))
    return scored.map(EUPruner(**ratios).fit(scored), batched=True)


def run(folder: Path, command: list[str], recipe: dict[str, Any]) -> None:
    """Run `python -m` `command` with `recipe` in `folder`."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DISABLE_VERSION_CHECK": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }  # fmt: skip
    if importlib.util.find_spec("torchaudio") is None:
        # The default engine imports it, for sound alone; the build on PyPI needs CUDA.
        (folder / "stand_in").mkdir(exist_ok=True)
        (folder / "stand_in" / "torchaudio.py").touch()
        environment["PYTHONPATH"] = str(folder / "stand_in")
    done = subprocess.run(
        [sys.executable, "-m", *command, "recipe.yaml"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def mean_loss(model: torch.nn.Module, data: list[dict[str, list[int]]]) -> float:
    """Mean negative log-likelihood over all supervised tokens, row by row."""
    total, count = 0.0, 0
    for row in data:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def test_whole_samples_in_the_default_engine(base: Path, tmp_path: Path) -> None:
    kept = 0
    for name, data in FORMATS.items():
        data = pruned(base, data, sample_ratio=0.5)
        write_data(data, tmp_path / f"{name}.jsonl")
        register(tmp_path / f"{name}.jsonl", name, tmp_path / "dataset_info.json")
        kept += len(data)
    recipe = LORA | {
        "model_name_or_path": str(base), "dataset_dir": ".", "dataset": ",".join(FORMATS), "output_dir": "out",
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 1.0,
    }  # fmt: skip
    run(tmp_path, ["llamafactory.cli", "train"], recipe)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == kept == 4 * len(FORMATS)


def test_trimmed_samples_in_the_default_engine(base: Path, tmp_path: Path) -> None:
    write_data(pruned(base, FORMATS["messages"], sample_ratio=0.75, token_ratio=0.5), tmp_path / "kept.parquet")
    tokenized(tmp_path / "kept.parquet", tmp_path / "kept")
    kept = load_from_disk(str(tmp_path / "kept"))
    assert kept.column_names == ["input_ids", "labels"]
    recipe = recipes.load("llamafactory/smollm2-1.7b-lora-pruned") | {
        "model_name_or_path": str(base), "output_dir": "out", "per_device_train_batch_size": len(kept),
        "gradient_accumulation_steps": 1, "max_steps": 2, "logging_steps": 1, "bf16": False, "use_cpu": True,
    }  # fmt: skip
    run(tmp_path, ["llamafactory.cli", "train"], recipe)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    # LoRA starts at the base, so that its first loss says which tokens it was computed from.
    assert history[0]["loss"] == pytest.approx(
        mean_loss(AutoModelForCausalLM.from_pretrained(base), list(kept)), abs=2e-3
    )


def test_a_side_network_in_engine_v1(base: Path, tmp_path: Path) -> None:
    write_data(Dataset.from_list(FORMATS["alpaca"]), tmp_path / "rows.jsonl")
    source = {"rows": {"path": "rows.jsonl", "source": "local", "converter": "alpaca"}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(source))
    recipe = recipes.load("llamafactory/smollm2-1.7b-qst") | {
        "model": str(base), "train_dataset": "data.yaml", "output_dir": "out", "micro_batch_size": 4,
        "global_batch_size": 8, "max_steps": 8, "learning_rate": 1e-2, "batching_workers": 0,
    }  # fmt: skip
    # For the equality below; the base in 4 bits is another one.
    del recipe["quant_config"]
    run(tmp_path, ["qtuning_peft.integrations.llamafactory", "train"], recipe)
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]

    tokenizer = AutoTokenizer.from_pretrained(base)
    data = []
    for row in CHAT:
        ids = {role: tokenizer(f"<|im_start|>{role}\n{text}<|im_end|>\n")["input_ids"] for role, text in row.items()}
        labels = [-100] * len(ids["user"]) + ids["assistant"]
        data.append({"input_ids": ids["user"] + ids["assistant"], "labels": labels})
    model = AutoModelForCausalLM.from_pretrained(base)
    # A fresh side network is the base; and what is saved is what was trained.
    assert losses[0] == pytest.approx(mean_loss(model, data), abs=2e-3)
    trained = PeftModel.from_pretrained(model, tmp_path / "out")
    assert trained.peft_config["default"].reduction_factor == recipe["peft_config"]["reduction_factor"] == 4
    assert mean_loss(trained, data) < min(losses) < losses[0] - 0.1


def test_a_wrong_block_is_refused(base: Path) -> None:
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    register_qst()
    with pytest.raises(ValueError, match=r"peft_config\.rank is no field; choose from reduction_factor, downsample"):
        PeftPlugin("qst")(AutoModelForCausalLM.from_pretrained(base), {"name": "qst", "rank": 4}, True)


def test_the_list_of_data_sets(base: Path, tmp_path: Path) -> None:
    info = tmp_path / "dataset_info.json"
    info.write_text('{"theirs": {"hf_hub_url": "somebody/something"}}')
    trimmed = tmp_path / "trimmed.jsonl"
    write_data(pruned(base, FORMATS["alpaca"], sample_ratio=0.75, token_ratio=0.5), trimmed)
    with pytest.raises(ValueError, match="trimmed samples, which its texts do not show"):
        register(trimmed, "mine", info)
    write_data(pruned(base, FORMATS["alpaca"], sample_ratio=0.5), tmp_path / "whole.jsonl")
    register(tmp_path / "whole.jsonl", "mine", info)
    assert json.loads(info.read_text()).keys() == {"theirs", "mine"}
    write_data(Dataset.from_dict({"text": ["w1"]}), tmp_path / "text.jsonl")
    with pytest.raises(ValueError, match="columns are text"):
        register(tmp_path / "text.jsonl", "mine", info)
