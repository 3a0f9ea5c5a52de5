"""Quantized Side Tuning in plain NumPy float64, written from its equations and sharing no code with the package.

With d the width of the base, w = d / r that of the side network, e the embeddings, h_i the output of base block i,
f the output of the base's final norm, and i(0) < i(1) < ... the tapped blocks:

    g_(-1) = tap_emb(e)
    x_j    = (1 - b_j) * tap_j(h_i(j)) + b_j * g_(j-1)            b_j = sigmoid(c_j)
             tap_j(h_i(j)) + g_(j-1)                              additive
    y_j    = x_j + attention(norm_a(x_j)), or x_j if side blocks do not attend
    g_j    = y_j + mlp(norm_m(y_j))
    h      = mix(f, norm(g_last))

    tap(h) = down(h - c), c the center where there is one, then a norm if downsample_norm is set: in "reference" a
    LayerNorm with eps 1e-5, whatever the base
        linear   W h                      adapter  L2 silu(L1 h)             lora, projection  L2 (L1 h)
        maxpool  the maximum and avgpool the mean of each r neighbouring channels
    norm(x) = x / sqrt(mean(x^2) + eps) * weight                                             (RMSNorm)
              (x - mean(x)) / sqrt(var(x) + eps) * weight + bias                             (LayerNorm)
    attention: H heads of n = w / H channels, causal, softmax(q k^T / sqrt(n)) v; padding is never attended to
    mlp(x) = down(act(gate) * up), [gate; up] = up_proj x, if the base is gated, else down(act(up_proj x))

    rotary: of the F frequencies of the base, number floor(k F / half), k = 0 .. half-1, half = min(n / 2, F), turns
            channels k and k + half of each head of q and k; the channels from 2 half on are left alone
    mix(f, g) = f + up(g) + 128/d W f / rms(f)       additive, rms(f) = sqrt(mean(f^2) + 1e-6)
                a f + (1 - a) up(g)                  paper
                s f + (1 - s) up(g), s = sigmoid(a)  reference, on an RMSNorm base
                s up(g) + (1 - s) f                  reference, on a LayerNorm base
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Tensors = Mapping[str, Array]


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


@dataclass(frozen=True)
class Setup:
    """What the tensors alone do not say about a side network."""

    r: int
    downsample: str
    downsample_norm: bool
    mixing: str
    num_heads: int
    layers: Sequence[int]
    eps: float
    act: Callable[[Array], Array]
    gated: bool
    frequencies: Array | None = None  # (F,), on a base with rotary embeddings
    positions: NDArray[np.int64] | None = None  # (batch, length), with the frequencies


def default_heads(width: int) -> int:
    """The most heads that divide the width into even sizes of at least 64, else 1."""
    return max((h for h in range(1, width + 1) if width % (2 * h) == 0 and width // h >= 64), default=1)


def linear(tensors: Tensors, name: str, x: Array) -> Array:
    y = x @ tensors[f"{name}.weight"].T
    return y + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else y


def norm(tensors: Tensors, name: str, x: Array, eps: float) -> Array:
    weight = tensors[f"{name}.weight"]
    if f"{name}.bias" not in tensors:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + tensors[f"{name}.bias"]


def down(tensors: Tensors, name: str, h: Array, setup: Setup) -> Array:
    groups = h.reshape(*h.shape[:-1], -1, setup.r)
    if setup.downsample == "maxpool":
        return groups.max(-1)
    if setup.downsample == "avgpool":
        return groups.mean(-1)
    if setup.downsample == "linear":
        return h @ tensors[f"{name}.weight"].T
    inner = h @ tensors[f"{name}.0.weight"].T
    if setup.downsample in ("lora", "projection"):
        return inner @ tensors[f"{name}.1.weight"].T
    return silu(inner) @ tensors[f"{name}.2.weight"].T


def tap(tensors: Tensors, name: str, h: Array, setup: Setup) -> Array:
    center = tensors.get(f"{name}.center")
    t = down(tensors, f"{name}.down", h if center is None else h - center, setup)
    eps = 1e-5 if setup.mixing == "reference" else setup.eps
    return norm(tensors, f"{name}.norm", t, eps) if setup.downsample_norm else t


def rotate(x: Array, frequencies: Array, positions: NDArray[np.int64]) -> Array:
    """`x` is (batch, heads, length, n)."""
    count = len(frequencies)
    half = min(x.shape[-1] // 2, count)
    chosen = frequencies[[k * count // half for k in range(half)]]
    angle = positions[:, None, :, None] * chosen
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate(
        [
            first * np.cos(angle) - second * np.sin(angle),
            second * np.cos(angle) + first * np.sin(angle),
            rest,
        ],
        axis=-1,
    )


def visible(attention_mask: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(batch, 1, length, length): which keys (last axis) a query may attend to."""
    length = attention_mask.shape[1]
    causal = np.tril(np.ones((length, length), dtype=bool))
    # The diagonal stays on so that the softmax of a padded query is defined; nothing reads its result.
    return (causal & (attention_mask[:, None, None, :] == 1)) | np.eye(length, dtype=bool)


