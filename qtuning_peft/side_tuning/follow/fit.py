"""What is fitted to the base's hidden states instead of being trained: centers of the taps, and frozen projections.

    c = mean of h over the positions that the loss reads, in the first training step
    P = the first k right singular vectors of H - mean(H),      H: (tokens, d), one for every tap

Most of a hidden state is the same in every row: nearly all of it in the last token of a chat template, which
classifiers read. A down-sampler's gradient is then that of the common part, and what tells rows apart is hardly learned
(docs/quality.md). A position is read where the loss has a gradient. The first step runs with c = 0: a mixture that
starts at the base's final state does so whatever enters the side network.

A random orthonormal P keeps k/d of a hidden state's variance; these keep the most that k numbers can. The base is
frozen (QST, ACL 2024), so what is fitted once stays right for as long as training goes on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..network import SideNetwork
from ..network.downsample import Projection
from .follower import follower_of
from .recorder import record_states


class CenterFit:
    """Measures the centers of a side network's taps in a first training step."""

    def __init__(self, network: SideNetwork) -> None:
        self.network = network
        self.seen: list[Tensor] = []  # of every tap, (batch, length, d)

    @classmethod
    def of(cls, network: SideNetwork) -> "CenterFit | None":
        """One for a training step of a network without centers, else `None`."""
        first = network.training and torch.is_grad_enabled() and network.lacks_centers()
        return cls(network) if first else None

    def see(self, hidden_states: Tensor) -> None:
        """Keep a tap, (batch, length, d)."""
        # Where training saves no taps on the device, its first step must not either.
        self.seen.append(hidden_states if self.network.saves_taps else hidden_states.cpu())

    def when_read(self, mixed: Tensor) -> None:
        """Set the centers once the gradient of `mixed` (batch, length, d) shows which positions the loss reads."""
        if mixed.requires_grad:
            mixed.register_hook(self._set)

    @torch.no_grad()
    def _set(self, gradient: Tensor) -> None:
        means = mean_where_read(self.seen, gradient) if self.network.lacks_centers() else None
        self.seen.clear()
        # One row of infinities would otherwise be in every center for good; the next step measures again.
        if means is not None and bool(means.isfinite().all()):
            for tap, mean in zip(self.network.all_taps(), means, strict=True):
                assert tap.center is not None
                tap.center.copy_(mean)


@torch.no_grad()
def mean_where_read(states: list[Tensor], gradient: Tensor) -> Tensor | None:
    """The mean hidden state of every tap over the positions that a loss reads, in all processes together.

    `states` are those of every tap, `gradient` the loss's by the mixture, each (batch, length, d). The result is
    (taps, d), float32; `None` if no position is read.
    """
    read = gradient.ne(0).any(-1)  # (batch, length)
    sums = torch.stack([state[read.to(state.device)].float().sum(0).to(read.device) for state in states])  # (taps, d)
    count = read.sum()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(count)
    return sums / count if count else None


def fit_projections(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], max_tokens: int = 8192, progress: bool = True
) -> list[float]:
    """Fit the frozen projections of a side-tuned model to the hidden states of some data.

    Do it before training: what follows a projection learns its channels.

    Args:
        batches: Each with `input_ids` (batch, length), int64, and, where there is padding, `attention_mask` of that
            shape; other entries are not read. A few hundred samples are enough.
        max_tokens: Tokens to use; reading stops there. They take d numbers each for every tap, in the base's dtype.

    Returns:
        For every tap, the embeddings first, the share of the states' variance that its projection keeps.

    Raises:
        ValueError: when the side network has no projections, or there are fewer tokens than their rank.
    """
    follower = follower_of(model)
    network = None if follower is None else follower.host.active_network()
    taps = [] if network is None else network.all_taps()
    projections = [module for tap in taps for module in tap.modules() if isinstance(module, Projection)]
    if not projections:
        raise ValueError("downsample of the active side network is not projection, so there is nothing to fit.")
    states = _collect(model, batches, max_tokens, progress)  # for every tap (tokens, d)
    rank, tokens = len(projections[0].weight), len(states[0])
    if tokens <= rank:
        raise ValueError(f"downsample_rank is {rank}, but there are {tokens} tokens to fit it to; give more batches.")
    pairs = tqdm(zip(projections, states, strict=True), "Fitting", len(projections), disable=not progress)
    return [_fit(projection, tap) for projection, tap in pairs]


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
            wanted = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            taps = record_states(model, **inputs).taps()
            parts.append([tap[wanted.to(tap.device)][:left].cpu() for tap in taps])
            bar.update(len(parts[-1][0]))
            left -= len(parts[-1][0])
            if left <= 0:
                break
    return [torch.cat(tap) for tap in zip(*parts, strict=True)] if parts else [torch.empty(0, 0)]


def _fit(projection: Projection, states: Tensor) -> float:
    centered = states.to(projection.weight.device).float()  # (tokens, d)
    centered -= centered.mean(dim=0)
    variances, vectors = torch.linalg.eigh(centered.T @ centered)  # ascending
    rank = projection.weight.shape[0]
    projection.weight.copy_(vectors[:, -rank:].T)
    return float(variances[-rank:].sum() / variances.sum().clamp_min(torch.finfo(torch.float32).tiny))
