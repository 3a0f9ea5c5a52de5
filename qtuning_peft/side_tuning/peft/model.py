"""Quantized Side Tuning as a PEFT tuner (Zhang et al., ACL 2024, arXiv 2401.07159).

    h = mix(f_N, g_N),   g_i = side block i of the frozen base's hidden states      (see `network` for the equations)

The tuner targets one module, the decoder's final norm; `SideTuningLayer` takes its place. Switching, disabling,
deleting and unloading adapters is PEFT's own machinery on that layer.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...head import is_causal, read_in_front
from ...loss import chunked_cross_entropy
from ...reading import reading_labels, reading_last
from ..follow import Decoder, find_decoder, follower_of, stored_cross_entropy
from ..network import SideNetwork
from .config import SideTuningConfig
from .dry_run import dry_run
from .files import check_adapter, own_tensors, without_adapter_name
from .layer import MERGE_REFUSAL, SideTuningLayer
from .peft_type import PREFIX
from .refusals import (
    PEFT_PREFIX,
    modules_outside,
    refuse_another_size,
    refuse_attention,
    refuse_mixed_batch,
    refuse_other_adapters,
    refuse_target_modules,
    refuse_untrainable_modules,
    warn_of_another_base,
)  # fmt: skip
from .untrusted import CONTAINER, cached_commit, check_file, tokenizer_fingerprint

# Arguments of a causal model that its decoder does not have, or that its loss has no use for.
NOT_THE_DECODERS = {"logits_to_keep", "return_dict", "use_cache"}


class SideTuningModel(BaseTuner):
    """A frozen base with a trained side network beside it.

    Made by `peft.get_peft_model(base, SideTuningConfig(...))` and by every loader of PEFT and transformers. The base
    may be of any precision or quantization that runs forward: nothing is ever back-propagated through it.

    Raises:
        ValueError: in one sentence, when the base or the configuration cannot work.
    """

    prefix: str = PREFIX
    tuner_layer_cls = SideTuningLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (PEFT declares it as an instance variable)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        # transformers' `Trainer` asks a quantizer whether it can train, and means back-propagation through its layers.
        # It does not ask of a model that says so; here nothing is trained in the base, whatever its quantizer.
        return bool(self.peft_config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, or leave the model as it was."""
        # What is filled in below belongs to this base; the caller's own may serve another.
        self.peft_config[adapter_name] = copy(self.peft_config[adapter_name])
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # Beside other adapters, transformers' way of adding one has registered it already and would keep it.
            self.peft_config.pop(adapter_name, None)
            raise

    def forward(self, *args: Any, chunked_loss: bool = False, **kwargs: Any) -> Any:
        """The model's own forward; with `chunked_loss` and `labels` their loss (see `loss`), without logits.

        Logits are computed nevertheless where the model reads more than its decoder does, such as pictures.

        With stored `states` (N + 2, tokens, d) of the base and their `labels` (1 + tokens,), the loss of these tokens.
        """
        given = {name: value for name, value in kwargs.items() if value is not None}
        _warn_of_input_gradient(given)
        if "states" in given:
            items, layers = given.get("num_items_in_batch"), given.get("state_layers")
            loss = stored_cross_entropy(self.model, given["states"], given["labels"], items, layers)
            return CausalLMOutputWithPast(loss=loss)
        inputs = {name: value for name, value in given.items() if name not in NOT_THE_DECODERS}
        chunked_loss &= {"input_ids", "labels"} <= given.keys() and is_causal(self.model)
        if not chunked_loss or read_in_front(self.model) & inputs.keys() - {"labels"}:
            with self._reading(given):
                return super().forward(*args, **kwargs)
        num_items = inputs.pop("num_items_in_batch", None)
        return CausalLMOutputWithPast(loss=chunked_cross_entropy(self.model, num_items=num_items, **inputs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        _warn_of_input_gradient(kwargs)
        names, follower = kwargs.get("adapter_names"), follower_of(self.model)
        if names is None or follower is None:
            yield
            return
        refuse_mixed_batch(names, self.peft_config, self.training)
        names = _of_sequences(names, kwargs)

        def with_names(head: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, given | {"adapter_names": names}

        # Heads that were trained beside a side network: PEFT's own.
        heads = [module for module in self.model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [head.register_forward_pre_hook(with_names, with_kwargs=True) for head in heads]
        try:
            with follower.mixing(names):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if not autocast_adapter_dtype:
            warnings.warn(
                "autocast_adapter_dtype is False, but a side network's weights are float32 beside any base; to compute "
                "in another dtype, set compute_dtype.",
                stacklevel=2,
            )
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _reading(self, given: dict[str, Any]) -> AbstractContextManager[None]:
        # Decoders taken out of an encoder-decoder do not shift their labels.
        if hasattr(self.model.config, "decoder_layers"):
            return nullcontext()
        of_rows = type(self.model).__name__.endswith("ForSequenceClassification")
        if of_rows and given.get("input_ids") is not None:
            return reading_last(given["input_ids"], self.model.config.get_text_config().pad_token_id)
        # Evaluation returns logits of all positions.
        return reading_labels(given.get("labels")) if self.training and is_causal(self.model) else nullcontext()

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SideTuningConfig)
        refuse_other_adapters(self.model, SideTuningLayer)
        decoder = find_decoder(self.model)
        shape = decoder.shape
        refuse_another_size(peft_config, decoder)
        peft_config.base_hidden_size, peft_config.base_num_layers = shape.hidden_size, shape.num_layers
        refuse_target_modules(peft_config, decoder)
        refuse_attention(peft_config, decoder)
        refuse_untrainable_modules(peft_config, self.model, decoder)
        # Recorded, so that an adapter stays what it is should the default ever change: no tensor's shape depends on it.
        peft_config.num_side_heads = peft_config.heads(shape)
        peft_config.target_modules = [decoder.norm_path]
        dry_run(self.model, peft_config)
        base = getattr(self.model, "name_or_path", None)
        commit = cached_commit(base)
        vocabulary = tokenizer_fingerprint(base, commit)
        if peft_config.origin is None:
            peft_config.revision = peft_config.revision or commit
            peft_config.tokenizer_fingerprint = peft_config.tokenizer_fingerprint or vocabulary
        else:
            check_file(peft_config.origin.weights(), dict(self._tensors_in_a_file(peft_config, decoder)))
            warn_of_another_base(peft_config, self.model, vocabulary)
        return peft_config

    def _tensors_in_a_file(self, config: SideTuningConfig, decoder: Decoder) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and shapes of what an adapter of this configuration holds on disk."""
        with torch.device("meta"):
            network = SideNetwork(config, decoder.shape)
        for key, tensor in network.state_dict().items():
            yield f"{PEFT_PREFIX}{decoder.norm_path}.{CONTAINER}.{key}", tensor
        for path, module in modules_outside(self.model, decoder):
            if f"{PEFT_PREFIX}{path}".endswith(tuple(config.modules_to_save or ())):
                for key, tensor in module.state_dict().items():
                    yield f"{PEFT_PREFIX}{path}.{key}", tensor

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        # Exactly the one module: PEFT's suffix matching would find other norms for a base whose decoder is the root.
        assert isinstance(peft_config, SideTuningConfig)
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert isinstance(peft_config, SideTuningConfig)
        if isinstance(target, SideTuningLayer):
            target.update_layer(adapter_name, peft_config)
        else:
            decoder = find_decoder(self.model)
            layer = SideTuningLayer(target, decoder)
            layer.update_layer(adapter_name, peft_config)
            layer.set_adapter(self.active_adapters)
            layer.attach_to_base(decoder)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also moves weights, which a norm need not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSAL)

    def unload(self) -> nn.Module:
        """Remove the side networks and their hooks; returns the base, as it was."""
        layers = [module for module in self.model.modules() if isinstance(module, SideTuningLayer)]
        base = super().unload()
        for layer in layers:
            layer.detach_from_base()
        return base

    # The rest is for adapter files from PEFT 0.21 on.
    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{CONTAINER}." in f".{key}":
            return without_adapter_name(key, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        assert isinstance(config, SideTuningConfig)
        # Not by PEFT's own, which takes the state of the whole model: see `own_tensors`.
        layer_path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, SideTuningLayer))
        prefix = f"{layer_path}.{CONTAINER}.{adapter_name}."
        saved = f"{layer_path.removeprefix(PEFT_PREFIX)}.{CONTAINER}."
        bare = {key: key.removeprefix(PEFT_PREFIX) for key in state_dict}
        remapped = {
            prefix + bare[key].removeprefix(saved) if bare[key].startswith(saved) else key: tensor
            for key, tensor in state_dict.items()
        }
        heads = f".modules_to_save.{adapter_name}."
        given = {key.removeprefix(prefix): tensor for key, tensor in remapped.items() if heads not in key}
        try:
            check_adapter(layer.qst_side_network[adapter_name].state_dict(), given)
            own = own_tensors(model)
            check_adapter({k: own[k] for k in own if heads in k}, {k: t for k, t in remapped.items() if heads in k})
        except ValueError:
            if config.origin is not None:
                # PEFT has just added it; without its weights it would be a random network under a trusted name.
                layer.delete_adapter(adapter_name)
                model.peft_config.pop(adapter_name, None)
            raise
        config.origin = None
        return remapped


def _of_sequences(names: Sequence[str], kwargs: dict[str, Any]) -> list[str]:
    """A name for each sequence that `generate` makes of the rows, as it repeats them for beams and samples."""
    settings = kwargs.get("generation_config")
    asked = (kwargs, {} if settings is None else vars(settings))
    counts = [given.get(name) or 1 for given in asked for name in ("num_beams", "num_return_sequences")]
    return [name for name in names for _ in range(max(counts))]


def _warn_of_input_gradient(given: dict[str, Any]) -> None:
    if torch.is_grad_enabled() and getattr(given.get("inputs_embeds"), "requires_grad", False):
        warnings.warn("inputs_embeds requires a gradient, and none reaches it through the base.", stacklevel=3)
