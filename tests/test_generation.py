"""Generation with the side network's keys and values in the base's cache gives what the uncached model gives."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import EVERY_PART, FAMILIES, randomize_side_network, tiny, token_ids
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig, StaticCache

from qtuning_peft import SideTuningConfig

DEFAULTS = {name: getattr(SideTuningConfig(), name) for name in EVERY_PART}
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def side_tuned(family: str = "llama", seed: int = 1, **options: object) -> PeftModel:
    config = SideTuningConfig(**{"reduction_factor": 4, "task_type": "CAUSAL_LM", **EVERY_PART} | options)
    model = get_peft_model(tiny(family), config).eval()
    randomize_side_network(model, seed=seed, scale=0.3)
    return model


def prompt(left_padded: bool) -> dict[str, torch.Tensor]:
    ids, mask = token_ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    if left_padded:
        ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("parts", [EVERY_PART, DEFAULTS], ids=["every part", "defaults"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_logits_equal_uncached_logits(family: str, parts: dict[str, object]) -> None:
    model = side_tuned(family, **parts)
    # Grouped matrix products of experts have no float64 kernel, and Bloom's position biases are float32.
    tolerance = {"qwen3_moe": 1e-5, "bloom": 1e-7}.get(family, 1e-9)
    model = model if family == "qwen3_moe" else model.double()
    ids = token_ids(2, 10)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :6], use_cache=True)
        second = model(input_ids=ids[:, 6:9], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=ids[:, 9:], past_key_values=second.past_key_values, use_cache=True)
    cached = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert (cached - whole).abs().max() < tolerance


@pytest.mark.parametrize("left_padded", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
    ],
    ids=["greedy", "sampling", "beam", "beam sampling"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_and_without_cache(family: str, strategy: dict[str, object], left_padded: bool) -> None:
    model = side_tuned(family)
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(model.generate(**prompt(left_padded), **NEW, **strategy, use_cache=use_cache))
    assert torch.equal(*outputs)


def test_the_side_network_changes_what_is_generated() -> None:
    model = side_tuned()
    tuned = model.generate(**prompt(False), **NEW, do_sample=False)
    with model.disable_adapter():
        base = model.generate(**prompt(False), **NEW, do_sample=False)
    assert not torch.equal(tuned, base)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_other_cache_implementations(family: str, kind: str) -> None:
    model = side_tuned(family)
    expected = model.generate(**prompt(True), **NEW, do_sample=False, use_cache=False)
    config = model.get_base_model().config
    cache = StaticCache(config, max_cache_len=32) if kind == "static" else DynamicCache()
    found = model.generate(**prompt(True), **NEW, do_sample=False, past_key_values=cache)
    assert torch.equal(found, expected)


def test_assisted_decoding_equals_plain_decoding() -> None:
    model, assistant = side_tuned(seed=1), side_tuned(seed=2)
    ids = token_ids(1, 6)
    expected = model.generate(input_ids=ids, **NEW, do_sample=False)
    found = model.generate(input_ids=ids, **NEW, do_sample=False, assistant_model=assistant.get_base_model())
    assert torch.equal(found, expected)
    found = model.generate(input_ids=ids, **NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_a_side_network_without_attention_leaves_the_cache_alone() -> None:
    model, ids = side_tuned(**DEFAULTS), token_ids(1, 6)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        assert len(cache.layers) == 3
        expected = model(input_ids=ids, use_cache=False).logits[:, -1]
        with model.disable_adapter():  # so one that the base alone has filled will do
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        found = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_continuing_from_a_copied_prompt_cache() -> None:
    model = side_tuned()
    prefix, ends = token_ids(1, 6), (token_ids(1, 3, seed=8), token_ids(1, 4, seed=9))
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache, use_cache=True)
    for end in ends:
        whole = torch.cat([prefix, end], dim=1)
        expected = model.generate(input_ids=whole, **NEW, do_sample=False, use_cache=False)
        found = model.generate(input_ids=whole, **NEW, do_sample=False, past_key_values=copy.deepcopy(cache))
        assert torch.equal(found, expected)


def test_a_cropped_cache_continues() -> None:
    model = side_tuned()
    ids = token_ids(1, 9)
    with torch.no_grad():
        expected = model(input_ids=ids[:, :7], use_cache=False).logits[:, -1]
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-3)
        found = model(input_ids=ids[:, 6:7], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_subset_of_tapped_layers_is_cached_too() -> None:
    model = side_tuned(layers_to_transform=[0, 2])
    cached = model.generate(**prompt(True), **NEW, do_sample=False)
    assert torch.equal(cached, model.generate(**prompt(True), **NEW, do_sample=False, use_cache=False))


def test_beside_blocks_that_share_keys_and_values_of_earlier_ones() -> None:
    torch.manual_seed(0)
    config = Gemma4TextConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=100, head_dim=16, num_kv_shared_layers=2, sliding_window=4, vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8, layer_types=["sliding_attention", "full_attention"] * 3,
    )  # fmt: skip
    for tap_every in (1, 3, 6):
        options = SideTuningConfig(side_attention=True, tap_every=tap_every, task_type="CAUSAL_LM")
        model = get_peft_model(Gemma4ForCausalLM(config).eval(), options)
        randomize_side_network(model)
        options = {"input_ids": token_ids(2, 7), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))


def test_a_cache_the_side_network_has_not_seen_is_refused() -> None:
    model = side_tuned()
    ids = token_ids(1, 6)
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled without this side network"), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)

    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with model.disable_adapter():
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="7 tokens of the base but 6 of the side network"), torch.no_grad():
        model(input_ids=ids[:, :1], past_key_values=cache)