def attention(tensors: Tensors, name: str, x: Array, mask: NDArray[np.bool_], setup: Setup) -> Array:
    batch, length, width = x.shape
    size = width // setup.num_heads
    qkv = linear(tensors, f"{name}.qkv_proj", x)
    q, k, v = (
        part.reshape(batch, length, setup.num_heads, size).transpose(0, 2, 1, 3)
        for part in (qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :])
    )
    if setup.frequencies is not None:
        assert setup.positions is not None
        q, k = rotate(q, setup.frequencies, setup.positions), rotate(k, setup.frequencies, setup.positions)
    scores = np.where(mask, q @ k.transpose(0, 1, 3, 2) / math.sqrt(size), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return linear(tensors, f"{name}.o_proj", out.transpose(0, 2, 1, 3).reshape(batch, length, width))


def mlp(tensors: Tensors, name: str, x: Array, setup: Setup) -> Array:
    inner = linear(tensors, f"{name}.up_proj", x)
    if not setup.gated:
        return linear(tensors, f"{name}.down_proj", setup.act(inner))
    gate, up = np.split(inner, 2, axis=-1)
    return linear(tensors, f"{name}.down_proj", setup.act(gate) * up)


def block(tensors: Tensors, name: str, x: Array, mask: NDArray[np.bool_], setup: Setup) -> Array:
    y = x
    if f"{name}.attention.qkv_proj.weight" in tensors:
        normed = norm(tensors, f"{name}.attention_norm", x, setup.eps)
        y = x + attention(tensors, f"{name}.attention", normed, mask, setup)
    return y + mlp(tensors, f"{name}.mlp", norm(tensors, f"{name}.mlp_norm", y, setup.eps), setup)


def mix(tensors: Tensors, f: Array, g: Array, setup: Setup) -> Array:
    up = linear(tensors, "mix.up_proj", g)
    if setup.mixing == "additive":
        rms = np.sqrt((f**2).mean(-1, keepdims=True) + 1e-6)
        return f + up + 128 / f.shape[-1] * linear(tensors, "mix.correction", f / rms)
    a = tensors["mix.weight"]
    if setup.mixing == "paper":
        return a * f + (1.0 - a) * up
    s = sigmoid(a)
    return s * up + (1.0 - s) * f if "norm.bias" in tensors else s * f + (1.0 - s) * up


def side_network(
    tensors: Tensors, hidden_states: Sequence[Array], f: Array, attention_mask: NDArray[np.int64], setup: Setup
) -> Array:
    """h, from the embeddings and every block output of the base (`hidden_states`) and its normed output `f`."""
    mask = visible(attention_mask)
    g = tap(tensors, "embedding_tap", hidden_states[0], setup)
    for j, i in enumerate(sorted(setup.layers)):
        t = tap(tensors, f"taps.{j}", hidden_states[i + 1], setup)
        if setup.mixing == "additive":
            x = t + g
        else:
            b = sigmoid(tensors[f"gates.{j}.weight"])
            x = (1.0 - b) * t + b * g
        g = block(tensors, f"blocks.{j}", x, mask, setup)
    return mix(tensors, f, norm(tensors, "norm", g, setup.eps), setup)
