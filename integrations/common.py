"""What the integrations of TRL, Axolotl and ms-swift share: pruning before training, callbacks, LoRA's leftovers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn

from qtuning_peft.eu_plane import EUPruningCallback
from qtuning_peft.trainer import PrefixCachingCallback

from .blocks import EUPruningBlock
from .metadata import TrainingMetadataCallback, datasets_on_the_hub, is_side_tuned
from .pruning import prune_training_data

# Side networks start at 1e-3; what is below this is usually left over from LoRA.
SMALLEST_LEARNING_RATE = 5e-4
# TRL's and Axolotl's keys for LoRA, without Axolotl's two that say where an adapter is read from.
LORA = re.compile(r"lora_(?!model_dir$|on_cpu$)|loraplus_|relora|peft_|use_(peft|rslora|dora)$")


def refuse_lora(settings: Mapping[str, Any], reason: str) -> None:
    """Check that nothing is left of LoRA's settings beside a side network.

    Args:
        settings: Keys and values that the user gave; false, zero and empty ones are ignored.
        reason: Why they do not belong there, for the message.

    Raises:
        ValueError: naming all that are left.
    """
    left = {key: value for key, value in settings.items() if value and LORA.match(key)}
    if left:
        listed = " and ".join(f"{key} is {'true' if value is True else repr(value)}" for key, value in left.items())
        raise ValueError(
            f"{listed}, but {reason}; remove {', '.join(left)}: the side network is described in the block qst."
        )


def prune_before_training(
    data: Dataset,
    model: nn.Module,
    tokenizer: Any,
    block: EUPruningBlock,
    output_dir: Path,
    log: Callable[[str], None],
    scores_dir: Path | None = None,
) -> tuple[Dataset, str | None]:
    """Score and prune what a trainer has tokenized, with scores and the report where that trainer's files are.

    Args:
        data, model, tokenizer, block: As `prune_training_data` takes them.
        output_dir: The trainer's output folder: the report goes there, and the scores without `scores_dir`.
        log: Gets what was kept, and where the report is.
        scores_dir: Folder of prepared data, if the trainer has one.

    Returns:
        The kept rows, and what was kept in words, in the process that logs.

    Raises:
        ValueError: when the data cannot be pruned.
    """
    logged: list[str] = []

    def log_and_remember(message: str) -> None:
        log(message)
        logged.append(message.removeprefix("eu_pruning "))

    kept = prune_training_data(
        data, model, tokenizer, block, cache_path=(scores_dir or output_dir) / "eu_scores",
        report_path=output_dir / "eu_report.html", log=log_and_remember,
    )  # fmt: skip
    return kept, logged[0] if logged else None


def batch_pruning(block: EUPruningBlock, tokenizer: Any) -> EUPruningCallback:
    """The callback of `mode: dynamic`, which prunes every batch."""
    return EUPruningCallback(block.pruner(tokenizer), block.tokens_per_batch)


def add_callbacks(
    trainer: Any,
    tokenizer: Any,
    recipe: Mapping[str, Any],
    eu_pruning: EUPruningBlock | None,
    pruned: str | None,
    warn: Callable[[str], None],
) -> None:
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
        trainer.add_callback(batch_pruning(eu_pruning, tokenizer))
    if not is_side_tuned(trainer.model):
        return
    trainer.add_callback(PrefixCachingCallback())
    trainer.add_callback(_metadata(trainer.model, recipe, pruned))
    rate = trainer.args.learning_rate
    if rate < SMALLEST_LEARNING_RATE and trainer.is_world_process_zero():
        warn(f"learning_rate is {rate:g}, a rate for LoRA; start at 1e-3 with a side network.")


def _metadata(model: Any, recipe: Mapping[str, Any], pruned: str | None) -> TrainingMetadataCallback:
    trained_on = datasets_on_the_hub(recipe.get("datasets") or recipe.get("dataset_name"))
    # TRL evaluates on another split of the same data, Axolotl on data of its own.
    split = recipe.get("dataset_test_split")
    tested_on = trained_on if split else datasets_on_the_hub(recipe.get("test_datasets"))
    evaluated_on = (tested_on[0], split) if len(tested_on) == 1 else (None, None)
    return TrainingMetadataCallback(model, recipe, pruned, trained_on, evaluated_on)
