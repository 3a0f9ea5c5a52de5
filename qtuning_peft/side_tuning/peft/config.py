"""A side network's settings as PEFT stores them in ``adapter_config.json``."""

import os
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

from peft import PeftConfig

from ...registry import option
from ..network import NetworkSettings
from .peft_type import QST
from .untrusted import Origin, check_names, check_text


@dataclass
class SideTuningConfig(NetworkSettings, PeftConfig):
    """Configuration of [`SideTuningModel`], Quantized Side Tuning (Zhang et al., ACL 2024, arXiv 2401.07159).

    The settings of the side network are those of [`NetworkSettings`]; `SideTuningConfig.paper()` and
    `SideTuningConfig.reference()` are the publication and its authors' code.

    Raises:
        ValueError: when a value is out of its range or contradicts another, naming the field.
    """

    target_modules: list[str] | str | None = option(
        None, "Filled in with the path of the base's final norm. Leave it unset."
    )
    modules_to_save: list[str] | None = option(
        None, "Further modules to train and save, such as a classification head behind the final norm."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, "Must stay unset: the embeddings are part of the frozen base."
    )
    base_hidden_size: int | None = option(None, "Filled in: the base's hidden size; refused beside another.", least=1)
    base_num_layers: int | None = option(None, "Filled in: its number of blocks; refused beside another.", least=1)
    tokenizer_fingerprint: str | None = option(
        None, "Filled in: which vocabulary the adapter was trained with, where known; it warns beside another."
    )

    def __post_init__(self) -> None:
        for name in ("base_model_name_or_path", "revision", "task_type", "peft_version", "tokenizer_fingerprint"):
            check_text(name, getattr(self, name))
        if self.task_type == "SEQ_2_SEQ_LM":
            raise ValueError("task_type is 'SEQ_2_SEQ_LM', but a side network needs a decoder; choose CAUSAL_LM.")
        PeftConfig.__post_init__(self)
        # Where this config was read, until its weights are in. No field: it is not saved.
        self.origin: Origin | None = None
        self.peft_type = QST
        # It names a class for AutoPeftModel to import.
        self.auto_mapping = None
        if not isinstance(self.target_modules, str):
            check_names("target_modules", self.target_modules)
        check_names("modules_to_save", self.modules_to_save)
        NetworkSettings.__post_init__(self)
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
    def paper(cls, **options: Any) -> "SideTuningConfig":
        """The side network as published (ACL 2024, section 3); `options` are fields that differ.

        Its output gate starts at one, so that nothing but that gate has a gradient in the first step.
        """
        published = {"reduction_factor": 16, "downsample": "adapter", "downsample_norm": False, "mixing": "paper"}
        return cls(**{**published, "center_taps": False, "side_attention": True, "tap_every": 1, **options})

    @classmethod
    def reference(cls, **options: Any) -> "SideTuningConfig":
        """The side network as the authors' code computes it (there, with the base's number of heads); see `paper`."""
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
                # PEFT would run an untrusted regular expression, before the tuner fills in the path of the norm.
                config.target_modules = None
        return config
