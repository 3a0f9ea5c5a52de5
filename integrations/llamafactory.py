"""LLaMA-Factory 0.9: data that its engine can train on, and, as an experiment, QST in its new engine.

Its default engine is closed to other methods, but not to pruned data:

    register      whole samples (`token_ratio` 1): an entry in `dataset_info.json` for what `qtuning prune` wrote
    tokenized     trimmed samples: a folder for its option `tokenized_path`

Its engine v1 has a registry of methods, but imports nobody's package. So it is started here, with QST registered:

    train         a recipe of engine v1 with `peft_config: {name: qst, reduction_factor: 8}`
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from datasets import Dataset
from torch import nn

from qtuning_peft.atomic import replacing
from qtuning_peft.eu_plane.files import check_output, read_data, write_data

from .blocks import QSTBlock, read_block

app = typer.Typer(
    name="llamafactory",
    help="Pruned data, and, as an experiment, QST, for LLaMA-Factory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# How LLaMA-Factory is told of each format, first match first.
ENTRIES: tuple[tuple[frozenset[str], dict[str, Any]], ...] = (
    (
        frozenset({"messages"}),
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages"},
            "tags": {
                "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "system_tag": "system",
            },
        },
    ),
    (frozenset({"conversations"}), {"formatting": "sharegpt", "columns": {"messages": "conversations"}}),
    (frozenset({"prompt", "completion"}), {"columns": {"prompt": "prompt", "response": "completion"}}),
    (frozenset({"instruction", "input", "output"}), {}),
    (frozenset({"instruction", "output"}), {"columns": {"prompt": "instruction", "response": "output"}}),
)  # fmt: skip


def register_dataset(info_file: Path, name: str, data_file: Path) -> dict[str, Any]:
    """Add pruned data to LLaMA-Factory's list of data sets, or replace it there.

    Args:
        info_file: The `dataset_info.json` of its `dataset_dir`; made if it does not exist.
        name: What `dataset:` in a recipe calls the data.
        data_file: What `qtuning prune` wrote with `token_ratio` 1: JSON lines or Parquet, with texts.

    Returns:
        The entry.

    Raises:
        ValueError: in one sentence, when the data or the list cannot be used.
    """
    if data_file.is_dir():
        raise ValueError(f"{data_file} is a folder; have `qtuning prune` write a file that ends in .jsonl or .parquet.")
    data = read_data(data_file)
    entry = _entry(data)
    if _trimmed(data):
        raise ValueError(
            f"{data_file} has trimmed samples, which its texts do not show; prune with --token-ratio 1, or use "
            "`tokenized`."
        )
    listed: Any = {}
    if info_file.exists():
        try:
            listed = json.loads(info_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{info_file} is no JSON: {error}; repair it.") from error
        if not isinstance(listed, dict):
            raise ValueError(f"{info_file} holds no JSON object; name the dataset_info.json of LLaMA-Factory.")
    # Joined to the folder of the list by LLaMA-Factory, which leaves an absolute path as it is.
    listed[name] = {"file_name": str(data_file.absolute()), **entry}
    with replacing(info_file) as unfinished:
        unfinished.write_text(json.dumps(listed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return listed[name]


def write_tokenized(data: Dataset, folder: Path) -> Dataset:
    """Write kept rows, whole or trimmed, as LLaMA-Factory's `tokenized_path` wants them.

    Args:
        data: Rows with `input_ids` and `labels`, as `EUPruner` leaves them. Everything else is left out, as
            LLaMA-Factory would make tensors of it.
        folder: Where to write; replaced if it is a data set.

    Raises:
        ValueError: when there are no tokens, or no place to write.
    """
    missing = [column for column in ("input_ids", "labels") if column not in data.column_names]
    if missing:
        raise ValueError(f"The data has no column {' and '.join(missing)}; use what `qtuning prune` wrote.")
    if folder.suffix:
        raise ValueError(f"{folder.name} ends in {folder.suffix}; name a folder without an ending.")
    tokens = data.select_columns(["input_ids", "labels"])
    write_data(tokens, folder)
    return tokens


def _entry(data: Dataset) -> dict[str, Any]:
    columns = set(data.column_names)
    # Prompts that are conversations themselves have no place in its lists.
    columns -= {name for name in ("prompt", "completion") if name in columns and not isinstance(data[0][name], str)}
    for needed, entry in ENTRIES:
        if needed <= columns:
            return entry
    raise ValueError(
        f"The data's columns are {', '.join(data.column_names)}; LLaMA-Factory reads messages, conversations, "
        "instruction and output, or prompt and completion as strings: use `tokenized` instead."
    )


def _trimmed(data: Dataset) -> bool:
    """Whether a row has lost tokens: its error stays the mean over all of them."""
    if not {"error", "token_error"} <= set(data.column_names):
        return False
    rows = data.select_columns(["error", "token_error"])
    return any(
        row["token_error"] and abs(fmean(row["token_error"]) - row["error"]) > 1e-4 * (1 + row["error"]) for row in rows
    )


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


@contextmanager
def _one_sentence() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def register(
    data_file: Annotated[Path, typer.Argument(help="Kept rows that `qtuning prune` wrote: .jsonl or .parquet.")],
    name: Annotated[str, typer.Option(help="What `dataset:` in a recipe calls the data.")],
    info_file: Annotated[Path, typer.Option(help="The dataset_info.json of LLaMA-Factory's dataset_dir.")] = Path(
        "data/dataset_info.json"
    ),
) -> None:
    """Add whole kept samples to LLaMA-Factory's dataset_info.json."""
    with _one_sentence():
        entry = register_dataset(info_file, name, data_file)
        typer.echo(f"{info_file}: {json.dumps({name: entry})}")


@app.command()
def tokenized(
    data: Annotated[Path, typer.Argument(help="Kept rows that `qtuning prune` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder, for `tokenized_path:` in a recipe.")],
) -> None:
    """Write kept samples, trimmed or whole, for LLaMA-Factory's option tokenized_path."""
    with _one_sentence():
        check_output(output)
        typer.echo(f"{len(write_tokenized(read_data(data), output))} rows: {output}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="YAML of LLaMA-Factory's engine v1, with peft_config: {name: qst}.")],
) -> None:
    """Train a side network in LLaMA-Factory's engine v1; experimental. Further key=value replace what the file says."""
    with _one_sentence():
        if recipe.suffix not in (".yaml", ".yml") or not recipe.is_file():
            raise ValueError(f"{recipe} is no YAML file; name a recipe that ends in .yaml.")
        # LLaMA-Factory 0.9.5 refuses every transformers that QST supports by its version alone, and reads these when
        # it is imported.
        os.environ.setdefault("DISABLE_VERSION_CHECK", "1")
        os.environ.setdefault("USE_V1", "1")
        from llamafactory.v1.trainers.sft_trainer import run_sft

        register_qst()
        # Without its launcher, which on several GPUs starts processes that do not know QST.
        sys.argv = [sys.argv[0], str(recipe), *context.args]
        run_sft()


if __name__ == "__main__":
    app()
