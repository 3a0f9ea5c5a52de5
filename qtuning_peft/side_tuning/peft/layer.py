"""The layer that takes the place of the decoder's final norm: PEFT's protocol, and the base's eval mode.

Its output is the norm's, mixed with that of the active side network, which listens to the decoder's pass (see
`follow`). No tensor of the base is ever part of the graph, whatever trainers do to the inputs:
`enable_input_require_grads`, `prepare_model_for_kbit_training` and checkpointing of the base have no effect.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...reading import read_positions
from ..follow import BASE, Decoder, Follower, Listener, MixedRows, SideRun, at_read_positions
from ..network import SideNetwork
from .config import SideTuningConfig
from .files import check_tensors

MERGE_REFUSAL = (
    "A side network is not a weight delta and cannot be merged into the base; keep the adapter beside it, or call "
    "unload() to get the base back."
)


class SideTuningLayer(nn.Module, BaseTunerLayer):
    """The decoder's final norm, and one side network per adapter."""

    adapter_layer_names = ("qst_side_network",)
    other_param_names = ()

    base_layer: nn.Module
    qst_side_network: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, decoder: Decoder) -> None:
        super().__init__()
        self.base_layer, self.shape = base_layer, decoder.shape
        self.qst_side_network = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        # In a list, so that the block does not become a part of this layer.
        self._last_block = [decoder.blocks[-1]]
        self.follower: Follower | None = None

    def update_layer(self, adapter_name: str, config: SideTuningConfig) -> None:
        """Make a side network named `adapter_name`; a `ValueError` when `config` does not fit the base."""
        network = SideNetwork(config, self.shape)
        network.train(self.training)
        self.qst_side_network[adapter_name] = network
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The final norm of `hidden_states` (batch, length, d), mixed with the side network's output."""
        normed: Tensor = self.base_layer(hidden_states, *args, **kwargs)
        return normed if self.follower is None else self.follower.after_norm(normed)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is nothing in the base that a side network could be added to."""
        raise NotImplementedError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse, as `merge` does."""
        raise NotImplementedError(MERGE_REFUSAL)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the side network is not a weight delta."""
        return False

    def attach_to_base(self, decoder: Decoder) -> None:
        """Follow every pass of the decoder from now on."""
        self.follower = Follower(self, decoder.module, decoder.blocks, decoder.stream)

    def detach_from_base(self) -> None:
        """Leave the base as it was."""
        if self.follower is not None:
            self.follower.detach()
            self.follower = None

    def active_network(self) -> SideNetwork | None:
        """The side network that runs beside the base now, if any; a `ValueError` when several are active."""
        names = self._active_names()
        if len(names) > 1:
            raise ValueError(f"Adapters {', '.join(names)} are active together; side networks run one at a time.")
        return self._network(names[0]) if names else None

    def _network(self, name: str) -> SideNetwork:
        network = self.qst_side_network[name]
        assert isinstance(network, SideNetwork)
        return network

    def make_listener(self) -> Listener | None:
        """The active side network, to listen to the next pass of the base: where it is read, if it does not attend."""
        names = None if self.follower is None else self.follower.current.adapter_names
        if names is not None and not self.disable_adapters:
            return MixedRows(names, {name: self.listener_of(name) for name in {*names} - {BASE}})
        network = self.active_network()
        if network is None:
            return None
        run = SideRun(network, self._active_names()[0])
        return run if network.attends else at_read_positions(run, read_positions())

    def listener_of(self, name: str) -> Listener:
        """The side network `name`, active or not, to listen to a pass of the base."""
        return SideRun(self._network(name), name)

    def _active_names(self) -> list[str]:
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.qst_side_network]

    def prepare_base(self, decoder: nn.Module) -> None:
        """Undo `model.train()` for the base: dropout there would only make the side network's inputs noisy."""
        if not decoder.training:
            return
        side_parameters = {id(parameter) for parameter in self.qst_side_network.parameters()}
        # FSDP's views of a unit that holds side parameters too require a gradient, and are no leaves.
        own_gradient = ((name, p) for name, p in decoder.named_parameters() if p.requires_grad and p.is_leaf)
        stray = [name for name, p in own_gradient if id(p) not in side_parameters]
        if stray and torch.is_grad_enabled():
            raise ValueError(
                f"{len(stray)} parameters of the base, {stray[0]} first, are set to require a gradient, and none "
                "reaches the base of a side network; freeze them, or unload() it before adding another adapter."
            )
        for module in decoder.modules():
            if (alpha := getattr(module, "neftune_noise_alpha", None)) is not None:
                raise ValueError(
                    f"neftune_noise_alpha is {alpha}, but the base of a side network runs without noise; leave it out."
                )
        # Not by `eval()`, which would take the side networks along, that another thread may be training.
        own = {id(self), *map(id, self.qst_side_network.modules())}
        for module in reversed([module for module in decoder.modules() if id(module) not in own]):
            module.training = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, before any tensor of this layer is copied, on every way of loading.
        check_tensors(self.qst_side_network, state_dict, f"{prefix}qst_side_network.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the side network to the base's device; its dtype stays float32 on a 16-bit base."""
        if adapter_name in self.qst_side_network:
            network = self.qst_side_network[adapter_name]
            target = device or self._base_device()
            devices = {parameter.device for parameter in network.parameters()}
            if torch.device("meta") not in {*devices, target} and devices != {target}:
                network.to(target)

    def _base_device(self) -> torch.device:
        # A norm need not have weights.
        parameters = [*self.base_layer.parameters(), *self._last_block[0].parameters()]
        return parameters[0].device
