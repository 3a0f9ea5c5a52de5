"""`transformers.Trainer` for side-tuned models: chunked cross-entropy, prefix caching and the hidden-state cache.

TRL and Axolotl bring a chunked loss of their own; the trainer is for those who use `Trainer` itself, the callbacks are
for any of them.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from .eu_plane.fingerprint import weights_of
from .head import causal_model
from .side_tuning.follow import follower_of
from .states import FolderStore, Store, cache_states, common_prefix, reuse_of
from .stored import StoredRows, holds_states

ROWS = 256


class PrefixCachingCallback(TrainerCallback):
    """Computes the prompt prefix that all rows share once: a system prompt, or few-shot examples.

    The prefix is found in the first 256 rows; a batch that begins otherwise, is packed, or padded at the left is
    computed whole. Results are the same up to rounding. It has no effect where side blocks attend (`side_attention`),
    where blocks of the base do not (hybrid and state-space models), or where there is no side network.
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Find the prefix in the training data."""
        reuse = reuse_of(kwargs["model"])
        data: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        # A stream's rows could not be given back.
        if reuse is not None and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            rows = [data[index] for index in range(min(ROWS, len(data)))]
            reuse.cache_prefix(common_prefix(rows))
            tokens = [list(row["input_ids"]) for row in rows if isinstance(row, Mapping) and "input_ids" in row]
            if len(tokens) > 1 and all(row == tokens[0] for row in tokens):
                warnings.warn(
                    f"The first {len(tokens)} rows are the same {len(tokens[0])} tokens, as if few-shot examples fill "
                    "max_length; use fewer examples, or raise it.",
                    stacklevel=2,
                )

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Free its keys and values."""
        reuse = reuse_of(kwargs["model"])
        if reuse is not None:
            reuse.cache_prefix([])


def store_in(folder: str | Path, model: nn.Module) -> Store | int:
    """The store of `folder` for the active side network of `model`, to be read and written; 0 where there is none.

    Raises:
        ValueError: when `folder` has stored states of another base or of other blocks.
    """
    folder, follower = Path(folder), follower_of(model)
    network = None if follower is None else follower.host.active_network()
    if follower is None or network is None:
        return 0
    if holds_states(folder):
        return StoredRows(folder, causal_model(model), network.layers)
    # Not those of a head, which a classifier starts anew.
    own = "-".join([weights_of(follower.decoder), *map(str, sorted(network.layers))])
    parts, width = len(network.layers) + 2, network.mix.up_proj.out_features
    return FolderStore(folder / xxhash.xxh3_64_hexdigest(own.encode()), parts, width)


class HiddenStateCacheCallback(TrainerCallback):
    """Caches the base's hidden states, so that epochs after the first cost the side network alone.

    They are cached in 16 bits, also of a base in float32: there, later epochs see states that are rounded. Packed rows,
    rows padded at the left, and side blocks that attend (`side_attention`) are computed in every epoch.

    Args:
        gibibytes: Of main memory at most. A row of n supervised tokens takes n (N + 2) d numbers of 16 bits, N taps of
            width d: 0.1 MB a token for the default beside Llama-3-8B.
        folder: Instead, a folder on disk. One of `qtuning states` is read; its rows must be tokenized as the trainer
            does. In any other they are written in the first epoch, for this run and all that follow with the same base
            and taps.
    """

    def __init__(self, gibibytes: float | None = None, folder: str | Path | None = None) -> None:
        if (gibibytes is None) == (folder is None):
            raise ValueError(f"gibibytes is {gibibytes} and folder {folder}; give one of them.")
        if gibibytes is not None and not gibibytes > 0:
            raise ValueError(f"gibibytes is {gibibytes}; give a number above 0.")
        self.gibibytes, self.folder = gibibytes, None if folder is None else Path(folder)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin to cache; in memory, if there is more than one epoch."""
        model = kwargs["model"]
        if self.folder is not None:
            cache_states(model, store_in(self.folder, model))
        elif state.num_train_epochs > 1:
            cache_states(model, round((self.gibibytes or 0) * 2**30))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Free what is in memory."""
        cache_states(kwargs["model"], 0)


class SideTuningTrainer(Trainer):
    """A `Trainer` for side-tuned causal language models that never holds the logits of a batch.

    Arguments are those of `transformers.Trainer`, and so are its results up to rounding. While training, the model's
    output has a loss and no logits. A prompt prefix that all rows share is computed once, see `PrefixCachingCallback`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(PrefixCachingCallback())

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `Trainer` does, with the chunked loss while training."""
        if model.training:
            inputs = {**inputs, "chunked_loss": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As `Trainer` does, with the chunked loss where nothing but the loss is asked for."""
        if prediction_loss_only:
            inputs = {**inputs, "chunked_loss": True}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
