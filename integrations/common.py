"""What the integrations of TRL, Axolotl and ms-swift share: pruning before training, callbacks, LoRA's leftovers."""

import contextlib
import gc
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import nn

from qtuning_peft.eu_plane import EUPruningCallback, score
from qtuning_peft.eu_plane.report import write_report
from qtuning_peft.hub.metadata import TrainingMetadata
from qtuning_peft.loading import load_model
from qtuning_peft.processes import SharedWork
from qtuning_peft.sharding import is_sharded
from qtuning_peft.trainer import PrefixCachingCallback

from .blocks import EUPruningBlock
from .metadata import NOT_PRUNED, TrainingMetadataCallback, as_recipe, datasets_on_the_hub, is_side_tuned

# Side networks start at 1e-3; what is below this is usually left over from LoRA.
SMALLEST_LEARNING_RATE = 5e-4
# TRL's and Axolotl's keys for LoRA, without Axolotl's two that say where an adapter is read from.
LORA = re.compile(r"lora_(?!model_dir$|on_cpu$)|loraplus_|relora|peft_|use_(peft|rslora|dora)$")


def refuse_lora(settings: Mapping[str, Any], reason: str) -> None:
    """Check that nothing is left of LoRA's settings beside a side network; false, zero and empty ones are ignored."""
    left = {key: value for key, value in settings.items() if value and LORA.match(key)}
    if left:
        listed = " and ".join(f"{key} is {'true' if value is True else repr(value)}" for key, value in left.items())
        raise ValueError(
            f"{listed}, but {reason}; remove {', '.join(left)}: the side network is described in the block qst."
        )


def prune_before_training(
    dataset: Dataset, model: nn.Module, tokenizer: Any, block: EUPruningBlock, output_dir: Path,
    log: Callable[[str], None], scores_dir: Path | None = None,
) -> tuple[Dataset, str]:  # fmt: skip
    """Score and prune rows that a trainer has tokenized.

    Scores are kept in files named by the rows, the model and the settings; ratios are applied to scores anew each
    time. So other ratios never find an old result, and need no new pass over the data.

    Args:
        dataset: Rows with `input_ids` and `labels`; other columns stay as they are.
        model: The model to train; it scores without its adapters, unless the block names another.
        tokenizer: Its tokenizer.
        block: What to keep.
        output_dir: Folder for the report when the block names none, and for the scores without `scores_dir`.
        log: Gets what was kept, and where the report is, in the main process.
        scores_dir: Folder of prepared data, if the trainer has one.

    Returns:
        The kept rows, with the columns of `dataset`, and what was kept in words.

    Raises:
        ValueError: when nothing would be kept, or the data cannot be scored.
    """
    if is_sharded(model):
        raise ValueError(
            "The model is sharded (ZeRO-3): its processes run every pass together, and cannot share the rows; prune "
            "the data beforehand, with qtuning prune."
        )
    names = ("input_ids", "labels", "attention_mask", "position_ids", "seq_lengths")
    rows = dataset.select_columns([name for name in names if name in dataset.column_names])
    state = PartialState()
    with SharedWork() as work, contextlib.ExitStack() as stack:
        scorer = stack.enter_context(_scorer(model, block.scorer_model))
        second = stack.enter_context(_scorer(model, block.reference_model)) if block.reference_model else None
        pruner = block.pruner(tokenizer)
        scored = score(
            rows, scorer, tokenizer, resume_dir=block.cache_path or (scores_dir or output_dir) / "eu_scores",
            work=work, tokens_per_batch=block.tokens_per_batch, scores=pruner.scores, reference_model=second,
        )  # fmt: skip
    pruned = pruner.fit(scored).pruned
    assert pruned is not None
    if state.is_main_process:
        log(f"eu_pruning {pruned}")
        report = Path(block.report_path or output_dir / "eu_report.html")
        if importlib.util.find_spec("matplotlib") is None:
            log(f"No report is written to {report}, which needs matplotlib: pip install matplotlib.")
        else:
            report.parent.mkdir(parents=True, exist_ok=True)
            log(f"Every sample on the Error-Uncertainty plane: {write_report(scored, tokenizer, pruner, report)}")
    if not pruned.kept_samples:
        raise ValueError(f"eu_pruning keeps none of {len(dataset)} samples; raise its budget.")
    others = [name for name in dataset.column_names if name not in rows.column_names]
    joined = concatenate_datasets([scored, dataset.select_columns(others)], axis=1) if others else scored
    options = {"keep_in_memory": True, "load_from_cache_file": False, "desc": "Pruning"}
    kept = joined.map(pruner, batched=True, with_indices=True, **options)
    return kept.select_columns(dataset.column_names), str(pruned)


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


def add_callbacks(
    trainer: Any, tokenizer: Any, recipe: Mapping[str, Any], eu_pruning: EUPruningBlock | None, pruned: str | None,
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Add what a run needs beside its blocks: pruning of batches; for a side network prefix caching and its metadata.

    Args:
        trainer: A `transformers.Trainer`, before training.
        tokenizer: The model's tokenizer.
        recipe: The settings, under the keys of TRL or Axolotl, for the card.
        eu_pruning: The block, if there is one.
        pruned: How the data were pruned before training, for the card.
        warn: Gets one sentence if the learning rate is one of LoRA's.
    """
    if eu_pruning is not None and eu_pruning.mode == "dynamic":
        trainer.add_callback(EUPruningCallback(trainer, eu_pruning.pruner(tokenizer), eu_pruning.tokens_per_batch))
    if not is_side_tuned(trainer.model):
        return
    trainer.add_callback(PrefixCachingCallback())
    trained_on = datasets_on_the_hub(recipe.get("datasets") or recipe.get("dataset_name"))
    # TRL evaluates on another split of the same data, Axolotl on data of its own.
    split = recipe.get("dataset_test_split")
    tested_on = trained_on if split else datasets_on_the_hub(recipe.get("test_datasets"))
    evaluated_on = (tested_on[0], split) if len(tested_on) == 1 else (None, None)
    known = TrainingMetadata(recipe=as_recipe(recipe), pruning=pruned or NOT_PRUNED, datasets=trained_on)
    trainer.add_callback(TrainingMetadataCallback(trainer.model, known, evaluated_on))
    rate = trainer.args.learning_rate
    if rate < SMALLEST_LEARNING_RATE and trainer.is_world_process_zero():
        warn(f"learning_rate is {rate:g}, a rate for LoRA; start at 1e-3 with a side network.")
