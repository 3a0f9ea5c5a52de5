"""How hidden states are stored: as they are, in 16 bits, or in 8 bits with a scale for each token and tap.

What is fitted to the data first is in `projection`.

q = round(h / s),     s = max |h| / 127 over the d numbers of one token and tap:     d + 2 bytes of them
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import Registry


@dataclass(frozen=True)
class Format:
    """From states (N + 2, n, d) to bytes, and from bytes and d back to (N + 2, n, d), given N + 2."""

    encode: Callable[[Tensor], bytes]
    decode: Callable[[bytes, int, int], Tensor]


FORMATS: Registry[Format] = Registry("states_format")


def _plain(dtype: torch.dtype) -> Format:
    def encode(states: Tensor) -> bytes:
        return _bytes(states.to("cpu", dtype))

    def decode(content: bytes, parts: int, width: int) -> Tensor:
        # Copied: what is mapped from a file cannot be written to.
        flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return flat.view(parts, len(flat) // (parts * width), width)

    return Format(encode, decode)


def _encode_8_bits(states: Tensor) -> bytes:
    states = states.cpu().float()
    scales = states.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    # Rounded first: what is divided by is what is multiplied with.
    scales = scales.bfloat16()
    values = (states / scales.float()).round_().clamp_(-127, 127).to(torch.int8)
    return _bytes(scales) + _bytes(values)


def _decode_8_bits(content: bytes, parts: int, width: int) -> Tensor:
    tokens = len(content) // (parts * (width + 2))
    if not tokens:
        return torch.empty(parts, 0, width)
    scales = torch.frombuffer(bytearray(content[: 2 * parts * tokens]), dtype=torch.bfloat16)
    values = torch.frombuffer(bytearray(content[2 * parts * tokens :]), dtype=torch.int8)
    return values.view(parts, tokens, width) * scales.view(parts, tokens, 1).float()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


FORMATS.add("bfloat16", _plain(torch.bfloat16), "16 bits, 2 d bytes a token and tap; exact for a base in bfloat16.")
FORMATS.add("float16", _plain(torch.float16), "16 bits with more digits and less range; exact for a base in float16.")
FORMATS.add("float32", _plain(torch.float32), "As the base computes them, 4 d bytes.")
FORMATS.add("int8", Format(_encode_8_bits, _decode_8_bits), "8 bits and a scale for each token and tap, d + 2 bytes.")
