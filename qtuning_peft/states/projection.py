"""Hidden states projected to fewer channels: what many rows have in common is stored once, and a token takes little.

    c = B^T (h - m) / s      h ~ m + B (s c)       B: the k first principal components of each tap, from the first rows

c is stored in 8 bits (see `format`): k + 2 bytes for a token and tap instead of 2 d. The final norm's output, which the
head reads, keeps its d channels, in 8 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import xxhash
from torch import Tensor

from .format import FORMATS, Format

PROJECTION = "projection"
CHANNELS = 256


@dataclass(frozen=True)
class Projection:
    """The projection of every tap; an encoder and decoder like those of `FORMATS`.

    Attributes:
        mean: m, (N + 1, d), float32.
        basis: B, (N + 1, d, k), float32, orthonormal.
        scale: s, (N + 1, k), float32: standard deviations.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, states: Tensor, channels: int) -> "Projection":
        """Of `states` (N + 2, tokens, d), of which there must be more than `channels`; a `ValueError` if not."""
        taps = states[:-1].float()
        _, tokens, width = taps.shape
        if not 0 < channels < min(tokens, width):
            raise ValueError(
                f"channels is {channels}; choose at least 1, and fewer than the base's width {width} and the {tokens} "
                "supervised tokens of the first rows, which they are fitted to."
            )
        mean = taps.mean(1)  # (N + 1, d)
        bases, scales = [], []
        for tap, own in zip(taps, mean, strict=True):
            centered = tap - own  # (tokens, d)
            variances, vectors = torch.linalg.eigh(centered.T @ centered / tokens)  # ascending
            bases.append(vectors[:, -channels:].flip(1))
            scales.append(variances[-channels:].flip(0).clamp_min(1e-12).sqrt())
        return cls(mean, torch.stack(bases).contiguous(), torch.stack(scales))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Projection":
        """Of what `tensors` gave."""
        return cls(**{field.name: tensors[field.name] for field in fields(cls)})

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of."""
        return {field.name: getattr(self, field.name).contiguous() for field in fields(self)}

    def fingerprint(self) -> str:
        """Of its content."""
        digest = xxhash.xxh3_128()
        for tensor in self.tensors().values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def encode(self, states: Tensor) -> bytes:
        """`states` (N + 2, tokens, d) as bytes."""
        states = states.cpu().float()
        coordinates = torch.bmm(states[:-1] - self.mean[:, None], self.basis) / self.scale[:, None]
        in_8_bits = FORMATS["int8"].encode
        return in_8_bits(coordinates) + in_8_bits(states[-1:])

    def decode(self, content: bytes, parts: int, width: int) -> Tensor:
        """States (N + 2, tokens, d), float32."""
        taps, channels = self.basis.shape[0], self.basis.shape[2]
        tokens = len(content) // (taps * (channels + 2) + width + 2)
        behind = tokens * taps * (channels + 2)
        from_8_bits = FORMATS["int8"].decode
        coordinates = from_8_bits(content[:behind], taps, channels) * self.scale[:, None]
        found = torch.baddbmm(self.mean[:, None], coordinates, self.basis.transpose(1, 2))
        return torch.cat([found, from_8_bits(content[behind:], 1, width)])


def describe_formats() -> str:
    """Every format and what it is, for help."""
    own = f"{PROJECTION} (taps in 8 bits of their first principal components, k + 2 bytes; see channels)"
    return f"{FORMATS.describe()}; {own}"


def check_format(name: str) -> None:
    """A `ValueError` when there is no format called `name`."""
    if name != PROJECTION:
        FORMATS.check(name)


def format_of(name: str, projection: Projection | None = None) -> Format:
    """The format called `name`."""
    return FORMATS[name] if projection is None else Format(projection.encode, projection.decode)
