"""`qtuning serve`: an OpenAI-compatible server with many adapters on one base (see `integrations.vllm`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from ..registry import Registry
from .data import one_sentence

# Serves a base and adapters by name, with further options of the engine's own command.
SERVERS: Registry[Callable[[str, Mapping[str, str], Sequence[str]], None]] = Registry("engine")


@SERVERS.register("vllm")
def vllm(base: str, adapters: Mapping[str, str], options: Sequence[str]) -> None:
    """vLLM, one base for all adapters."""
    try:
        from ..integrations.vllm.serve import serve as run
    except ModuleNotFoundError as error:
        raise ValueError("qtuning serve needs vLLM: pip install 'qtuning-peft[vllm]'.") from error
    run(base, adapters, options)


@SERVERS.register("transformers")
def transformers(base: str, adapters: Mapping[str, str], options: Sequence[str]) -> None:
    """The command `transformers serve`, with a base for each adapter."""
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("--engine transformers needs a web server: pip install 'qtuning-peft[serve]'.")
    from ..integrations.transformers_serve import serve as run

    run(base, adapters, options)


def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base model: a folder, or a name on the Hub.")],
    adapter: Annotated[list[str] | None, typer.Option(help="An adapter as NAME=PATH; once for each.")] = None,
    engine: Annotated[str, typer.Option(help=f"What serves. {SERVERS.describe()}.")] = "vllm",
) -> None:
    """Serve a base and its side networks; further options are those of `vllm serve` or `transformers serve`.

    In requests, the name of an adapter is the name of a model, as with LoRA.
    """
    with one_sentence():
        adapters = dict(_pair(entry) for entry in adapter or [])
        if len(adapters) < len(adapter or []):
            raise ValueError("--adapter gives a name twice; each adapter needs its own.")
        SERVERS.check(engine)
        SERVERS[engine](base, adapters, context.args)


def _pair(entry: str) -> tuple[str, str]:
    name, found, path = entry.partition("=")
    if not found or not name or not path:
        raise ValueError(f"--adapter is {entry!r}; write it as NAME=PATH.")
    return name, path
