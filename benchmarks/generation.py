"""Tokens per second of greedy decoding with a cache: the base alone, with a side network, with LoRA that is not merged.

    python -m benchmarks.generation                               SmolLM2-135M-Instruct in float32
    python -m benchmarks.generation --base llama-2-7b --four-bit  a true shape with random weights

Adapters are fresh: what they learned changes no time. All take turns; figures are medians, the prompt's pass included.
Rows go to `results/generation.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import torch

from benchmarks import bases, methods, rows
from benchmarks.common import smollm2
from benchmarks.step import positive, seconds, spread

REAL = "SmolLM2-135M-Instruct"
NAMES = {"base": None, "side": "side", "lora": "lora"}


def load(base: str, four_bit: bool, device: str) -> Any:
    """The base model."""
    if base != REAL:
        return bases.build(base, four_bit, device)
    model, _ = smollm2(four_bit)
    return model if four_bit else model.to(device)  # a quantized one is where it was quantized


def main() -> None:
    """Measure, and append and print a row for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=[REAL, *bases.SHAPES], default=REAL, metavar="BASE", help=f"({REAL})")
    parser.add_argument("--four-bit", action="store_true", help="the base in NF4")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="sequences at a time (1 16)")
    parser.add_argument("--prompt", type=positive, default=32, help="tokens of the prompt (32)")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens to generate (32)")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each (3)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    models = {}
    for name, method in NAMES.items():
        base = load(arguments.base, arguments.four_bit, arguments.device)
        models[name] = (methods.apply(methods.find(method), base) if method else base).eval()
    for batch in arguments.batch:
        generator = torch.Generator().manual_seed(0)
        vocabulary = models["base"].config.vocab_size
        prompt = torch.randint(vocabulary, (batch, arguments.prompt), generator=generator).to(models["base"].device)

        def generate(name: str, tokens: int, prompt: torch.Tensor = prompt) -> None:
            models[name].generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
            )  # fmt: skip

        times: dict[str, list[float]] = {name: [] for name in models}
        for name in models:
            generate(name, 2)
        for _ in range(arguments.rounds):
            for name in models:
                times[name].append(seconds(lambda name=name: generate(name, arguments.new_tokens)))  # type: ignore[misc]  # a default binds it now
        tokens = batch * arguments.new_tokens
        row = {
            "base": arguments.base, "four_bit": arguments.four_bit, "batch": batch, "prompt": arguments.prompt,
            "new_tokens": arguments.new_tokens, "rounds": arguments.rounds,
            "options": {name: methods.find(method).options() for name, method in NAMES.items() if method},
            "seconds": {name: spread(found) for name, found in times.items()},
            "tokens_per_second": {name: tokens / median(found) for name, found in times.items()},
            "speed_of_base": {name: median(times["base"]) / median(found) for name, found in times.items()},
        } | rows.provenance()  # fmt: skip
        rows.append("generation", row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
