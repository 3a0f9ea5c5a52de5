"""vLLM's own models, with what a side network reads of them: made by structure, from any that supports EAGLE-3.

    rows of forward:  [ f_N | h_0 | h_i of the tapped blocks i | adapter ]        logits:  head(mix(f_N, g(h)))

A draft model of the EAGLE-3 kind also reads states of the base, and vLLM's models hand them out for it: no forward is
copied, and no hook is set. Side networks run where logits are asked for, and nowhere else. Which adapter a row has
stands in the row, so that whoever asks for logits gets the right ones: samplers, prompt_logprobs, several at a time.

`SideTunedX` and `StatesX` for every X of vLLM's are attributes of this module, made when they are asked for.
"""

from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import EagleModelMixin, supports_eagle3, supports_multimodal

from qtuning_peft.side_tuning.network import UnsupportedBaseError

from . import SERVING, STATES
from .adapters import SideAdapters
from .states import StatesPooler


class Tapped:
    """Mixin: the model's forward returns the final norm's output and the tapped states, side by side."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size is above 1, but a side network reads all blocks; use tensors'.")
        if vllm_config.speculative_config is not None:
            raise ValueError("speculative_config is given, but draft models do not know side networks; leave it out.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        self.tapped: list[int] = [*config.qst_layers]
        self.width: int = config.get_text_config().hidden_size
        _keep_embeddings(self)
        # 0 are the embeddings, i + 1 is the output of block i.
        self.set_aux_hidden_state_layers((0, *(index + 1 for index in self.tapped)))  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The rows, (tokens, (2 + taps) d)."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(output, tuple) or len(output[1]) != 1 + len(self.tapped):
            raise UnsupportedBaseError(f"{type(self).__name__} does not hand out the states of blocks {self.tapped}.")
        return torch.cat([output[0], *output[1], *self.marks(output[0])], dim=-1)

    def marks(self, normed: Tensor) -> list[Tensor]:
        """What else is put into a row."""
        return []

    def parts(self, rows: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The final norm's output, (rows, d), and by index the blocks' outputs; -1 are the embeddings."""
        normed, *states = rows[:, : (2 + len(self.tapped)) * self.width].split(self.width, dim=-1)
        return normed, dict(zip([-1, *self.tapped], states, strict=True))

    def base_logits(self, normed: Tensor) -> Tensor:
        """The base's logits."""
        return super().compute_logits(normed)  # type: ignore[misc]


def _keep_embeddings(model: Any) -> None:
    """Hand out a copy where a model would hand out what its next block may write to: on GPUs, norms work in place."""
    holders = [module for module in model.modules() if isinstance(module, EagleModelMixin)]
    if len(holders) != 1:
        raise UnsupportedBaseError(f"{type(model).__name__} hands out states in a way of its own; use transformers.")
    add = holders[0]._maybe_add_hidden_state

    def add_copy(found: list[Tensor], index: int, states: Tensor, residual: Tensor | None) -> list[Tensor]:
        return add(found, index, states.clone() if residual is None else states, residual)

    holders[0]._maybe_add_hidden_state = add_copy


class SideTuned(Tapped):
    """Serves side networks: each row has its own, or none."""

    adapters: SideAdapters

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if vllm_config.lora_config is None:
            raise ValueError("enable_lora is not set, by which vLLM knows of adapters; set it.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def make_adapters(self, vllm_config: Any, device: torch.device) -> SideAdapters:
        """The manager of this model's adapters."""
        self.adapters = SideAdapters(self.tapped, vllm_config, device)
        return self.adapters

    def marks(self, normed: Tensor) -> list[Tensor]:
        """The adapter's id, as bits of the rows' dtype."""
        return [self.adapters.ids[: len(normed), None].view(normed.dtype)]

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Logits of some of the rows."""
        normed, states = self.parts(rows)
        ids = rows[:, (2 + len(self.tapped)) * self.width :].contiguous().view(torch.int32).squeeze(-1)
        mixed = normed.clone()
        for adapter in filter(None, ids.unique().tolist()):
            own = (ids == adapter).nonzero().squeeze(-1)
            mixed[own] = self.adapters.mix(adapter, normed[own], {index: s[own] for index, s in states.items()})
        return self.base_logits(mixed)


class States(Tapped):
    """Returns scores and states of the base, as a pooling model."""

    is_pooling_model = True
    default_seq_pooling_type = "LAST"
    default_tok_pooling_type = "ALL"
    score_type = "bi-encoder"
    attn_type = "decoder"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pooler = StatesPooler(self.parts, self.base_logits)


KINDS = {SERVING: SideTuned, STATES: States}


def refuse_unknown(name: str) -> type:
    """Class `name` of vLLM's; an `UnsupportedBaseError` when it does not hand out its states."""
    found = ModelRegistry.models.get(name)
    own = None if found is None else found.load_model_cls()
    if own is None or not supports_eagle3(own) or supports_multimodal(own):
        reason = (
            "vLLM has no model of this name" if own is None
            else "it is multimodal" if supports_multimodal(own)
            else "vLLM's model does not hand out the states of its blocks (the EAGLE-3 interface)"
        )  # fmt: skip
        raise UnsupportedBaseError(f"{name} cannot be followed in vLLM: {reason}; run it with transformers.")
    return own


def __getattr__(name: str) -> type:
    for prefix, kind in KINDS.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in ModelRegistry.models:
            globals()[name] = type(name, (kind, refuse_unknown(name.removeprefix(prefix))), {"__module__": __name__})
            return globals()[name]
    raise AttributeError(f"module {__name__} has no attribute {name}")
