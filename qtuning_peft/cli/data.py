"""`qtuning score`, `qtuning prune` and `qtuning plot`: the plane for files, from a shell.

Files of JSON lines, Parquet, or folders of `Dataset.save_to_disk`; what the output's name ends in decides its format.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there, not exported
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

console = Console(stderr=True)

ScoredData = Annotated[Path, typer.Argument(help="Scored data: .jsonl, .parquet, or a folder of save_to_disk.")]
Split = Annotated[str | None, typer.Option(help="Split to read, if the folder holds several.")]
SampleRatio = Annotated[float | None, typer.Option(help="Share of the samples to keep, in (0, 1].")]
NumSamples = Annotated[int | None, typer.Option(help="Number of samples to keep, instead of a share.")]
NumTokens = Annotated[int | None, typer.Option(help="Number of supervised tokens to keep, instead of a share.")]
TokenRatio = Annotated[float, typer.Option(help="Share of the tokens to keep in misconceptions, in (0, 1].")]
Strategy = Annotated[
    str,
    typer.Option(
        help="eu_plane, or to compare: random, longest, highest_perplexity, lowest_perplexity, entropy, el2n, "
        "infobatch, ifd."
    ),
]
TokenStrategy = Annotated[str, typer.Option(help="neighbours, random, or rho1.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer of the model, to protect special tokens and to show text.")
]
Protect = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression for text that is never trimmed, such as '####.*'; repeatable."),
]
Stratum = Annotated[str | None, typer.Option(help="Column in each of whose values the budget is met.")]
MaxRepetition = Annotated[
    float | None, typer.Option(help="Drop rows that repeat themselves more than this, 0 to 1, as degenerate.")
]
Seed = Annotated[int, typer.Option(help="Seed for what is drawn.")]


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
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, HTTPError) as error:
            # An error of the connection is an HTTPError alone.
            console.print(f"[bold red]Error:[/] {printable(error)}", highlight=False)
            raise typer.Exit(1) from error


def score(
    data: Annotated[Path, typer.Argument(help="Data: .jsonl, .parquet, or a folder of save_to_disk.")],
    model: Annotated[str, typer.Argument(help="Model, or adapter: a folder, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the scored data goes.")],
    split: Split = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Your name of a column, such as prompt=question; repeatable."),
    ] = None,
    chat_template: Annotated[bool, typer.Option(help="Put prompts through the model's chat template.")] = True,
    max_length: Annotated[int | None, typer.Option(help="Longer rows get no score; by default the context.")] = None,
    tokens_per_batch: Annotated[int, typer.Option(help="Tokens in a forward pass, padding included.")] = 4096,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the model to NF4 with bitsandbytes.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the model's folder.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "auto",
    el2n: Annotated[bool, typer.Option(help="Also score EL2N.")] = False,
    ifd: Annotated[bool, typer.Option(help="Also score instruction-following difficulty; a second pass.")] = False,
    reference_model: Annotated[str | None, typer.Option(help="Also score tokens under this model, for rho1.")] = None,
    resume_dir: Annotated[
        Path | None, typer.Option(help="Folder for finished parts; by default beside the output, removed at the end.")
    ] = None,
) -> None:
    """Score every sample on the Error-Uncertainty plane.

    Interrupted and started again, it goes on where it stopped. Rows may have messages, prompt and completion,
    instruction and output, text, or input_ids and labels.
    """
    with one_sentence():
        from ..eu_plane.dataset import score as score_dataset
        from ..eu_plane.files import check_output, read_data, write_data

        check_output(output)
        columns = dict(_pair(entry) for entry in column or [])
        rows = read_data(data, split)
        loaded, tokenizer = load_model(model, load_in_4bit, gguf_file, dtype)
        reference = load_model(reference_model, load_in_4bit, None, dtype)[0] if reference_model else None
        parts = resume_dir or output.with_name(f"{output.name}.parts")
        scored = score_dataset(
            rows, loaded, tokenizer, resume_dir=parts,
            columns=columns, chat_template=chat_template, max_length=max_length, tokens_per_batch=tokens_per_batch,
            el2n=el2n, ifd=ifd, reference_model=reference,
        )  # fmt: skip
        write_data(scored, output)
        if resume_dir is None:
            remove_parts(parts)
        console.print(f"{len(scored)} rows scored: {output}", highlight=False)


def prune(
    data: ScoredData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the kept rows go.")],
    split: Split = None,
    sample_ratio: SampleRatio = None,
    num_samples: NumSamples = None,
    num_tokens: NumTokens = None,
    token_ratio: TokenRatio = 1.0,
    strategy: Strategy = "eu_plane",
    token_strategy: TokenStrategy = "neighbours",
    neighbour_weight: Annotated[float, typer.Option(help="Weight of a token's neighbours, 0 to 1.")] = 0.5,
    keep_tokens: Annotated[
        str, typer.Option(help="Which end of the tokens' ranking stays: lowest or highest.")
    ] = "lowest",
    remove_tokens: Annotated[bool, typer.Option(help="Take trimmed tokens out of the input.")] = False,
    tokenizer: Tokenizer = None,
    protect: Protect = None,
    stratum_column: Stratum = None,
    max_repetition: MaxRepetition = None,
    keep_dropped: Annotated[bool, typer.Option(help="Keep every row; column quadrant tells them apart.")] = False,
    seed: Seed = 0,
) -> None:
    """Keep what teaches of scored data. Runs no model: prune again with other ratios as often as you like."""
    with one_sentence():
        from ..eu_plane.files import check_output, read_data, write_data
        from ..eu_plane.pruner import EUPruner

        check_output(output)
        pruner = EUPruner(
            sample_ratio=sample_ratio, num_samples=num_samples, num_tokens=num_tokens, token_ratio=token_ratio,
            strategy=strategy, token_strategy=token_strategy, neighbour_weight=neighbour_weight,
            keep_tokens=keep_tokens, remove_tokens=remove_tokens, tokenizer=load_tokenizer(tokenizer),
            protect=protect or (), stratum_column=stratum_column, max_repetition=max_repetition,
            keep_dropped=keep_dropped, seed=seed,
        )  # fmt: skip
        rows = read_data(data, split)
        pruner.fit(rows)
        write_data(rows.map(pruner, batched=True, keep_in_memory=True), output)
        console.print(f"{pruner.pruned}: {output}", highlight=False)


def plot(
    data: ScoredData,
    output: Annotated[Path, typer.Option("--output", "-o", help="Picture (.png, .svg, .pdf) or report (.html).")],
    split: Split = None,
    sample_ratio: SampleRatio = None,
    num_samples: NumSamples = None,
    num_tokens: NumTokens = None,
    token_ratio: TokenRatio = 1.0,
    strategy: Strategy = "eu_plane",
    tokenizer: Tokenizer = None,
    protect: Protect = None,
    stratum_column: Stratum = None,
    max_repetition: MaxRepetition = None,
    examples: Annotated[int, typer.Option(help="Examples of each quadrant in a report.")] = 5,
    seed: Seed = 0,
) -> None:
    """Show scored data on the plane: a picture, or a report with examples in one HTML file.

    A report needs --tokenizer and a budget. A picture without a budget shows the samples alone.
    """
    with one_sentence():
        from ..eu_plane.files import read_data
        from ..eu_plane.plot import plot_plane
        from ..eu_plane.pruner import EUPruner
        from ..eu_plane.report import write_report

        pruner = None
        if any(budget is not None for budget in (sample_ratio, num_samples, num_tokens)):
            pruner = EUPruner(
                sample_ratio=sample_ratio, num_samples=num_samples, num_tokens=num_tokens, token_ratio=token_ratio,
                strategy=strategy, tokenizer=load_tokenizer(tokenizer), protect=protect or (),
                stratum_column=stratum_column, max_repetition=max_repetition, seed=seed,
            )  # fmt: skip
        report = output.suffix in (".html", ".htm")
        if report and (pruner is None or pruner.tokenizer is None):
            raise ValueError("A report shows text and what would be kept; give --tokenizer and --sample-ratio.")
        rows = read_data(data, split)
        if pruner is not None:
            pruner.fit(rows)
        if report:
            assert pruner is not None
            write_report(rows, pruner.tokenizer, pruner, output, examples=examples, seed=seed)
        else:
            plot_plane(rows, pruner, path=output)
        console.print(f"{pruner.pruned if pruner else f'{len(rows)} rows'}: {output}", highlight=False)


def load_model(name: str, load_in_4bit: bool, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """A model, or an adapter with its base, on the GPU if there is one, and its tokenizer."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; choose auto, float32, bfloat16 or float16.")
    gpu = torch.cuda.is_available()
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": torch.cuda.current_device()} if gpu else None}
    if load_in_4bit:
        compute = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported() else torch.float32
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
        if dtype == "auto":
            arguments["dtype"] = compute
    if gguf_file:
        arguments["gguf_file"] = gguf_file
    if (Path(name) / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(name, **arguments)
        base = model.get_base_model().config._name_or_path
        has_tokenizer = (Path(name) / "tokenizer_config.json").is_file()
        return model.eval(), AutoTokenizer.from_pretrained(name if has_tokenizer else base)
    model = AutoModelForCausalLM.from_pretrained(name, **arguments)
    return model.eval(), AutoTokenizer.from_pretrained(name, **({"gguf_file": gguf_file} if gguf_file else {}))


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer, if one is named."""
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def remove_parts(folder: Path) -> None:
    """Remove finished parts, and their folder if nothing else is in it."""
    for part in folder.glob("*.arrow"):
        if re.fullmatch(r"[0-9a-f]{16}", part.stem):
            part.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _pair(entry: str) -> tuple[str, str]:
    ours, found, theirs = entry.partition("=")
    if not found or not ours or not theirs:
        raise ValueError(f"--column is {entry!r}; write it as prompt=question.")
    return ours, theirs
