"""Rows of one batch with side networks of their own: each as it is alone, behind one pass of the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import config_of, tiny, token_ids
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DynamicCache, GenerationConfig

from benchmarks.small_bases import families, small_base
from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.follow import find_decoder

NAMES = ["first", "__base__", "second", "first", "third"]
# Of other widths, taps and parts than each other.
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"reduction_factor": 4, "tap_every": 1},
    "second": {"reduction_factor": 8, "layers_to_transform": [1], "mixing": "paper"},
    "third": {"reduction_factor": 4, "downsample": "avgpool"},
}


def several(base: Any = None, task_type: str = "CAUSAL_LM") -> Any:
    base = tiny() if base is None else base
    model: Any = None
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        config = SideTuningConfig(task_type=task_type, **fields)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        for path, parameter in model.named_parameters():
            if f".{name}." in path:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data.add_(0.2 * noise)
    return model.eval()


def alone(model: Any, name: str, call: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


def padded(rows: int = len(NAMES)) -> dict[str, Tensor]:
    ids = token_ids(rows, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "gpt2", "jamba"])
def test_each_row_is_as_it_is_alone(family: str) -> None:
    model, inputs = several(tiny(family) if family != "jamba" else small_base(*families()[family])), padded()
    mixed = model(**inputs, adapter_names=NAMES).logits
    for index, name in enumerate(NAMES):
        own = alone(model, name, lambda index=index: model(**{k: v[[index]] for k, v in inputs.items()}).logits)
        torch.testing.assert_close(mixed[[index]], own, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[0], mixed[3])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("given", ["arguments", "generation_config"])
def test_each_row_generates_what_it_does_alone(options: dict[str, int], given: str) -> None:
    model, inputs = several(), padded()
    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    asked = common if given == "arguments" else {"generation_config": GenerationConfig(**common)}
    mixed = model.generate(**inputs, **asked, adapter_names=NAMES).view(len(NAMES), -1, 15)
    for index, name in enumerate(NAMES):
        row = {key: tensor[[index]] for key, tensor in inputs.items()}
        assert torch.equal(mixed[index], alone(model, name, lambda row=row: model.generate(**row, **asked)))


def test_the_base_runs_once() -> None:
    model, inputs = several(), padded()
    passes: list[int] = []
    block = find_decoder(model.get_base_model()).blocks[0]
    block.register_forward_pre_hook(lambda block, args, kwargs: passes.append(1), with_kwargs=True)
    model(**inputs, adapter_names=NAMES)
    assert len(passes) == 1


def test_heads_of_classifiers_are_their_rows_too() -> None:
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config_of("llama", num_labels=3))
    model, ids = several(base, "SEQ_CLS"), token_ids(3, 9)
    names = ["second", "first", "third"]
    mixed = model(input_ids=ids, adapter_names=names).logits
    for index, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[[index]], model(input_ids=ids[[index]]).logits, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_mixed_is_refused() -> None:
    model, inputs = several(), padded()
    for names, message in (
        (["first", "fourth"], "adapter_names has fourth; choose from first, second, third, __base__"),
        (NAMES[:2], "adapter_names has 2 names for a batch of 5 rows"),
        ("first", "adapter_names is 'first'; give a list"),
        ([], r"adapter_names is \[\]; give a list"),
    ):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=message):
                call(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**inputs, adapter_names=NAMES)
    model.eval().add_adapter("attending", SideTuningConfig(reduction_factor=4, side_attention=True))
    with pytest.raises(ValueError, match="adapter_names has attending, whose side blocks attend"):
        model(**inputs, adapter_names=["attending"] * 5)
    # Nothing of a refused call is left.
    model.set_adapter("first")
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, adapter_names=["first"] * 5).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_prompts_cache_serves_every_adapter() -> None:
    """Computed by one adapter, by none, or by a mixed batch: the same keys and values."""
    model, ids = several(), token_ids(1, 12)
    prompt, rest = ids[:, :8], ids[:, 8:]
    caches = []
    for name in ("first", "__base__"):
        cache = DynamicCache()
        alone(model, name, lambda cache=cache: model(input_ids=prompt, past_key_values=cache, use_cache=True))
        caches.append(cache)
    for layer, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
    for name in ADAPTERS:
        for cache in caches:
            model.set_adapter(name)
            whole = model(input_ids=ids).logits[:, 8:]
            found = model(input_ids=rest, past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
            cache.crop(-4)


def test_another_adapter_goes_on_with_the_conversation() -> None:
    """Switched between two tokens: the rest is what it would have been from the start."""
    model, ids = several(), token_ids(1, 12)
    model.set_adapter("first")
    cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
    model.set_adapter("second")
    switched = model(input_ids=ids[:, 8:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(switched, model(input_ids=ids).logits[:, 8:], rtol=1e-4, atol=1e-5)
