"""`qtuning train`: a side network from stored states, without its base (see `integrations.stored`)."""

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from .data import console, one_sentence


def train(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Folder of `qtuning states`, or a pruned view of one.")],
    config: Annotated[Path, typer.Option(help="Recipe: TrainingArguments, and the blocks below.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Train anew where an adapter is there.")] = False,
) -> None:
    """Train a side network from stored states; nothing of the base but its head is loaded.

    The recipe is a YAML file. Beside the keys of transformers' TrainingArguments it has qst (the side network),
    eu_pruning (which rows are kept), validation (a share of the rows, or another folder of states) and sweep (lists of
    values: every combination is a network, all learn side by side, the best is saved). Any key that is a number, a
    word or a flag may also be given as an option, which then counts: --learning_rate 2e-3. Interrupted and started
    again, training goes on from its last checkpoint.
    """
    from ..integrations.stored import Recipe
    from ..integrations.stored import train as train_from

    with one_sentence():
        output = train_from(folder, Recipe.read(config, changes(context.args)), overwrite, console)
        console.print(f"adapter: {output}", highlight=False)


def changes(arguments: list[str]) -> dict[str, Any]:
    """Keys and values of options like `--learning_rate 2e-3` or `--bf16`."""
    found: dict[str, Any] = {}
    left = list(arguments)
    while left:
        option = left.pop(0)
        if not option.startswith("--"):
            raise ValueError(f"{option} is no option; write --KEY VALUE.")
        key, given, value = option[2:].partition("=")
        if not given:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        found[key.replace("-", "_")] = yaml.safe_load(value)
    return found
