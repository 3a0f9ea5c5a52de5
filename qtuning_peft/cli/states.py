"""`qtuning states`: the base's pass over a data set, stored (see `stored`)."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState

from ..eu_plane.files import read_data
from ..loading import load_model, load_tokenizer
from ..registry import Registry
from ..side_tuning import SideTuningConfig
from ..states.projection import CHANNELS, describe_formats
from ..stored import MANIFEST, compute_states
from .data import Overwrite, Split, columns_from, console

# From a name, load_in_4bit, gguf_file and dtype to what runs the model, and its tokenizer.
ENGINES: Registry[Callable[[str, bool, str | None, str], tuple[Any, Any]]] = Registry("engine")
ENGINES.add("transformers", load_model, "transformers, in this process")


@ENGINES.register("vllm")
def vllm(model: str, load_in_4bit: bool, gguf_file: str | None, dtype: str) -> tuple[Any, Any]:
    """vLLM, with the quantization of the checkpoint."""
    if load_in_4bit or gguf_file:
        raise ValueError("--load-in-4bit and --gguf-file are transformers'; with vllm, name a quantized checkpoint.")
    try:
        from ..integrations.vllm.engine import VLLMEngine
    except ModuleNotFoundError as error:
        raise ValueError("--engine vllm needs vLLM: pip install 'qtuning-peft[vllm]'.") from error
    return VLLMEngine(model, dtype=dtype), load_tokenizer(model)


def states(
    data: Annotated[Path, typer.Argument(help="Data: .jsonl, .parquet, or a folder of save_to_disk.")],
    model: Annotated[str, typer.Argument(help="Base model: a folder, or a name on the Hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder that the states go to.")],
    split: Split = None,
    tap_every: Annotated[int, typer.Option(help="Tap every how-many-th block; as in the side network.")] = 3,
    states_format: Annotated[str, typer.Option(help=f"How states are stored. {describe_formats()}.")] = "bfloat16",
    channels: Annotated[int, typer.Option(help="Of each tap, for the format projection.")] = CHANNELS,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the model to NF4 with bitsandbytes.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file in the model's folder.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "auto",
    engine: Annotated[str, typer.Option(help=f"What runs the model. {ENGINES.describe()}.")] = "transformers",
    overwrite: Overwrite = False,
    **options: Any,
) -> None:
    """Score a data set and store the base's hidden states, from which side networks train without the base.

    Interrupted and started again, it goes on where it stopped. Under `accelerate launch -m qtuning_peft.cli states ...`
    processes share the rows. The folder can be pruned like any scored data.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file; name a folder.")
    if (output / MANIFEST).is_file() and not overwrite:
        raise ValueError(f"{output} is there already; choose another output, or give --overwrite.")
    if options.pop("reference_model", None):
        raise ValueError("--reference-model is given, but stored states are of one model; score with it by itself.")
    options["columns"] = columns_from(options["columns"])
    ENGINES.check(engine)
    process = PartialState(cpu=not torch.cuda.is_available())  # one of several, if launched so
    rows = read_data(data, split)
    loaded, tokenizer = ENGINES[engine](model, load_in_4bit, gguf_file, dtype)
    config = SideTuningConfig(tap_every=tap_every)
    stored = compute_states(
        rows, loaded, tokenizer, config, output, states_format=states_format, channels=channels, **options
    )
    size = sum(file.stat().st_size for file in output.iterdir())
    if process.is_main_process:
        console.print(f"{len(stored)} rows, {size / 2**20:.0f} MiB of states: {output}", highlight=False)
    if process.num_processes > 1:  # else a group is somebody else's
        process.destroy_process_group()
