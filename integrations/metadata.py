"""What an adapter's card says of its training in a trainer: the recipe, how the data were pruned, what was logged.

A recipe may hold folders or tokens: the card shows only settings of an allow-list that look like no path or address.
"""

import os
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from statistics import fmean
from typing import Any

import pyarrow.compute as pc
import yaml
from datasets import Dataset
from huggingface_hub import EvalResult
from peft import PeftModel
from transformers import TrainerCallback

from qtuning_peft.head import is_causal
from qtuning_peft.hub.metadata import TrainingMetadata, is_hub_name, machine, peak_memory, slowdown
from qtuning_peft.reading import IGNORE_INDEX
from qtuning_peft.sharding import is_sharded
from qtuning_peft.side_tuning import SideTuningConfig

from .blocks import EUPruningBlock, QSTTrainingBlock

# Keys of TRL and of Axolotl, of an entry of `datasets`, and of our two blocks.
SHOWN = {
    "model_name_or_path", "model_revision", "base_model", "dtype", "attn_implementation", "load_in_4bit", "fraction",
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets", "test_datasets", "path",
    "name", "split", "type", "load_in_8bit", "max_length", "sequence_len", "packing", "sample_packing", "padding_free",
    "assistant_only_loss", "completion_only_loss", "train_on_inputs", "loss_type", "learning_rate", "lr_scheduler_type",
    "lr_scheduler", "warmup_ratio", "warmup_steps", "weight_decay", "optim", "optimizer", "max_grad_norm", "num_epochs",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing", "bf16", "fp16", "seed", "qst", "eu_pruning",
}  # fmt: skip
SHOWN |= (QSTTrainingBlock.model_fields.keys() | EUPruningBlock.model_fields.keys()) - {
    "cache_path", "report_path", "states"
}  # fmt: skip
NOT_PRUNED = "none in this training"
PATH = re.compile(r"""(^|[\s"'=:,(\[])(~|/|\.\.?[/\\]|\\\\|[A-Za-z]:[/\\])|://|@""")


def shown(value: Any) -> Any:
    """What a card may show of a trainer's recipe, or one value of it: `SHOWN` without paths, addresses and secrets."""
    if isinstance(value, Mapping):
        found = {key: shown(each) for key, each in value.items() if key in SHOWN}
        return {key: left for key, left in found.items() if left not in (None, {}, [])}
    if isinstance(value, list | tuple):
        return [left for left in map(shown, value) if left not in (None, {})]
    if isinstance(value, str):
        value = str(getattr(value, "value", value))
        # A single word is a name, also where something in this folder has it.
        file = not value.isidentifier() and os.path.exists(value)
        return None if file or PATH.search(value) else value
    return value if isinstance(value, bool | int | float) else None


def as_recipe(settings: Mapping[str, Any]) -> str:
    """What a card may show of a trainer's settings, as YAML."""
    return yaml.safe_dump(shown(settings), sort_keys=False, allow_unicode=True)


def datasets_on_the_hub(entries: Any) -> tuple[str, ...]:
    """Those `user/name` that can be on the Hub, of a name or entries with a `path`; files are left out."""
    entries = entries if isinstance(entries, list | tuple) else [entries]
    names = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and "/" in name and is_hub_name(name)))


