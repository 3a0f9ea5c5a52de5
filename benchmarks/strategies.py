"""Does training on a quarter of the samples and half of their tokens beat choosing otherwise? The demo's task decides.

    python benchmarks/strategies.py            about an hour on 2 cores; goes on where it was interrupted

Every strategy keeps as many supervised tokens as the plane at 25 % x 50 %. An epoch is cut into equally many steps for
all, so that optimizer steps and tokens are the same; full data takes as many steps over all tokens. A side network
(r = 16) learns from the NF4 base's states, which never change and are computed once, in bfloat16. Held-out loss is that
of 100 GSM8K test answers. `results/strategies.jsonl` gets one row for each run.
"""

from __future__ import annotations

import json
import random
import time
from statistics import mean, stdev
from typing import Any

import torch
from common import HERE, environment, markdown, smollm2
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup, set_seed

from qtuning_peft import SideTuningConfig
from qtuning_peft.demo.gsm8k import read_rows
from qtuning_peft.eu_plane import EUPruner, score
from qtuning_peft.loss import IGNORE_INDEX, supervised_loss
from qtuning_peft.side_tuning.base_states import BaseStates, base_states, use_in_next_forward

R, LEARNING_RATE, STEPS_PER_EPOCH, EPOCHS, SEEDS = 16, 2e-3, 10, 2, (0, 1, 2)
TRAIN_ROWS, TEST_ROWS = 320, 100

PLANE = {"sample_ratio": 0.25, "token_ratio": 0.5}
STRATEGIES: dict[str, dict[str, Any]] = {
    "full data, as many steps": {"sample_ratio": 1.0, "strategy": "random"},
    "EU plane x neighbours (Q-Tuning)": PLANE,
    "EU plane x neighbours, highest kept": PLANE | {"keep_tokens": "highest"},
    "EU plane x random tokens": PLANE | {"token_strategy": "random"},
    "EU plane x Rho-1 tokens": PLANE | {"token_strategy": "rho1"},
    "random": {"strategy": "random"},
    "random x random tokens": {"strategy": "random", "token_ratio": 0.5, "token_strategy": "random"},
    "longest": {"strategy": "longest"},
    "highest perplexity": {"strategy": "highest_perplexity"},
    "lowest perplexity": {"strategy": "lowest_perplexity"},
    "highest entropy": {"strategy": "entropy"},
    "highest EL2N": {"strategy": "el2n"},
    "InfoBatch": {"strategy": "infobatch"},
    "IFD": {"strategy": "ifd"},
}


def gsm8k(split: str, start: int, stop: int) -> Dataset:
    """Rows of GSM8K as prompt and completion."""
    rows = read_rows(split, stop)[start:]
    return Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])


class States:
    """The base's states of every row, and batches of them."""

    def __init__(self, model: Any, rows: Dataset) -> None:
        self.rows = [self._of(model, row["input_ids"]) for row in rows]
        longest = max(self.rows, key=lambda states: states.input_ids.shape[1])
        self.rotary = longest.blocks[0][1]["position_embeddings"]

    @staticmethod
    def _of(model: Any, input_ids: list[int]) -> BaseStates:
        states = base_states(model, torch.tensor([input_ids]))
        states.embeddings, states.normed = states.embeddings.bfloat16(), states.normed.bfloat16()
        states.blocks = [(block, arguments, hidden.bfloat16()) for block, arguments, hidden in states.blocks]
        return states

    def batch(self, indices: list[int]) -> BaseStates:
        """The states of several rows, padded at the right, where plain causal attention sees none of the padding."""
        chosen = [self.rows[index] for index in indices]
        length = max(states.input_ids.shape[1] for states in chosen)

        def padded(parts: list[Tensor]) -> Tensor:
            return torch.cat([torch.nn.functional.pad(p, (0, 0, 0, length - p.shape[1])).float() for p in parts])

        ids = [torch.nn.functional.pad(states.input_ids, (0, length - states.input_ids.shape[1])) for states in chosen]
        rotary = tuple(part[:, :length] for part in self.rotary)
        blocks = [
            (block, {"position_embeddings": rotary}, padded([states.blocks[i][2] for states in chosen]))
            for i, (block, _, _) in enumerate(chosen[0].blocks)
        ]
        return BaseStates(
            torch.cat(ids),
            padded([s.embeddings for s in chosen]),
            blocks,
            padded([s.normed for s in chosen]),
            chosen[0].output,
        )


def padded_labels(rows: list[list[int]]) -> Tensor:
    """(rows, longest), int64."""
    length = max(map(len, rows))
    return torch.tensor([row + [IGNORE_INDEX] * (length - len(row)) for row in rows])


def loss_of(model: Any, states: States, indices: list[int], labels: list[list[int]], total: bool = False) -> Tensor:
    """Loss of a batch, its mean or its sum over supervised tokens."""
    batch = states.batch(indices)
    use_in_next_forward(model, batch)
    return supervised_loss(model, batch.input_ids, padded_labels(labels), num_items=1 if total else None)


