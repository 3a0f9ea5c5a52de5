"""What pruning every mini-batch costs: a training step with it beside the same step without.

    python -m benchmarks.dynamic                       both adapters
    python -m benchmarks.dynamic --adapters LoRA       one; the other's rows stay

Steps of a side network and of LoRA on one batch of GSM8K rows, the 8 shortest of 64, of which the answers are
supervised, beside SmolLM2-135M in float32. Pruned and unpruned steps run in turn; figures are means over the rounds,
after one step that is not counted, in seconds of processor time of all threads, which other programs disturb less than
the clock's. A step is the trainer's `training_step`, forward and backward. `results/dynamic.jsonl` gets one row for
each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerControl, TrainerState, TrainingArguments

from benchmarks import rows
from benchmarks.common import environment, smollm2, smollm2_tokenizer
from benchmarks.document import markdown
from benchmarks.gsm8k import read_rows
from qtuning_peft import EUPruner, EUPruningCallback, SideTuningConfig, SideTuningTrainer
from qtuning_peft.eu_plane.rows import RowEncoder

ROWS, ROUNDS, TOKEN_RATIO = 8, 2, 0.5
SHARES = (None, 0.5, 0.25)
ADAPTERS: dict[str, Any] = {
    "side network": lambda: SideTuningConfig(task_type="CAUSAL_LM"),
    "LoRA": lambda: LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
}


def main() -> None:
    """Measure, and write results and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=[*ADAPTERS], metavar="ADAPTER")
    adapters = parser.parse_args().adapters
    tokenizer = smollm2_tokenizer()
    encoder = RowEncoder(tokenizer)
    encoded = [
        encoder.encode({"prompt": r["question"], "completion": r["answer"]}, "prompt") for r in read_rows("train", 64)
    ]
    encoded = sorted(encoded, key=lambda row: len(row.input_ids))[:ROWS]
    batch = dict(
        DataCollatorForSeq2Seq(tokenizer)([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    )
    for name in adapters:
        others = [row for row in rows.read("dynamic") if row["adapter"] != name]
        rows.replace("dynamic", others + measured(name, batch))
    header = ["adapter", "samples kept", "tokens kept", "CPU seconds a step", "of an unpruned step"]
    lines = [
        [
            row["adapter"], f"{row['kept_samples']:.0%}", f"{row['kept_tokens']:.0%}", f"{row['seconds']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows.read("dynamic")
    ]  # fmt: skip
    print(markdown(header, lines))


def measured(name: str, batch: dict[str, Any]) -> list[rows.Row]:
    """One row for every share of the samples."""
    model = get_peft_model(smollm2(quantized=False)[0], ADAPTERS[name]())
    steps = {share: step_of(model, name, share) for share in SHARES}
    times: dict[float | None, list[float]] = {share: [] for share in SHARES}
    supervised = (batch["labels"][:, 1:] != -100).sum()
    for _ in range(1 + ROUNDS):
        for share, (trainer, _) in steps.items():
            started = time.process_time()
            trainer.training_step(model, dict(batch), supervised)
            times[share].append(time.process_time() - started)
            print(name, share, f"{times[share][-1]:.2f} s", flush=True)
            model.zero_grad()
    seconds = {share: mean(found[1:]) for share, found in times.items()}
    shares = {share: kept_of(callback) for share, (_, callback) in steps.items()}
    return [
        {
            "adapter": name, "sample_ratio": share, "token_ratio": TOKEN_RATIO, "kept_samples": shares[share][0],
            "kept_tokens": shares[share][1], "seconds": seconds[share], "ratio": seconds[share] / seconds[None],
            "rows": ROWS, "tokens": int(batch["attention_mask"].sum()), "supervised": int(supervised),
            "rounds": ROUNDS, "model": "SmolLM2-135M-Instruct, float32", "environment": environment(),
        }
        for share in SHARES
    ]  # fmt: skip


def step_of(model: Any, name: str, share: float | None) -> tuple[Trainer, EUPruningCallback | None]:
    """A trainer, and what prunes its batches."""
    kind = SideTuningTrainer if name == "side network" else Trainer
    on_cpu = not torch.cuda.is_available()
    args = TrainingArguments(tempfile.mkdtemp(), report_to="none", use_cpu=on_cpu, bf16=False)
    trainer = kind(model, args)
    if share is None:
        return trainer, None
    callback = EUPruningCallback(trainer, EUPruner(sample_ratio=share, token_ratio=TOKEN_RATIO))
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    trainer.create_optimizer()
    return trainer, callback


def kept_of(callback: EUPruningCallback | None) -> tuple[float, float]:
    """Shares of the samples and of the tokens that were kept."""
    if callback is None:
        return 1.0, 1.0
    kept, samples, kept_tokens, tokens = callback.counts.tolist()
    return kept / samples, kept_tokens / tokens


if __name__ == "__main__":
    main()
