"""What an adapter's card says of its training in a trainer: the recipe, how the data were pruned, what was logged.

A recipe may hold folders or tokens: the card shows only settings of an allow-list that look like no path or address.
"""

import os
import re
import time
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult
from peft import PeftModel
from transformers import TrainerCallback

from qtuning_peft.hub.metadata import TrainingMetadata, is_hub_name, machine, peak_memory, versions
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
DATA = ("path", "name", "split", "type", "ds_type", "fraction", "shards")
SHOWN_INSIDE: dict[str, Iterable[str]] = {
    "datasets": DATA,
    "test_datasets": DATA,
    "qst": QSTTrainingBlock.model_fields,
    "eu_pruning": EUPruningBlock.model_fields.keys() - {"cache_path", "report_path"},
}
PATH = re.compile(r"""(^|[\s"'=:,(\[])(~|/|\.\.?[/\\]|\\\\|[A-Za-z]:[/\\])|://|@""")
# Builders of `datasets` that read files.
BUILDERS = {"arrow", "csv", "json", "parquet", "text", "webdataset", "xml"}


def shown(value: Any, keys: Iterable[str] = SHOWN) -> Any:
    """What a card may show of a trainer's recipe (or one value of it): `keys`, without paths, addresses and secrets."""
    if isinstance(value, Mapping):
        found = {key: shown(value.get(key), SHOWN_INSIDE.get(key, ())) for key in keys}
        return {key: left for key, left in found.items() if left not in (None, {}, [])}
    if isinstance(value, list | tuple):
        return [left for left in (shown(entry, keys) for entry in value) if left not in (None, {})]
    if isinstance(value, str):
        value = str(getattr(value, "value", value))
        # A single word is a name, also where something in this folder has it.
        file = not value.isidentifier() and os.path.exists(value)
        return None if file or PATH.search(value) else value
    return value if isinstance(value, bool | int | float) else None


def datasets_on_the_hub(entries: Any) -> tuple[str, ...]:
    """Names of data sets that can be on the Hub, of a name or entries with a `path`; those in files are left out."""
    listed = entries if isinstance(entries, list | tuple) else [entries]
    names = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in listed]
    known = (name for name in names if isinstance(name, str) and name not in BUILDERS and is_hub_name(name))
    return tuple(dict.fromkeys(known))


class TrainingMetadataCallback(TrainerCallback):
    """Keeps `model.training_metadata`, which the model's card is written from, at what the trainer has logged.

    An evaluation before the first step (`eval_on_start=True`) is the base's: a new side network starts exactly there.

    Args:
        model: Whose card it is.
        recipe: Of which the card shows what [`shown`] leaves.
        pruning: How the training data were pruned; `None` that they were not.
        datasets: Names on the Hub of the training data.
        evaluated_on: Name on the Hub of the data that the trainer evaluates on, if it has one, and its split.
    """

    def __init__(
        self, model: PeftModel, recipe: Mapping[str, Any], pruning: str | None, datasets: tuple[str, ...] = (),
        evaluated_on: tuple[str | None, str | None] = (None, None),
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.recipe = yaml.safe_dump(shown(recipe), sort_keys=False, allow_unicode=True)
        self.pruning = pruning or "none in this training"
        self.datasets, self.evaluated_on = datasets, evaluated_on
        self.began: float | None = None
        self.first_step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where training starts: a resumed one at the step of its checkpoint."""
        self.began, self.first_step = time.perf_counter(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is known by now."""
        last = {key: value for entry in state.log_history for key, value in entry.items()}
        # What is saved at the end may be an earlier step's.
        best = state.best_global_step if args.load_best_model_at_end and "train_runtime" in last else None
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        first = [entry for entry in evaluations[:1] if entry["step"] == 0]
        final = [entry for entry in evaluations if entry["step"] and best in (None, entry["step"])][-1:]
        self.model.training_metadata = TrainingMetadata(
            recipe=self.recipe,
            pruning=_pruned_in_batches(state.log_history) or self.pruning,
            results=tuple(self._result(entry, state.global_step) for entry in first + final),
            datasets=self.datasets, steps=state.global_step, loss=last.get("loss"),
            seconds=last.get("train_runtime", time.perf_counter() - self.began if self.began else None),
            resumed_at=self.first_step or None, peak_memory=peak_memory(), machine=machine(), versions=versions(),
        )  # fmt: skip

    def _result(self, entry: Mapping[str, Any], steps: int) -> EvalResult:
        (name, split), step = self.evaluated_on, entry["step"]
        metric = "loss before training" if not step else "loss" if step == steps else f"loss after {step} steps"
        return EvalResult(
            task_type="text-generation", dataset_type=name or "unpublished", dataset_name=name or "unpublished rows",
            dataset_split=split, metric_type="loss", metric_name=metric, metric_value=round(entry["eval_loss"], 4),
        )  # fmt: skip


def _pruned_in_batches(history: list[dict[str, Any]]) -> str | None:
    if not (logs := [entry for entry in history if "kept_samples" in entry]):
        return None
    samples, tokens = (fmean(entry[key] for entry in logs) for key in ("kept_samples", "kept_tokens"))
    return (
        f"every batch while training, which kept {samples:.0%} of its samples and {tokens:.0%} of its supervised tokens"
    )


def is_side_tuned(model: Any) -> bool:
    """Whether `model` trains a side network."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, SideTuningConfig)
