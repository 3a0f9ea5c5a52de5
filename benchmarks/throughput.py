"""Speed and memory of scoring, beside a bare forward pass.

    python -m benchmarks.throughput

The bare forward (`model(input_ids)`, with all its logits) and scoring run in turn over the same batches, as a shared
machine's speed drifts; figures are medians over the rounds. Two loads: GSM8K rows, of which the answers are supervised,
and the same rows supervised throughout. Memory is each one's peak above the loaded model, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from statistics import median
from typing import Any

import psutil
import torch

from benchmarks import rows
from benchmarks.common import HERE, environment, smollm2
from benchmarks.document import markdown
from benchmarks.gsm8k import read_rows
from qtuning_peft.eu_plane.batching import batches, right_padded, token_scores
from qtuning_peft.eu_plane.rows import RowEncoder
from qtuning_peft.eu_plane.tokenized import Sample

TOKENS_PER_BATCH, ROWS, ROUNDS = 2048, 16, 3


def loads(tokenizer: Any) -> dict[str, list[Any]]:
    """Batches of both loads, longest first."""
    encoder = RowEncoder(tokenizer)
    encoded = [
        encoder.encode({"prompt": r["question"], "completion": r["answer"]}, "prompt") for r in read_rows("train", ROWS)
    ]
    encoded.sort(key=lambda row: -len(row.input_ids))
    parts = batches([len(row.input_ids) for row in encoded], TOKENS_PER_BATCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = {
        "answers": [row.labels for row in encoded],
        "all tokens": [[-100, *row.input_ids[1:]] for row in encoded],
    }
    return {
        name: [right_padded([Sample(i, encoded[i].input_ids, of[i]) for i in part], device) for part in parts]
        for name, of in labels.items()
    }


@torch.inference_mode()
def run(kind: str, model: Any, data: list[Any]) -> None:
    """One pass over the batches."""
    for input_ids, mask, labels in data:
        if kind == "bare":
            model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        else:
            token_scores(model, input_ids, mask, labels)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory(kind: str, load: str) -> int:
    """Peak of one pass above the loaded and warmed-up model, in bytes."""
    model, tokenizer = smollm2()
    data = loads(tokenizer)[load]
    run(kind, model, [tuple(t if t is None else t[:1, :8] for t in data[0])])
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(kind, model, data)
        return torch.cuda.max_memory_allocated() - before
    # The process' own record holds the peak of loading, which is higher; so memory is watched while the pass runs.
    process, done = psutil.Process(), threading.Event()
    seen: list[int] = []
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch, args=(process, seen, done))
    watcher.start()
    run(kind, model, data)
    done.set()
    watcher.join()
    return max(seen) - before


def memory_apart(kind: str, load: str) -> int:
    """`memory`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.throughput", "--memory-of", kind, load]
    found = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True).stdout
    return int(found.splitlines()[-1])


def watch(process: psutil.Process, seen: list[int], done: threading.Event) -> None:
    """Note the resident memory every five milliseconds until `done`."""
    while not done.wait(0.005):
        seen.append(process.memory_info().rss)


def main() -> None:
    """Measure, and write results and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "LOAD"), help="print one peak, in bytes, and stop")
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory(*arguments.memory_of))
        return

    model, tokenizer = smollm2()
    results = []
    for load, data in loads(tokenizer).items():
        tokens = sum(int(mask.sum()) if mask is not None else ids.numel() for ids, mask, _ in data)
        run("bare", model, data[-1:])
        seconds: dict[str, list[float]] = {"bare": [], "scoring": []}
        for _ in range(ROUNDS):
            for kind, times in seconds.items():
                started = time.perf_counter()
                run(kind, model, data)
                times.append(time.perf_counter() - started)
        peaks = {kind: memory_apart(kind, load) for kind in seconds}
        results.append(
            {
                "load": load, "tokens": tokens, "rounds": ROUNDS, "tokens_per_batch": TOKENS_PER_BATCH,
                **{f"{kind}_tokens_per_second": tokens / median(times) for kind, times in seconds.items()},
                "speed_ratio": median(seconds["bare"]) / median(seconds["scoring"]),
                **{f"{kind}_bytes": peaks[kind] for kind in seconds},
                "memory_ratio": peaks["scoring"] / peaks["bare"],
                "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
            }
        )  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    rows.replace("throughput", results)
    header = ["supervised", "bare, tokens/s", "scoring, tokens/s", "ratio", "bare, MiB", "scoring, MiB", "ratio"]
    lines = [
        [
            r["load"], f"{r['bare_tokens_per_second']:.0f}", f"{r['scoring_tokens_per_second']:.0f}",
            f"{r['speed_ratio']:.2f}", f"{r['bare_bytes'] / 2**20:.0f}", f"{r['scoring_bytes'] / 2**20:.0f}",
            f"{r['memory_ratio']:.2f}",
        ]
        for r in results
    ]  # fmt: skip
    print(markdown(header, lines))


if __name__ == "__main__":
    main()
