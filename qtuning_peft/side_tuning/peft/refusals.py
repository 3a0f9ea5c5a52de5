"""What cannot work or has no effect beside a base: refused, or warned of, before anything is attached."""

import warnings
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..follow import BASE, Decoder
from ..network.attention import blocks_without_attention
from .config import SideTuningConfig

PEFT_PREFIX = "base_model.model."


def refuse_other_adapters(model: nn.Module, ours: type) -> None:
    """Check that no other method has adapters in `model`."""
    tuned = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = {type(module).__name__ for module in tuned if not isinstance(module, ours)}
    if others:
        raise ValueError(
            f"The base already carries another adapter ({', '.join(sorted(others))}), which no gradient would "
            "reach; call merge_and_unload() or unload() first."
        )


def refuse_another_size(config: SideTuningConfig, decoder: Decoder) -> None:
    """Check that the adapter is for a base of this size, and fits into it."""
    shape = decoder.shape
    for name, actual in (("base_hidden_size", shape.hidden_size), ("base_num_layers", shape.num_layers)):
        recorded = getattr(config, name)
        if recorded not in (None, actual):
            raise ValueError(
                f"{name} of the adapter is {recorded}, but this base has {actual}; load the base it was trained on"
                f"{f', {config.base_model_name_or_path}' if config.base_model_name_or_path else ''}."
            )
    if config.downsample_rank > shape.hidden_size:
        raise ValueError(
            f"downsample_rank is {config.downsample_rank}, more than the base's hidden size of {shape.hidden_size}; "
            "choose a rank of at most that."
        )
    if config.layers_to_transform is None and config.tap_every > max(shape.num_layers, SideTuningConfig.tap_every):
        warnings.warn(
            f"tap_every is {config.tap_every}, but the base has {shape.num_layers} blocks: only the last is tapped.",
            stacklevel=2,
        )


def refuse_attention(config: SideTuningConfig, decoder: Decoder) -> None:
    """Check that all blocks of the base attend, if side blocks are to: they take over masks, positions and caches."""
    if config.side_attention and (others := blocks_without_attention(decoder.shape.config)):
        raise ValueError(
            f"side_attention is True, but the base has blocks without attention ({', '.join(sorted(others))}); leave "
            "it out."
        )


def refuse_target_modules(config: SideTuningConfig, decoder: Decoder) -> None:
    """Check that a new adapter names nothing but the final norm."""
    given, norm = config.target_modules, decoder.norm_path.rpartition(".")[2]
    names = [given] if isinstance(given, str) else list(given or ())
    if config.origin is None and any(name.rpartition(".")[2] != norm for name in names):
        raise ValueError(
            f"target_modules is {given!r}, but a side network attaches at the final norm; leave it unset, or choose "
            "blocks with layers_to_transform."
        )


def modules_outside(model: nn.Module, decoder: Decoder) -> list[tuple[str, nn.Module]]:
    """Path and original of every module that is neither in the decoder nor around it."""
    wrappers = {path: m for path, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    return [
        (path, wrappers[path].original_module if path in wrappers else module)
        for path, module in model.named_modules()
        if not _is_in_or_around(path, decoder.norm_path.rpartition(".")[0])
        and not path.startswith(tuple(f"{wrapper}." for wrapper in wrappers))
    ]


def refuse_untrainable_modules(config: SideTuningConfig, model: nn.Module, decoder: Decoder) -> None:
    """Check that every module of `modules_to_save` runs behind the final norm, where gradients are."""
    outside = {path for path, _ in modules_outside(model, decoder)}
    inside = [f"{PEFT_PREFIX}{path}".rstrip(".") for path, _ in model.named_modules() if path not in outside]
    # Heads are the base's own children, and made behind what they are put on.
    children = [name for name, _ in model.named_children()]
    around = decoder.norm_path.partition(".")[0]
    heads = children[children.index(around) + 1 :]
    trained = False
    # As PEFT matches them: anything that ends so, even within a word.
    for name in config.modules_to_save or ():
        if any(path.endswith(name) for path in inside):
            raise ValueError(
                f"modules_to_save names {name}, part of the base, which no gradient reaches; only modules "
                "behind the final norm, such as a classification head, can be trained beside the side network."
            )
        found = [path for path in outside if f"{PEFT_PREFIX}{path}".endswith(name)]
        if any(path.partition(".")[0] not in heads for path in found):
            raise ValueError(
                f"modules_to_save names {name}, which runs in front of the base's blocks, where no gradient comes; "
                "leave it out."
            )
        trained = trained or bool(found)
        # PEFT adds these two by itself for every classifier.
        if name not in ("classifier", "score") and not found:
            raise ValueError(f"modules_to_save names {name}, which this base does not have; leave it out.")
    if config.task_type == "SEQ_CLS" and not trained:
        raise ValueError(
            f"task_type is SEQ_CLS, but modules_to_save names no head of the base; name it, one of {', '.join(heads)}."
        )


def refuse_mixed_batch(names: Any, configs: Mapping[str, Any], training: bool) -> None:
    """Check that `names`, an adapter's for each row of a batch, are of adapters that can share a pass."""
    if training:
        raise ValueError("adapter_names is given, but the model is in training mode; call eval(), or set_adapter().")
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"adapter_names is {names!r}; give a list with an adapter's name, or {BASE}, for each row.")
    if unknown := {*names} - {*configs, BASE}:
        raise ValueError(
            f"adapter_names has {', '.join(map(str, unknown))}; choose from {', '.join([*configs, BASE])}."
        )
    for name in names:
        if name != BASE and configs[name].side_attention:
            raise ValueError(
                f"adapter_names has {name}, whose side blocks attend (side_attention) and need a cache of their own; "
                "run it by itself with set_adapter()."
            )


def warn_of_another_base(config: SideTuningConfig, base: Any, vocabulary: str | None) -> None:
    """Warn when an adapter from a file meets another base than its own, or another `vocabulary`."""
    assert config.origin is not None
    recorded, actual = config.base_model_name_or_path, getattr(base, "name_or_path", None)
    if recorded and actual and recorded != actual:
        warnings.warn(
            f"The adapter was trained on {recorded} and is loaded on {actual}; unless these are the same weights, "
            "load that base.",
            stacklevel=2,
        )
    vocabularies = {
        "recorded in the adapter": config.tokenizer_fingerprint,
        "saved beside it": config.origin.tokenizer(),
        "of the base": vocabulary,
    }
    known = {owner: fingerprint for owner, fingerprint in vocabularies.items() if fingerprint}
    if len(set(known.values())) > 1:
        warnings.warn(
            "The tokenizers differ in their vocabulary: "
            f"{', '.join(f'{fingerprint} {owner}' for owner, fingerprint in known.items())}; "
            "use the tokenizer the adapter was trained with.",
            stacklevel=2,
        )


def _is_in_or_around(path: str, decoder: str) -> bool:
    return not path or not decoder or f"{path}.".startswith(f"{decoder}.") or decoder.startswith(f"{path}.")
