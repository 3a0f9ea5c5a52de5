"""`qtuning recipes list | show | copy`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..recipes import names, path, summary
from .data import one_sentence

app = typer.Typer(
    name="recipes", help="YAML files with every setting of a run: list, show or copy them.", no_args_is_help=True
)
console = Console()

Name = Annotated[str, typer.Argument(help="Name of the recipe, as `qtuning recipes list` shows it.")]


@app.command("list")
def list_recipes() -> None:
    """List every recipe: the trainer that runs it, and what it is for."""
    table = Table("recipe", "what it is for", box=None, pad_edge=False)
    for name in names():
        table.add_row(name, summary(name))
    console.print(table)


@app.command()
def show(name: Name) -> None:
    """Print a recipe."""
    # Not through rich, whose markup would eat brackets.
    with one_sentence():
        typer.echo(path(name).read_text(encoding="utf-8"), nl=False)


@app.command()
def copy(
    name: Name,
    to: Annotated[
        Path | None, typer.Argument(help="File or folder; by default a file of the recipe's last name, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    with one_sentence():
        source = path(name)
        target = Path(source.name) if to is None else to / source.name if to.is_dir() else to
        try:
            with target.open("w" if force else "x", encoding="utf-8") as file:
                file.write(source.read_text(encoding="utf-8"))
        except FileExistsError as error:
            raise ValueError(f"{target} exists; choose another name, or --force.") from error
        console.print(f"{target}", highlight=False)
