"""LLaMA-Factory 0.9: pruned data for its default engine, and, as an experiment, QST in its new one.

Commands:
    register      whole samples (`token_ratio` 1): an entry in `dataset_info.json` for what `qtuning prune` wrote
    tokenized     trimmed samples: a folder for its option `tokenized_path`
    train         a recipe of engine v1 with `peft_config: {name: qst, reduction_factor: 8}`; this engine has a registry
                  of methods, but imports nobody's package, so it is started here
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from datasets import Dataset
from torch import nn

from qtuning_peft.atomic import replacing
from qtuning_peft.eu_plane.files import read_data, write_data

from .blocks import QSTBlock, read_block

app = typer.Typer(
    help="Pruned data, and, as an experiment, QST, for LLaMA-Factory.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

# LLaMA-Factory's entry for rows that have these columns, first match first.
ENTRIES: dict[tuple[str, ...], dict[str, Any]] = {
    ("messages",): {
        "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {f"{tag}_tag": tag for tag in ("role", "content", "user", "assistant", "system")},
    },
    ("conversations",): {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
    ("prompt", "completion"): {"columns": {"prompt": "prompt", "response": "completion"}},
    ("instruction", "input", "output"): {},
    ("instruction", "output"): {"columns": {"prompt": "instruction", "response": "output"}},
}  # fmt: skip

Rows = Annotated[Path, typer.Argument(help="Kept rows that `qtuning prune` wrote.")]
Name = Annotated[str, typer.Option(help="What `dataset:` in a recipe calls the data.")]
InfoFile = Annotated[Path, typer.Option(help="The dataset_info.json of LLaMA-Factory's dataset_dir.")]
Folder = Annotated[Path, typer.Option("--output", "-o", help="Folder, for `tokenized_path:` in a recipe.")]


@app.command()
def register(rows: Rows, name: Name, info_file: InfoFile = Path("data/dataset_info.json")) -> None:
    """Add whole kept samples, .jsonl or .parquet, to LLaMA-Factory's dataset_info.json, or replace them there."""
    if rows.is_dir():
        raise ValueError(f"{rows} is a folder; have `qtuning prune` write a file that ends in .jsonl or .parquet.")
    # Joined to the folder of the list by LLaMA-Factory, which leaves an absolute path as it is.
    entry = {"file_name": str(rows.absolute()), **_entry(read_data(rows))}
    try:
        listed = json.loads(info_file.read_text(encoding="utf-8")) if info_file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{info_file} is no JSON: {error}; repair it.") from error
    if not isinstance(listed, dict):
        raise ValueError(f"{info_file} holds no JSON object; name the dataset_info.json of LLaMA-Factory.")
    text = json.dumps(listed | {name: entry}, indent=2, ensure_ascii=False)
    with replacing(info_file) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"{info_file}: {json.dumps({name: entry})}")


def _entry(data: Dataset) -> dict[str, Any]:
    # Prompts and completions that are conversations themselves have no place in its lists.
    columns = {name for name in data.column_names if name not in ("prompt", "completion") or type(data[0][name]) is str}
    found = next((entry for needed, entry in ENTRIES.items() if columns.issuperset(needed)), None)
    if found is None:
        raise ValueError(
            f"The data's columns are {', '.join(data.column_names)}; LLaMA-Factory reads messages, conversations, "
            "instruction and output, or prompt and completion as strings: use `tokenized` instead."
        )
    if "trimmed_tokens" in columns and any(data["trimmed_tokens"]):
        raise ValueError(
            "The data has trimmed samples, which its texts do not show; prune with --token-ratio 1, or use `tokenized`."
        )
    return found


@app.command()
def tokenized(rows: Rows, output: Folder) -> None:
    """Write kept samples, trimmed or whole, for LLaMA-Factory's option tokenized_path."""
    data = read_data(rows)
    if missing := [column for column in ("input_ids", "labels") if column not in data.column_names]:
        raise ValueError(f"The data has no column {' and '.join(missing)}; use what `qtuning prune` wrote.")
    if output.suffix:
        raise ValueError(f"{output.name} ends in {output.suffix}; name a folder without an ending.")
    # LLaMA-Factory would make tensors of every other column.
    write_data(data.select_columns(["input_ids", "labels"]), output)
    typer.echo(f"{len(data)} rows: {output}")


def register_qst() -> None:
    """Make `peft_config: {name: qst}` known to LLaMA-Factory's engine v1; calling it again changes nothing."""
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
    from peft import get_peft_model

    def attach(model: nn.Module, config: Mapping[str, Any], is_train: bool = False) -> nn.Module:
        block = read_block("peft_config", QSTBlock, {key: value for key, value in config.items() if key != "name"})
        attached = get_peft_model(model, block.peft_config())
        attached.print_trainable_parameters()
        return attached

    PeftPlugin("qst").register()(attach)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML of LLaMA-Factory's engine v1, with peft_config: {name: qst}.")],
) -> None:
    """Train a side network in LLaMA-Factory's engine v1; experimental. Further key=value replace what the file says."""
    if recipe.suffix not in (".yaml", ".yml") or not recipe.is_file():
        raise ValueError(f"{recipe} is no YAML file; name a recipe that ends in .yaml.")
    # LLaMA-Factory 0.9.5 refuses every transformers that QST supports by its version alone, and reads these when it
    # is imported.
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
    os.environ.setdefault("USE_V1", "1")
    from llamafactory.v1.trainers.sft_trainer import run_sft

    register_qst()
    # Without its launcher, which on several GPUs starts processes that do not know QST.
    sys.argv = [sys.argv[0], str(recipe), *context.args]
    run_sft()


if __name__ == "__main__":
    try:
        app()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"Error: {error}")
