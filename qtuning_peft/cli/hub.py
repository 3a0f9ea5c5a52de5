"""`qtuning push`, `pull` and `info`: adapters on the Hub."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..hub import sharing
from ..hub.metadata import TrainingMetadata
from .data import console, one_sentence, printable

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter; new, or empty.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]


@one_sentence()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; made if it does not exist.")],
    private: Annotated[bool, typer.Option(help="Make a new repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; by default main.")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="Commit message.")] = "Upload side adapter",
    base_model: Annotated[str | None, typer.Option(help="The base's name on the Hub, if it is a folder here.")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Training data's name on the Hub; may be repeated.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Their language's code, as en; may be repeated.")] = None,
    license: Annotated[str | None, typer.Option(help="The adapter's licence on the Hub, as apache-2.0.")] = None,
) -> None:
    """Upload an adapter to the Hub: its configuration, weights, card and tokenizer, and nothing else."""
    known = TrainingMetadata(datasets=tuple(dataset or ()), language=tuple(language or ()), license=license)
    address = sharing.push(
        folder, repo, private=private, revision=revision, message=message, base_model=base_model, training=known
    )  # fmt: skip
    console.print(printable(address), highlight=False)


@one_sentence()
def pull(
    repo: Annotated[str, typer.Argument(help="user/name on the Hub.")], output: Output, revision: Revision = None
) -> None:
    """Download an adapter from the Hub. Loading by its name needs no pull; this is for a copy of your own."""
    config = sharing.pull(repo, output, revision)
    console.print(printable(f"a side network for {config.base_model_name_or_path}: {output}"), highlight=False)


@one_sentence()
def info(
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter, or user/name on the Hub.")],
    revision: Revision = None,
) -> None:
    """Show what an adapter is: its base, settings, size and gates, and what its card says of data and results."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for known in sharing.describe(adapter, revision).items():
        table.add_row(*map(Text, known))
    Console().print(table, highlight=False)
