"""Samples of all lengths through the model: sorted by length, in batches of a fixed number of tokens, back in order.

The head runs on chunks of supervised positions, so the logits of a batch never exist at once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..evaluation import eval_mode
from ..head import causal_model, head_of, positions_at_once
from ..loss import IGNORE_INDEX, supervised_positions
from ..reading import positions_that_predict
from ..side_tuning.follow import AtPositions, BaseStates
from ..side_tuning.peft.following import following
from .scores import SCORES, Predictions
from .tokenized import Sample

# Logits held at a time, whatever the vocabulary and the batch: 16 MiB of float32 where they should stay in a CPU's
# cache, 256 MiB where a GPU should have enough to do.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ELSEWHERE = 2**26
# Names of scores, which the plane is made of.
PLANE = ("error", "uncertainty")


def run(
    model: nn.Module, samples: Sequence[Sample], tokens_per_batch: int, names: Sequence[str] = PLANE,
    on_progress: Callable[[int], object] | None = None, take: Callable[[int, Tensor], object] | None = None,
    layers: Collection[int] = (),
) -> dict[str, list[np.ndarray]]:  # fmt: skip
    """Scores `names` of the supervised tokens of `samples`: for each sample (supervised tokens,), float64.

    `tokens_per_batch` counts padding; `on_progress` is called with the number of samples of each batch. `take` gets, by
    the index of a sample, the base's states (N + 2, supervised tokens, d) that predict its tokens: the embeddings, the
    outputs of the N blocks `layers`, and the final norm's.
    """
    # Longest first, so that a batch that does not fit in memory is the first one.
    order = sorted(range(len(samples)), key=lambda index: -len(samples[index].input_ids))
    ordered = [samples[index] for index in order]
    device = causal_model(model).get_input_embeddings().weight.device
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with torch.inference_mode(), eval_mode(model):
        for batch in batches([len(sample.input_ids) for sample in ordered], tokens_per_batch):
            members = ordered[batch.start : batch.stop]
            inputs = right_padded(members, device)
            with recording(model, inputs[2], layers if take is not None else None) as states:
                scores = token_scores(model, *inputs, names)
            for name, values in by_sample(scores, members).items():
                found[name] += values
            if take is not None:
                lengths = [len(values) for values in next(iter(found.values()))[-len(members) :]]
                parts = torch.stack([part[0].to(states.parts()[-1].device) for part in states.parts()])
                for index, own in zip(order[batch.start : batch.stop], parts.split(lengths, dim=1), strict=True):
                    take(index, own)
            if on_progress is not None:
                on_progress(len(members))
    back = np.argsort(order)
    return {name: [values[index] for index in back] for name, values in found.items()}


@contextmanager
def recording(model: nn.Module, labels: Tensor, layers: Collection[int] | None) -> Iterator[BaseStates]:
    """Record the base's states where `labels` (batch, length) are predicted, in this context; nothing for `None`."""
    states = BaseStates(layers or ())
    if layers is None:
        yield states
        return
    read = AtPositions(states, positions_that_predict(labels))
    with following(model) as follower, follower.recording(read):
        yield states


def token_scores(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, names: Sequence[str] = PLANE
) -> dict[str, Tensor]:
    """Scores of every supervised token of a right-padded batch, by name (tokens,), row after row.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids, attention_mask: (batch, length), int64; no mask without padding.
        labels: (batch, length), int64, -100 where a token is not supervised; the first of a row never is.
        names: Scores of tokens to compute.
    """
    base = causal_model(model)
    output = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return scores_of_hidden_states(base, output, labels, names)


def scores_of_hidden_states(base: Any, output: Any, labels: Tensor, names: Sequence[str] = PLANE) -> dict[str, Tensor]:
    """Scores from what the decoder of `base` returned; `labels` and `names` as in `token_scores`."""
    hidden_states, targets = supervised_positions(output.last_hidden_state, labels)  # (tokens, d), (tokens,)
    chunk = positions_at_once(base, CHUNK_ELEMENTS.get(hidden_states.device.type, CHUNK_ELEMENTS_ELSEWHERE))
    head = head_of(base, output)
    chunks = [
        scores_of_logits(head(states), wanted, names)
        for states, wanted in zip(hidden_states.split(chunk), targets.split(chunk), strict=True)
    ]
    return {name: torch.cat([scores[name] for scores in chunks]) for name in names}


def scores_of_logits(logits: Tensor, targets: Tensor, names: Sequence[str] = PLANE) -> dict[str, Tensor]:
    """Scores by name, each (tokens,), of logits (tokens, vocabulary), which are overwritten, and targets (tokens,)."""
    predictions = Predictions(logits, targets)
    return {name: SCORES[name].of(predictions) for name in names}


def by_sample(scores: dict[str, Tensor], samples: Sequence[Sample]) -> dict[str, list[np.ndarray]]:
    """Scores that follow each other sample after sample, taken apart: for each (supervised tokens,), float64."""
    ends = np.cumsum([sum(label != IGNORE_INDEX for label in sample.labels) for sample in samples])
    return {name: np.split(values.double().cpu().numpy(), ends[:-1]) for name, values in scores.items()}


def batches(lengths: Sequence[int], tokens_per_batch: int) -> list[range]:
    """Consecutive runs of descending `lengths`, each of at most `tokens_per_batch` padded tokens or a single one."""
    runs, start = [], 0
    for index in range(len(lengths)):
        if index > start and (index - start + 1) * lengths[start] > tokens_per_batch:
            runs.append(range(start, index))
            start = index
    return [*runs, range(start, len(lengths))] if lengths else []


def right_padded(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor | None, Tensor]:
    """`input_ids`, `attention_mask` (`None` without padding) and `labels`, each (samples, longest), int64."""
    # Any token will do for padding: it is masked, and no tokenizer needs to have one.
    input_ids, mask, labels = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill).to(device)
        for rows, fill in (
            ([sample.input_ids for sample in samples], 0),
            ([[1] * len(sample.input_ids) for sample in samples], 0),
            ([sample.labels for sample in samples], IGNORE_INDEX),
        )
    )
    return input_ids, None if mask.all() else mask, labels
