"""The methods that are compared: a PEFT configuration and a few flags each.

LoRA, IA3 and SHADOW train in the base's own precision, as TRL lets them on a 4-bit base: float32 adapters would save a
float32 copy of their inputs for backward, which would be unfair to them. A side network's weights are always float32;
on a GPU it runs under autocast, as trainers run it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from typing import Any, Literal

import bitsandbytes as bnb
import peft
import torch
from torch import nn

from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.network import NetworkSettings

NOT_REENTRANT = {"use_reentrant": False}


@dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: As in commands and result rows.
        config: Name of a PEFT configuration class; none for full fine-tuning.
        arguments: Its arguments.
        four_bit: Whether the base is in NF4.
        checkpointing: Gradient checkpointing, of the side network or of the base; "offload" keeps what it saves in
            pinned memory of the host (transformers 5.23).
        kbit: `prepare_model_for_kbit_training`, which casts what is not quantized to float32.
        autocast: Trained under autocast on a GPU, as `bf16=True` does in every trainer: parts of it are in float32.
        adam8: 8-bit AdamW, on a GPU.
        loss: Forces a loss; SHADOW starts in the whole model's forward, so that its head cannot be run apart.
        learning_rate: Of the steps that are timed.
    """

    name: str
    config: str | None = "SideTuningConfig"
    arguments: dict[str, Any] = field(default_factory=dict)
    four_bit: bool = True
    checkpointing: bool | Literal["offload"] = False
    kbit: bool = False
    autocast: bool = False
    adam8: bool = False
    loss: str | None = None
    learning_rate: float = 1e-3

    @property
    def is_side(self) -> bool:
        """Whether no gradient crosses the base."""
        return self.config == "SideTuningConfig"

    def options(self) -> dict[str, Any]:
        """Everything but the name, for result rows: other options are another measurement."""
        given: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        if self.is_side:  # with the defaults, so that a changed default is another measurement
            config = SideTuningConfig(**self.arguments)
            own = {f.name: getattr(config, f.name) for f in fields(NetworkSettings)}
            given["arguments"] = {name: value for name, value in own.items() if value is not None}
        return given


LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
DEFAULT, PUBLISHED = vars(SideTuningConfig()), vars(SideTuningConfig.paper())
PAPER = {name: value for name, value in PUBLISHED.items() if value != DEFAULT[name]}
LEAN = {"reduction_factor": 16, "downsample": "avgpool"}
PROJECTION = {"reduction_factor": 16, "downsample": "projection", "downsample_rank": 64}

METHODS = {
    method.name: method
    for method in (
        Method("side", autocast=True),
        Method("side-paper", arguments=PAPER, autocast=True),
        Method("side-checkpointed", checkpointing=True, autocast=True),
        Method("side-int8", arguments={"tap_storage": "int8"}, checkpointing=True, adam8=True, autocast=True),
        Method("side-int4", arguments={"tap_storage": "int4"}, checkpointing=True, adam8=True, autocast=True),
        Method("side-projection", arguments=PROJECTION, checkpointing=True, adam8=True, autocast=True),
        Method("side-lean", arguments=LEAN, checkpointing=True, adam8=True, autocast=True),
        Method("lst", arguments={"downsample": "linear"}, four_bit=False, autocast=True),
        Method("lora", "LoraConfig", LORA, four_bit=False, learning_rate=2e-4),
        Method("lora-r8", "LoraConfig", {**LORA, "r": 8, "lora_alpha": 16}, four_bit=False, learning_rate=2e-4),
        Method("lora-checkpointed", "LoraConfig", LORA, four_bit=False, checkpointing=True, learning_rate=2e-4),
        Method("qlora", "LoraConfig", LORA, learning_rate=2e-4),
        Method(
            "qlora-checkpointed", "LoraConfig", LORA, checkpointing=True, kbit=True, autocast=True, learning_rate=2e-4
        ),
        # The most that QLoRA's user can save: no float32 casts, 8-bit AdamW; then checkpoints in the host's memory too.
        Method("qlora-lean", "LoraConfig", LORA, checkpointing=True, adam8=True, learning_rate=2e-4),
        Method("qlora-offloaded", "LoraConfig", LORA, checkpointing="offload", adam8=True, learning_rate=2e-4),
        Method("shadow", "ShadowConfig", loss="full", learning_rate=2e-4),
        Method("ia3", "IA3Config", autocast=True, learning_rate=3e-3),
        Method("full", None, four_bit=False, learning_rate=1e-5),
    )
}  # fmt: skip


def available(name: str) -> bool:
    """Whether the installed PEFT has the method called `name`."""
    return METHODS[name].config != "ShadowConfig" or find_spec("peft.tuners.shadow") is not None


def find(name: str) -> Method:
    """The method called `name`.

    Raises:
        ValueError: when there is none, or PEFT lacks it.
    """
    if name not in METHODS:
        raise ValueError(f"method is {name}; choose one of {', '.join(METHODS)}.")
    if not available(name):
        raise ValueError(f"method is {name}, which this PEFT lacks; install peft>=0.21.")
    return METHODS[name]


def apply(method: Method, model: Any, task_type: str = "CAUSAL_LM") -> Any:
    """Make `model` trainable by `method`, in training mode."""
    dtype = model.dtype
    if not method.is_side:
        keep_gradients(model)
    if method.kbit:
        peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=NOT_REENTRANT)
    if method.config is None:
        model.requires_grad_(True)
    else:
        maker = SideTuningConfig if method.is_side else getattr(peft, method.config)
        model = peft.get_peft_model(
            model, maker(task_type=task_type, **method.arguments), autocast_adapter_dtype=method.is_side
        )
        for parameter in () if method.is_side else trained(model):
            parameter.data = parameter.data.to(dtype)
    if method.checkpointing:
        owner = model.get_base_model() if method.config else model
        if method.checkpointing == "offload":
            owner.activation_checkpointing_enable(NOT_REENTRANT, offload=True)
        else:
            owner.gradient_checkpointing_enable(NOT_REENTRANT)
    return model.train()


def optimizer(method: Method, model: nn.Module, learning_rate: float | None = None) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    parameters = list(trained(model))
    maker = bnb.optim.AdamW8bit if method.adam8 and parameters[0].is_cuda else torch.optim.AdamW
    return maker(parameters, lr=learning_rate or method.learning_rate)


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trained parameters."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def keep_gradients(model: nn.Module) -> None:
    """Forbid the CPU kernel that runs forward only: one evaluation, and QLoRA would have no gradient afterwards."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
