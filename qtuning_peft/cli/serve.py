"""`qtuning serve`: an OpenAI-compatible server with many adapters on one base (see `integrations.vllm`)."""

from typing import Annotated

import typer

from .data import one_sentence


def serve(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Base model: a folder, or a name on the Hub.")],
    adapter: Annotated[list[str] | None, typer.Option(help="An adapter as NAME=PATH; once for each.")] = None,
) -> None:
    """Serve a base and its side networks with vLLM; further options are those of `vllm serve`.

    In requests, the name of an adapter is the name of a model, as with LoRA.
    """
    with one_sentence():
        adapters = dict(_pair(entry) for entry in adapter or [])
        if len(adapters) < len(adapter or []):
            raise ValueError("--adapter gives a name twice; each adapter needs its own.")
        try:
            from ..integrations.vllm.serve import serve as run
        except ModuleNotFoundError as error:
            raise ValueError("qtuning serve needs vLLM: pip install 'qtuning-peft[vllm]'.") from error
        run(base, adapters, context.args)


def _pair(entry: str) -> tuple[str, str]:
    name, found, path = entry.partition("=")
    if not found or not name or not path:
        raise ValueError(f"--adapter is {entry!r}; write it as NAME=PATH.")
    return name, path
