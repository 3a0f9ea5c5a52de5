"""ms-swift: `tuner_type: qst` for side tuning and `callbacks: [eu_pruning]` for pruning, in `swift sft`.

ms-swift imports this file by its path, which `python -m qtuning_peft.integrations.swift` prints:

    swift sft recipe.yaml --external_plugins "$(python -m qtuning_peft.integrations.swift)"

Its parser has run before the plugin is imported, so that our blocks are keys of an option of its own: `qst` and
`eu_pruning` under `model_kwargs`, which also goes to `args.json` beside every checkpoint.
"""

import ast
import os
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from qtuning_peft.integrations.blocks import EUPruningBlock, QSTBlock, read_block
from qtuning_peft.integrations.common import prune_before_training
from swift.callbacks import callbacks_map
from swift.dataset import LazyLLMDataset
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import get_logger
from torch import nn
from transformers import TrainerCallback

from qtuning_peft.eu_plane import EUPruningCallback

logger = get_logger()

# PEFT's names for the tasks of ms-swift that a side network can be trained for.
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS"}


class QSTTuner(PeftTuner):
    """Trains a side network beside the frozen base: `tuner_type: qst`."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """Put a fresh side network beside `model`, as `model_kwargs.qst` says."""
        # ms-swift takes any key there: a misspelt one would otherwise train something else.
        if "qst" not in args.model_kwargs:
            keys = ", ".join(args.model_kwargs) or "none"
            raise ValueError(f"model_kwargs has the keys {keys}, but tuner_type is 'qst'; add qst, such as qst: {{}}.")
        if "eu_pruning" in args.model_kwargs and "eu_pruning" not in args.callbacks:
            raise ValueError(f"model_kwargs has eu_pruning, but callbacks is {args.callbacks}; add eu_pruning to it.")
        if args.task_type not in TASK_TYPES:
            raise ValueError(f"task_type is {args.task_type!r}; choose from {', '.join(TASK_TYPES)}.")
        block = read_block("model_kwargs.qst", QSTBlock, args.model_kwargs["qst"])
        return get_peft_model(model, block.peft_config(TASK_TYPES[args.task_type]))


class StaticPruningCallback(TrainerCallback):
    """Prunes a trainer's training data when the trainer is complete, before it counts its steps."""

    def __init__(self, block: EUPruningBlock, trainer: Any) -> None:
        self.block, self.trainer = block, trainer

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Replace the trainer's data by what is kept of it."""
        trainer, data = self.trainer, self.trainer.train_dataset
        if not isinstance(data, LazyLLMDataset):
            raise ValueError(
                f"model_kwargs.eu_pruning.mode is 'static', but the training data is {type(data).__name__}; turn "
                "streaming and packing off, or prune beforehand with qtuning prune."
            )
        # Encoded once here instead of in every epoch; `lengths` is what ms-swift groups by.
        rows = Dataset.from_list([_row(data[index]) for index in range(len(data))])
        tokenizer, folder = trainer.template.tokenizer, Path(trainer.args.output_dir)
        kept, _ = prune_before_training(rows, trainer.model, tokenizer, self.block, folder, logger.info)
        trainer.train_dataset = kept.map(
            lambda row: {"lengths": [len(row["input_ids"])]}, keep_in_memory=True, load_from_cache_file=False
        )


def eu_pruning(args: Any, trainer: Any) -> TrainerCallback:
    """What `callbacks: [eu_pruning]` stands for: pruning as `model_kwargs.eu_pruning` says, with any tuner."""
    # The trainer's arguments have no model_kwargs; ms-swift hands them on in the environment, as Python literals.
    content = os.environ.get("EU_PRUNING")
    if content is None:
        raise ValueError("callbacks has eu_pruning, but model_kwargs has no such block; add it or remove the callback.")
    block = read_block("model_kwargs.eu_pruning", EUPruningBlock, ast.literal_eval(content))
    if trainer.task_type != "causal_lm":
        raise ValueError(
            f"task_type is {trainer.task_type!r}, whose samples have no supervised tokens to score; remove eu_pruning, "
            "or choose causal_lm."
        )
    if block.mode == "static":
        return StaticPruningCallback(block, trainer)
    # Else ms-swift cuts labels down to the positions it wants logits of, and rows of packs are no longer told apart.
    args.use_logits_to_keep = False
    return EUPruningCallback(trainer, block.pruner(trainer.template.tokenizer), block.tokens_per_batch)


def _row(encoded: dict[str, Any]) -> dict[str, Any]:
    """The columns that training needs of what ms-swift's template makes of a sample."""
    if other := sorted(encoded.keys() - {"input_ids", "labels", "length", "lengths"}):
        raise ValueError(
            f"model_kwargs.eu_pruning.mode is 'static', but samples have {', '.join(other)} beside their tokens; leave "
            "out the option that adds them, such as loss_scale."
        )
    return {"input_ids": encoded["input_ids"], "labels": encoded["labels"]}


tuners_map["qst"] = QSTTuner
callbacks_map["eu_pruning"] = eu_pruning
