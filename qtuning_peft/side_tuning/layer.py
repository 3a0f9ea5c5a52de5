"""The side network's seat in the base: the layer that takes the place of the decoder's final norm.

While the base runs, in eval mode and without autograd, every block's output is handed to the side network; the final
norm's output is mixed with what comes out of it. No tensor of the base is ever part of the graph (QST, ACL 2024,
section 3: "gradients only flow in the side network"), whatever trainers do to the inputs: `enable_input_require_grads`,
`prepare_model_for_kbit_training` and checkpointing of the base come to nothing, because nothing is recorded there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapter_files import check_tensors
from .base_states import BaseStates
from .cache import attach_side_layers, require_same_length
from .config import SideTuningConfig
from .decoder import DecoderSpec
from .forward_pass import BlockHook, CurrentPass, DecoderForward, ForwardPass, bind, cache_in, inputs_of
from .kept_states import KeptStates
from .network import SideNetwork
from .shared_prefix import SharedPrefix, depends_on_length
from .tap_storage import RunBase, TapReader

MERGE_REFUSAL = (
    "A side network is not a weight delta and cannot be merged into the base; keep the adapter beside it, or call "
    "unload() to get the base back."
)


class SideTuningLayer(nn.Module, BaseTunerLayer):
    """The decoder's final norm, and one side network per adapter.

    Args:
        base_layer: The final norm.
        spec: The decoder it belongs to.
    """

    adapter_layer_names = ("qst_side_network",)
    other_param_names = ()

    base_layer: nn.Module
    qst_side_network: nn.ModuleDict

    def __init__(self, base_layer: nn.Module, spec: DecoderSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.qst_side_network = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._current = CurrentPass()
        # In a list, so that the block does not become a part of this layer.
        self._last_block = [spec.blocks[-1]]
        self._num_base_layers = len(spec.blocks)
        self._handles: list[RemovableHandle] = []
        self._decoder_forward: DecoderForward | None = None
        self.waiting_states: list[BaseStates] = []
        self.shared_prefix: SharedPrefix | None = None
        self.kept_states: KeptStates | None = None

    def update_layer(self, adapter_name: str, config: SideTuningConfig, spec: DecoderSpec) -> None:
        """Add a side network named `adapter_name`.

        Raises:
            ValueError: when `config` does not fit the base.
        """
        network = SideNetwork(config, spec)
        network.train(self.training)
        self.qst_side_network[adapter_name] = network
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The final norm of `hidden_states` (batch, length, d), mixed with the side network's output.

        Raises:
            RuntimeError: when not every tapped block has run.
        """
        base: Tensor = self.base_layer(hidden_states, *args, **kwargs)
        current = self._current.value
        if current is not None and current.recording is not None:
            current.recording.normed = base
            return base
        if current is None or current.network is None or current.side is None:
            return base
        if current.steps != len(current.network.layers):
            raise RuntimeError(
                f"{current.steps} of {len(current.network.layers)} tapped blocks ran before the final norm; side "
                "tuning needs every block to run in every pass, without layer dropping or early exit."
            )
        # Left on: what the decoder does behind its norm (a view, a projection) is on the way to the loss.
        torch.set_grad_enabled(current.outer_grad)
        current.finished = True
        return current.network.finish(base, current.side, current.taps)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: there is nothing in the base that a side network could be added to."""
        raise NotImplementedError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Refuse, as `merge` does."""
        raise NotImplementedError(MERGE_REFUSAL)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """No: the side network is not a weight delta."""
        return False

    # -- following the base ------------------------------------------------------------------------------------------

    def attach_to_base(self, spec: DecoderSpec) -> None:
        """Follow every pass of the decoder from now on."""
        self._decoder_forward = DecoderForward(self, spec.decoder)
        spec.decoder.forward = self._decoder_forward
        self._handles = [
            spec.decoder.register_forward_pre_hook(_refuse_replica),
            spec.blocks[0].register_forward_pre_hook(self._enter_first_block, with_kwargs=True),
        ]
        for index, block in enumerate(spec.blocks):
            self._handles.append(block.register_forward_hook(BlockHook(self, index), with_kwargs=True))

    def detach_from_base(self) -> None:
        """Leave the base as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._decoder_forward is not None:
            self._decoder_forward.restore()
            self._decoder_forward = None

    @contextmanager
    def following(self, decoder: nn.Module, run_base: RunBase | None = None) -> Iterator[None]:
        """Run the decoder's forward in this context: no autograd, eval mode, the side network beside it.

        Args:
            decoder: The decoder.
            run_base: Runs it again over the same input, for taps that are not held.

        Raises:
            RuntimeError: when the decoder ends without its final norm.
            ValueError: when several adapters are active, or something else in the base wants a gradient.
        """
        if self._decoder_forward is None:
            yield
            return
        current = ForwardPass(
            torch.is_grad_enabled(), self.active_network(), recording=self._current.recording, run_base=run_base
        )
        self._keep_base_in_eval_mode(decoder)
        self._current.value = current
        torch.set_grad_enabled(False)
        try:
            yield
            if current.side is not None and not current.finished:
                raise RuntimeError(
                    f"{type(decoder).__name__} ended without the norm that the side network is attached to; "
                    "side tuning does not support this architecture yet."
                )
        finally:
            torch.set_grad_enabled(current.outer_grad)
            self._current.value = None

    def _enter_first_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current = self._current.value
        if current is None or current.network is None:
            return
        arguments = bind(block, args, kwargs)
        cache = cache_in(arguments)
        if cache is not None and current.network.attends:
            layers = current.network.layers
            current.first_side_layer = attach_side_layers(
                cache, self._num_base_layers, layers, adapter=self.active_adapters[0]
            )
            require_same_length(cache, current.first_side_layer, layers)
        embeddings = next(iter(arguments.values())).detach()  # (batch, length, d)
        if current.recording is not None:
            current.recording.embeddings = embeddings
            return
        if embeddings.dim() != 3:
            raise NotImplementedError(
                f"The base's blocks work on {embeddings.dim()}-dimensional states instead of (batch, length, width); "
                "side tuning does not support this architecture yet."
            )
        with torch.set_grad_enabled(current.outer_grad):
            current.taps = current.network.make_tap_storage(current.run_base)
            current.side = current.network.start(embeddings, current.taps)

    def after_block(self, index: int, block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Advance the side network by the output of base block `index`, if that is tapped."""
        current = self._current.value
        if current is None or current.network is None or index not in current.network.layers:
            return
        hidden_states = (output[0] if isinstance(output, tuple) else output).detach()  # (batch, length, d)
        if current.recording is not None:
            current.recording.add_block(block, bind(block, args, kwargs), hidden_states)
            return
        assert current.side is not None
        inputs = current.block_inputs(block, bind(block, args, kwargs))
        with torch.set_grad_enabled(current.outer_grad):
            current.side = current.network.step(current.steps, hidden_states, current.side, inputs, current.taps)
        current.steps += 1

    # -- the base's states, kept ---------------------------------------------------------------------------------------

    @property
    def decoder(self) -> nn.Module:
        """The decoder this layer follows."""
        assert self._decoder_forward is not None
        return self._decoder_forward.decoder

    @contextmanager
    def recording(self, states: BaseStates | TapReader) -> Iterator[None]:
        """Keep the base's states in `states`, and let the side network rest, in passes of this context."""
        self._current.recording = states
        try:
            yield
        finally:
            self._current.recording = None

    def take_waiting(self, input_ids: Any, arguments: dict[str, Any]) -> BaseStates | None:
        """The kept states for `input_ids` (batch, length) and the decoder's other arguments, if some wait."""
        for index, states in enumerate(self.waiting_states):
            if states.are_for(input_ids, arguments):
                del self.waiting_states[: index + 1]
                return states
        return None

    def share_prefix(self, input_ids: Sequence[int]) -> None:
        """Compute the tokens `input_ids` once for all rows that begin with them; none for an empty list."""
        self.shared_prefix = SharedPrefix(input_ids) if len(input_ids) else None
        if self.kept_states is not None:  # of rows behind another prefix
            self.keep_states(self.kept_states.budget)

    def keep_states(self, budget: int) -> None:
        """Keep the base's states of rows that the active adapter trains on, `budget` bytes of them; none for zero."""
        network = self.active_network()
        self.kept_states = KeptStates(budget, network.layers) if budget and network is not None else None

    def kept_for(self, args: tuple[Any, ...], arguments: dict[str, Any]) -> KeptStates | None:
        """Where states for a pass of training are kept, if a decoder's `args` and `arguments` allow it."""
        kept = self.kept_states
        if kept is None or len(args) > 1 or kept.layers != self._layers_with_reuse():
            return None
        return kept if kept.serve(inputs_of(args, arguments)) else None

    def prefix_of(self, input_ids: Any, arguments: dict[str, Any]) -> SharedPrefix | None:
        """The shared prefix, if a pass over `input_ids` (batch, length) and `arguments` can leave it out."""
        prefix, unread = self.shared_prefix, self._current.unread
        if prefix is None or unread is None or self._layers_with_reuse() is None:
            return None
        # The last of the prefix must not be what predicts a supervised token.
        if unread() <= len(prefix.input_ids):
            return None
        return prefix if prefix.begins(input_ids, arguments) else None

    def _layers_with_reuse(self) -> list[int] | None:
        """The tapped blocks of the active network, if what the base computed before can serve in this pass."""
        # In training alone: evaluation may read any position, and sees each row once.
        if not self.training or not torch.is_grad_enabled() or self._current.recording is not None:
            return None
        network = self.active_network()
        if network is None or network.attends or depends_on_length(getattr(self.decoder, "config", None)):
            return None
        return network.layers

    @contextmanager
    def reading_from(self, column: Callable[[], int]) -> Iterator[None]:
        """Say that in passes of this context no hidden state before `column()` - 1 is read."""
        before, self._current.unread = self._current.unread, column
        try:
            yield
        finally:
            self._current.unread = before

    def replay(self, states: BaseStates, run_base: RunBase | None) -> Any:
        """What the decoder returns for kept states: the side network runs, the base does not; `run_base` as above."""
        assert states.embeddings is not None
        assert states.normed is not None
        current = ForwardPass(torch.is_grad_enabled(), self.active_network())
        network = current.network
        if network is None:
            return states.output_with(states.normed)
        current.taps = network.make_tap_storage(run_base)
        current.side = network.start(states.embeddings, current.taps)
        for step, (block, arguments, hidden_states) in enumerate(states.blocks):
            inputs = current.block_inputs(block, arguments)
            current.side = network.step(step, hidden_states, current.side, inputs, current.taps)
            current.steps += 1
        return states.output_with(network.finish(states.normed, current.side, current.taps))

    def active_network(self) -> SideNetwork | None:
        """The side network that runs beside the base now, if any."""
        names = [name for name in self.active_adapters if name in self.qst_side_network]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(f"Adapters {', '.join(names)} are active together; side networks run one at a time.")
        network = self.qst_side_network[names[0]]
        assert isinstance(network, SideNetwork)
        return network

    def _keep_base_in_eval_mode(self, decoder: nn.Module) -> None:
        """Undo `model.train()` for the base: dropout there would only make the side network's inputs noisy."""
        if not decoder.training:
            return
        side_parameters = {id(parameter) for parameter in self.qst_side_network.parameters()}
        stray = [name for name, p in decoder.named_parameters() if p.requires_grad and id(p) not in side_parameters]
        if stray and torch.is_grad_enabled():
            raise ValueError(
                f"{len(stray)} parameters of the base, {stray[0]} first, are set to require a gradient, and none "
                "reaches the base of a side network; freeze them, or unload() it before adding another adapter."
            )
        side_networks_train = self.training
        decoder.eval()
        self.train(side_networks_train)
        self.base_layer.eval()

    # -- loading and moving ------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, before any tensor of this layer is copied, on every way of loading.
        check_tensors(self.qst_side_network, state_dict, f"{prefix}qst_side_network.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the side network to the base's device; its dtype stays float32 on a 16-bit base."""
        if adapter_name in self.qst_side_network:
            network = self.qst_side_network[adapter_name]
            if not any(parameter.is_meta for parameter in network.parameters()):
                network.to(device or self._base_device())

    def _base_device(self) -> torch.device:
        # A norm need not have weights.
        parameters = [*self.base_layer.parameters(), *self._last_block[0].parameters()]
        return parameters[0].device


def _refuse_replica(decoder: nn.Module, args: tuple[Any, ...]) -> None:
    if getattr(decoder, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel replicates modules in threads, which side tuning cannot follow; launch with "
            "'accelerate launch' or torchrun, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
