"""Time and memory of a training step, measured in a process of its own: one JSON row.

    python -m benchmarks.step --base llama-2-7b --method side --batch 16 --length 512

Steps on one batch of random tokens take turns with the base's bare forward pass and loss (no gradient, adapter off), as
a shared machine's speed drifts. Memory is the peak of the first steps, model and optimizer included: allocated and
reserved on a GPU, resident on a CPU. Running out of memory is a result too. The row goes to `results/steps.jsonl`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks import bases, methods, rows
from qtuning_peft.hub.metadata import peak_memory
from qtuning_peft.loss import IGNORE_INDEX, chunked_cross_entropy

WARM_UP = 2


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--base", required=True, choices=bases.SHAPES, help="shape of the base model")
    result.add_argument("--method", required=True, choices=methods.METHODS, help="how it is trained")
    result.add_argument("--batch", type=positive, required=True, help="sequences in a batch")
    result.add_argument("--length", type=positive, required=True, help="tokens in a sequence")
    result.add_argument("--steps", type=positive, default=10, help="timed steps (10), after two that warm up")
    result.add_argument("--supervised", type=share, default=1.0, help="share of tokens, at the end, with a loss (1)")
    result.add_argument(
        "--loss", choices=("supervised", "full"), default="supervised",
        help="supervised: chunked cross-entropy, for every method (default); full: model(labels=...), with all logits",
    )  # fmt: skip
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--seed", type=int, default=0, help="of weights and tokens (0)")
    return result


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive; give an integer of at least 1.")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is no share; give a number above 0 and up to 1.")
    return value


def key(arguments: argparse.Namespace) -> dict[str, Any]:
    """What identifies a measurement, beside the machine and the seed."""
    method = methods.find(arguments.method)
    return {
        **{name: getattr(arguments, name) for name in ("base", "method", "batch", "length", "supervised")},
        "loss": method.loss or arguments.loss,
        "options": method.options(),
    }


def random_batch(vocabulary: int, arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens and labels, each (batch, length)."""
    generator = torch.Generator().manual_seed(arguments.seed)
    input_ids = torch.randint(vocabulary, (arguments.batch, arguments.length), generator=generator)
    labels = input_ids.clone()
    labels[:, : round((1 - arguments.supervised) * arguments.length)] = IGNORE_INDEX
    return input_ids.to(arguments.device), labels.to(arguments.device)


class Memory:
    """Peak memory from now on."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        gc.collect()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of building

    def peak(self) -> dict[str, int]:
        """In bytes."""
        if self.cuda:
            torch.cuda.synchronize()
            return {
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
            }
        status = Path("/proc/self/status")
        if status.is_file():
            line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            return {"peak_resident": int(line.split()[1]) * 1024}
        return {"peak_resident": (peak_memory() or (0,))[0]}


def seconds(work: Callable[[], object]) -> float:
    """Time of `work`, on a GPU until it is really done."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {"median": median(times), "quartile_1": low, "quartile_3": high}


def measure(arguments: argparse.Namespace, row: dict[str, Any]) -> None:
    """Fill `row`, as far as memory reaches."""
    method = methods.find(arguments.method)
    torch.manual_seed(arguments.seed)
    model = methods.apply(method, bases.build(arguments.base, method.four_bit, arguments.device, arguments.seed))
    trained = list(methods.trained(model))
    row["weight_bytes"] = bases.weight_bytes(model)
    row["trained_parameters"] = sum(p.numel() for p in trained)
    row["adapter_bytes"] = sum(p.numel() * p.element_size() for p in trained)
    optimizer = methods.optimizer(method, model)
    input_ids, labels = random_batch(model.config.vocab_size, arguments)
    losses: list[float] = []

    dtype = bases.compute_dtype(arguments.device)

    def loss() -> Tensor:
        with torch.autocast(arguments.device, dtype, enabled=method.autocast and dtype.itemsize == 2):
            if row["loss"] == "full":
                total: Tensor = model(input_ids=input_ids, labels=labels, use_cache=False).loss
                return total
            return chunked_cross_entropy(model, input_ids, labels)

    def step() -> None:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())

    @torch.no_grad()
    def base_forward() -> None:
        with model.disable_adapter() if method.config else nullcontext():
            loss()

    memory = Memory(arguments.device)
    for _ in range(WARM_UP):
        step()
    row |= memory.peak()
    base_forward()
    steps, forwards = [], []
    for _ in range(arguments.steps):
        steps.append(seconds(step))
        forwards.append(seconds(base_forward))
    row["step_seconds"], row["base_forward_seconds"] = spread(steps), spread(forwards)
    row["step_over_forward"] = median(steps) / median(forwards)
    row["tokens_per_second"] = input_ids.numel() / median(steps)
    row["loss_at_start"] = losses[0]
    with torch.no_grad():
        row["loss_at_end"] = loss().item()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, did not suffice."""
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
    )


def main() -> None:
    """Measure, and append and print the row."""
    options = parser()
    arguments = options.parse_args()
    try:
        row: dict[str, Any] = key(arguments)
    except ValueError as error:
        options.error(str(error))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        options.error("device is cuda, but PyTorch finds no GPU here; give --device cpu.")
    config = bases.shape(arguments.base)
    row |= {
        "steps": arguments.steps, "seed": arguments.seed, "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers, "vocabulary": config.vocab_size,
        "parameters": bases.parameter_count(arguments.base), "out_of_memory": False,
    }  # fmt: skip
    try:
        measure(arguments, row)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        row["out_of_memory"] = True
    row |= rows.provenance()
    rows.append("steps", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
