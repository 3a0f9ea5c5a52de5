"""TRL: `qtuning sft --config recipe.yaml` runs TRL's own SFT script on TRL's own YAML keys, with our blocks.

A file for `trl sft` becomes ours by adding `qst:`, `eu_pruning:`, or both; `sweep:` trains several side networks at
once. On several GPUs: `accelerate launch -m
qtuning_peft.integrations.trl --config recipe.yaml`. In Python, `SFTTrainer(peft_config=SideTuningConfig(...))` is
enough for side tuning; [`EUPruningSFTTrainer`] adds the pruning of what TRL has tokenized.
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import trl
import yaml
from datasets import Dataset
from rich.console import Console
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser
from trl.scripts import sft

from qtuning_peft.eu_plane import EUPruner
from qtuning_peft.hub.card import complete
from qtuning_peft.registry import help_of
from qtuning_peft.side_tuning import SideTuningConfig
from qtuning_peft.sweep import SweepTrainer

from .blocks import EUPruningBlock, QSTTrainingBlock, read_block
from .common import add_callbacks, prune_before_training, refuse_lora
from .metadata import datasets_on_the_hub, is_side_tuned
from .stored import read_sweep, show_sweep

logger = logging.getLogger(__name__)

USAGE = "qtuning sft --config FILE [--KEY VALUE ...]"
DESCRIPTION = """TRL's supervised fine-tuning, with more blocks in its YAML file. Every other key is TRL's own, and may
also be given as an option, which then counts. `sweep` has lists of values by setting, such as {learning_rate: [0.0005,
0.001], reduction_factor: [4, 8]}: every combination is a side network, all learn from the same pass of the base, and
the best in evaluation is saved. `qtuning recipes list` shows files to start from."""


@dataclass
class Blocks:
    """Our keys, for TRL's parser."""

    qst: dict[str, Any] | str | None = None
    eu_pruning: dict[str, Any] | str | None = None
    sweep: dict[str, Any] | str | None = None


class EUPruningSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, which prunes its training data as the block `eu_pruning` says.

    In mode static, rows are pruned between TRL's tokenization and its packing, so that packs hold what is kept; rows
    longer than `max_length` are truncated first. In mode dynamic, every batch is pruned. The card of a side network
    also says how to use it, and how it was trained.

    Args:
        eu_pruning: What to keep; `None` for everything.
        recipe: Settings for the card, under TRL's keys; it shows those that decide what is learned, and no paths.
        *args, **kwargs: As `SFTTrainer` takes them.
    """

    def __init__(
        self, *args: Any, eu_pruning: EUPruningBlock | None = None, recipe: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        self._static = eu_pruning is not None and eu_pruning.mode == "static"
        super().__init__(*args, **kwargs)
        if eu_pruning is not None and self._is_vision_dataset:
            raise ValueError("eu_pruning is set, but the data has images, which scores do not see; leave it out.")
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        block = {} if eu_pruning is None else {"eu_pruning": eu_pruning.model_dump(exclude_unset=True)}
        pruned = None
        if eu_pruning is not None and self._static:
            data: Any = self.train_dataset  # type: ignore[has-type]  # set by TRL, and again below
            if not isinstance(data, Dataset):
                raise ValueError("eu_pruning.mode is 'static', but the training data is streamed; choose 'dynamic'.")
            folder, packing = Path(self.args.output_dir), self.args.packing
            kept, pruned = prune_before_training(data, self.model, tokenizer, eu_pruning, folder, logger.info)
            prepare = super()._prepare_dataset
            self.train_dataset = prepare(kept, self.processing_class, self.args, packing, None, "train")
        add_callbacks(self, tokenizer, recipe or vars(self.args) | block, eu_pruning, pruned, logger.warning)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write TRL's card, and complete it for a side network."""
        on_the_hub = datasets_on_the_hub(dataset_name)
        super().create_model_card(model_name, on_the_hub[0] if on_the_hub else None, tags)
        if is_side_tuned(self.model) and self.is_world_process_zero():
            complete(
                Path(self.args.output_dir) / "README.md", self.model.active_peft_config,
                adapter=self.hub_model_id or "ADAPTER", training=getattr(self.model, "training_metadata", None),
            )  # fmt: skip

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        text = getattr(args, "dataset_text_field", None) or "text"
        known = {"input_ids", "messages", "conversations", "prompt", text}
        columns = list(getattr(dataset, "column_names", None) or known)
        if formatting_func is None and known.isdisjoint(columns):
            raise ValueError(
                f"The data has the columns {', '.join(columns)}; TRL needs messages, prompt and completion, or text, "
                "under another name with dataset_text_field."
            )
        # Samples are pruned one by one, so packs are made afterwards.
        packing = packing and not (dataset_name == "train" and self._static)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


