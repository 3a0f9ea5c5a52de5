"""`qtuning train`: a recipe for training from stored states, with `transformers.Trainer` underneath.

    qst: {reduction_factor: 4}                     # the side network
    eu_pruning: {sample_ratio: 0.5}                # which rows are kept: a view, no copy
    sweep: {learning_rate: [0.0005, 0.001]}        # several networks on one pass: every combination
    validation: 0.1                                # share of the rows, or another folder of states

All other keys are `TrainingArguments`.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qtuning_peft.hub.metadata import TrainingMetadata
from qtuning_peft.loading import load_tokenizer
from qtuning_peft.side_tuning import SideTuningConfig
from qtuning_peft.stored import Manifest, StatesCollator, load_states, model_from_states, pruned_view, states_of
from qtuning_peft.sweep import RESULTS, Candidate, SweepTrainer, candidates, plot_sweep

from .blocks import EUPruningBlock, QSTBlock, read_block
from .common import SMALLEST_LEARNING_RATE, refuse_lora
from .metadata import NOT_PRUNED, TrainingMetadataCallback, as_recipe

OWN = ("qst", "eu_pruning", "sweep", "validation")
DEFAULTS = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 8, "num_train_epochs": 3, "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1, "logging_steps": 10, "save_strategy": "epoch", "eval_strategy": "epoch", "report_to": "none",
}  # fmt: skip
# What the rows are, and that nothing but a loss comes out.
FIXED = {"remove_unused_columns": False, "prediction_loss_only": True}
CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
ONLY_A_SCORER = ("scorer_model", "reference_model", "cache_path", "report_path")


class Recipe:
    """A recipe, read and checked.

    Args:
        content: As in the YAML file, changed by what the command line says.

    Raises:
        ValueError: in one sentence, naming the key.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        refuse_lora(content, "states train a side network")
        known = [field.name for field in fields(TrainingArguments) if field.init]
        for key in content:
            if key not in known and key not in OWN:
                meant = get_close_matches(key, [*known, *OWN], 1)
                raise ValueError(
                    f"{key} is no key of a recipe for states{f'; did you mean {meant[0]}?' if meant else '.'}"
                )
            if key in FIXED and content[key] != FIXED[key]:
                raise ValueError(
                    f"{key} is {content[key]!r}, but training from states needs {FIXED[key]!r}; remove it."
                )
        if not content.get("output_dir"):
            raise ValueError(
                "output_dir is missing; name the folder of the adapter in the recipe, or give --output-dir."
            )
        self.content = dict(content)
        self.config = read_block("qst", QSTBlock, content.get("qst")).peft_config()
        self.pruning: EUPruningBlock | None = None
        if "eu_pruning" in content:
            self.pruning = read_block("eu_pruning", EUPruningBlock, content["eu_pruning"])
            if self.pruning.mode == "dynamic":
                raise ValueError("eu_pruning.mode is 'dynamic', but scores are stored once for all; leave it out.")
            for name in ONLY_A_SCORER:
                if getattr(self.pruning, name) is not None:
                    raise ValueError(f"eu_pruning.{name} has no effect on rows that are scored already; leave it out.")
        self.validation = content.get("validation", 0)
        if isinstance(self.validation, int | float) and not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; give a share in [0, 1), or a folder of states.")
        settings = DEFAULTS | {key: value for key, value in content.items() if key not in OWN} | FIXED
        if not self.validation:
            settings["eval_strategy"] = content.get("eval_strategy", "no")
            if settings["eval_strategy"] != "no":
                raise ValueError("eval_strategy is set, but validation is not; give a share of the rows, or a folder.")
        settings.setdefault("use_cpu", not torch.cuda.is_available())
        (self.arguments,) = HfArgumentParser(TrainingArguments).parse_dict(settings)
        self.sweep: list[Candidate] = []
        self.keep_all = False
        if content.get("sweep") is not None:
            rate, seed = self.arguments.learning_rate, self.arguments.seed
            self.sweep, self.keep_all = read_sweep(content["sweep"], self.config, rate, seed)
            if not self.validation:
                raise ValueError(
                    "sweep needs validation, by which the best network is chosen; give a share, or a folder."
                )

    @classmethod
    def read(cls, file: Path, changes: Mapping[str, Any]) -> "Recipe":
        """The recipe in `file`, with `changes`."""
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"--config is {file}, which cannot be read: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"--config is {file}, which holds no keys; write one `key: value` on each line.")
        return cls(with_numbers(content | dict(changes)))

    def rows(self, folder: Path) -> tuple[Dataset, Dataset | None, str]:
        """Rows to train on, rows to validate on, and what was kept in words."""
        rows, validation = load_states(folder), None
        among: list[int] | None = None
        if isinstance(self.validation, str):
            validation = load_states(self.validation)
            own, other = (Manifest.read(states_of(each)) for each in (folder, self.validation))
            if (own.base, own.layers, own.head) != (other.base, other.layers, other.head):
                raise ValueError(f"validation is {self.validation}, whose states are of another base or other blocks.")
            if own.format != other.format:
                raise ValueError(
                    f"validation is {self.validation}, in {other.format}, but {folder} is in {own.format}."
                )
        elif self.validation:
            draw = torch.Generator().manual_seed(self.arguments.data_seed or self.arguments.seed)
            order, count = torch.randperm(len(rows), generator=draw).tolist(), round(self.validation * len(rows))
            if not 0 < count < len(rows):
                raise ValueError(
                    f"validation is {self.validation}, which is {count} of {len(rows)} rows; give another."
                )
            validation, among = rows.select(sorted(order[:count])), sorted(order[count:])
        if self.pruning is None:
            return rows if among is None else rows.select(among), validation, NOT_PRUNED
        if states_of(folder) != folder:
            raise ValueError(f"eu_pruning is set, but {folder} is pruned already; leave it out.")
        pruner = self.pruning.pruner(None)
        rows = pruned_view(rows, pruner, among)
        if not len(rows):
            raise ValueError("eu_pruning keeps no rows; raise its budget.")
        return rows, validation, str(pruner.pruned)


