"""Quantized Side Tuning as a PEFT tuner (Zhang et al., ACL 2024, arXiv 2401.07159).

    h = mix(f_N, g_N),   g_i = side block i of the frozen base's hidden states      (see `config` for the equations)

The tuner targets one module, the decoder's final norm; `SideTuningLayer` takes its place. Switching, disabling,
deleting and unloading adapters is PEFT's own machinery on that layer.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from .._register import PREFIX
from .adapter_files import CONTAINER, check_adapter, without_adapter_name
from .config import SideTuningConfig
from .decoder import DecoderSpec, find_decoder
from .layer import MERGE_REFUSAL, SideTuningLayer
from .network import side_heads, side_width


class SideTuningModel(BaseTuner):
    """A frozen base with a trained side network beside it.

    Made by `peft.get_peft_model(base, SideTuningConfig(...))` and by every loader of PEFT and transformers. The base
    may be of any precision or quantization that runs forward: nothing is ever back-propagated through it.

    Args:
        model (`torch.nn.Module`): The base, a transformers model around a causal decoder.
        config ([`SideTuningConfig`]): The configuration.
        adapter_name (`str`): Name of the adapter.
        low_cpu_mem_usage (`bool`): Create the weights on the meta device, to be loaded afterwards.

    Raises:
        ValueError: in one sentence, when the base or the configuration cannot work.
    """

    prefix: str = PREFIX
    tuner_layer_cls = SideTuningLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (PEFT declares it as an instance variable)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, SideTuningConfig)
        self._refuse_other_adapters()
        spec = find_decoder(self.model)
        for name, actual in (("base_hidden_size", spec.hidden_size), ("base_num_layers", len(spec.blocks))):
            recorded = getattr(peft_config, name)
            if recorded not in (None, actual):
                raise ValueError(
                    f"{name} of the adapter is {recorded}, but this base has {actual}; load the base it was trained on"
                    f"{f', {peft_config.base_model_name_or_path}' if peft_config.base_model_name_or_path else ''}."
                )
            setattr(peft_config, name, actual)
        self._refuse_trainable_modules_in_base(peft_config, spec)
        # Recorded, so that an adapter stays what it is should the default ever change: no tensor's shape depends on it.
        peft_config.num_side_heads = side_heads(peft_config, spec, side_width(peft_config, spec))
        peft_config.target_modules = [spec.norm_path]
        return peft_config

    def _refuse_other_adapters(self) -> None:
        others = {type(m).__name__ for m in self.model.modules() if isinstance(m, BaseTunerLayer)} - {
            SideTuningLayer.__name__
        }
        if others:
            raise ValueError(
                f"The base already carries another adapter ({', '.join(sorted(others))}), which no gradient would "
                "reach; call merge_and_unload() or unload() first."
            )

    def _refuse_trainable_modules_in_base(self, config: SideTuningConfig, spec: DecoderSpec) -> None:
        names = set(config.modules_to_save or ())
        inside = sorted(names & {path.rpartition(".")[2] for path, _ in spec.decoder.named_modules() if path})
        if inside:
            raise ValueError(
                f"modules_to_save names {', '.join(inside)}, part of the base, which no gradient reaches; only modules "
                "behind the final norm, such as a classification head, can be trained beside the side network."
            )

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool:
        # Exactly the one module: PEFT's suffix matching would find other norms for a base whose decoder is the root.
        assert isinstance(peft_config, SideTuningConfig)
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, SideTuningConfig)
        spec = find_decoder(self.model)
        if isinstance(target, SideTuningLayer):
            target.update_layer(adapter_name, peft_config, spec)
            return
        layer = SideTuningLayer(target, spec)
        layer.update_layer(adapter_name, peft_config, spec)
        layer.set_adapter(self.active_adapters)
        layer.attach_to_base(spec)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own also moves weights, which a norm need not have.
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSAL)

    def unload(self) -> nn.Module:
        """Remove the side networks and their hooks.

        Returns:
            The base, as it was.
        """
        layers = [module for module in self.model.modules() if isinstance(module, SideTuningLayer)]
        base = super().unload()
        for layer in layers:
            layer.detach_from_base()
        return base

    # -- adapter files, PEFT from 0.21 ---------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if f".{CONTAINER}." in f".{key}":
            return without_adapter_name(key, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        layer_path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, SideTuningLayer))
        prefix = f"{layer_path}.{CONTAINER}.{adapter_name}."
        own_keys = model.state_dict().keys()
        # What belongs to no module at all counts as the adapter's: it is either damaged or of another method.
        given = {
            key.removeprefix(prefix): t for key, t in remapped.items() if key.startswith(prefix) or key not in own_keys
        }
        try:
            check_adapter(layer.qst_side_network[adapter_name].state_dict(), given)
        except ValueError:
            # PEFT has added it already; without its weights it would be a random network under a trusted name.
            layer.delete_adapter(adapter_name)
            model.peft_config.pop(adapter_name, None)
            raise
        return remapped
