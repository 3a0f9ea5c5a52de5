"""`qtuning serve`: vLLM's OpenAI server with side networks."""

import json
import sys
from collections.abc import Mapping, Sequence

from . import engine_options


def serve(base: str, adapters: Mapping[str, str], options: Sequence[str]) -> None:
    """Run vLLM's server until it is stopped; each adapter is a model by its name, the base by its own.

    Args:
        base: A folder, or a name on the Hub.
        adapters: Folders by name.
        options: Further ones of `vllm serve`, as on the command line.

    Raises:
        ValueError: before vLLM starts, when an adapter or the base cannot be served.
    """
    for taken in ("--hf-overrides", "--lora-modules", "--enable-lora", "--max-loras"):
        if any(option.partition("=")[0] == taken for option in options):
            raise ValueError(f"{taken} is given, but qtuning serve fills it in; leave it out.")
    given = engine_options(base, adapters)
    arguments = ["--model", base, "--enable-lora", "--max-loras", str(given["max_loras"])]
    arguments += ["--hf-overrides", json.dumps(given["hf_overrides"])]
    if adapters:
        arguments += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm serve", *arguments, *options]
    main()
