"""Pruning every mini-batch while training, under the model as it is in that step, as Q-Tuning publishes it.

`EUPruningCallback` stands before its trainer's `training_step`. With a side network the pass that trains also scores:
when the decoder returns, error and uncertainty of every supervised token are computed from its side-tuned output, and
the labels of what is not kept are taken back before the loss reads them. Nothing runs twice but the head, and what is
not kept has no part in the head's backward. With LoRA or another method, one more forward pass scores the batch, and
the step runs on the kept samples alone.

A batch's loss is the mean over its kept tokens. Where several batches make a step, under gradient accumulation or in
several processes, each counts as much as it has supervised tokens before it is pruned: what the later ones keep is not
known when the first is trained on. That is done with the trainer's own count of tokens, `num_items_in_batch`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..head import causal_model
from ..loss import IGNORE_INDEX
from ..sharding import is_sharded
from ..side_tuning.follow import follower_of
from .batching import PLANE, by_sample, run, scores_of_hidden_states
from .pruner import EUPruner
from .scores import SCORES, mean
from .selection import KEEP, TRIM
from .tokenized import RowError, Sample, tokenized

# What collators of packed rows say about where samples end, beside positions.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")


class EUPruningCallback(TrainerCallback):
    """Prunes every training batch: `trainer.add_callback(EUPruningCallback(trainer, EUPruner(sample_ratio=0.5)))`.

    For `Trainer` and those derived from it, such as TRL's `SFTTrainer`. Evaluation sees everything. The logs get
    `kept_samples` and `kept_tokens`, the shares kept since the last entry.

    Args:
        trainer: The trainer that it is added to.
        pruner: What to keep of a batch, with a `sample_ratio`. Every batch is divided by itself, so `fit` is not
            called, and batches should be large: of 8 samples, a quarter is 2.
        tokens_per_batch: Tokens in a forward pass that does nothing but score, padding included.
    """

    def __init__(self, trainer: Any, pruner: EUPruner, tokens_per_batch: int = 4096) -> None:
        self.trainer, self.pruner, self.tokens_per_batch = trainer, for_batches(pruner), tokens_per_batch
        # Kept samples, samples, kept tokens and tokens so far, and at the last log entry; tokens are supervised ones.
        self.counts, self._logged = np.zeros(4, np.int64), np.zeros(4, np.int64)
        self._step: Callable[..., Tensor] | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Stand before the trainer's step."""
        if is_sharded(kwargs["model"]):
            raise ValueError(
                "The model is sharded (FSDP, ZeRO-3), and batches are scored by each process for itself; prune the "
                "data before training, or train with DDP."
            )
        # An interrupted training leaves it there.
        if self._step is None:
            self._step, self.trainer.training_step = self.trainer.training_step, self.training_step

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the trainer its own step back."""
        self.trainer.training_step, self._step = self._step, None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add what was kept to the training log."""
        logs, since = kwargs.get("logs"), self.counts - self._logged
        if logs is not None and "loss" in logs and since[1]:
            self._logged = self.counts.copy()
            samples, tokens = (round(float(since[i] / since[i + 1]), 4) for i in (0, 2))
            kept = {"kept_samples": samples, "kept_tokens": tokens}
            logs.update(kept)
            # The trainer has copied the entry into its history already.
            state.log_history[-1].update(kept)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The trainer's step over what is kept of `inputs`."""
        assert self._step is not None
        batch = Batch(dict(inputs), num_items_in_batch)
        if not batch.samples:
            return self._step(model, inputs, num_items_in_batch)
        own, names = self.trainer.model, (*PLANE, *self.pruner.scores)
        base, follower = causal_model(own), follower_of(own)
        if follower is None or follower.host.active_network() is None:
            with self.trainer.accelerator.autocast():
                scores = run(own, batch.samples, self.tokens_per_batch, names)
            kept = self._prune(batch, scores)
            return self._step(model, batch.without_dropped(kept), batch.count)

        seen = self.counts[1]

        def score(decoder: nn.Module, args: Any, output: Any) -> None:
            # Once, if the decoder should run several times in a step.
            if self.counts[1] == seen:
                with torch.no_grad():
                    found = scores_of_hidden_states(base, output, batch.labels, names)
                self._prune(batch, by_sample(found, batch.samples))

        hooks = (
            own.register_forward_pre_hook(torch.compiler.disable(batch.hand_over), with_kwargs=True),
            base.get_decoder().register_forward_hook(torch.compiler.disable(score)),
        )
        try:
            loss = self._step(model, inputs, batch.count)
        finally:
            for hook in hooks:
                hook.remove()
        if self.counts[1] == seen:
            raise RuntimeError("The model's decoder was not called in a step, so the batch was not pruned.")
        return loss

    def _prune(self, batch: "Batch", scores: dict[str, list[np.ndarray]]) -> list[Sample]:
        """Take back the labels of what is not kept; returns the samples that are."""
        columns: dict[str, list[Any]] = {name: [mean(values) for values in rows] for name, rows in scores.items()}
        if not np.isfinite(columns["error"]).all():
            raise ValueError("The model's output is not finite for a batch; it cannot be pruned, nor trained on.")
        columns["supervised_tokens"] = [len(values) for values in scores["error"]]
        columns["input_ids"] = [sample.input_ids for sample in batch.samples]
        kept: list[tuple[Sample, np.ndarray]] = []
        for index, quadrant in enumerate(self.pruner.quadrants(columns)):
            if quadrant in KEEP:
                sample = batch.samples[index]
                labels = np.array(sample.labels)
                if quadrant in TRIM and self.pruner.token_ratio < 1:
                    row = vars(sample) | {f"token_{name}": rows[index] for name, rows in scores.items()}
                    labels[np.flatnonzero(labels != IGNORE_INDEX)[~self.pruner.kept_tokens(row)]] = IGNORE_INDEX
                kept.append((sample, labels))
        tokens = sum(columns["supervised_tokens"])
        kept_tokens = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in kept)
        self.counts += (len(kept), len(batch.samples), kept_tokens, tokens)
        batch.keep(kept, kept_tokens / tokens)
        return [sample for sample, _ in kept]


