"""Bytes that a training step saves for backward, per token: counted on the true shapes, on any machine.

    python -m benchmarks.saved_for_backward --base llama-3-8b --method side lora

The model has shapes and no numbers (PyTorch's FakeTensorMode; a CPU's operators, bfloat16). One forward pass with the
loss runs; every storage that autograd then keeps counts once, weights and buffers not at all. The slope between two
lengths is the bytes per token. All are supervised, or with `--supervised 0.25` an answer behind a prompt three times as
long. Four-bit weights change nothing in what is saved, so LoRA stands for QLoRA. Rows go to
`results/saved_for_backward.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import masking_utils

from benchmarks import bases, methods, rows, step
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.side_tuning.network.quantize import Quantized

METHODS = (
    "side", "side-paper", "side-checkpointed", "side-int8", "side-int4", "side-projection", "side-lean", "lora",
    "lora-checkpointed", "full",
)  # fmt: skip
BASES = ("llama-2-7b", "llama-2-70b", "llama-3-8b")
LENGTHS = (256, 512)


class Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Counter:
    """Counts what is saved at the moment, apart from the weights and buffers of `model`."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {_storage(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self._quantized: weakref.WeakSet[Tensor] = weakref.WeakSet()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the graphs that are recorded in this context."""

        def pack(tensor: Tensor) -> Saved:
            saved = Saved(tensor)
            self._saved.add(saved)
            return saved

        def quantized(states: Tensor, bits: int) -> Quantized:
            # Packed by hooks of the package's own, inside of which these are not called.
            result = quantize(states, bits)
            self._quantized.update(result[:2])
            return result

        quantize = Quantized.of
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
        with hooks, patch.object(Quantized, "of", quantized):
            yield

    def bytes(self) -> int:
        """In all storages, each once."""
        tensors = [*(saved.tensor for saved in self._saved), *self._quantized]
        storages = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for storage, size in storages.items() if storage not in self._weights)


def _storage(tensor: Tensor) -> int:
    # Not its address: storages without numbers all have none.
    return tensor.untyped_storage()._cdata


class Masks(TorchDispatchMode):
    """Without numbers no mask is known: here masks are true everywhere (no padding), those of labels in a share."""

    def __init__(self, supervised: float) -> None:
        super().__init__()
        self.supervised = supervised

    def places(self, mask: Tensor) -> int:
        """How often a mask of labels is true."""
        return round(mask.numel() * self.supervised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor and _is_mask(args[1][0]):
            values, (mask,) = args
            return values.new_empty((self.places(mask), *values.shape[mask.dim() :]))
        if function is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self.places(args[0]), args[0].dim()), dtype=torch.int64)
        if function is torch.ops.aten._local_scalar_dense.default and _is_mask(args[0]):
            return True
        return function(*args, **(kwargs or {}))


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


@contextmanager
def pretending(mode: FakeTensorMode, supervised: float = 1.0) -> Iterator[None]:
    """Run a model without numbers as if it had some."""
    # For a compiler, transformers makes the causal mask that a plain run leaves to the attention kernel.
    with mode, Masks(supervised), patch.object(masking_utils, "is_tracing", lambda *_: False):
        yield


def without_numbers(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a model on the meta device into one that believes to be on a CPU."""
    fakes: dict[Tensor, Tensor] = {}  # tied weights stay tied

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in fakes:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                trained = tensor.requires_grad
                fakes[tensor] = nn.Parameter(empty, trained) if isinstance(tensor, nn.Parameter) else empty
        return fakes[tensor]

    for module in model.modules():
        tensors: Any
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})


def saved_bytes(model: nn.Module, input_ids: Tensor) -> int:
    """Bytes that one forward pass with the loss saves for backward."""
    counter = Counter(model)
    with counter.watching():
        # In a name: nothing stays saved for a loss that is gone.
        loss = chunked_cross_entropy(model, input_ids, input_ids)
    count = counter.bytes()
    del loss
    return count


def count(base: str, name: str, lengths: tuple[int, ...], supervised: float = 1.0) -> list[int]:
    """Bytes saved at each length, batch 1."""
    method = methods.find(name)
    with torch.device("meta"):
        model = methods.apply(method, bases.skeleton(base, torch.bfloat16))
    mode = FakeTensorMode()
    without_numbers(model, mode)
    with pretending(mode, supervised):
        return [saved_bytes(model, torch.zeros(1, length, dtype=torch.int64)) for length in lengths]


def row_of(
    base: str, name: str, lengths: tuple[int, ...], counts: list[int], supervised: float = 1.0
) -> dict[str, Any]:
    """One result row."""
    config: Any = bases.shape(base)
    slope = (counts[-1] - counts[0]) / (lengths[-1] - lengths[0])
    return {
        "base": base, "method": name, "options": methods.find(name).options(), "dtype": "bfloat16",
        "supervised": supervised,
        "hidden_size": config.hidden_size, "layers": config.num_hidden_layers, "vocabulary": config.vocab_size,
        "lengths": list(lengths), "saved_bytes": counts, "bytes_per_token": slope,
        "bytes_at_no_length": counts[0] - slope * lengths[0],
    }  # fmt: skip


def main(progress: Callable[..., Any] = tqdm) -> None:
    """Count, and append and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=bases.SHAPES, default=BASES, metavar="BASE", help="shapes")
    parser.add_argument("--method", nargs="+", choices=methods.METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--lengths", nargs=2, type=int, default=LENGTHS, metavar="TOKENS", help="two lengths")
    parser.add_argument("--supervised", type=step.share, default=1.0, help="share of tokens with a loss (1)")
    arguments = parser.parse_args()
    short, long = arguments.lengths
    if not 1 < short < long:
        parser.error(f"lengths are {short} and {long}; give two lengths of at least 2, the shorter first.")
    for base, name in progress([(base, name) for base in arguments.base for name in arguments.method]):
        supervised, lengths = arguments.supervised, (short, long)
        row = row_of(base, name, lengths, count(base, name, lengths, supervised), supervised) | rows.provenance()
        rows.append("saved_for_backward", row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
