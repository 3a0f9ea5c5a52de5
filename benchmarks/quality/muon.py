"""Muon (Jordan et al., 2024): momentum whose matrix is made orthogonal, so that every direction moves as far.

    M <- 0.95 M + 0.05 G,      W <- W - 0.2 sqrt(max(m, n)) lr orthogonal(0.05 G + 0.95 M),      G, M, W (m, n)

orthogonal(U S V^T) = U V^T, about, by five Newton-Schulz steps. The factor gives an update the size of AdamW's (Liu et
al., 2025), so that learning rates are comparable. Newer PyTorch has Muon too, in bfloat16; this one is float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices only.

    Args:
        matrices: Each (m, n).
        lr: Learning rate.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # PyTorch overloads it
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(momentum, MOMENTUM))
                weight.add_(update, alpha=-0.2 * max(weight.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix (m, n) whose singular values are all about one."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
