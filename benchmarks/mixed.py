"""Many adapters in one batch, in transformers and PEFT: a batch of 16 for 1, 2, 4 and 8 adapters.

    python -m benchmarks.mixed

Greedy decoding of SmolLM2-135M-Instruct in float32. `side` and `lora` are one call with a name for each row, `calls` is
one call for each side network's rows. All take turns; figures are medians. Rows go to `results/mixed.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import torch

from benchmarks import methods, rows
from benchmarks.common import smollm2
from benchmarks.step import positive, seconds, spread

BATCH, PROMPT = 16, 32


def with_adapters(name: str, count: int) -> Any:
    """The base with `count` adapters of one method."""
    method = methods.find(name)
    model = methods.apply(method, smollm2(False)[0])
    for index in range(1, count):
        model.add_adapter(str(index), model.peft_config["default"])
    return model.eval()


def main() -> None:
    """Measure, and append and print a row for each number of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=positive, nargs="+", default=[1, 2, 4, 8], help="how many (1 2 4 8)")
    parser.add_argument("--new-tokens", type=positive, default=16, help="tokens to generate (16)")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each (3)")
    arguments = parser.parse_args()
    most = max(arguments.adapters)
    models = {"base": smollm2(False)[0], "side": with_adapters("side", most), "lora": with_adapters("lora", most)}
    models["calls"] = models["side"]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(models["base"].config.vocab_size, (BATCH, PROMPT), generator=generator)

    def generate(of: str, prompt: torch.Tensor, **names: Any) -> None:
        models[of].generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
            min_new_tokens=arguments.new_tokens, max_new_tokens=arguments.new_tokens, pad_token_id=0, **names,
        )  # fmt: skip

    def run(of: str, names: list[str]) -> None:
        if of == "base":
            generate(of, prompt)
        elif of == "calls":
            for name in dict.fromkeys(names):
                models[of].set_adapter(name)
                generate(of, prompt[[own == name for own in names]])
        else:
            generate(of, prompt, adapter_names=names)

    for count in arguments.adapters:
        names = (["default", *map(str, range(1, count))] * BATCH)[:BATCH]
        times: dict[str, list[float]] = {of: [] for of in models}
        for turn in range(arguments.rounds + 1):
            for of in models:
                taken = seconds(lambda of=of, names=names: run(of, names))  # type: ignore[misc]  # a default binds it now
                if turn:  # the first warms up
                    times[of].append(taken)
        row = {
            "adapters": count, "batch": BATCH, "prompt": PROMPT, "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds, "seconds": {of: spread(found) for of, found in times.items()},
            "speed_of_base": {of: median(times["base"]) / median(found) for of, found in times.items()},
        }  # fmt: skip
        rows.append("mixed", row | rows.provenance())
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