class SweepSFTTrainer(SweepTrainer, EUPruningSFTTrainer):
    """`EUPruningSFTTrainer` for the networks of a sweep; see `qtuning_peft.sweep`."""


def main(arguments: list[str]) -> None:
    """Run TRL's SFT script on command-line arguments; a wrong block or key is a ValueError of one sentence."""
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(_help())
        return
    options = {option[2:].partition("=")[0].replace("-", "_") for option in arguments if option.startswith("--")}
    given = options | _keys_of_file(arguments)
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, Blocks)
    parser = TrlParser(kinds, prog="qtuning sft", usage=USAGE)
    script_args, training_args, model_args, dataset_args, ours = parser.parse_args_and_config(arguments)
    # A block without content asks for defaults.
    blocks = {name: content for name, content in vars(ours).items() if name in given}
    # As they count: of the file, of the command line, and by default.
    recipe = {**vars(dataset_args), **vars(model_args), **vars(training_args), **vars(script_args), **blocks}
    changes: dict[str, Any] = {"recipe": recipe | {"datasets": [vars(each) for each in dataset_args.datasets or []]}}
    if "qst" in blocks:
        refuse_lora({key: value for key, value in vars(model_args).items() if key in given}, "there is a block qst")
        qst = read_block("qst", QSTTrainingBlock, blocks["qst"])
        changes |= {"peft_config": qst.peft_config(), "callbacks": qst.callbacks()}
    if "eu_pruning" in blocks:
        changes["eu_pruning"] = read_block("eu_pruning", EUPruningBlock, blocks["eu_pruning"])
    trainer: type[SFTTrainer] = EUPruningSFTTrainer
    if "sweep" in blocks:
        if "qst" not in blocks or training_args.eval_strategy == "no":
            raise ValueError(
                "sweep needs the block qst, and eval_strategy, by which the best network is chosen; set both."
            )
        for name in ("hidden_state_cache_gib", "states"):
            if getattr(qst, name) is not None:
                raise ValueError(f"qst.{name} has no effect in a sweep; leave it out.")
        if "eu_pruning" in changes and changes["eu_pruning"].mode == "dynamic":
            raise ValueError(
                "eu_pruning.mode is 'dynamic', but the networks of a sweep share their rows; choose static."
            )
        rate, seed = training_args.learning_rate, training_args.seed
        sweep, keep_all = read_sweep(blocks["sweep"], qst.peft_config(), rate, seed)
        trainer, changes = SweepSFTTrainer, changes | {"sweep": sweep, "keep_all": keep_all}
    made: list[Any] = []

    def make(**of_script: Any) -> Any:
        made.append(trainer(**of_script | changes))
        return made[0]

    # What is kept belongs on the screen of every run.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qtuning_peft").setLevel(logging.INFO)
    # The script looks its trainer up in `trl` when it runs.
    trl.SFTTrainer = make
    try:
        sft.main(script_args, training_args, model_args, dataset_args)
    finally:
        trl.SFTTrainer = SFTTrainer
    if "sweep" in blocks and made[0].is_world_process_zero():
        show_sweep(made[0], Path(training_args.output_dir), Console(stderr=True))


def _keys_of_file(arguments: list[str]) -> set[str]:
    if "--config" not in arguments[:-1]:
        return set()
    file = Path(arguments[arguments.index("--config") + 1])
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config is {file}, which cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config is {file}, which holds no keys; write one `key: value` on each line.")
    return set(content)


def _help() -> str:
    """Our two blocks, from their classes, and where TRL's keys are listed."""
    parser = argparse.ArgumentParser(
        prog="qtuning sft", usage=USAGE, description=DESCRIPTION, add_help=False,
        epilog="All other keys are TRL's: `trl sft --help` lists them.",
    )  # fmt: skip
    # Read now, not when the blocks were made: other packages may have registered further choices.
    options = {field.name: field for kind in (SideTuningConfig, EUPruner) for field in fields(kind)}
    titles: dict[type[QSTTrainingBlock | EUPruningBlock], str] = {
        QSTTrainingBlock: "qst, a side network beside the frozen base instead of LoRA",
        EUPruningBlock: "eu_pruning, what to keep of the training data",
    }
    for block, title in titles.items():
        group = parser.add_argument_group(title)
        for key, entry in block.model_fields.items():
            described = key in options and "help" in options[key].metadata
            text = help_of(options[key]) if described else entry.description or ""
            default = entry.get_default(call_default_factory=True)
            if default not in (None, [], ()) and "Default:" not in text:
                text += f" Default: {yaml.safe_dump(default).splitlines()[0]}."
            group.add_argument(key, help=text.replace("%", "%%"))
    return parser.format_help()


if __name__ == "__main__":
    main(sys.argv[1:])