class TrainingMetadataCallback(TrainerCallback):
    """Keeps `model.training_metadata`, which the model's card is written from, at what the trainer has logged.

    An evaluation before the first step (`eval_on_start=True`) is the base's: a new side network starts exactly there.
    It does nothing where no side network is trained.

    Args:
        model: Whose card it is; by default, the trainer's.
        known: What is known before training; by default, the trainer's arguments.
        evaluated_on: Name on the Hub, and split, of the data that the trainer evaluates on.
    """

    def __init__(
        self, model: PeftModel | None = None, known: TrainingMetadata | None = None,
        evaluated_on: tuple[str | None, str | None] = (None, None),
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.known, self.evaluated_on = known or TrainingMetadata(pruning=NOT_PRUNED), evaluated_on
        self.began: float | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Note the training data, and where training starts: a resumed one at the step of its checkpoint."""
        self.model = self.model or model
        rows, tokens = count(getattr(train_dataloader, "dataset", None))
        self.known = replace(
            self.known, recipe=self.known.recipe or as_recipe(vars(args)), rows=rows, tokens=tokens,
            resumed_at=state.global_step or None,
        )  # fmt: skip
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Keep what is known by now."""
        self.model = self.model or model
        if not is_side_tuned(self.model):
            return
        last = {key: value for entry in state.log_history for key, value in entry.items()}
        # What is saved at the end may be an earlier step's.
        best = state.best_global_step if args.load_best_model_at_end and "train_runtime" in last else None
        evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
        first = [entry for entry in evaluations[:1] if entry["step"] == 0]
        final = [entry for entry in evaluations if entry["step"] and best in (None, entry["step"])][-1:]
        pruned = [(log["kept_samples"], log["kept_tokens"]) for log in state.log_history if "kept_samples" in log]
        every_batch = "every batch while training, which kept {:.0%} of its samples and {:.0%} of its supervised tokens"
        self.model.training_metadata = replace(
            self.known,
            pruning=every_batch.format(*map(fmean, zip(*pruned, strict=True))) if pruned else self.known.pruning,
            results=tuple(self._result(entry, state.global_step) for entry in first + final),
            steps=state.global_step, loss=last.get("loss"),
            seconds=last.get("train_runtime", time.perf_counter() - self.began if self.began else None),
            peak_memory=peak_memory(), machine=machine(),
            versions=", ".join(f"{name} {version(name)}" for name in ("qtuning-peft", "peft", "transformers", "torch")),
        )  # fmt: skip

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Measure what the side network costs in generation, in one process, beside a base that is there whole."""
        if not is_side_tuned(self.model):
            return
        data = getattr(train_dataloader, "dataset", None)
        row: list[int] = []
        if isinstance(data, Dataset) and "input_ids" in data.column_names:
            row = max(data.with_format(None)[:16]["input_ids"], key=len, default=[])
        base = self.model.get_base_model()
        # Trained from stored states, it has no embeddings.
        whole = is_causal(base) and not is_sharded(model or self.model) and base.get_input_embeddings().weight.numel()
        if len(row) < 4 or not whole or not state.is_world_process_zero:
            return
        trained = time.perf_counter() - (self.began or time.perf_counter())
        try:
            self.known = replace(self.known, slowdown=slowdown(self.model, row, max(1.0, trained / 100)))
        except Exception as error:  # a figure on a card is not worth the training
            warnings.warn(f"The slow-down of generation is not measured: {error!r:.200}.", stacklevel=2)
        self.on_log(args, state, control)

    def _result(self, entry: Mapping[str, Any], steps: int) -> EvalResult:
        (name, split), step = self.evaluated_on, entry["step"]
        metric = "loss before training" if not step else "loss" if step == steps else f"loss after {step} steps"
        return EvalResult(
            task_type="text-generation", dataset_type=name or "unpublished", dataset_name=name or "unpublished rows",
            dataset_split=split, metric_type="loss", metric_name=metric, metric_value=round(entry["eval_loss"], 4),
        )  # fmt: skip


def count(dataset: Any) -> tuple[int | None, int | None]:
    """Rows of tokenized data, also of packed ones, and their supervised tokens, where they can be known."""
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None, None
    rows = sum(map(len, dataset["seq_lengths"])) if "seq_lengths" in dataset.column_names else len(dataset)
    labels = (pc.list_flatten(batch["labels"]) for batch in dataset.with_format("arrow").iter(1000))
    return rows, sum(pc.sum(pc.not_equal(part, IGNORE_INDEX)).as_py() or 0 for part in labels)


def is_side_tuned(model: Any) -> bool:
    """Whether `model` trains a side network."""
    return isinstance(model, PeftModel) and isinstance(model.active_peft_config, SideTuningConfig)
