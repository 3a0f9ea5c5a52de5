"""Pruning the tokenized data of a trainer, under the model that it has loaded: score, keep, report."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import nn

from qtuning_peft.eu_plane import EUPruner, score
from qtuning_peft.eu_plane.report import write_report
from qtuning_peft.loading import load_model

from .blocks import EUPruningBlock

logger = logging.getLogger(__name__)


def prune_training_data(
    dataset: Dataset,
    model: nn.Module,
    tokenizer: Any,
    block: EUPruningBlock,
    *,
    cache_path: Path,
    report_path: Path,
    log: Callable[[str], None] = logger.info,
) -> Dataset:
    """Score and prune rows that a trainer has tokenized.

    Scores are kept in files named by the rows, the model and the settings; ratios are applied to scores anew each
    time. So other ratios never find an old result, and need no new pass over the data.

    Args:
        dataset: Rows with `input_ids` and `labels`; other columns stay as they are.
        model: The model to train; it scores without its adapters, unless the block names another.
        tokenizer: Its tokenizer.
        block: What to keep.
        cache_path, report_path: Where scores and the report go when the block does not say.
        log: Gets what was kept, and where the report is.

    Returns:
        The kept rows, with the columns of `dataset`.

    Raises:
        ValueError: when nothing would be kept, or the data cannot be scored.
    """
    names = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
    rows = dataset.select_columns([name for name in names if name in dataset.column_names])
    state = PartialState()
    # The first process scores; the others find its parts.
    with state.main_process_first(), contextlib.ExitStack() as stack:
        scorer = stack.enter_context(_scorer(model, block.scorer_model))
        reference = None
        if block.reference_model:
            reference = stack.enter_context(_scorer(model, block.reference_model))
        pruner = block.pruner(tokenizer)
        scored = score(
            rows, scorer, tokenizer, resume_dir=block.cache_path or cache_path, progress=state.is_main_process,
            tokens_per_batch=block.tokens_per_batch, scores=pruner.scores, reference_model=reference,
        )  # fmt: skip
    pruner.fit(scored)
    if state.is_main_process:
        log(f"eu_pruning {pruner.pruned}")
        log(_report(scored, tokenizer, pruner, Path(block.report_path or report_path)))
    assert pruner.pruned is not None
    if not pruner.pruned.kept_samples:
        raise ValueError(f"eu_pruning keeps none of {len(dataset)} samples; raise its budget.")
    others = [name for name in dataset.column_names if name not in rows.column_names]
    joined = concatenate_datasets([scored, dataset.select_columns(others)], axis=1) if others else scored
    kept = joined.map(pruner, batched=True, keep_in_memory=True, load_from_cache_file=False, desc="Pruning")
    return kept.select_columns(dataset.column_names)


@contextlib.contextmanager
def _scorer(model: nn.Module, name: str | None) -> Iterator[nn.Module]:
    """The model that scores: `model` without its adapters, or the one named, quantized as `model` is."""
    if name is None:
        with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
            yield model
        return
    # Weights that the trainer does not hold: beside them on the device, and gone afterwards.
    loaded, _ = load_model(name, load_in_4bit=bool(getattr(model, "is_loaded_in_4bit", False)))
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _report(scored: Dataset, tokenizer: Any, pruner: EUPruner, path: Path) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return f"No report is written to {path}, which needs matplotlib: pip install matplotlib."
    path.parent.mkdir(parents=True, exist_ok=True)
    return f"Every sample on the Error-Uncertainty plane: {write_report(scored, tokenizer, pruner, path)}"
