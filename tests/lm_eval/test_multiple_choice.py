"""Recipes for multiple choice: base, side network and LoRA get the accuracy that transformers and PEFT count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtuning_peft import SideTuningConfig, recipes

pytest.importorskip("lm_eval.api", reason="needs the harness: pip install lm_eval")

TASKS = ("mmlu_validation", "arc_file")
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw", "Cuba": "Havana",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Peru": "Lima",
    "Kenya": "Nairobi", "Iraq": "Baghdad", "Hungary": "Budapest",
}  # fmt: skip


def questions() -> list[tuple[str, list[str], int]]:
    """Questions with four answers each, and the index of the right one."""
    names = list(CAPITALS.values())
    found = []
    for index, (country, capital) in enumerate(CAPITALS.items()):
        answers = [names[(index + step) % len(names)] for step in (0, 3, 7, 11)]
        answers = answers[index % 4 :] + answers[: index % 4]
        found.append((f"What is the capital of {country}?", answers, answers.index(capital)))
    return found


def as_rows(task: str) -> list[dict[str, Any]]:
    if task == "arc_file":
        return [
            {"question": question, "choices": {"text": answers, "label": list("ABCD")}, "answerKey": "ABCD"[right]}
            for question, answers, right in questions()
        ]
    texts = [
        "\n".join([question, *(f"{letter}. {answer}" for letter, answer in zip("ABCD", answers, strict=True))])
        for question, answers, _ in questions()
    ]
    return [
        {"subject": "geography", "input": f"{text}\nAnswer:", "output": "ABCD"[right]}
        for text, (*_, right) in zip(texts, questions(), strict=True)
    ]


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of both tasks, and a side network and a LoRA that have left the base."""
    folder = tmp_path_factory.mktemp("recipes")
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_rows(task)))
    torch.manual_seed(0)
    side = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), SideTuningConfig(task_type="CAUSAL_LM"))
    randomize_side_network(side, scale=0.05)
    side.save_pretrained(folder / "side")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), lora).save_pretrained(folder / "lora")
    return folder


def load(smollm2: Path, folder: Path, adapter: str | None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / adapter)
    return model.eval()


def scored(model: Any, tokenizer: Any, folder: Path, task: str) -> tuple[float, list[list[float]]]:
    """The harness's accuracy, and its log-likelihoods, (rows, choices)."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16), tasks=[task], bootstrap_iters=0,
        task_manager=TaskManager(
            include_path=str(recipes.folder() / "lm_eval"), metadata={"data_file": str(folder / f"{task}.jsonl")}
        ),
    )  # fmt: skip
    samples = [[answer[0] for answer in sample["filtered_resps"]] for sample in found["samples"][task]]
    return found["results"][task]["acc,none"], samples


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, task: str) -> tuple[float, list[list[float]]]:
    """The same by transformers and PEFT, one question at a time."""
    right, likelihoods = 0, []
    for row, (question, answers, target) in zip(as_rows(task), questions(), strict=True):
        prompt = row["input"] if task == "mmlu_validation" else f"Question: {question}\nAnswer:"
        choices = list("ABCD") if task == "mmlu_validation" else answers
        start = len(tokenizer(prompt)["input_ids"])
        # Padding on the right is behind all that counts.
        rows = [tokenizer(f"{prompt} {choice}")["input_ids"] for choice in choices]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        kept = torch.tensor([[start <= place < len(row) for place in range(1, longest)] for row in rows])
        if task == "mmlu_validation":
            assert ids.shape[1] == start + 1  # letters are single tokens, which one pass tells
            logits = model(ids[:1, :-1]).logits.expand(len(choices), -1, -1)
        else:
            logits = model(ids[:, :-1]).logits
        log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        found = (log_probs * kept).sum(1).tolist()
        right += found.index(max(found)) == target
        likelihoods.append(found)
    return right / len(likelihoods), likelihoods


@pytest.mark.slow
@pytest.mark.smollm2
@pytest.mark.parametrize("task", TASKS)
def test_accuracy_is_what_an_independent_count_gives(task: str, smollm2: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    answers = {}
    for adapter in (None, "side", "lora"):
        model = load(smollm2, folder, adapter)
        accuracy, likelihoods = scored(model, tokenizer, folder, task)
        counted, expected = by_hand(model, tokenizer, task)
        torch.testing.assert_close(torch.tensor(likelihoods), torch.tensor(expected), atol=1e-3, rtol=0)
        assert accuracy == counted
        answers[adapter] = likelihoods
        if adapter is None:
            # A model of this size knows capitals, and no letters.
            assert accuracy >= (0.9 if task == "arc_file" else 0.0)
        else:
            assert likelihoods != answers[None]
        if adapter == "side":
            with model.disable_adapter():
                assert scored(model, tokenizer, folder, task)[1] == answers[None]


@pytest.mark.slow
@pytest.mark.smollm2
def test_the_command_of_a_copied_recipe(smollm2: Path, folder: Path) -> None:
    (folder / "mine.yaml").write_text(recipes.path("lm_eval/arc_file").read_text())
    command = [
        sys.executable, "-m", "qtuning_peft.integrations.lm_eval", "run", "--model", "hf", "--model_args",
        f"pretrained={smollm2},dtype=float32,peft=side", "--tasks", "mine.yaml", "--device", "cpu",
        "--batch_size", "16", "--output_path", "results",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )

    done = run("--metadata", "data_file=arc_file.jsonl")
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "results").rglob("results_*.json")
    expected, _ = by_hand(load(smollm2, folder, "side"), AutoTokenizer.from_pretrained(smollm2), "arc_file")
    assert json.loads(results.read_text())["results"]["arc_file"]["acc,none"] == expected
    assert "The task has no rows; add --metadata data_file=FILE." in run().stderr
