"""The demo from end to end: quantize, prune the data, train a side network, save it, evaluate it in a fresh process."""

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
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments, set_seed

from qtuning_peft import SideTuningConfig, SideTuningTrainer
from qtuning_peft.atomic import replacing
from qtuning_peft.eu_plane import EUPruner, Pruned
from qtuning_peft.eu_plane import score as score_data
from qtuning_peft.eu_plane.report import write_report
from qtuning_peft.hub.metadata import TrainingMetadata, machine, peak_memory
from qtuning_peft.trainer import HiddenStateCacheCallback

from .evaluate import Score, load_base, load_recipe, quiet, score
from .messages import corrupt, draw_rows
from .smollm2 import prepare_checkpoint


@dataclass
class DemoResult:
    """What the demo found: the test rows, the scores of the quantized base and, from a fresh process, of base and
    adapter; what was kept of the training data and of its corrupted rows; seconds of scoring, training and everything;
    the most bytes that training took (of the GPU if there is one), where they are known; and the files.
    """

    rows: list[dict[str, str]]
    before: Score
    after: Score
    pruned: Pruned
    corrupted: int
    corrupted_kept: int
    seconds: tuple[float, float, float]
    peak_memory: int | None
    adapter: Path
    report: Path


def run_demo(output_dir: Path, seed: int | None = None) -> DemoResult:
    """Train and evaluate as `recipe.yaml` says.

    Args:
        output_dir: Receives `base/` (kept for the next run), `report.html` and `adapter/` (each replaced when the new
            one is complete).
        seed: Instead of the recipe's.

    Raises:
        FileNotFoundError: when the model's package is not installed, with the command that installs it.
        RuntimeError: when the fresh process fails.
    """
    started = time.perf_counter()
    quiet()
    disable_progress_bar()
    recipe = load_recipe()
    seed = recipe["seed"] if seed is None else seed
    set_seed(seed)
    base_folder, adapter = prepare_checkpoint(output_dir / "base"), output_dir / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    base = load_base(str(base_folder), recipe["quantization"])
    before = score(base, tokenizer, recipe, "Evaluating the 4-bit base")

    rows = draw_rows("train", recipe["train"]["rows"], seed)
    corrupted = corrupt(rows, recipe["train"]["corrupted"], seed)
    pruner = EUPruner(tokenizer=tokenizer, seed=seed, **recipe["eu_pruning"])
    start = time.perf_counter()
    scored = score_data(Dataset.from_list(rows), base, tokenizer, scores=pruner.scores)
    score_seconds = time.perf_counter() - start
    pruner.fit(scored)
    assert pruner.pruned is not None
    report = write_report(scored, tokenizer, pruner, output_dir / "report.html", seed=seed)

    model: Any = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", **recipe["qst"]))
    start = time.perf_counter()
    _train(model, tokenizer, scored.map(pruner, batched=True), recipe, seed, output_dir)
    train_seconds, memory = time.perf_counter() - start, peak_memory()
    model.training_metadata = TrainingMetadata(
        recipe=yaml.safe_dump(recipe, sort_keys=False), pruning=str(pruner.pruned), language=("en",),
        seconds=train_seconds, peak_memory=memory, machine=machine(),
    )  # fmt: skip
    with replacing(adapter) as unfinished:
        model.save_pretrained(unfinished)
    return DemoResult(
        rows=draw_rows(recipe["test"]["split"], recipe["test"]["rows"]),
        before=before,
        after=_score_in_fresh_process(base_folder, adapter.absolute()),
        pruned=pruner.pruned,
        corrupted=len(corrupted),
        corrupted_kept=len(scored.select(corrupted).map(pruner, batched=True)),
        seconds=(score_seconds, train_seconds, time.perf_counter() - started),
        peak_memory=memory[0] if memory else None,
        adapter=adapter,
        report=report,
    )


def _train(model: Any, tokenizer: Any, kept: Dataset, recipe: dict[str, Any], seed: int, work_dir: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(work_dir), save_strategy="no", report_to="none", logging_steps=10, seed=seed,
        train_sampling_strategy="group_by_length", remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(), **recipe["training"],
    )  # fmt: skip
    SideTuningTrainer(
        model=model,
        args=arguments,
        train_dataset=kept.select_columns(["input_ids", "labels"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[HiddenStateCacheCallback(recipe["hidden_state_cache_gib"])],
    ).train()


def _score_in_fresh_process(base: Path, adapter: Path) -> Score:
    command = [sys.executable, "-m", "examples.json_extraction.evaluate", str(base), str(adapter)]
    root = Path(__file__).parents[2]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=root)
    if finished.returncode != 0:
        raise RuntimeError(f"The fresh process that evaluates {adapter} failed; its message is above.")
    return Score(**json.loads(finished.stdout.splitlines()[-1]))
