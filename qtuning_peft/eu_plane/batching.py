"""Samples of all lengths through the model: sorted by length, in batches of a fixed number of tokens, back in order.

The head runs on chunks of supervised positions, so the logits of a batch never exist at once. What all samples begin
with, a system prompt or few-shot examples, is computed once (see `states.prefix`).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from ..evaluation import eval_mode
from ..head import causal_model, head_of, positions_at_once
from ..loss import IGNORE_INDEX, supervised_positions
from ..reading import positions_that_predict
from ..sharding import is_sharded
from ..side_tuning.follow import AtPositions, BaseStates, find_decoder, follower_of
from ..side_tuning.peft.following import following
from ..states.prefix import cache_name, caches_keys_alone, common_prefix, compute
from ..states.reuse import depends_on_length
from .scores import SCORES, Predictions
from .tokenized import Sample

# Logits held at a time, whatever the vocabulary and the batch: 16 MiB of float32 where they should stay in a CPU's
# cache, 256 MiB where a GPU should have enough to do.
CHUNK_ELEMENTS = {"cpu": 2**22}
CHUNK_ELEMENTS_ELSEWHERE = 2**26
# Of all tokens: a shorter prefix, such as a system prompt, is not worth attention to a cache.
LEAST_SHARED = 0.25
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
    lengths = [len(samples[index].input_ids) for index in order]
    device = causal_model(model).get_input_embeddings().weight.device
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with torch.inference_mode(), eval_mode(model):
        prefix = prefix_of(model, samples, device)
        ordered = [behind(samples[index], prefix) for index in order]
        for batch in batches(lengths, tokens_per_batch):  # of whole samples: attention has the keys of all tokens
            members = ordered[batch.start : batch.stop]
            inputs = right_padded(members, device)
            with recording(model, inputs[2], layers if take is not None else None) as states:
                scores = token_scores(model, *inputs, names, prefix)
            for name, values in by_sample(scores, members).items():
                found[name] += values
            if take is not None:
                tokens = [len(values) for values in next(iter(found.values()))[-len(members) :]]
                parts = torch.stack([part[0].to(states.parts()[-1].device) for part in states.parts()])
                for index, own in zip(order[batch.start : batch.stop], parts.split(tokens, dim=1), strict=True):
                    take(index, own)
            if on_progress is not None:
                on_progress(len(members))
    back = np.argsort(order)
    return {name: [values[index] for index in back] for name, values in found.items()}


def prefix_of(model: nn.Module, samples: Sequence[Sample], device: torch.device) -> Cache | None:
    """The key-value cache of the prefix that all `samples` share; none where there is none, or it cannot be reused."""
    base, follower = causal_model(model), follower_of(model)
    network = None if follower is None else follower.host.active_network()
    if len(samples) < 2 or is_sharded(model) or (network is not None and network.attends):
        return None
    try:
        find_decoder(base)
    except ValueError:  # it attends in both directions, for one
        return None
    decoder = base.get_decoder()
    config = getattr(decoder, "config", None)
    if depends_on_length(config) or not caches_keys_alone(decoder.forward, config):
        return None
    shared = common_prefix({"input_ids": sample.input_ids, "labels": sample.labels} for sample in samples)
    if len(shared) * len(samples) < LEAST_SHARED * sum(len(sample.input_ids) for sample in samples):
        return None
    computed = compute(decoder, torch.tensor([shared], device=device), cache_name(decoder.forward)) if shared else None
    return None if computed is None else computed[0]


def behind(sample: Sample, prefix: Cache | None) -> Sample:
    """What of a sample is behind the prefix."""
    columns = 0 if prefix is None else prefix.get_seq_length()
    return replace(sample, input_ids=sample.input_ids[columns:], labels=sample.labels[columns:])


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
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, names: Sequence[str] = PLANE,
    prefix: Cache | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Scores of every supervised token of a right-padded batch, by name (tokens,), row after row.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids, attention_mask: (batch, length), int64; no mask without padding.
        labels: (batch, length), int64, -100 where a token is not supervised; the first of a row never is.
        names: Scores of tokens to compute.
        prefix: Of tokens that every row has before these.
    """
    base = causal_model(model)
    decoder, cached = base.get_decoder(), {}
    if prefix is not None:
        cached = {cache_name(decoder.forward): prefix}
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (prefix.get_seq_length(), 0), value=1)
    output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=prefix is not None, **cached)
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
