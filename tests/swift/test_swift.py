"""`swift sft` of ms-swift through our plugin, on a pico chat model: train, prune, resume, load without ms-swift."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Not "swift", the name of this folder too, which Python would take for the package where that is not installed.
pytest.importorskip("swift.tuner_plugin", reason="needs ms-swift: bash scripts/test_swift.sh")

import pico
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import qtuning_peft  # noqa: F401  (registers QST with PEFT)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "model": "model", "model_type": "llama", "template": "chatml", "use_hf": True, "check_model": False,
    "torch_dtype": "float32", "dataset": ["chat/train.jsonl"], "val_dataset": ["chat/test.jsonl"], "max_length": 128,
    "tuner_type": "qst", "callbacks": ["eu_pruning"], "seed": 0,
    "model_kwargs": {"qst": {"reduction_factor": 8}, "eu_pruning": {"sample_ratio": 0.5, "token_ratio": 0.7}},
    "max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16,
    "gradient_accumulation_steps": 1, "learning_rate": 5e-2, "warmup_ratio": 0, "logging_steps": 1,
    "save_steps": 2, "eval_steps": 2, "dataloader_num_workers": 0, "add_version": False, "report_to": ["none"],
}  # fmt: skip


def command(name: str, *arguments: str, folder: Path) -> str:
    """What `swift NAME ARGUMENTS` prints."""
    environment = {
        "USE_HF": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "MODELSCOPE_CACHE": str(folder / "modelscope"),
    }  # fmt: skip
    finished = subprocess.run(
        [Path(sys.executable).with_name("swift"), name, *arguments],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-1000:] + finished.stderr[-6000:]
    return finished.stdout + finished.stderr


def sft(folder: Path, output: str, **overrides: Any) -> str:
    """Run `swift sft` on a YAML file, with the plugin where the documented command finds it."""
    file = folder / f"{output}.yaml"
    file.write_text(yaml.safe_dump(RECIPE | {"output_dir": output} | overrides))
    return command("sft", str(file), "--external_plugins", plugin(), folder=folder)


def plugin() -> str:
    module = [sys.executable, "-m", "qtuning_peft.integrations.swift"]
    return subprocess.run(module, capture_output=True, text=True, check=True).stdout.strip()


def logged(checkpoint: Path, key: str) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


@torch.no_grad()
def loss_on_test_rows(model: PreTrainedModel | PeftModel, folder: Path) -> float:
    """Mean over answers' tokens, computed here: row by row, with nothing of ms-swift."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    losses = []
    for row in pico.rows(16, seed=1):
        question = tokenizer(f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n").input_ids
        answer = tokenizer(f"{row['answer']}<|im_end|>\n").input_ids
        logits = model.eval()(torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return torch.cat(losses).mean().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.prepare(tmp_path_factory.mktemp("swift"))


@pytest.fixture(scope="module")
def base(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def log(folder: Path) -> str:
    return sft(folder, "qst")


@pytest.fixture
def trained(folder: Path, log: str) -> Path:
    return folder / "qst"


def test_training_learns_from_pruned_data(trained: Path, log: str, folder: Path, base: PreTrainedModel) -> None:
    losses = logged(trained / "checkpoint-4", "loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert logged(trained / "checkpoint-4", "eval_loss")[-1] < loss_on_test_rows(base, folder) - 0.1
    assert re.search(r"eu_pruning kept 32 of 64 samples and \d+ of \d+ supervised tokens", log)
    assert (trained / "eu_report.html").is_file()


def test_only_side_tensors_learned_and_all_of_them(trained: Path, log: str, base: PreTrainedModel) -> None:
    before, after = weights(trained / "checkpoint-2"), weights(trained / "checkpoint-4")
    assert all("qst_side_network" in name for name in after)
    # Centers are measured in the first pass, not learned.
    assert {name for name in after if torch.equal(before[name], after[name])} == {
        name for name in after if name.endswith(".center")
    }
    trainable = sum(tensor.numel() for name, tensor in after.items() if not name.endswith(".center"))
    assert f"({trainable / 1e6:.4f}M Trainable" in log


def test_the_adapter_loads_with_plain_peft(trained: Path, folder: Path) -> None:
    """The same loss on the base as it lies on disk: nothing else was trained, and everything was saved."""
    checkpoint = trained / "checkpoint-4"
    fresh = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(fresh, checkpoint)
    assert loss_on_test_rows(model, folder) == pytest.approx(logged(checkpoint, "eval_loss")[-1], abs=1e-5)


def test_resuming_gives_what_one_run_gives(trained: Path, folder: Path) -> None:
    sft(folder, "resumed", resume_from_checkpoint=str(trained / "checkpoint-2"))
    whole, resumed = weights(trained / "checkpoint-4"), weights(folder / "resumed" / "checkpoint-4")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=0, atol=1e-6)


def test_inference_finds_the_plugin_by_the_checkpoint(trained: Path, folder: Path) -> None:
    command(
        "infer", "--adapters", str(trained / "checkpoint-4"), "--val_dataset", "chat/test.jsonl", "--max_new_tokens",
        "4", "--result_path", "answers.jsonl", "--use_hf", "true", folder=folder,
    )  # fmt: skip
    answers = [json.loads(line)["response"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 16
    assert any(answers)


def test_the_same_file_trains_lora(folder: Path) -> None:
    # A rate for weight deltas; the side network takes a larger one.
    log = sft(folder, "lora", tuner_type="lora", learning_rate=5e-3)
    assert "eu_pruning kept 32 of 64 samples" in log
    config = json.loads((folder / "lora" / "checkpoint-4" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    losses = logged(folder / "lora" / "checkpoint-4", "loss")
    assert losses[-1] < losses[0]


def test_every_batch_is_pruned(folder: Path) -> None:
    blocks = {"qst": {"reduction_factor": 8}, "eu_pruning": {"mode": "dynamic", "sample_ratio": 0.5}}
    sft(folder, "dynamic", model_kwargs=blocks, gradient_accumulation_steps=2, gradient_checkpointing=False)
    assert logged(folder / "dynamic" / "checkpoint-4", "kept_samples") == [0.5] * 4


def test_the_recipe_for_classification_runs(folder: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"w{i % 3} " * 4 + f"w{i}"}], "label": i % 3} for i in range(48)]
    (folder / "classes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load((ROOT / "recipes" / "swift" / "qwen3-8b-classification.yaml").read_text())
    for_pico = {
        name: RECIPE[name]
        for name in ("model", "model_type", "template", "torch_dtype", "logging_steps", "learning_rate", "add_version")
    }
    file = folder / "classification.yaml"
    steps = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "bnb_4bit_compute_dtype": "float32"}
    where = {"dataset": ["classes.jsonl"], "output_dir": "classes"}
    file.write_text(yaml.safe_dump(recipe | for_pico | steps | where))
    log = command("sft", str(file), "--external_plugins", plugin(), folder=folder)
    assert "Linear4bit" in log
    losses = logged(folder / "classes" / "checkpoint-4", "loss")
    assert losses[-1] < losses[0]
    names = weights(folder / "classes" / "checkpoint-4")
    assert {name.split(".")[-2] for name in names if "qst_side_network" not in name} == {"score"}


def test_the_recipe_for_a_cpu_runs(folder: Path) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "swift" / "smollm2-135m-cpu.yaml").read_text())
    for_pico = {name: RECIPE[name] for name in ("model", "model_type", "template", "add_version")}
    where = {"dataset": [str(folder / "chat" / "train.jsonl")], "output_dir": "cpu", "max_steps": 2}
    file = folder / "cpu.yaml"
    file.write_text(yaml.safe_dump(recipe | for_pico | where))
    log = command("sft", str(file), "--external_plugins", plugin(), folder=folder)
    assert "kept 32 of 64 samples" in log
    assert all("qst_side_network" in name for name in weights(folder / "cpu" / "checkpoint-2"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"model_kwargs": {"qts": {"reduction_factor": 8}}},
            "model_kwargs has the keys qts, but tuner_type is 'qst'; add qst",
        ),
        ({"model_kwargs": {"qst": {"rank": 8}}}, "model_kwargs.qst.rank is no field; choose from reduction_factor, "),
        ({"model_kwargs": {"qst": {"reduction_factor": 0}}}, "reduction_factor is 0; give an integer of at least 2"),
        ({"model_kwargs": {"qst": {}, "eu_pruning": {}}}, "has eu_pruning, but callbacks is ..; add eu_pruning to it"),
        ({"model_kwargs": {"qst": {}}, "task_type": "embedding"}, "task_type is 'embedding'; choose from causal_lm"),
    ],
    ids=str,
)
def test_a_wrong_block_is_one_sentence(arguments: dict[str, Any], sentence: str, base: PreTrainedModel) -> None:
    from qtuning_peft.integrations.swift.plugin import QSTTuner

    with pytest.raises(ValueError, match=sentence):
        QSTTuner.prepare_model(SimpleNamespace(**{"callbacks": [], "task_type": "causal_lm"} | arguments), base)


@pytest.mark.parametrize(
    ("content", "task_type", "sentence"),
    [
        (None, "causal_lm", "callbacks has eu_pruning, but model_kwargs has no such block"),
        ("{'sample_ratio': 2}", "causal_lm", "model_kwargs.eu_pruning.*sample_ratio is 2"),
        ("{'sample_ratio': 0.5}", "seq_cls", "task_type is 'seq_cls', whose samples have no supervised tokens"),
    ],
)
def test_a_wrong_pruning_is_one_sentence(
    content: str | None, task_type: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtuning_peft.integrations.swift.plugin import eu_pruning

    monkeypatch.delenv("EU_PRUNING", raising=False)
    if content is not None:
        monkeypatch.setenv("EU_PRUNING", content)
    with pytest.raises(ValueError, match=sentence):
        eu_pruning(None, SimpleNamespace(task_type=task_type))
