"""What an adapter's card says of its training in a trainer: the recipe, how the data were pruned, what was logged.

A recipe may hold names of folders, tokens of accounts, or whatever else a trainer reads. So only settings that decide
what is learned are shown, each by name, and none of them whose value looks like a path or an address.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult
from peft import PeftModel
from transformers import TrainerCallback

from qtuning_peft.hub.metadata import TrainingMetadata, is_hub_name, machine, peak_memory
from qtuning_peft.side_tuning import SideTuningConfig

from .blocks import EUPruningBlock, QSTTrainingBlock

# The keys of TRL, then those of Axolotl that have another name.
SHOWN = (
    "model_name_or_path", "model_revision", "dtype", "attn_implementation", "load_in_4bit", "load_in_8bit",
    "bnb_4bit_quant_type", "use_bnb_nested_quant", "dataset_name", "dataset_config", "dataset_train_split",
    "dataset_test_split", "datasets", "test_split_size", "max_length", "packing", "packing_strategy", "padding_free",
    "assistant_only_loss", "completion_only_loss", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "bf16", "fp16", "tf32", "seed", "data_seed", "neftune_noise_alpha",
    "label_smoothing_factor", "shuffle_dataset", "qst", "eu_pruning", "base_model", "adapter", "test_datasets",
    "val_set_size", "sequence_len", "sample_packing", "pad_to_sequence_len", "train_on_inputs", "lr_scheduler",
    "optimizer", "num_epochs", "micro_batch_size",
)  # fmt: skip
SHOWN_OF_DATA = {"path", "name", "split", "type", "ds_type", "fraction", "shards"}
SHOWN_OF_BLOCKS = {*QSTTrainingBlock.model_fields, *EUPruningBlock.model_fields} - {"cache_path", "report_path"}
SHOWN_INSIDE = {
    "datasets": SHOWN_OF_DATA, "test_datasets": SHOWN_OF_DATA, "qst": SHOWN_OF_BLOCKS, "eu_pruning": SHOWN_OF_BLOCKS,
}  # fmt: skip
PATH = re.compile(r"""(^|[\s"'=:,(\[])(~|/|\.\.?[/\\]|\\\\|[A-Za-z]:[/\\])|://|@""")
# Builders of `datasets` that read files.
BUILDERS = {"arrow", "csv", "json", "parquet", "text", "webdataset", "xml"}


def shown(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a trainer's recipe that a card may show: known ones, without paths, addresses and secrets.

    Args:
        recipe: Keys and values of a YAML file of TRL or Axolotl.
    """
    found = {key: _shown(recipe.get(key), SHOWN_INSIDE.get(key, set())) for key in SHOWN}
    return {key: value for key, value in found.items() if value not in (None, {}, [])}


def _shown(value: Any, inside: set[str]) -> Any:
    if isinstance(value, Mapping):
        found = {key: _shown(value[key], set()) for key in value if key in inside}
        return {key: value for key, value in found.items() if value not in (None, {}, [])}
    if isinstance(value, list | tuple):
        return [part for part in (_shown(part, inside) for part in value) if part not in (None, {})]
    if isinstance(value, str):
        value = str(getattr(value, "value", value))
        # A single word is a name, also where something in this folder has it.
        file = not value.isidentifier() and os.path.exists(value)
        return None if file or PATH.search(value) else value
    return value if isinstance(value, bool | int | float) else None


def datasets_on_the_hub(recipe: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """Names of data sets under those `keys` of a recipe that can be on the Hub; those in files are left out."""
    names: list[Any] = []
    for key in keys:
        content = recipe.get(key)
        entries = content if isinstance(content, list | tuple) else [content]
        names += [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return tuple(
        dict.fromkeys(name for name in names if isinstance(name, str) and name not in BUILDERS and is_hub_name(name))
    )


class TrainingMetadataCallback(TrainerCallback):
    """Keeps `model.training_metadata`, which the model's card is written from, at what the trainer has logged.

    Args:
        model: Whose card it is.
        recipe: Of which the card shows what [`shown`] leaves.
        pruning: How the training data were pruned; `None` that they were not.
        datasets: Names on the Hub of the training data.
        evaluated_on: Name on the Hub of the data that the trainer evaluates on, if it has one, and its split.
    """

    def __init__(
        self,
        model: PeftModel,
        recipe: Mapping[str, Any],
        pruning: str | None,
        datasets: tuple[str, ...] = (),
        evaluated_on: tuple[str | None, str | None] = (None, None),
    ) -> None:
        self.model: Any = model
        self.recipe = yaml.safe_dump(shown(recipe), sort_keys=False, allow_unicode=True)
        self.pruning = pruning or "none in this training"
        self.datasets = datasets
        self.evaluated_on = evaluated_on
        self.began: tuple[float, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where training starts: a resumed one at the step of its checkpoint."""
        self.began = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell what is known by now."""
        history = state.log_history
        last = {key: value for entry in history for key, value in entry.items()}
        seconds = last.get("train_runtime")
        if self.began is not None and seconds is None:
            seconds = time.perf_counter() - self.began[0]
        # What is saved then is that step's.
        best = state.best_global_step if args.load_best_model_at_end and "train_runtime" in last else None
        evaluations = [entry for entry in history if "eval_loss" in entry and best in (None, entry["step"])]
        self.model.training_metadata = TrainingMetadata(
            recipe=self.recipe,
            pruning=_pruned_in_batches(history) or self.pruning,
            results=tuple(self._result(entry, state.global_step) for entry in evaluations[-1:]),
            datasets=self.datasets,
            steps=state.global_step,
            loss=last.get("loss"),
            seconds=seconds,
            resumed_at=self.began[1] if self.began is not None else 0,
            peak_memory=peak_memory(),
            machine=machine(),
        )

    def _result(self, entry: Mapping[str, Any], steps: int) -> EvalResult:
        name, split = self.evaluated_on
        return EvalResult(
            task_type="text-generation", dataset_type=name or "unpublished", dataset_name=name or "unpublished rows",
            dataset_split=split, metric_type="loss", metric_value=round(entry["eval_loss"], 4),
            metric_name="loss" if entry["step"] == steps else f"loss after {entry['step']} steps",
        )  # fmt: skip


def _pruned_in_batches(history: list[dict[str, Any]]) -> str | None:
    entries = [entry for entry in history if "kept_samples" in entry]
    if not entries:
        return None
    samples, tokens = (sum(e[key] for e in entries) / len(entries) for key in ("kept_samples", "kept_tokens"))
    return (
        f"every batch while training, which kept {samples:.0%} of its samples and {tokens:.0%} of its supervised tokens"
    )


def is_side_tuned(model: Any) -> bool:
    """Whether `model` trains a side network."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, SideTuningConfig)