def read_sweep(content: Any, config: SideTuningConfig, rate: float, seed: int) -> tuple[list[Candidate], bool]:
    """The networks of a block `sweep` around `config`, and whether all are saved."""
    if not isinstance(content, Mapping):
        raise ValueError(f"sweep is {content!r}; give settings, each with a list of values.")
    values = with_numbers(content)
    keep_all = bool(values.pop("keep_all", False))
    return candidates(config, values, rate, seed), keep_all


def with_numbers(value: Any) -> Any:
    """`value`, in which words like 1e-3 are the numbers that people mean: YAML 1.1 wants 1.0e-3."""
    if isinstance(value, Mapping):
        return {key: with_numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def train(folder: Path, recipe: Recipe, overwrite: bool, console: Console) -> Path:
    """Train from the states in `folder` as `recipe` says; returns the folder of the adapter.

    Interrupted and started again, it goes on from the last checkpoint.
    """
    output = Path(recipe.arguments.output_dir)
    if (output / "adapter_model.safetensors").is_file() and not overwrite:
        raise ValueError(f"{output} holds an adapter already; choose another output_dir, or give --overwrite.")
    rows, validation, pruned = recipe.rows(folder)
    set_seed(recipe.arguments.seed)
    several = {candidate.name: candidate.config for candidate in recipe.sweep}
    model = model_from_states(folder, several or recipe.config)
    options: dict[str, Any] = {
        "model": model, "args": recipe.arguments, "train_dataset": rows, "eval_dataset": validation,
        "data_collator": StatesCollator(folder), "processing_class": _tokenizer(model),
    }  # fmt: skip
    trainer: Any = (
        SweepTrainer(**options, sweep=recipe.sweep, keep_all=recipe.keep_all) if recipe.sweep else Trainer(**options)
    )
    known = TrainingMetadata(recipe=as_recipe(recipe.content), pruning=pruned)
    trainer.add_callback(TrainingMetadataCallback(model, known))
    rate = recipe.arguments.learning_rate
    if rate < SMALLEST_LEARNING_RATE:
        console.print(f"Note: learning_rate is {rate:g}, a rate for LoRA; start at 1e-3 with a side network.")
    kept = "" if pruned == NOT_PRUNED else f" ({pruned})"
    console.print(f"{len(rows)} rows to train on{kept}, {len(validation or ())} for validation", highlight=False)
    last = None if overwrite else last_checkpoint(output)
    if last is not None:
        console.print(f"going on from {last}", highlight=False)
    trainer.train(resume_from_checkpoint=last)
    if recipe.sweep:
        trainer.evaluate()
    trainer.save_model()
    if recipe.sweep:
        show_sweep(trainer, output, console)
    return output


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: the Trainer writes its state last, and may be killed before."""
    numbered = [(int(found[1]), path) for path in folder.glob("*") if (found := CHECKPOINT.fullmatch(path.name))]
    for _, path in sorted(numbered, reverse=True):
        with suppress(OSError, ValueError, TypeError):
            TrainerState.load_from_json(str(path / TRAINER_STATE_NAME))
            return str(path)
    return None


def _tokenizer(model: Any) -> Any:
    """The base's tokenizer, to save it beside the adapter, where it can be loaded."""
    with suppress(OSError, ValueError):
        return load_tokenizer(model.get_base_model().name_or_path)
    return None


def show_sweep(trainer: SweepTrainer, folder: Path, console: Console) -> None:
    """Print the sweep's table, and write its plot to `folder` where matplotlib is installed."""
    rows = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    settings = [key for key in rows[0] if key not in ("name", "eval_loss", "best")]
    table = Table("network", *settings, "validation loss", "")
    for row in sorted(rows, key=lambda row: row["eval_loss"]):
        cells = [row["name"], *(str(row[key]) for key in settings), f"{row['eval_loss']:.4f}"]
        table.add_row(*cells, "saved" if row["best"] else "")
    console.print(table)
    if find_spec("matplotlib") is not None:
        plot_sweep(trainer.state.log_history, trainer.sweep, folder / "sweep.png")
