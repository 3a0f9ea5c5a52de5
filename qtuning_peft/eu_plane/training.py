"""Pruning every mini-batch while training, as Q-Tuning publishes it: under the model as it is then.

`EUPruningCallback` goes to `Trainer` or TRL's `SFTTrainer`. It wraps the collator of the training data, and of that
alone: each batch is scored, divided on its own Error-Uncertainty plane, and handed on with the kept samples, their
`labels` trimmed. The trainer counts what is left, so that gradient accumulation divides by the tokens that were kept.

With a side network the base's own scores are used: the base then runs once for each batch, the scores come from that
pass, and the training step takes its hidden states for the kept samples, the only ones the side network sees.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..head import causal_model
from ..loss import IGNORE_INDEX
from ..sharding import is_sharded
from ..side_tuning.follow import BaseStates, follower_of, record_states
from ..states import reuse_of
from .batching import PLANE, by_sample, run, scores_of_hidden_states
from .pruner import EUPruner
from .scores import SCORES, mean
from .selection import KEEP, TRIM
from .tokenized import RowError, Sample, tokenized

# What collators of packed rows say about where samples end, beside positions.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")


class PruningCollator:
    """A collator that prunes what another one returns.

    Args:
        collate: The other collator; returns `input_ids`, `labels` and, if there is padding, `attention_mask`, each
            (batch, length), and `position_ids` if samples are packed.
        model: The model that is trained.
        pruner: What to keep; its thresholds are found in every batch.
        tokens_per_batch: Tokens in a forward pass that scores, padding included.
        autocast: Dtype that the trainer computes in beside the model's own, if any.

    Attributes:
        samples, kept_samples, tokens, kept_tokens: Counts so far; tokens are supervised ones.
    """

    def __init__(
        self, collate: Callable[[list[Any]], Any], model: nn.Module, pruner: EUPruner, tokens_per_batch: int = 4096,
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.collate, self.model, self.pruner = collate, model, pruner
        self.tokens_per_batch, self.autocast = tokens_per_batch, autocast
        self.samples = self.kept_samples = self.tokens = self.kept_tokens = 0

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        """Collate `examples` and prune the batch."""
        batch: dict[str, Any] = dict(self.collate(examples))
        samples = samples_of(batch)
        if not samples:
            return batch
        device = causal_model(self.model).get_input_embeddings().weight.device
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            scores, states = self._score(batch, samples)
        columns: dict[str, list[Any]] = {name: [mean(values) for values in rows] for name, rows in scores.items()}
        if not all(np.isfinite(error) for error in columns["error"]):
            raise ValueError("The model's output is not finite for a batch; it cannot be pruned, nor trained on.")
        columns["supervised_tokens"] = [len(values) for values in scores["error"]]
        columns["input_ids"] = [sample.input_ids for sample in samples]

        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        kept: list[Sample] = []
        for index, quadrant in enumerate(self.pruner.quadrants(columns)):
            if quadrant in KEEP:
                sample = samples[index]
                supervised = np.flatnonzero(np.array(sample.labels) != IGNORE_INDEX) + sample.start
                if quadrant in TRIM and self.pruner.token_ratio < 1:
                    row = vars(sample) | {f"token_{name}": rows[index] for name, rows in scores.items()}
                    supervised = supervised[self.pruner.kept_tokens(row)]
                labels[sample.row, supervised] = batch["labels"][sample.row, supervised]
                kept.append(sample)
        self.samples += len(samples)
        self.kept_samples += len(kept)
        self.tokens += sum(columns["supervised_tokens"])
        self.kept_tokens += int((labels != IGNORE_INDEX).sum())
        return self._without_dropped(batch | {"labels": labels}, kept, states)

    def _score(
        self, batch: dict[str, Any], samples: list[Sample]
    ) -> tuple[dict[str, list[np.ndarray]], BaseStates | None]:
        """Scores of every sample's tokens, and the base's states if there is a side network to use them."""
        names = (*PLANE, *self.pruner.scores)
        follower = follower_of(self.model)
        if follower is None or follower.host.active_network() is None:
            return run(self.model, samples, self.tokens_per_batch, names), None
        model = causal_model(self.model)
        device = model.get_input_embeddings().weight.device
        inputs = {n: batch[n].to(device) for n in ("input_ids", "attention_mask", "position_ids") if n in batch}
        labels = torch.full_like(batch["labels"], IGNORE_INDEX)
        for sample in samples:
            labels[sample.row, sample.start : sample.stop] = torch.tensor(sample.labels)
        with torch.no_grad():
            states = record_states(self.model, **inputs)
            found = scores_of_hidden_states(model, states.output, labels.to(device), names)
        return by_sample(found, samples), states

    def _without_dropped(self, batch: dict[str, Any], kept: list[Sample], states: BaseStates | None) -> dict[str, Any]:
        """`batch` without dropped samples: without their rows, or, in a packed row, without their tokens."""
        rows = sorted({sample.row for sample in kept})
        count, length = batch["labels"].shape
        if len(rows) < count:
            batch = {
                name: value[rows] if isinstance(value, Tensor) and value.dim() and value.shape[0] == count else value
                for name, value in batch.items()
            }
        if states is not None:
            reuse = reuse_of(self.model)
            assert reuse is not None
            reuse.serve_next(states.rows(torch.tensor(rows)))
            return batch
        used = torch.zeros(length, dtype=torch.bool)
        for sample in kept:
            used[sample.start : sample.stop] = True
        per_token = {
            name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == (len(rows), length)
        }
        if all(name in per_token or name in BOUNDARIES for name, value in batch.items() if np.ndim(value)):
            # Samples follow each other as they do in the batch.
            bounds = np.cumsum([0, *(len(sample.labels) for sample in kept)])
            batch |= {name: batch[name][:, used] for name in per_token}
            batch |= {name: torch.tensor(bounds, dtype=batch[name].dtype) for name in BOUNDARIES if name in batch}
        return batch


class EUPruningCallback(TrainerCallback):
    """Prunes every training batch of `Trainer` or `SFTTrainer`: `Trainer(..., callbacks=[EUPruningCallback(pruner)])`.

    The logs get `kept_samples` and `kept_tokens`, the shares kept since the last entry. Trainers fetch batches ahead of
    the step, those of a whole step under gradient accumulation: scores are as old as that.

    Args:
        pruner: What to keep of a batch, with a `sample_ratio`. Thresholds are found in every batch, so `fit` is not
            called, and batches should be large: of 8 samples, a quarter is 2.
        tokens_per_batch: Tokens in a forward pass that scores, padding included.
    """

    def __init__(self, pruner: EUPruner, tokens_per_batch: int = 4096) -> None:
        if pruner.sample_ratio is None:
            raise ValueError("sample_ratio is None; budgets of mini-batches are shares of their samples.")
        for name in ("max_repetition", "keep_dropped"):
            if getattr(pruner, name):
                raise ValueError(f"{name} is {getattr(pruner, name)}; it works on data sets, not on mini-batches.")
        for name in pruner.scores:
            if not SCORES[name].per_token:
                raise ValueError(f"{name} needs a pass of its own; score the data set and prune it before training.")
        self.pruner = replace(pruner, per_batch=True)
        self.tokens_per_batch = tokens_per_batch
        self.collator: PruningCollator | None = None
        self._logged = np.zeros(4, np.int64)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the collator of the training data."""
        if is_sharded(kwargs["model"]):
            raise ValueError(
                "The model is sharded (FSDP, ZeRO-3), and batches are scored outside of the trainer's pass; prune the "
                "data before training, or train with DDP."
            )
        loader = self._let_go(kwargs)
        if loader.num_workers:
            cause = "batches are scored with the model, which lives in this process"
            raise ValueError(f"dataloader_num_workers is {loader.num_workers}, but {cause}; set it to 0.")
        autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.collator = PruningCollator(
            loader.collate_fn, kwargs["model"], self.pruner, self.tokens_per_batch, autocast
        )
        self._logged = np.zeros(4, np.int64)
        loader.collate_fn = self.collator

    def on_log(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add what was kept to the training log."""
        logs, collator = kwargs.get("logs"), self.collator
        if logs is None or collator is None or "loss" not in logs:
            return
        counts = np.array([collator.kept_samples, collator.samples, collator.kept_tokens, collator.tokens])
        since, self._logged = counts - self._logged, counts
        if since[1]:
            samples, tokens = (round(float(since[i] / since[i + 1]), 4) for i in (0, 2))
            kept = {"kept_samples": samples, "kept_tokens": tokens}
            logs.update(kept)
            # The trainer has copied the entry into its history already.
            state.log_history[-1].update(kept)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the training data its collator back."""
        self._let_go(kwargs)

    @staticmethod
    def _let_go(kwargs: dict[str, Any]) -> Any:
        """The loader of the training data, with its own collator, and no states of the base that no step has taken.

        An interrupted training leaves both behind.
        """
        loader = getattr(kwargs["train_dataloader"], "base_dataloader", kwargs["train_dataloader"])
        if isinstance(loader.collate_fn, PruningCollator):
            loader.collate_fn = loader.collate_fn.collate
        if (reuse := reuse_of(kwargs["model"])) is not None:
            reuse.waiting = []
        return loader


def samples_of(batch: dict[str, Any]) -> list[Sample]:
    """The samples of a batch that have supervised tokens, without padding."""
    for name in ("input_ids", "labels"):
        if not isinstance(batch.get(name), Tensor):
            raise ValueError(f"The collator returns no {name}, which pruning needs; use one that does.")
    names = [name for name in ("input_ids", "labels", "attention_mask", "position_ids") if name in batch]
    samples: list[Sample] = []
    for row in range(len(batch["labels"])):
        try:
            samples += tokenized({name: batch[name][row] for name in names}).samples(row)
        except RowError as error:
            raise ValueError(f"Row {row} of a batch cannot be pruned: {error}.") from error
    return samples
