"""The demo from end to end: quantize, prune the data, train a side network, save it, evaluate it in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer, TrainingArguments, set_seed

from .. import SideTuningConfig, SideTuningTrainer, recipes  # type: ignore[attr-defined]  # in another folder until installed
from ..atomic import replacing
from ..eu_plane import EUPruner, Pruned
from ..eu_plane import score as score_data
from ..eu_plane.report import write_report
from ..hub.metadata import TrainingMetadata, machine, peak_memory
from .evaluate import Score, load_base, quiet, score
from .gsm8k import RightPadding, read_rows
from .smollm2 import prepare_checkpoint


@dataclass
class DemoResult:
    """What the demo prints.

    Attributes:
        before: Score of the quantized base.
        after: Score of base and adapter, from a fresh process.
        pruned: What was kept of the training data.
        score_seconds: Time of scoring the training data.
        train_seconds: Time of the training loop.
        total_seconds: Time of everything.
        peak_memory: Bytes; of the GPU if there is one, else resident memory of the training process, where it is known.
        adapter_bytes: Size of `adapter_model.safetensors`.
        trained_parameters: Number of trained parameters.
        adapter: Folder of the adapter.
        report: The training data on the Error-Uncertainty plane, an HTML file.
    """

    before: Score
    after: Score
    pruned: Pruned
    score_seconds: float
    train_seconds: float
    total_seconds: float
    peak_memory: int | None
    adapter_bytes: int
    trained_parameters: int
    adapter: Path
    report: Path


def run_demo(output_dir: Path, seed: int | None = None) -> DemoResult:
    """Train and evaluate as the recipe `demo` says.

    Args:
        output_dir: Receives `base/` (kept for the next run), `report.html` and `adapter/` (each replaced when the new
            one is complete).
        seed: Instead of the recipe's.

    Returns:
        The figures.

    Raises:
        FileNotFoundError: when the model's package is not installed, with the command that installs it.
        RuntimeError: when the fresh process fails.
    """
    started = time.perf_counter()
    quiet()
    disable_progress_bar()
    recipe = recipes.load("demo")
    seed = recipe["seed"] if seed is None else seed
    set_seed(seed)
    base_folder = prepare_checkpoint(output_dir / "base")

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = load_base(str(base_folder), recipe["quantization"])
    before = score(base, tokenizer, recipe, "Evaluating the 4-bit base")

    scored, score_seconds = _score_training_data(base, tokenizer, recipe)
    pruner = EUPruner(tokenizer=tokenizer, seed=seed, **recipe["eu_pruning"]).fit(scored)
    assert pruner.pruned is not None
    report = write_report(scored, tokenizer, pruner, output_dir / "report.html", seed=seed)

    model: Any = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", **recipe["qst"]))
    train_seconds = _train(model, tokenizer, scored.map(pruner, batched=True), recipe, seed, output_dir)
    memory = peak_memory()
    model.training_metadata = TrainingMetadata(
        recipe=yaml.safe_dump(recipe, sort_keys=False), pruning=str(pruner.pruned), datasets=("openai/gsm8k",),
        language=("en",), seconds=train_seconds, peak_memory=memory, machine=machine(),
    )  # fmt: skip
    adapter_folder = _save(model, output_dir / "adapter")
    return DemoResult(
        before=before,
        after=_score_in_fresh_process(base_folder, adapter_folder),
        pruned=pruner.pruned,
        score_seconds=score_seconds,
        train_seconds=train_seconds,
        total_seconds=time.perf_counter() - started,
        peak_memory=memory[0] if memory else None,
        adapter_bytes=(adapter_folder / "adapter_model.safetensors").stat().st_size,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter=output_dir / "adapter",
        report=report,
    )


def _score_training_data(base: nn.Module, tokenizer: Any, recipe: dict[str, Any]) -> tuple[Dataset, float]:
    rows = read_rows("train", recipe["data"]["train_rows"])
    data = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    started = time.perf_counter()
    scored = score_data(data, base, tokenizer, max_length=recipe["data"]["max_length"])
    return scored, time.perf_counter() - started


def _train(model: nn.Module, tokenizer: Any, kept: Dataset, recipe: dict[str, Any], seed: int, work_dir: Path) -> float:
    trainer = SideTuningTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work_dir),
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            train_sampling_strategy="group_by_length",
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            **recipe["training"],
        ),
        train_dataset=kept.select_columns(["input_ids", "labels"]),
        data_collator=RightPadding(tokenizer.pad_token_id),
    )
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def _save(model: Any, folder: Path) -> Path:
    with replacing(folder) as unfinished:
        model.save_pretrained(unfinished)
    return folder.absolute()


def _score_in_fresh_process(base: Path, adapter: Path) -> Score:
    command = [sys.executable, "-m", "qtuning_peft.demo.evaluate", "--base", str(base), "--adapter", str(adapter)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"The fresh process that evaluates {adapter} failed; its message is above.")
    return Score(**json.loads(finished.stdout.splitlines()[-1]))
