"""`qtuning score`, `qtuning prune` and `qtuning plot`: the plane for files, from a shell.

Files of JSON lines, Parquet, or folders of `Dataset.save_to_disk`; what the output's name ends in decides its format.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from functools import update_wrapper
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there, not exported
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from ..atomic import alone_with
from ..eu_plane.dataset import score as score_dataset
from ..eu_plane.files import check_output, read_data, write_data
from ..eu_plane.plot import plot_plane
from ..eu_plane.pruner import EUPruner
from ..eu_plane.report import write_report
from ..loading import load_model, load_tokenizer
from ..processes import SharedWork
from ..registry import help_of
from ..stored import STATES, holds_states, load_states, prune_states

console = Console(stderr=True)

ScoredData = Annotated[Path, typer.Argument(help="Scored data: .jsonl, .parquet, or a folder of save_to_disk.")]
Split = Annotated[str | None, typer.Option(help="Split to read, if the folder holds several.")]
# What a user can cause; an error of the connection is an HTTPError alone.
USER_ERRORS = (OSError, ValueError, ImportError, RuntimeError, SafetensorError, HTTPError)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there already.")]
# Options of the library that a shell gives in another type, or under the name of one of several.
FROM_A_SHELL: dict[str, Any] = {
    "tokenizer": str | None, "protect": list[str], "columns": list[str] | None, "scores": list[str],
    "reference_model": str | None,
}  # fmt: skip
REPEATABLE = {"columns": "--column", "scores": "--score"}


def printable(value: object) -> str:
    """`value` as text that commands neither rich nor the terminal, whoever wrote it."""
    return escape("".join(letter if letter.isprintable() or letter == "\n" else " " for letter in str(value)))


@contextmanager
def one_sentence() -> Iterator[None]:
    """Show an error that a user can cause as its sentence, and warnings without their source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: (
            console.print(f"[yellow]Note:[/] {printable(message)}", highlight=False)
            if category is UserWarning
            else None
        )
        try:
            yield
        except USER_ERRORS as error:
            console.print(f"[bold red]Error:[/] {printable(error)}", highlight=False)
            raise typer.Exit(1) from error


class Command:
    """A function as a command, its docstring the help; the fields of `config` with a help stand for its `**options`.

    They are read when they are asked for, with the choices that are registered then.
    """

    def __init__(self, function: Callable[..., None], config: type) -> None:
        update_wrapper(self, function)
        self.function, self.config = function, config

    def __call__(self, **arguments: Any) -> None:
        """Run the command."""
        with one_sentence():
            self.function(**arguments)

    @property
    def __signature__(self) -> inspect.Signature:
        own = [*inspect.signature(self.function, eval_str=True).parameters.values()][:-1]
        types = get_type_hints(self.config) | FROM_A_SHELL
        for field in fields(self.config):
            # Files have no batches.
            if "help" in field.metadata and field.name != "per_batch":
                names = [REPEATABLE[field.name]] if field.name in REPEATABLE else []
                option = typer.Option(field.default, *names, help=help_of(field))
                own.append(own[0].replace(name=field.name, annotation=types[field.name], default=option))
        return inspect.Signature(own)


def make_pruner(options: dict[str, Any]) -> EUPruner:
    """The pruner that the command line describes."""
    name = options["tokenizer"]
    return EUPruner(**options | {"tokenizer": None if name is None else load_tokenizer(name)})


