"""Cost of a loss over a large vocabulary: all logits at once, PyTorch's chunked loss, and that of `qtuning_peft.loss`.

    python -m benchmarks.loss --tokens 2048

Forward and backward to the hidden states, the head frozen, in a process for each, as memory is a process's peak. They
take turns. Rows go to `results/loss.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows, step
from qtuning_peft.loss import CHUNK_ELEMENTS, summed_cross_entropy

KINDS = ("all logits", "torch.nn.functional.linear_cross_entropy", "qtuning_peft.loss")


def loss_of(kind: str, hidden_states: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Summed loss of `hidden_states` (tokens, d) with `targets` (tokens,)."""
    if kind == KINDS[0]:
        return F.cross_entropy(head(hidden_states).float(), targets, reduction="sum")
    if kind == KINDS[1]:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden_states, head.weight, targets, reduction="sum", options=options)
    return summed_cross_entropy(head, hidden_states, targets, CHUNK_ELEMENTS // head.weight.shape[0], frozen=True)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Times and memory of one kind."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    with torch.device(arguments.device):
        head = nn.Linear(arguments.hidden_size, arguments.vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        hidden_states = torch.randn(arguments.tokens, arguments.hidden_size, dtype=dtype, requires_grad=True)
        targets = torch.randint(arguments.vocabulary, (arguments.tokens,))
    memory = step.Memory(arguments.device)
    before = next(iter(memory.peak().values()))

    def run() -> None:
        loss_of(arguments.kind, hidden_states, head, targets).backward()

    run()
    peak = next(iter(memory.peak().values())) - before
    times = [step.seconds(run) for _ in range(arguments.repeats)]
    return {"seconds": median(times), "peak_bytes": peak}


def main() -> None:
    """Measure each kind in turn, and append and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="supervised tokens (2048)")
    parser.add_argument("--hidden-size", type=int, default=576, help="width of the hidden states (576)")
    parser.add_argument("--vocabulary", type=int, default=49152, help="rows of the head (49152)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (5), after one that warms up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        print(json.dumps(measure(arguments)))
        return
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--kind", kind]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        shape = {name: getattr(arguments, name) for name in ("tokens", "hidden_size", "vocabulary")}
        row = {"kind": kind, **shape, **found} | rows.provenance()
        rows.append("loss", row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