class Batch:
    """A collated batch, with labels and a count of tokens of its own, that are changed in place when it is pruned.

    Whoever computes the loss is handed both before the decoder runs, and reads them when it has.

    Attributes:
        inputs: What the model takes.
        samples: Its samples that have supervised tokens, without padding.
        labels: (batch, length), int64, -100 where a token is not supervised, is padding, or nothing predicts it.
        count: What the trainer divides a sum over tokens by, if it does.
    """

    def __init__(self, inputs: dict[str, Any], count: Tensor | int | None) -> None:
        self.inputs, self.samples = inputs, samples_of(inputs)
        self.labels = torch.empty_like(inputs["labels"])
        self.count = None if count is None else torch.as_tensor(count, dtype=torch.float32).clone()
        self.keep([(sample, sample.labels) for sample in self.samples], 1.0)

    def keep(self, kept: Sequence[tuple[Sample, Any]], share: float) -> None:
        """Keep the labels (length,) of some samples, and of the tokens `share` as many as before."""
        labels = torch.full(self.labels.shape, IGNORE_INDEX)
        for sample, own in kept:
            labels[sample.row, sample.start : sample.stop] = torch.as_tensor(own)
        self.labels.copy_(labels)
        if self.count is not None:
            self.count *= share

    def hand_over(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of a model, with these labels and this count; the trainer may have copied both."""
        if kwargs.get("labels") is None:
            raise ValueError(
                "The trainer computes its loss without giving the model labels, as with label_smoothing_factor or "
                "compute_loss_func, and would not see what is pruned; do without, or prune the data before training."
            )
        own = {"labels": self.labels, "num_items_in_batch": self.count}
        return args, kwargs | {name: value for name, value in own.items() if kwargs.get(name) is not None}

    def without_dropped(self, kept: list[Sample]) -> dict[str, Any]:
        """The inputs without dropped samples: without their rows, or, in a packed row, without their tokens."""
        rows = sorted({sample.row for sample in kept})
        count, length = self.labels.shape
        batch = {
            name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
            for name, value in (self.inputs | {"labels": self.labels}).items()
        }
        used = torch.zeros(length, dtype=torch.bool, device=self.labels.device)
        for sample in kept:
            used[sample.start : sample.stop] = True
        per_token = {
            name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == (len(rows), length)
        }
        if all(name in per_token or name in BOUNDARIES for name, value in batch.items() if np.ndim(value)):
            # Samples follow each other as they do in the batch.
            bounds = np.cumsum([0, *(len(sample.labels) for sample in kept)])
            batch |= {name: batch[name][:, used] for name in per_token}
            batch |= {name: batch[name].new_tensor(bounds) for name in BOUNDARIES if name in batch}
        return batch


def for_batches(pruner: EUPruner) -> EUPruner:
    """The same pruner for mini-batches; a `ValueError` when it asks for what they cannot do."""
    if pruner.sample_ratio is None:
        raise ValueError("sample_ratio is None; budgets of mini-batches are shares of their samples.")
    for name in ("deduplicate", "max_repetition", "keep_dropped"):
        if getattr(pruner, name):
            raise ValueError(f"{name} is {getattr(pruner, name)}; it works on data sets, not on mini-batches.")
    for name in pruner.scores:
        if not SCORES[name].per_token:
            raise ValueError(f"{name} needs a pass of its own; score the data set and prune it before training.")
    return replace(pruner, per_batch=True)


def samples_of(inputs: dict[str, Any]) -> list[Sample]:
    """The samples of a batch that have supervised tokens, without padding."""
    for name in ("input_ids", "labels"):
        if not isinstance(inputs.get(name), Tensor):
            raise ValueError(f"The collator returns no {name}, which pruning needs; use one that does.")
    names = [name for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in inputs]
    columns = {name: inputs[name].cpu() for name in names}
    samples: list[Sample] = []
    for row in range(len(columns["labels"])):
        try:
            samples += tokenized({name: values[row] for name, values in columns.items()}).samples(row)
        except RowError as error:
            raise ValueError(f"Row {row} of a batch cannot be pruned: {error}.") from error
    return samples