def score(
    data: Annotated[Path, typer.Argument(help="Data: .jsonl, .parquet, or a folder of save_to_disk.")],
    model: Annotated[str, typer.Argument(help="Model, or adapter: a folder, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the scored data goes.")],
    split: Split = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the model to NF4 with bitsandbytes.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the model's folder.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "auto",
    resume_dir: Annotated[
        Path | None, typer.Option(help="Folder for finished parts; by default beside the output, removed at the end.")
    ] = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Score every sample on the Error-Uncertainty plane.

    Interrupted and started again, it goes on where it stopped. Under `accelerate launch -m qtuning_peft.cli score ...`
    processes share the rows. Rows may have messages, prompt and completion, instruction and output, text, or input_ids
    and labels.
    """
    check_output(output, overwrite)
    options["columns"] = columns_from(options["columns"])
    parts = resume_dir or output.with_name(f"{output.name}.parts")
    process = PartialState(cpu=not torch.cuda.is_available())  # one of several, if launched so
    with SharedWork() as work, alone_with(output) if work.main else nullcontext():
        rows = read_data(data, split)
        loaded, tokenizer = load_model(model, load_in_4bit, gguf_file, dtype)
        if options["reference_model"]:
            options["reference_model"] = load_model(options["reference_model"], load_in_4bit, dtype=dtype)[0]
        scored = score_dataset(rows, loaded, tokenizer, resume_dir=parts, work=work, **options)
        # All have read the parts.
        work.meet()
        if work.main:
            write_data(scored, output, overwrite)
            if resume_dir is None:
                remove_parts(parts)
            console.print(f"{len(scored)} rows scored: {output}", highlight=False)
    process.destroy_process_group()


def prune(
    data: ScoredData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the kept rows go.")],
    split: Split = None,
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Keep the best of scored data. Runs no model: prune again with other ratios as often as you like.

    Of a folder of states, a folder as output is a view: it names rows and labels, and copies no states.
    """
    pruner = make_pruner(options)
    if holds_states(data) and not output.suffix:
        if output.exists() and not overwrite:
            raise ValueError(f"{output} is there already; choose another output, or give --overwrite.")
        prune_states(data, pruner, output)
        console.print(f"{pruner.pruned}: {output}", highlight=False)
        return
    check_output(output, overwrite)
    rows = read_scored(data, split)
    # Files have no use for them, and lines no bytes.
    rows = rows.remove_columns([name for name in STATES if name in rows.column_names])
    pruner.fit(rows)
    with alone_with(output):
        write_data(rows.map(pruner, batched=True, with_indices=True, keep_in_memory=True), output, overwrite)
    console.print(f"{pruner.pruned}: {output}", highlight=False)


def plot(
    data: ScoredData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture (.png, .svg, .pdf) or report (.html).")],
    split: Split = None,
    examples: Annotated[int, typer.Option(help="Examples of each quadrant in a report.")] = 5,
    **options: Any,
) -> None:
    """Show scored data on the plane: a picture, or a report with examples in one HTML file.

    A report needs --tokenizer and a budget. A picture without a budget shows the samples alone.
    """
    budgets = ("sample_ratio", "num_samples", "num_tokens")
    pruner = make_pruner(options) if any(options[name] is not None for name in budgets) else None
    report = output.suffix in (".html", ".htm")
    if report and (pruner is None or pruner.tokenizer is None):
        raise ValueError("A report shows text and what would be kept; give --tokenizer and --sample-ratio.")
    rows = read_scored(data, split)
    if pruner is not None:
        pruner.fit(rows)
    if report and pruner is not None:
        write_report(rows, pruner.tokenizer, pruner, output, examples=examples, seed=pruner.seed)
    else:
        plot_plane(rows, pruner, path=output)
    console.print(f"{pruner.pruned if pruner else f'{len(rows)} rows'}: {output}", highlight=False)


def remove_parts(folder: Path) -> None:
    """Remove finished parts, and their folder if nothing else is in it."""
    for part in folder.glob(f"{'[0-9a-f]' * 16}.arrow"):
        part.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def read_scored(path: Path, split: str | None) -> Dataset:
    """Scored data, or a folder of states."""
    return load_states(path) if holds_states(path) else read_data(path, split)


def columns_from(entries: list[str] | None) -> dict[str, str]:
    """The data's own names of columns, by ours, from entries like prompt=question."""
    return dict(_pair(entry) for entry in entries or [])


def _pair(entry: str) -> tuple[str, str]:
    ours, found, theirs = entry.partition("=")
    if not found or not ours or not theirs:
        raise ValueError(f"--column is {entry!r}; write it as prompt=question.")
    return ours, theirs
