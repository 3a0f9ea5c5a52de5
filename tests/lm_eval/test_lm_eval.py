"""lm-evaluation-harness scores an adapter with its own command: what it prints is what transformers computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import side_parameters
from peft import PeftModel, get_peft_model
from pico import rows, save_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qtuning_peft import SideTuningConfig

# Not lm_eval itself: without the package, that would be the folder of this file.
pytest.importorskip("lm_eval.api", reason="needs the harness: pip install lm_eval")

TASK = Path(__file__).with_name("first_word.yaml")
CHOICES = ["w0", "w1", "w2", "w3"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def prompt(question: str) -> str:
    return f"<|im_start|> user {question} <|im_end|> <|im_start|> assistant"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter that has learned to say w0 where the base does not, the task and its rows."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tokenizer = AutoTokenizer.from_pretrained(save_model(folder / "base"))
    # With an adapter, and only then, the harness cuts the base's embeddings down to the tokenizer's size, which would
    # change every probability.
    config = AutoConfig.from_pretrained(folder / "base")
    tokenizer.add_tokens([f"unused{index}" for index in range(config.vocab_size - len(tokenizer))])
    tokenizer.save_pretrained(folder / "base")
    # As a checkpoint: transformers 5 has no argument load_in_4bit any more, the only one that the harness hands on.
    quantized = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, quantization_config=NF4)
    quantized.save_pretrained(folder / "base-4bit")
    tokenizer.save_pretrained(folder / "base-4bit")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"),
    )
    documents = [
        {"question": row["question"], "choices": CHOICES, "target": index % 2} for index, row in enumerate(rows(20))
    ]
    ids = tokenizer([prompt(row["question"]) + " w0" for row in documents], return_tensors="pt", padding=True)
    last = ids["attention_mask"].cumsum(1) == ids["attention_mask"].sum(1, keepdim=True)
    labels = ids["input_ids"].masked_fill(~(last & ids["attention_mask"].bool()), -100)
    optimizer = torch.optim.AdamW(side_parameters(model).values(), lr=1e-2)
    for _ in range(30):
        model(**ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "adapter")
    (folder / "tasks").mkdir()
    (folder / "tasks" / TASK.name).write_text(TASK.read_text())
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return folder


def evaluate(folder: Path, base: str, adapter: bool) -> tuple[float, list[dict[str, Any]]]:
    """Accuracy, and the rows with their log-likelihoods, of the command that the README names."""
    name = f"{base}{'-adapter' if adapter else ''}-results"
    command = [
        sys.executable, "-m", "qtuning_peft.integrations.lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={base},dtype=float32{',peft=adapter' if adapter else ''}", "--tasks", "first_word",
        "--include_path", "tasks", "--device", "cpu", "--batch_size", "4", "--output_path", name, "--log_samples",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (results,) = (folder / name).rglob("results_*.json")
    (samples,) = (folder / name).rglob("samples_*.jsonl")
    scored = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"]["first_word"]["acc,none"], scored


def by_hand(folder: Path, base: str, adapter: bool, question: str) -> list[float]:
    """Log-likelihood of every choice, from transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "adapter") if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(folder / base)
    found = []
    for choice in CHOICES:
        ids = tokenizer(f"{prompt(question)} {choice}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_probs = model.eval()(ids[:, :-1]).logits[0, -1].float().log_softmax(-1)
        found.append(log_probs[ids[0, -1]].item())
    return found


def test_the_adapter_is_scored(folder: Path) -> None:
    answers = {}
    for base, adapter in (("base", False), ("base", True), ("base-4bit", True)):
        accuracy, scored = evaluate(folder, base, adapter)
        theirs = [float(answer[0]) for answer in scored[3]["filtered_resps"]]
        assert theirs == pytest.approx(by_hand(folder, base, adapter, scored[3]["doc"]["question"]), abs=1e-3)
        answers[base, adapter] = theirs
        if adapter:
            # It always says w0, which is right in every other row.
            assert accuracy == 0.5
            assert theirs[0] > math.log(0.5)
    assert answers["base", False][0] < math.log(0.5)
    assert answers["base", True] != pytest.approx(answers["base-4bit", True], abs=1e-4)
