"""Test loss against training time: a side network, LoRA and QLoRA on the same GSM8K answers, in the same order.

    python -m benchmarks.curve --minutes 8

SmolLM2-135M-Instruct. Each method has its own model and its own clock, and they take a step in turn, as a shared
machine's speed drifts. Clocks stand still during evaluation. Every evaluation is a row of `results/curve.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq

from benchmarks import methods, rows
from benchmarks.common import smollm2
from benchmarks.gsm8k import encode, read_rows
from benchmarks.step import positive, seconds
from qtuning_peft.loss import IGNORE_INDEX, chunked_cross_entropy

RATES = {"side": 1e-3, "side-lean": 1e-3, "lora": 1e-3, "qlora": 1e-3}
TRAIN_ROWS, MAX_LENGTH, BATCH = 200, 512, 4
Batch = dict[str, Tensor]


class Learner:
    """A model, its optimizer, and a clock that runs while it steps."""

    def __init__(self, name: str, rate: float, seed: int) -> None:
        self.method, self.rate, self.steps, self.clock = methods.find(name), rate, 0, 0.0
        base, _ = smollm2(self.method.four_bit)
        if torch.cuda.is_available() and not self.method.four_bit:  # a quantized one is there already
            base.cuda()
        torch.manual_seed(seed)
        self.model = methods.apply(self.method, base)
        self.optimizer = methods.optimizer(self.method, self.model, rate)
        self.device = next(self.model.parameters()).device

    def step(self, batch: Batch) -> None:
        """One step; the clock runs."""
        self.clock += seconds(lambda: self._step(batch))
        self.steps += 1

    def _step(self, batch: Batch) -> None:
        chunked_cross_entropy(self.model, **self._here(batch)).backward()
        torch.nn.utils.clip_grad_norm_(methods.trained(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def test_loss(self, batches: list[Batch]) -> float:
        """Nats per supervised token. No method here has dropout, so the model stays in training mode."""
        total = sum(chunked_cross_entropy(self.model, **self._here(batch), num_items=1).item() for batch in batches)
        return total / sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in batches)

    def _here(self, batch: Batch) -> Batch:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def batches(tokenizer: Any, split: str, count: int) -> list[Batch]:
    """Rows of GSM8K, `BATCH` at a time; test rows by length."""
    encoded = [encode(tokenizer, row, MAX_LENGTH) for row in read_rows(split, count)]
    if split == "test":
        encoded.sort(key=lambda row: len(row["input_ids"]))
    collate = DataCollatorForSeq2Seq(tokenizer)
    return [dict(collate(encoded[start : start + BATCH])) for start in range(0, count, BATCH)]


def rates(texts: list[str]) -> dict[str, float]:
    """Learning rates by method, as given or by default.

    Raises:
        ValueError: when a method has none.
    """
    found = {}
    for text in texts:
        name, _, rate = text.partition("=")
        methods.find(name)
        if not rate and name not in RATES:
            raise ValueError(f"method {name} has no learning rate; give one as {name}=5e-4.")
        found[name] = float(rate or RATES[name])
    return found


def main() -> None:
    """Train in turn, until the minutes or the data are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=["side", "lora", "qlora"], metavar="NAME[=RATE]",
        help="methods, with a learning rate where the default does not suit (side lora qlora)",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="in all, evaluation included (8)")
    parser.add_argument("--evaluate-every", type=positive, default=10, metavar="STEPS", help="steps between (10)")
    parser.add_argument("--test-rows", type=positive, default=32, help="test answers (32)")
    parser.add_argument("--steps", type=positive, help="stop after as many steps of each")
    parser.add_argument("--seed", type=int, default=0, help="of the order and the new weights (0)")
    arguments = parser.parse_args()
    try:
        given = rates(arguments.methods)
    except ValueError as error:
        parser.error(str(error))

    end = time.monotonic() + 60 * arguments.minutes
    _, tokenizer = smollm2()
    training = batches(tokenizer, "train", TRAIN_ROWS)
    test = batches(tokenizer, "test", arguments.test_rows)
    learners = [Learner(name, rate, arguments.seed) for name, rate in given.items()]
    source = rows.provenance()

    def evaluate() -> None:
        for learner in learners:
            row = {
                "method": learner.method.name, "options": learner.method.options(), "learning_rate": learner.rate,
                "model": "SmolLM2-135M-Instruct", "batch": BATCH, "test_rows": arguments.test_rows,
                "seed": arguments.seed, "step": learner.steps, "seconds": learner.clock,
                "loss": learner.test_loss(test),
            }  # fmt: skip
            rows.append("curve", row | source)
            print(json.dumps({name: row[name] for name in ("method", "step", "seconds", "loss")}), flush=True)

    began = time.monotonic()
    evaluate()
    evaluation = time.monotonic() - began
    draw, steps = random.Random(arguments.seed), 0
    order: list[Batch] = []
    with tqdm(unit="step", total=arguments.steps) as bar:
        while arguments.steps is None or steps < arguments.steps:
            if time.monotonic() + 1.5 * evaluation > end:  # time for the last evaluation
                break
            order = order or draw.sample(training, len(training))
            batch = order.pop()
            for learner in draw.sample(learners, len(learners)):
                learner.step(batch)
            steps += 1
            bar.update()
            if steps % arguments.evaluate_every == 0:
                evaluate()
    if steps % arguments.evaluate_every:
        evaluate()


if __name__ == "__main__":
    main()
