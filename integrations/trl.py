"""TRL: `qtuning sft --config recipe.yaml` runs TRL's own SFT script on TRL's own YAML keys, with our two blocks.

A YAML file for `trl sft` becomes ours by adding `qst:`, `eu_pruning:`, or both. On several GPUs:
`accelerate launch -m qtuning_peft.integrations.trl --config recipe.yaml`.

In Python nothing of this is needed for side tuning, `SFTTrainer(peft_config=SideTuningConfig(...))` does it;
[`EUPruningSFTTrainer`] adds the pruning of what TRL has tokenized.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trl
import yaml
from datasets import Dataset
from trl import SFTTrainer
from trl.scripts import sft

from qtuning_peft.eu_plane import EUPruningCallback
from qtuning_peft.hub.card import complete
from qtuning_peft.trainer import PrefixCachingCallback

from .blocks import EUPruningBlock, QSTTrainingBlock, read_block
from .metadata import TrainingMetadataCallback, datasets_on_the_hub, is_side_tuned
from .pruning import prune_training_data

logger = logging.getLogger(__name__)

DESCRIPTION = """TRL's supervised fine-tuning with two more blocks in the YAML file: `qst:`, a side network beside a
frozen base instead of LoRA, and `eu_pruning:`, which keeps of the training data what teaches. Every other key is TRL's
own, and may also be given as an option, which then counts. `qtuning recipes list` shows files to start from."""


class EUPruningSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, which prunes its training data as the block `eu_pruning` says.

    Statically, rows are pruned between TRL's tokenization and its packing, so that packs hold what is kept; rows
    longer than `max_length` are truncated first. Dynamically, every batch is.

    The card of a side network, which TRL writes anew at every checkpoint and push, says also how to use it, and how it
    was trained.

    Args:
        eu_pruning: What to keep; `None` for everything.
        recipe: Settings for the card, under TRL's keys; it shows those that decide what is learned, and no paths.
        *args, **kwargs: As `SFTTrainer` takes them.

    Raises:
        ValueError: when the data cannot be pruned.
    """

    def __init__(
        self,
        *args: Any,
        eu_pruning: EUPruningBlock | None = None,
        recipe: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._static_block = eu_pruning if eu_pruning is not None and eu_pruning.mode == "static" else None
        super().__init__(*args, **kwargs)
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        logged: list[str] = []

        def log(message: str) -> None:
            logger.info(message)
            logged.append(message)

        if self._static_block is not None:
            data: Any = self.train_dataset  # type: ignore[has-type]  # set by TRL, and again below
            if not isinstance(data, Dataset):
                raise ValueError(
                    "eu_pruning.mode is 'static', but the training data is streamed and cannot be seen whole; choose "
                    "'dynamic'."
                )
            output = Path(self.args.output_dir)
            kept = prune_training_data(
                data, self.model, tokenizer, self._static_block,
                cache_path=output / "eu_scores", report_path=output / "eu_report.html", log=log,
            )  # fmt: skip
            self.train_dataset = super()._prepare_dataset(
                kept, self.processing_class, self.args, self.args.packing, None, "train"
            )
        elif eu_pruning is not None:
            self.add_callback(EUPruningCallback(eu_pruning.pruner(tokenizer), eu_pruning.tokens_per_batch))
        if is_side_tuned(self.model):
            self.add_callback(PrefixCachingCallback())
            self.add_callback(self._training_metadata(eu_pruning, recipe, logged))

    def _training_metadata(
        self, eu_pruning: EUPruningBlock | None, recipe: Mapping[str, Any] | None, logged: list[str]
    ) -> TrainingMetadataCallback:
        if recipe is None:
            block = {} if eu_pruning is None else {"eu_pruning": eu_pruning.model_dump(exclude_unset=True)}
            recipe = vars(self.args) | block
        datasets = datasets_on_the_hub(recipe.get("datasets") or recipe.get("dataset_name"))
        split = recipe.get("dataset_test_split") if len(datasets) == 1 else None
        return TrainingMetadataCallback(
            self.model, recipe, logged[0].removeprefix("eu_pruning ") if logged else None, datasets,
            (datasets[0], split) if split else (None, None),
        )  # fmt: skip

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
        # Samples are pruned one by one, so packs are made afterwards.
        packing = packing and not (dataset_name == "train" and self._static_block is not None)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


def main(arguments: list[str]) -> None:
    """Run TRL's SFT script.

    Args:
        arguments: As on the command line; `--config` names the YAML file.

    Raises:
        ValueError: in one sentence, when a block or a key is wrong.
    """
    with _without_blocks(arguments) as (arguments, blocks):
        parser = sft.make_parser(prog="qtuning sft")
        parser.usage = "qtuning sft --config FILE [--KEY VALUE ...]"
        parser.description = DESCRIPTION
        script_args, training_args, model_args, dataset_args = parser.parse_args_and_config(arguments)
    # As they count: of the file, of the command line, and by default.
    recipe = {**vars(dataset_args), **vars(model_args), **vars(training_args), **vars(script_args)}
    recipe["datasets"] = [vars(entry) for entry in dataset_args.datasets or []]
    options: dict[str, Any] = {"recipe": recipe | blocks}
    if "qst" in blocks:
        if model_args.use_peft:
            raise ValueError("use_peft is true beside the block qst, but that asks for LoRA; remove one of the two.")
        block = read_block("qst", QSTTrainingBlock, blocks["qst"])
        options |= {"peft_config": block.peft_config(), "callbacks": block.callbacks()}
    if "eu_pruning" in blocks:
        options["eu_pruning"] = read_block("eu_pruning", EUPruningBlock, blocks["eu_pruning"])
    # What is kept belongs on the screen of every run.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("qtuning_peft").setLevel(logging.INFO)
    with _trainer_of_script(options):
        sft.main(script_args, training_args, model_args, dataset_args)


@contextmanager
def _without_blocks(arguments: list[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The arguments with a YAML file that TRL's parser can read, and the blocks that the user's file has besides."""
    if "--config" not in arguments[:-1]:
        yield arguments, {}
        return
    place = arguments.index("--config") + 1
    file = Path(arguments[place])
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config is {file}, which cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config is {file}, which holds no keys; write one `key: value` on each line.")
    blocks = {name: content.pop(name) for name in ("qst", "eu_pruning") if name in content}
    with tempfile.TemporaryDirectory() as folder:
        rest = Path(folder) / file.name
        rest.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield [*arguments[:place], str(rest), *arguments[place + 1 :]], blocks


@contextmanager
def _trainer_of_script(options: dict[str, Any]) -> Iterator[None]:
    """Let TRL's script, which looks its trainer up in `trl` when it runs, build ours with `options`."""

    class Trainer(EUPruningSFTTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | options)

    # The name stands in the model card and in experiment trackers.
    Trainer.__name__ = Trainer.__qualname__ = "SFTTrainer"
    trl.SFTTrainer = Trainer
    try:
        yield
    finally:
        trl.SFTTrainer = SFTTrainer


if __name__ == "__main__":
    main(sys.argv[1:])