def train(model: Any, states: States, labels: dict[int, list[int]], seed: int) -> None:
    """Train the side network on the rows of `labels`."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0)
    steps = STEPS_PER_EPOCH * EPOCHS
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    draw = random.Random(seed)
    for _ in range(EPOCHS):
        order = draw.sample(sorted(labels), len(labels))
        for step in range(STEPS_PER_EPOCH):
            chosen = order[step::STEPS_PER_EPOCH]
            tokens = sum(label != IGNORE_INDEX for index in chosen for label in labels[index])
            for start in range(0, len(chosen), 8):
                part = chosen[start : start + 8]
                (loss_of(model, states, part, [labels[i] for i in part], total=True) / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: Any, states: States, labels: list[list[int]]) -> float:
    """Nats per supervised token."""
    # The side network has no dropout, and kept states are taken in training mode alone.
    model.train()
    order = sorted(range(len(labels)), key=lambda index: len(labels[index]))
    total = sum(
        loss_of(model, states, order[i : i + 10], [labels[j] for j in order[i : i + 10]], total=True).item()
        for i in range(0, len(order), 10)
    )
    return total / sum(label != IGNORE_INDEX for row in labels for label in row)


def with_reference(scored: Dataset, model: Any, states: States) -> Dataset:
    """Add the tokens' error under `model`, as Rho-1 needs it."""
    model.train()
    errors = []
    with torch.no_grad():
        for index, row in enumerate(scored):
            batch = states.batch([index])
            use_in_next_forward(model, batch)
            logits = model(input_ids=batch.input_ids).logits[0, :-1].float()
            targets = torch.tensor(row["labels"])[1:]
            kept = targets != IGNORE_INDEX
            errors.append(torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="none").tolist())
    return scored.add_column("token_reference_error", errors)


def main() -> None:
    """Run what has not run yet, and print the table."""
    base, tokenizer = smollm2()
    parts = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 64, "el2n": True, "ifd": True}
    scored = score(gsm8k("train", 0, TRAIN_ROWS), base, tokenizer, **parts)
    reference_rows = score(gsm8k("train", TRAIN_ROWS, 400), base, tokenizer, **parts)
    test = score(gsm8k("test", 0, TEST_ROWS), base, tokenizer, **parts)

    def side_tuned(seed: int) -> Any:
        set_seed(seed)
        return get_peft_model(base, SideTuningConfig(r=R, task_type="CAUSAL_LM"))

    model = side_tuned(0)
    train_states, reference_states, test_states = (States(model, rows) for rows in (scored, reference_rows, test))
    test_labels = test["labels"][:]
    before = held_out_loss(model, test_states, test_labels)
    train(model, reference_states, dict(enumerate(reference_rows["labels"][:])), seed=0)
    scored = with_reference(scored, model, train_states)
    model.unload()

    budget = EUPruner(**PLANE, tokenizer=tokenizer).fit(scored).pruned.kept_tokens
    file = HERE / "results" / "strategies.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for seed in SEEDS:
        for name, options in STRATEGIES.items():
            if any(row["strategy"] == name and row["seed"] == seed for row in done):
                continue
            given = options if "sample_ratio" in options else options | {"num_tokens": budget}
            pruner = EUPruner(**given, tokenizer=tokenizer, seed=seed, keep_dropped=True).fit(scored)
            kept = scored.map(pruner, batched=True, load_from_cache_file=False)
            wanted = ("misconception", "calibration", "kept")
            labels = {i: row["labels"] for i, row in enumerate(kept) if row["quadrant"] in wanted}
            model = side_tuned(seed)
            started = time.perf_counter()
            train(model, train_states, labels, seed)
            seconds = time.perf_counter() - started
            row = {
                "strategy": name, "seed": seed, "loss": held_out_loss(model, test_states, test_labels), "base": before,
                "samples": len(labels), "tokens": pruner.pruned.kept_tokens, "steps": STEPS_PER_EPOCH * EPOCHS,
                "train_seconds": round(seconds, 1), "r": R, "learning_rate": LEARNING_RATE,
                "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
            }  # fmt: skip
            model.unload()
            done.append(row)
            with file.open("a") as rows:
                rows.write(json.dumps(row) + "\n")
            print(name, seed, round(row["loss"], 4), f"{seconds:.0f} s", flush=True)
    print(table(done))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds, best first."""
    lines = []
    for name in STRATEGIES:
        runs = [row for row in rows if row["strategy"] == name]
        losses = [row["loss"] for row in runs]
        if losses:
            spread = stdev(losses) if len(losses) > 1 else float("nan")
            samples, tokens = mean(r["samples"] for r in runs), mean(r["tokens"] for r in runs)
            lines.append(
                (mean(losses), [name, f"{samples:.0f}", f"{tokens:.0f}", f"{mean(losses):.4f}", f"{spread:.4f}"])
            )
    header = ["strategy", "samples", "supervised tokens", "held-out loss", "spread (s.d.)"]
    return markdown(header, [line for _, line in sorted(lines)]) + f"\n\nBase: {rows[0]['base']:.4f} nats per token."


if __name__ == "__main__":
    main()
