"""One model in training: its optimizer, its schedule, and a clock that runs while it steps.

Learners take their steps in turn, each on the same batches, so that a shared machine's drift hits all alike. The clock
stands still during evaluation.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from benchmarks import methods
from benchmarks.common import NF4, checkpoint
from benchmarks.quality.tasks import Batch, Task
from benchmarks.step import seconds
from qtuning_peft.eu_plane.batching import token_scores
from qtuning_peft.eu_plane.scores import Predictions, token_score
from qtuning_peft.loss import IGNORE_INDEX, chunked_cross_entropy
from qtuning_peft.reading import reading_labels
from qtuning_peft.states import cache_states, common_prefix, reuse_of
from qtuning_peft.trainer import ROWS, store_in

WARM_UP = 0.1
HIDDEN_STATE_CACHE = 8 * 2**30  # bytes


def factor(step: int, steps: int, warm_up: float = WARM_UP) -> float:
    """Share of the learning rate at `step` of `steps`: up linearly for `warm_up` of them, then down a cosine to 0."""
    warm = max(1, round(warm_up * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Learner:
    """A base, trained by one method.

    Args:
        method: Of `benchmarks.methods`.
        task: Its rows.
        rate: Learning rate at its highest.
        steps: Steps in all, for the schedule.
        seed: Of new weights.
        epochs: With several, a side network caches the base's hidden states in the first.
        base: The model to train beside, or its folder, SmolLM2-135M-Instruct's unless given: then it is loaded as the
            method asks.
        states: Folder for a side network's cache, which later runs read; else it is in memory.

    Attributes:
        exact: Of answers that are text: the share that was right at every token when last measured.
        peak: Bytes of a GPU at the peak of a step, everything in the process included; 0 on a CPU.
    """

    def __init__(
        self,
        method: methods.Method,
        task: Task,
        rate: float,
        steps: int,
        seed: int,
        epochs: float = 1,
        base: Any = None,
        states: Path | None = None,
    ) -> None:
        self.method, self.task, self.rate, self.steps = method, task, rate, steps
        self.keeps_states = method.is_side and states is not None
        self.step_number, self.clock, self.tokens, self.peak = 0, 0.0, 0, 0
        self.exact: float | None = None
        if base is None or isinstance(base, Path):
            base = load_base(task, method.four_bit, seed, base)
        torch.manual_seed(seed)
        self.model = methods.apply(method, base, "CAUSAL_LM" if task.labels is None else "SEQ_CLS")
        self.optimizer = methods.optimizer(method, self.model, rate)
        self.device = next(self.model.parameters()).device
        if method.is_side:
            reuse = reuse_of(self.model)
            assert reuse is not None
            reuse.cache_prefix(common_prefix(task.train[:ROWS]))
            in_memory = HIDDEN_STATE_CACHE if epochs > 1 else 0
            cache_states(self.model, in_memory if states is None else store_in(states, self.model))

    def step(self, batch: Batch) -> None:
        """One step; the clock runs."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor(self.step_number, self.steps)
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        self.clock += seconds(lambda: self._step(batch))
        if gpu:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.step_number += 1
        self.tokens += int(batch["attention_mask"].sum()) - len(batch["labels"]) * self.task.few_shot_examples

    def _step(self, batch: Batch) -> None:
        self._loss(batch).backward()
        nn.utils.clip_grad_norm_(methods.trained(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, batch: Batch) -> torch.Tensor:
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        return chunked_cross_entropy(self.model, **inputs) if self.task.labels is None else self.model(**inputs).loss

    @torch.no_grad()
    def measure(self, batches: list[Batch]) -> float:
        """Nats per supervised token, or accuracy.

        No method here has dropout: the model stays in training mode, in which no kernel is switched. The prompt prefix
        is reused, as where a model is served, and so are states in a folder, which takes a pass with gradients.
        """
        if self.task.labels is None:
            return self._measure_text(batches)
        right = 0
        for batch in batches:
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            with torch.set_grad_enabled(self.keeps_states):
                logits = self.model(**inputs).logits
            right += int((logits.argmax(-1).cpu() == batch["labels"]).sum())
        return right / sum(len(batch["labels"]) for batch in batches)

    def _measure_text(self, batches: list[Batch]) -> float:
        errors, exact = [], []
        for batch in batches:
            ids, mask, labels = (batch[name].to(self.device) for name in ("input_ids", "attention_mask", "labels"))
            with reading_labels(labels):
                scores = token_scores(self.model, ids, mask, labels, ("error", "likeliest"))
            errors.append(scores["error"])
            lengths = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).tolist()
            exact += [bool(row.all()) for row in scores["likeliest"].split(lengths)]
        self.exact = sum(exact) / len(exact)
        return torch.cat(errors).mean().item()


@token_score("likeliest")
def likeliest(predictions: Predictions) -> torch.Tensor:
    """Whether no other token is likelier: greedy generation then gives it."""
    return (predictions.target == 0).float()


def load_base(task: Task, four_bit: bool, seed: int, folder: Path | None = None) -> Any:
    """The base in `folder`, or SmolLM2-135M-Instruct, in NF4 or float32, with a new head where the task has classes.

    It computes in float32, on a GPU too.
    """
    folder = folder or checkpoint()
    options: dict[str, Any] = {"dtype": torch.float32}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(**NF4)
    if task.labels is None:
        base = AutoModelForCausalLM.from_pretrained(folder, **options)
    else:
        torch.manual_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=task.labels, pad_token_id=task.padding, **options
        )
    if torch.cuda.is_available() and not four_bit:  # a quantized one is there already
        base.cuda()
    return base.eval()
