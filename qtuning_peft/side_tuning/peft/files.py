"""The tensors of a side adapter on disk: their names on every PEFT version, and checks before any is loaded.

In the model a side network's tensors are called ``<norm>.qst_side_network.<adapter name>.<tensor>``; in
``adapter_model.safetensors`` the adapter name is left out.
"""

import functools
import warnings
from contextlib import suppress
from dataclasses import fields
from typing import Any

import peft.functional
import peft.peft_model
import peft.utils.save_and_load
import torch
from peft import PeftConfig
from peft.config import PeftConfigMixin
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers import PretrainedConfig

from .config import SideTuningConfig
from .peft_type import QST
from .untrusted import CONTAINER, LARGEST_TEXT, check_keys, check_shape, check_values


def without_adapter_name(key: str, adapter_name: str) -> str:
    """Name in a file of the tensor called `key` in the model's state dict."""
    return key.replace(f".{CONTAINER}.{adapter_name}.", f".{CONTAINER}.", 1)


def check_tensors(networks: nn.ModuleDict, state_dict: dict[str, Any], prefix: str) -> None:
    """Check everything that `state_dict` holds for side networks under `prefix`, before anything is copied."""
    found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    for name in dict.fromkeys(key.split(".")[0] for key in found):
        if name not in networks:
            raise ValueError(
                f"The file holds {prefix}{name}, which is no adapter of this model; load it under its name."
            )
        given = {key[len(name) + 1 :]: value for key, value in found.items() if key.startswith(f"{name}.")}
        check_adapter(networks[name].state_dict(), given)


def check_adapter(expected: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> None:
    """Check the tensors of one adapter against those of the side network they are for."""
    check_keys(expected, given)
    for key, tensor in given.items():
        check_shape(key, tensor.shape, expected[key])
        check_values(key, tensor, expected[key])


def save_the_adapter_alone() -> None:
    """Teach PEFT what a side adapter's file holds.

    The base's embeddings are not part of it: PEFT would add them where the vocabulary was resized, though nothing here
    trains them, and loading refuses tensors of the base. And before 0.21 PEFT finds an adapter's name only in the last
    or last but one segment of a key, and has no hook to be told where ours is; loading puts the name back itself.
    """
    original = peft.get_peft_model_state_dict
    finds_names = hasattr(BaseTuner, "_remove_adapter_name_from_key")

    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        ours = isinstance(model.peft_config.get(adapter_name), SideTuningConfig)
        if ours:
            if kwargs.get("save_embedding_layers", "auto") not in ("auto", False):
                raise ValueError(
                    "save_embedding_layers is True, but an adapter with tensors of the base is refused when it is "
                    "loaded; leave it out, and save a base with new tokens by itself."
                )
            kwargs["save_embedding_layers"] = False
            _warn_of_resized_vocabulary(model, model.peft_config[adapter_name].base_model_name_or_path)
            state_dict = own_tensors(model) if state_dict is None else state_dict
        if finds_names:
            return original(model, state_dict, adapter_name, *args, **kwargs)
        state_dict = model.state_dict() if state_dict is None else state_dict
        rest = original(model, state_dict, adapter_name, *args, **kwargs)
        side = {key: tensor for key, tensor in state_dict.items() if f".{CONTAINER}.{adapter_name}." in key}
        return {key: tensor for key, tensor in rest.items() if f".{CONTAINER}." not in key} | {
            without_adapter_name(key, adapter_name): tensor for key, tensor in side.items()
        }

    for module in (peft, peft.functional, peft.peft_model, peft.utils, peft.utils.save_and_load):
        vars(module)[original.__name__] = get_peft_model_state_dict


def own_tensors(model: Any) -> dict[str, torch.Tensor]:
    """State of the side networks and of further modules that are trained.

    Without the base: bitsandbytes re-quantizes the scales of 4-bit layers on some CPUs when their state is taken, and a
    base that goes on running would compute other numbers.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if path.endswith((f".{CONTAINER}", ".modules_to_save")):
            tensors |= module.state_dict(prefix=f"{path}.")
    return tensors


def _warn_of_resized_vocabulary(model: Any, name: str | None) -> None:
    """Warn when the base's vocabulary is another than where it is loaded from; only this machine is looked at."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    actual = original = len(base.get_input_embeddings().weight)
    with suppress(Exception):  # whatever a folder or a cache may hold instead
        # A GGUF file has no configuration beside it, and transformers gives the default one.
        if PretrainedConfig.get_config_dict(name, local_files_only=True)[0]:
            original = type(base.config).from_pretrained(name, local_files_only=True).get_text_config().vocab_size
    if actual not in (0, original):  # none where the weights are sharded
        warnings.warn(
            f"The base's vocabulary has {actual} tokens, and {original} where it is loaded from; rows of added tokens "
            "are not in the adapter: save the base too, and load the adapter on that.",
            stacklevel=3,
        )


def refuse_pickles() -> None:
    """Have PEFT refuse to save a side adapter as a pickle, which is never loaded."""
    original = peft.PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(
        self: Any, save_directory: str, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        if not safe_serialization and any(isinstance(one, SideTuningConfig) for one in self.peft_config.values()):
            raise ValueError(
                "safe_serialization is False, but a side adapter is loaded from safetensors alone, as a pickle can "
                "carry code; leave it out."
            )
        return original(self, save_directory, safe_serialization, *args, **kwargs)

    setattr(peft.PeftModel, original.__name__, save_pretrained)


def check_config_files() -> None:
    """Have PEFT read ``adapter_config.json`` with errors of one sentence, and no more than a few unknown fields."""
    original = vars(PeftConfigMixin)["from_json_file"].__func__

    def from_json_file(cls: type[PeftConfig], /, path_json_file: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            content: dict[str, Any] = dict(original(cls, path_json_file, **kwargs))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path_json_file} is no configuration ({error!s:.100}); get the file again.") from error
        unknown = f"{sorted(content.keys() - {f.name for f in fields(SideTuningConfig)})}"
        # PEFT lists them in a warning.
        if content.get("peft_type") == QST and len(unknown) > LARGEST_TEXT:
            raise ValueError(f"{path_json_file} has many unknown fields, as {unknown:.100}; get the file again.")
        return content

    setattr(PeftConfig, original.__name__, classmethod(from_json_file))


def remember_origins() -> None:
    """Have `PeftConfig.from_pretrained` make a config of ours by its own `from_pretrained`.

    transformers' `load_adapter` reads configs through the base class, which passes on what a file holds but not where
    it lies, and afterwards copies the tensors without calling the tuner. This is the only place where it can be told
    which file it is about to trust.
    """
    original = vars(PeftConfigMixin)["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: type[PeftConfig], *args: Any, **kwargs: Any) -> PeftConfig:
        config: PeftConfig = original(cls, *args, **kwargs)
        if isinstance(config, SideTuningConfig) and not issubclass(cls, SideTuningConfig):
            return SideTuningConfig.from_pretrained(*args, **kwargs)
        return config

    setattr(PeftConfig, original.__name__, classmethod(from_pretrained))
