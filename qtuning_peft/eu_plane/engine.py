"""Engines: tokens in, scores and hidden states out, in one pass of a model over them.

transformers is the default. Whatever else runs the same weights may take its place: the tokens, and what is made of the
scores and states, stay the same.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import xxhash
from peft import PeftModel
from torch import Tensor, nn

from ..head import causal_model
from ..sharding import is_sharded
from ..side_tuning.follow import find_decoder
from ..side_tuning.network import BaseShape
from .batching import PLANE, run
from .fingerprint import add_model, weights_of
from .scores import SCORES
from .tokenized import Sample


class Engine(ABC):
    """Runs a causal language model over samples.

    Attributes:
        name: The model's name or folder.
        config: Its configuration.
        vocabulary: Number of tokens that it has embeddings for.
        together: Whether the processes of the process group have to run every pass together.
    """

    name: str
    config: Any
    vocabulary: int
    together: bool = False

    @property
    def scores(self) -> Collection[str]:
        """Names of the scores of tokens that it can compute: by default all that are registered."""
        return [name for name, score in SCORES.items() if score.per_token]

    @abstractmethod
    def run(
        self, samples: Sequence[Sample], tokens_per_batch: int, names: Sequence[str] = PLANE,
        on_progress: Callable[[int], object] | None = None, take: Callable[[int, Tensor], object] | None = None,
        layers: Collection[int] = (),
    ) -> dict[str, list[np.ndarray]]:  # fmt: skip
        """Scores `names` of the supervised tokens of `samples`: for each sample (supervised tokens,), float64.

        Args:
            samples: In any order, and of any lengths.
            tokens_per_batch: Tokens in a pass at most, padding included, or one sample.
            names: Scores of tokens.
            on_progress: Called with the number of samples that have been run since the last call.
            take: Gets, by the index of a sample, the base's states (N + 2, supervised tokens, d) that predict its
                tokens: the embeddings, the outputs of the N blocks `layers`, and the final norm's.
            layers: Indices of blocks.
        """

    @abstractmethod
    def shape(self) -> BaseShape:
        """The base as a side network sees it; a `ValueError` when none can follow it."""

    @abstractmethod
    def head(self) -> dict[str, Tensor]:
        """The weights of the base's head, on the CPU, by their names in its module; a `ValueError` under an adapter."""

    def weights(self) -> str:
        """Fingerprint of the base's weights (`fingerprint.weights_of`); empty where the engine does not show them."""
        return ""

    @abstractmethod
    def add_to(self, digest: xxhash.xxh3_128) -> None:
        """Add to `digest` everything that what this engine computes depends on."""


class TransformersEngine(Engine):
    """A model of transformers, quantized or not, or a PEFT model around one, in this process."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, causal_model(model)
        self.name, self.config = self.base.name_or_path, self.base.config
        self.vocabulary = self.base.get_input_embeddings().weight.shape[0]
        self.together = is_sharded(model) or (getattr(self.base, "tp_size", None) or 1) > 1

    def run(self, *args: Any, **kwargs: Any) -> dict[str, list[np.ndarray]]:
        """See [`Engine`]."""
        return run(self.model, *args, **kwargs)

    def shape(self) -> BaseShape:
        """See [`Engine`]."""
        return find_decoder(self.base).shape

    def head(self) -> dict[str, Tensor]:
        """See [`Engine`]."""
        if isinstance(self.model, PeftModel):
            raise ValueError("model carries an adapter, but stored states are the base's; pass the base alone.")
        return {
            name: tensor.cpu().contiguous() for name, tensor in self.base.get_output_embeddings().state_dict().items()
        }

    def weights(self) -> str:
        """See [`Engine`]."""
        return weights_of(self.base)

    def add_to(self, digest: xxhash.xxh3_128) -> None:
        """See [`Engine`]."""
        add_model(digest, self.model)


def engine_of(model: nn.Module | Engine) -> Engine:
    """`model`, or the engine that runs it."""
    return model if isinstance(model, Engine) else TransformersEngine(model)
