"""Frozen projections chosen by principal components of the base's hidden states.

    P = the first k right singular vectors of H - mean(H),      H: (tokens, d), one for every tap

A random orthonormal P keeps k/d of a hidden state's variance; these keep the most that k numbers can. The base is
frozen (QST, ACL 2024), so what is fitted once stays right for as long as training goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .base_states import base_states, side_tuning_layer
from .downsample import Projection


def fit_projections(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], max_tokens: int = 8192, progress: bool = True
) -> list[float]:
    """Fit the frozen projections of a side-tuned model to the hidden states of some data.

    Do it before training: what is behind a projection learns its channels.

    Args:
        model: A model with an active side network whose `downsample` is `"projection"`.
        batches: Each with `input_ids` (batch, length), int64, and, where there is padding, `attention_mask` of that
            shape; other entries are not read. A few hundred samples are enough.
        max_tokens: Tokens to use; reading stops there. They take d numbers each for every tap, in the base's dtype.
        progress: Whether to show a progress bar.

    Returns:
        For every tap, the embeddings first, the share of the states' variance that its projection keeps.

    Raises:
        ValueError: when the side network has no projections, or there are fewer tokens than their rank.
    """
    layer = side_tuning_layer(model)
    network = None if layer is None else layer.active_network()
    taps = [] if network is None else [network.embedding_tap, *network.taps]
    projections = [module for tap in taps for module in tap.modules() if isinstance(module, Projection)]
    if not projections:
        raise ValueError("downsample of the active side network is not projection, so there is nothing to fit.")
    states = _collect(model, batches, max_tokens, progress)  # for every tap (tokens, d)
    rank, tokens = projections[0].weight.shape[0], len(states[0])
    if tokens <= rank:
        raise ValueError(f"downsample_rank is {rank}, but there are {tokens} tokens to fit it to; give more batches.")
    taps_and_states = zip(projections, states, strict=True)
    return [
        _fit(projection, tap)
        for projection, tap in tqdm(taps_and_states, "Fitting", len(projections), disable=not progress)
    ]


def _collect(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], max_tokens: int, progress: bool
) -> list[Tensor]:
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]  # no tensor, as mypy thinks
    parts: list[list[Tensor]] = []
    left = max_tokens
    with tqdm(desc="Reading hidden states", total=max_tokens, unit="token", disable=not progress) as bar:
        for batch in batches:
            inputs: dict[str, Any] = {
                name: batch[name].to(device) for name in ("input_ids", "attention_mask") if name in batch
            }
            kept = base_states(model, **inputs)
            wanted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            assert kept.embeddings is not None
            taps = [kept.embeddings, *(hidden_states for _, _, hidden_states in kept.blocks)]
            parts.append([tap[wanted.to(tap.device)][:left].cpu() for tap in taps])
            bar.update(len(parts[-1][0]))
            left -= len(parts[-1][0])
            if left <= 0:
                break
    return [torch.cat(tap) for tap in zip(*parts, strict=True)] if parts else [torch.empty(0, 0)]


def _fit(projection: Projection, states: Tensor) -> float:
    centred = states.to(projection.weight.device).float()  # (tokens, d)
    centred -= centred.mean(dim=0)
    covariance = centred.T @ centred  # (d, d)
    variances, vectors = torch.linalg.eigh(covariance)  # ascending
    rank = projection.weight.shape[0]
    projection.weight.copy_(vectors[:, -rank:].T)
    return float(variances[-rank:].sum() / variances.sum().clamp_min(torch.finfo(torch.float32).tiny))
