"""How much slower than reading is scoring, and how much memory does it take?

    python benchmarks/throughput.py

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
from common import environment, markdown, save, smollm2
from gsm8k import read_rows

from qtuning_peft.eu_plane.batching import Piece, batches, right_padded
from qtuning_peft.eu_plane.rows import RowEncoder
from qtuning_peft.eu_plane.scores import token_scores

TOKENS_PER_BATCH, ROWS, ROUNDS = 2048, 16, 3


def loads(tokenizer: Any) -> dict[str, list[Any]]:
    """Batches of both loads, longest first."""
    encoder = RowEncoder(tokenizer)
    rows = [
        encoder.encode({"prompt": r["question"], "completion": r["answer"]}, "prompt") for r in read_rows("train", ROWS)
    ]
    rows.sort(key=lambda row: -len(row.input_ids))
    parts = batches([len(row.input_ids) for row in rows], TOKENS_PER_BATCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: [
            right_padded(
                [
                    Piece(i, rows[i].input_ids, rows[i].labels if name == "answers" else [-100, *rows[i].input_ids[1:]])
                    for i in part
                ],
                device,
            )
            for part in parts
        ]
        for name in ("answers", "all tokens")
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
    rows = []
    for load, data in loads(tokenizer).items():
        tokens = sum(int(mask.sum()) if mask is not None else ids.numel() for ids, mask, _ in data)
        run("bare", model, data[-1:])
        seconds: dict[str, list[float]] = {"bare": [], "scoring": []}
        for _ in range(ROUNDS):
            for kind, times in seconds.items():
                started = time.perf_counter()
                run(kind, model, data)
                times.append(time.perf_counter() - started)
        peaks = {
            kind: int(
                subprocess.run(
                    [sys.executable, __file__, "--memory-of", kind, load], capture_output=True, text=True, check=True
                ).stdout.splitlines()[-1]
            )
            for kind in seconds
        }
        rows.append(
            {
                "load": load, "tokens": tokens, "rounds": ROUNDS, "tokens_per_batch": TOKENS_PER_BATCH,
                **{f"{kind}_tokens_per_second": tokens / median(times) for kind, times in seconds.items()},
                "speed_ratio": median(seconds["bare"]) / median(seconds["scoring"]),
                **{f"{kind}_bytes": peaks[kind] for kind in seconds},
                "memory_ratio": peaks["scoring"] / peaks["bare"],
                "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
            }
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    save("throughput", rows)
    header = ["supervised", "bare, tokens/s", "scoring, tokens/s", "ratio", "bare, MiB", "scoring, MiB", "ratio"]
    print(
        markdown(
            header,
            [
                [
                    r["load"], f"{r['bare_tokens_per_second']:.0f}", f"{r['scoring_tokens_per_second']:.0f}",
                    f"{r['speed_ratio']:.2f}", f"{r['bare_bytes'] / 2**20:.0f}", f"{r['scoring_bytes'] / 2**20:.0f}",
                    f"{r['memory_ratio']:.2f}",
                ]
                for r in rows
            ],
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
