"""Training on a quarter of the samples and half of their tokens, chosen by different strategies, on GSM8K.

    python -m benchmarks.strategies            about 40 minutes on 2 cores; resumes where it was interrupted

Every strategy keeps as many supervised tokens as the plane at 25 % x 50 %. An epoch is cut into equally many steps for
all, so that optimizer steps and tokens are the same; full data takes as many steps over all tokens. A side network
(reduction factor 16, beside every third block) learns from the NF4 base's hidden states, which never change and are
computed once, in bfloat16. The test loss is that of 100 GSM8K test answers. `results/strategies.jsonl` gets one row per
run.
"""

from __future__ import annotations

import random
import time
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import get_cosine_schedule_with_warmup, set_seed

from benchmarks import rows
from benchmarks.common import HERE, environment, smollm2
from benchmarks.document import markdown
from benchmarks.gsm8k import read_rows
from qtuning_peft import SideTuningConfig
from qtuning_peft.eu_plane import EUPruner, score
from qtuning_peft.eu_plane.rows import RowEncoder
from qtuning_peft.eu_plane.selection import KEEP
from qtuning_peft.loss import IGNORE_INDEX, chunked_cross_entropy
from qtuning_peft.states import HiddenStateCache, MemoryStore, reuse_of

REDUCTION_FACTOR, LAYERS, LEARNING_RATE, STEPS_PER_EPOCH, EPOCHS, SEEDS = (
    16,
    list(range(2, 30, 3)),
    2e-3,
    20,
    1,
    (0, 1, 2),
)
TRAIN_ROWS, TEST_ROWS = 320, 100

PLANE = {"sample_ratio": 0.25, "token_ratio": 0.5}
STRATEGIES: dict[str, dict[str, Any]] = {
    "full data, as many steps": {"sample_ratio": 1.0, "strategy": "random"},
    "EU plane x neighbours (Q-Tuning)": PLANE,
    "EU plane, whole samples": {"token_ratio": 1.0},
    "EU plane x random tokens": PLANE | {"token_strategy": "random"},
    "EU plane x Rho-1 tokens": PLANE | {"token_strategy": "rho1"},
    "random": {"strategy": "random"},
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
    found = read_rows(split, stop)[start:]
    return Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in found])


def padded(ids: list[list[int]], fill: int) -> Tensor:
    """Right-padded with `fill`, (rows, longest), int64."""
    return pad_sequence([torch.tensor(row) for row in ids], batch_first=True, padding_value=fill)


def loss_of(model: Any, input_ids: list[list[int]], labels: list[list[int]], total: bool = False) -> Tensor:
    """Loss of a batch, its mean or its sum over supervised tokens; with its gradient, as the cache serves no other."""
    mask = padded([[1] * len(row) for row in input_ids], 0)
    return chunked_cross_entropy(
        model, padded(input_ids, 0), padded(labels, IGNORE_INDEX), 1 if total else None, attention_mask=mask
    )


def train(model: Any, input_ids: list[list[int]], labels: dict[int, list[int]], seed: int) -> None:
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
                loss = loss_of(model, [input_ids[i] for i in part], [labels[i] for i in part], total=True)
                (loss / tokens).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def test_loss(model: Any, input_ids: list[list[int]], labels: list[list[int]]) -> float:
    """Nats per supervised token."""
    # The side network has no dropout, and the cache serves training alone.
    model.train()
    order = sorted(range(len(labels)), key=lambda index: len(labels[index]))
    parts = [order[i : i + 10] for i in range(0, len(order), 10)]
    total = sum(loss_of(model, [input_ids[i] for i in p], [labels[i] for i in p], total=True).item() for p in parts)
    return total / sum(label != IGNORE_INDEX for row in labels for label in row)


def with_reference(scored: Dataset, model: Any) -> Dataset:
    """Add the tokens' error under `model`, as Rho-1 needs it."""
    model.train()
    errors = []
    for row in scored:
        logits = model(input_ids=torch.tensor(row["input_ids"])[None]).logits[0, :-1].detach().float()
        targets = torch.tensor(row["labels"])[1:]
        kept = targets != IGNORE_INDEX
        errors.append(torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="none").tolist())
    return scored.add_column("token_reference_error", errors)


