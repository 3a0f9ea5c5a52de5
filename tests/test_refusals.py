"""What cannot work is refused in one sentence that names the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny, token_ids
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
)

from benchmarks.families import check
from benchmarks.small_bases import families, small_base
from qtuning_peft import SideTuningConfig
from qtuning_peft.side_tuning.peft.dry_run import dry_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 0}, "reduction_factor is 0; give an integer of at least 2"),
        ({"reduction_factor": 1}, "reduction_factor is 1;"),
        ({"reduction_factor": 2.5}, "reduction_factor is 2.5;"),
        ({"reduction_factor": True}, "reduction_factor is True;"),
        ({"reduction_factor": "8"}, "reduction_factor is '8';"),
        (
            {"downsample": "conv"},
            "downsample is 'conv'; choose one of linear, lora, adapter, projection, maxpool, avgpool",
        ),
        ({"downsample_rank": 0}, "downsample_rank is 0;"),
        ({"mixing": "lst"}, "mixing is 'lst'; choose one of additive, paper, reference"),
        ({"compute_dtype": "int8"}, "compute_dtype is 'int8';"),
        ({"side_dropout": 1.0}, "side_dropout is 1.0;"),
        ({"side_dropout": float("nan")}, "side_dropout is nan;"),
        ({"num_side_heads": 0}, "num_side_heads is 0;"),
        ({"num_side_heads": 2}, "num_side_heads is 2, but side blocks do not attend; set side_attention to true"),
        ({"side_attention": 1}, "side_attention is 1; give true or false"),
        ({"tap_every": 0}, "tap_every is 0;"),
        ({"layers_to_transform": []}, r"layers_to_transform is \[\];"),
        ({"layers_to_transform": [1, 1]}, r"layers_to_transform is \[1, 1\];"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\];"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all';"),
        ({"layers_to_transform": 0.5}, "layers_to_transform is 0.5;"),
        ({"downsample_norm": "no"}, "downsample_norm is 'no'; give true or false"),
        ({"modules_to_save": "score"}, "modules_to_save is 'score'; give a list"),
        ({"base_num_layers": "3"}, "base_num_layers is '3';"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices is .*leave it unset"),
    ],
)
def test_config_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        SideTuningConfig(**options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction_factor": 7}, "reduction_factor is 7, .* hidden size of 64; choose one of 2, 4, 8"),
        ({"reduction_factor": 64}, "reduction_factor is 64, .* choose one of 2, 4, 8"),
        (
            {"reduction_factor": 4, "num_side_heads": 3, "side_attention": True},
            "num_side_heads is 3, which does not split the side width of 16",
        ),
        (
            {"reduction_factor": 4, "num_side_heads": 16, "side_attention": True},
            "num_side_heads is 16, .* equal even sizes",
        ),
        ({"layers_to_transform": [0, 3]}, "layers_to_transform names block 3, but the base has blocks 0 to 2"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save names embed_tokens, part of the base"),
    ],
)
def test_configurations_that_do_not_fit_the_base(options: dict[str, object], message: str) -> None:
    base = tiny()
    expected = base(input_ids=token_ids()).logits
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", **options))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert torch.equal(base(input_ids=token_ids()).logits, expected)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(d_model=32, num_layers=2, num_heads=2, d_ff=64, vocab_size=50)),
         "T5ForConditionalGeneration is an encoder-decoder"),
        (lambda: AutoModelForMaskedLM.from_config(BertConfig(**SMALL, num_attention_heads=2, intermediate_size=64)),
         "BertForMaskedLM has no norm behind its 2 blocks"),
        (lambda: OPTForCausalLM(OPTConfig(**SMALL, num_attention_heads=2, ffn_dim=64, do_layer_norm_before=False,
                                          word_embed_proj_dim=32)), "OPTForCausalLM has no norm behind its 2 blocks"),
        (lambda: TrOCRForCausalLM(TrOCRConfig(d_model=32, decoder_layers=2, decoder_attention_heads=2, vocab_size=50,
                                              decoder_ffn_dim=64)), "TrOCRForCausalLM has no norm behind its 2 blocks"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), "Sequential has no transformers config"),
    ],
    ids=["encoder-decoder", "encoder", "no norm", "norm of embeddings only", "not a transformer"],
)  # fmt: skip
def test_models_without_a_place_for_a_side_network(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_peft_model(make(), SideTuningConfig(reduction_factor=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=2, n_layers=2, vocab_size=100)), "a mask of torch.bool"),
        (lambda: FalconForCausalLM(FalconConfig(**SMALL, num_attention_heads=4, alibi=True)), "each of its 4 heads"),
        (lambda: MambaForCausalLM(MambaConfig(**SMALL)), r"blocks without attention \(linear_attention\)"),
        (lambda: small_base(*families()["deepseek_v2"]), "rotary positions in a form other"),
        (lambda: small_base(*families()["llama4_text"]), "rotary positions in a form other"),
    ],
    ids=["MPT", "ALiBi in the mask", "no attention", "complex rotary positions", "Llama 4"],
)  # fmt: skip
def test_what_attention_in_side_blocks_cannot_take_over(make: Callable[[], Any], message: str) -> None:
    """It is refused when the side network is attached, which leaves the base as it was, and works without."""
    base = make().eval()
    expected = base(token_ids()).logits
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, SideTuningConfig(reduction_factor=4, side_attention=True))
    assert torch.equal(base(token_ids()).logits, expected)
    assert check(base) == "works"


def test_blocks_that_run_several_times() -> None:
    with pytest.raises(ValueError, match="HrmTextForCausalLM runs its blocks several times"):
        get_peft_model(small_base(*families()["hrm_text"]), SideTuningConfig(reduction_factor=4))


def test_the_dry_run_touches_nothing() -> None:
    """Not the base, nor the random state; and what it cannot decide is left to the first pass."""
    base = tiny()
    before = {name: (tensor, tensor._version) for name, tensor in base.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    dry_run(base, SideTuningConfig(reduction_factor=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor is before[name][0] for name, tensor in base.state_dict(keep_vars=True).items())
    assert all(tensor._version == version for tensor, version in before.values())

    class MadeOtherwise(type(base)):  # type: ignore[misc]
        def __init__(self, config: Any, path: str) -> None:
            super().__init__(config)

    dry_run(MadeOtherwise(base.config, "somewhere"), SideTuningConfig(reduction_factor=4))


def test_another_method_on_the_same_base() -> None:
    lora = get_peft_model(tiny(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for base in (lora, lora.get_base_model()):
        with pytest.raises(ValueError, match=r"already carries another adapter \(Linear.*unload\(\) first"):
            get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))

    base = tiny()
    get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM"))
    both = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    both.train()
    with pytest.raises(ValueError, match=r"6 parameters of the base, .*lora_A.* first"):
        both(input_ids=token_ids())


def test_a_cache_of_another_adapter() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM", side_attention=True))
    model.add_adapter("other", SideTuningConfig(task_type="CAUSAL_LM", side_attention=True))
    with torch.no_grad():
        cache = model(input_ids=token_ids(), use_cache=True).past_key_values
        model.set_adapter("other")
        with pytest.raises(ValueError, match="filled by adapter default, and other is active"):
            model(input_ids=token_ids()[:, :1], past_key_values=cache)


def test_merging() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="not a weight delta"):
            merge()
    assert model(input_ids=token_ids()).logits.requires_grad


def test_two_active_adapters() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    model.add_adapter("other", SideTuningConfig(task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Adapters default, other are active together"):
        model(input_ids=token_ids())
    assert torch.is_grad_enabled()


def test_skipped_blocks() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    model.get_base_model().config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="0 of 1 tapped blocks ran"):
        model(input_ids=token_ids())


def test_replicas_in_threads() -> None:
    model = get_peft_model(tiny(), SideTuningConfig(task_type="CAUSAL_LM"))
    model.get_base_model().model._is_replica = True
    with pytest.raises(RuntimeError, match=r"DataParallel .* launch with 'accelerate launch'"):
        model(input_ids=token_ids())
