"""What a side network is made of, as PEFT stores it in ``adapter_config.json``.

Quantized Side Tuning (Zhang et al., ACL 2024, arXiv 2401.07159), section 3, with d the hidden size of the base,
r the reduction factor and f_i, g_i the i-th block of the base and of the side network:

    x_i = (1 - beta_i) * down_i(h_fi) + beta_i * h_g(i-1)      h_gi = g_i(x_i)          (width d / r)
    h   = alpha * h_fN + (1 - alpha) * up(h_gN)                                         (width d)

The defaults depart from the paper where that learned more in the same time (docs/quality.md);
`SideTuningConfig.paper()` and `SideTuningConfig.reference()` are the publication and its authors' code.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from peft import PeftConfig

from .._register import QST
from .safe_loading import LARGEST_SIZE, Origin, check_names, check_text

LEARNED = ("adapter", "lora", "linear")
DOWNSAMPLES = (*LEARNED, "projection", "maxpool", "avgpool")
MIXINGS = ("additive", "residual", "paper", "reference")
TAP_STORAGES = ("full", "int8", "int4", "recompute")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class SideTuningConfig(PeftConfig):
    """Configuration of [`SideTuningModel`], Quantized Side Tuning.

    Args:
        reduction_factor (`int`):
            The side network is the base's hidden size divided by `reduction_factor` wide. It must divide the hidden
            size. A divisor, not a rank: smaller learns more and costs more.
        downsample (`str`):
            How a hidden state of the base enters the side network: `"linear"` (d to d/r), `"lora"` (d to
            `downsample_rank` to d/r), `"adapter"` (the same with a SiLU in between), `"projection"` (as `"lora"`, its
            first half frozen: orthogonal, or fitted by `fit_projections`), `"maxpool"` or `"avgpool"` (over groups of
            r channels, nothing to learn). The last three hold nothing d wide for backward.
        downsample_rank (`int`):
            Inner width of `"adapter"`, `"lora"` and `"projection"`.
        downsample_norm (`bool`):
            Normalize every down-sampled hidden state. The authors' code does, the paper does not say so.
        center_taps (`bool`):
            Take off every tapped hidden state what those that the loss reads have in common: their mean in the first
            pass of training, saved with the adapter. Little for language modelling, much for classifiers.
        num_side_heads (`int`, *optional*):
            Attention heads of a side block, with `side_attention`. By default heads of size 64 where the side width
            allows it; the number is filled in.
        side_attention (`bool`):
            Whether side blocks attend. Without, they read at each position what the base has gathered there, need
            no mask and no keys and values in generation, and work beside every kind of attention.
        tap_every (`int`):
            Tap every n-th block, counted from the last one, which is always tapped. The paper taps all, with 1.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the base blocks that are tapped, each by a side block of its own, instead of `tap_every`.
        side_dropout (`float`):
            Dropout on the output of the side blocks' attention and MLP.
        mixing (`str`):
            Parametrisation of the gates. `"additive"`: none; taps are added to the side state, and its up-projection
            and a linear map of the base's final state to the output, both zero at the start, so that training starts
            exactly at the base. `"residual"`: vector input gates that start at one half, and the up-projection
            alone. `"paper"`: scalar gates as published. `"reference"`: vector gates as the authors' code computes
            them, and its LayerNorm behind the down-samplers.
        compute_dtype (`str`):
            Autocast dtype of the side network: `"auto"` (that of the base's hidden states), `"float32"`,
            `"bfloat16"` or `"float16"`. The weights themselves are always kept and trained in float32.
        tap_storage (`str`):
            What training holds of the hidden states that a learned down-sampler reads, d wide in every block:
            `"full"`, rounded to `"int8"` or `"int4"` (only the down-samplers' gradient is inexact), or nothing, with
            `"recompute"`: the base runs once more in backward, exactly. Pooled and projected taps need none of it.
        target_modules (`list[str]`, *optional*):
            Filled in with the path of the base's final norm, where the side network attaches.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save, such as a classification head. They must lie behind the final norm:
            no gradient ever reaches the base.
        trainable_token_indices (`list[int]` or `dict[str, list[int]]`, *optional*):
            Present because trainers read it; must stay `None`, the embeddings are part of the frozen base.
        base_hidden_size (`int`, *optional*), base_num_layers (`int`, *optional*):
            Filled in from the base; an adapter is refused on a base of other dimensions.
        tokenizer_fingerprint (`str`, *optional*):
            Filled in where the base's tokenizer is known; an adapter warns beside another vocabulary.

    Raises:
        ValueError: when a value is out of its range or contradicts another, naming the field.
    """

    reduction_factor: int = field(
        default=4,
        metadata={"help": "The side network is hidden_size / reduction_factor wide. A divisor: smaller learns more."},
    )
    downsample: str = field(
        default="linear",
        metadata={
            "help": "How a hidden state of the base enters the side network: linear, lora, adapter (learned), "
            "projection (frozen, a learned layer behind it), maxpool or avgpool (nothing to learn, least memory)."
        },
    )
    downsample_rank: int = field(
        default=16, metadata={"help": "Inner width of the adapter, lora and projection down-samplers."}
    )
    downsample_norm: bool = field(
        default=True, metadata={"help": "Normalize every down-sampled hidden state, as the authors' code does."}
    )
    center_taps: bool = field(
        default=True,
        metadata={"help": "Take their mean, as the first pass of training finds it, off the tapped hidden states."},
    )
    num_side_heads: int | None = field(
        default=None,
        metadata={"help": "Attention heads of a side block. Default: heads of size 64 where the width allows it."},
    )
    side_attention: bool = field(default=False, metadata={"help": "Whether side blocks attend, or only have an MLP."})
    tap_every: int = field(
        default=3, metadata={"help": "Tap every n-th block, counted from the last one, by a side block of its own."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Indices of the base blocks that are tapped, instead of tap_every."},
    )
    side_dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the output of the side blocks' attention and MLP."}
    )
    mixing: str = field(
        default="additive",
        metadata={
            "help": "Parametrisation of the gates: additive (none, and a linear map of the base's final state) or "
            "residual (vector gates), which both start exactly at the base, paper (scalar gates, as published) or "
            "reference (vector gates, as the authors' code computes them)."
        },
    )
    compute_dtype: str = field(
        default="auto",
        metadata={
            "help": "Autocast dtype of the side network: auto (that of the base's hidden states), float32, bfloat16 "
            "or float16. Weights are always kept in float32."
        },
    )
    tap_storage: str = field(
        default="full",
        metadata={
            "help": "What training holds of the hidden states that learned down-samplers read: full, int8, int4, or "
            "recompute (nothing; the base runs once more in backward)."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Filled in with the path of the base's final norm. Leave it unset."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to train and save, such as a classification head behind the final norm."},
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Must stay unset: the embeddings are part of the frozen base."}
    )
    base_hidden_size: int | None = field(
        default=None, metadata={"help": "Filled in: hidden size of the base the adapter belongs to."}
    )
    base_num_layers: int | None = field(
        default=None, metadata={"help": "Filled in: number of blocks of the base the adapter belongs to."}
    )
    tokenizer_fingerprint: str | None = field(
        default=None, metadata={"help": "Filled in: which vocabulary the adapter was trained with, where known."}
    )

    def __post_init__(self) -> None:
        for name in ("base_model_name_or_path", "revision", "task_type", "peft_version", "tokenizer_fingerprint"):
            check_text(name, getattr(self, name))
        super().__post_init__()
        # Where this config was read, until its weights are in. No field: it is not saved.
        self.origin: Origin | None = None
        self.peft_type = QST
        # It names a class for AutoPeftModel to import.
        self.auto_mapping = None
        self._check_bool("inference_mode")
        self._check_bool("downsample_norm")
        self._check_bool("center_taps")
        self._check_bool("side_attention")
        if not isinstance(self.target_modules, str):
            check_names("target_modules", self.target_modules)
        check_names("modules_to_save", self.modules_to_save)
        self._check_integer("reduction_factor", minimum=2)
        self._check_integer("downsample_rank", minimum=1)
        self._check_integer("tap_every", minimum=1)
        for name in ("num_side_heads", "base_hidden_size", "base_num_layers"):
            if getattr(self, name) is not None:
                self._check_integer(name, minimum=1)
        if self.num_side_heads is not None and not self.side_attention:
            raise ValueError(
                f"num_side_heads is {self.num_side_heads}, but side blocks do not attend; set side_attention to true, "
                "or leave it unset."
            )
        self._check_choice("downsample", DOWNSAMPLES)
        self._check_choice("mixing", MIXINGS)
        self._check_choice("compute_dtype", COMPUTE_DTYPES)
        self._check_choice("tap_storage", TAP_STORAGES)
        if self.tap_storage != "full" and self.downsample not in LEARNED:
            raise ValueError(
                f"tap_storage is {self.tap_storage}, but {self.downsample} holds no hidden state for backward; leave "
                f"it at full, or choose downsample from {', '.join(LEARNED)}."
            )
        dropout = self.side_dropout
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise ValueError(f"side_dropout is {short(dropout)}; give a probability from 0 up to, not including, 1.")
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if self.layers_to_transform is not None:
            self._check_layers(self.layers_to_transform)
        if self.trainable_token_indices is not None:
            raise ValueError(
                f"trainable_token_indices is {short(self.trainable_token_indices)}, but the embeddings belong to the "
                "base, which no gradient reaches; leave it unset."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        # PEFT and transformers name the base when they make a new adapter: then the config is a file's no more.
        if name == "base_model_name_or_path":
            super().__setattr__("origin", None)
        super().__setattr__(name, value)

    @classmethod
    def paper(cls, **options: Any) -> SideTuningConfig:
        """The side network as published (ACL 2024, section 3).

        Its output gate starts at one, so that nothing but that gate has a gradient in the first step.

        Args:
            **options: Fields that differ.
        """
        published = {"reduction_factor": 16, "downsample": "adapter", "downsample_norm": False, "mixing": "paper"}
        return cls(**{**published, "center_taps": False, "side_attention": True, "tap_every": 1, **options})

    @classmethod
    def reference(cls, **options: Any) -> SideTuningConfig:
        """The side network as the authors' code computes it; there, it has as many heads as the base.

        Args:
            **options: Fields that differ.
        """
        return cls.paper(**{"downsample_norm": True, "mixing": "reference", **options})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read a config as PEFT does, and remember where, so that the weights are checked before they are loaded."""
        folder = os.fspath(pretrained_model_name_or_path)
        config: PeftConfig = super().from_pretrained(folder, subfolder, **kwargs)
        if isinstance(config, SideTuningConfig):
            config.origin = Origin(folder, subfolder, cls._split_kwargs(kwargs)[0])
            if isinstance(config.target_modules, str):
                # PEFT would run a stranger's regular expression, before the tuner fills in the path of the norm.
                config.target_modules = None
        return config

    def _check_bool(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {short(value)}; give true or false.")

    def _check_integer(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} is {short(value)}; give an integer of at least {minimum}.")
        if value > LARGEST_SIZE:
            raise ValueError(f"{name} is {short(value)}; give an integer of at most {LARGEST_SIZE}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{name} is {short(value)}; choose one of {', '.join(choices)}.")

    @staticmethod
    def _check_layers(layers: Any) -> None:
        listed = isinstance(layers, (list, tuple, range)) and 0 < len(layers) <= LARGEST_SIZE
        integers = listed and all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < LARGEST_SIZE for i in layers
        )
        if not integers or len(set(layers)) != len(layers):
            raise ValueError(f"layers_to_transform is {short(layers)}; give distinct block indices counted from 0.")