def main() -> None:
    """Run what has not run yet, and print the table."""
    base, tokenizer = smollm2()
    parts = {"resume_dir": HERE / "results" / "parts", "rows_per_part": 64}
    scored = score(gsm8k("train", 0, TRAIN_ROWS), base, tokenizer, scores=("el2n", "ifd"), **parts)
    encoder = RowEncoder(tokenizer)

    def encoded(split: str, start: int, stop: int) -> Dataset:
        found = [encoder.encode(row, "prompt") for row in gsm8k(split, start, stop)]
        return Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in found])

    reference_rows, test = encoded("train", 320, 380), encoded("test", 0, TEST_ROWS)

    cache = HiddenStateCache(MemoryStore(2**32), LAYERS)

    def side_tuned(seed: int) -> Any:
        set_seed(seed)
        model = get_peft_model(
            base, SideTuningConfig(reduction_factor=REDUCTION_FACTOR, layers_to_transform=LAYERS, task_type="CAUSAL_LM")
        )
        reuse = reuse_of(model)
        assert reuse is not None
        reuse.cache = cache
        return model

    model = side_tuned(0)
    train_ids, test_ids, test_labels = scored["input_ids"][:], test["input_ids"][:], test["labels"][:]
    before = test_loss(model, test_ids, test_labels)
    train(model, reference_rows["input_ids"][:], dict(enumerate(reference_rows["labels"][:])), seed=0)
    scored = with_reference(scored, model)
    model.unload()

    budget = EUPruner(**PLANE, tokenizer=tokenizer).fit(scored).pruned.kept_tokens
    done = rows.read("strategies")
    for seed in SEEDS:
        for name, options in STRATEGIES.items():
            if any(row["strategy"] == name and row["seed"] == seed for row in done):
                continue
            given = options if "sample_ratio" in options else options | {"num_tokens": budget}
            pruner = EUPruner(**given, tokenizer=tokenizer, seed=seed, keep_dropped=True).fit(scored)
            kept = scored.map(pruner, batched=True, load_from_cache_file=False)
            labels = {i: row["labels"] for i, row in enumerate(kept) if row["quadrant"] in KEEP}
            model = side_tuned(seed)
            started = time.perf_counter()
            train(model, train_ids, labels, seed)
            seconds = time.perf_counter() - started
            row = {
                "strategy": name, "seed": seed, "loss": test_loss(model, test_ids, test_labels), "base": before,
                "samples": len(labels), "tokens": pruner.pruned.kept_tokens, "steps": STEPS_PER_EPOCH * EPOCHS,
                "train_seconds": round(seconds, 1), "reduction_factor": REDUCTION_FACTOR, "layers": LAYERS,
                "learning_rate": LEARNING_RATE,
                "model": "SmolLM2-135M-Instruct, NF4", "environment": environment(),
            }  # fmt: skip
            model.unload()
            rows.append("strategies", row)
            print(name, seed, round(row["loss"], 4), f"{seconds:.0f} s", flush=True)
    print(table(rows.read("strategies")))


def table(found: list[rows.Row]) -> str:
    """Mean and spread over seeds, best first."""
    lines = []
    for name in STRATEGIES:
        runs = [row for row in found if row["strategy"] == name]
        losses = [row["loss"] for row in runs]
        if losses:
            spread = stdev(losses) if len(losses) > 1 else float("nan")
            samples, tokens = mean(r["samples"] for r in runs), mean(r["tokens"] for r in runs)
            lines.append(
                (mean(losses), [name, f"{samples:.0f}", f"{tokens:.0f}", f"{mean(losses):.4f}", f"{spread:.4f}"])
            )
    header = ["strategy", "samples", "supervised tokens", "test loss", "spread (s.d.)"]
    return markdown(header, [line for _, line in sorted(lines)]) + f"\n\nBase: {found[0]['base']:.4f} nats per token."


if __name__ == "__main__":
    main()
