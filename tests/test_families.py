"""Families of transformers' registry: a sample in every run, all of them with `-m slow`."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomize_side_network
from peft import get_peft_model

from benchmarks.families import DOCUMENT, RESULTS, check, check_classifier, families, logits, table, tokens
from benchmarks.small_bases import small_base
from qtuning_peft import SideTuningConfig

# Hybrids, state-space models, mixtures of experts, several streams, latent attention, decoders of encoder-decoders.
SAMPLE = (
    "bamba", "falcon_h1", "gemma3n_text", "gpt_oss", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "mbart",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv", "zamba2", "deepseek_v3", "deepseek_v32",
)  # fmt: skip
# What happens beside bases that cannot be used: each has a sentence of ours.
REASONS = ("has no norm behind its", "attends in both directions", "is an encoder-decoder", "4-dimensional states",
           "runs its blocks several times", "tapped blocks ran before the final norm")  # fmt: skip


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_works(family: str) -> None:
    assert check(small_base(*families()[family])) == "works"


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family(family: str) -> None:
    """It works, or is refused in a sentence of ours; nothing crashes, and nothing differs silently."""
    try:
        base = small_base(*families()[family])
    except Exception as error:
        pytest.skip(f"not built small: {error}")
    for result in (check(base), check(base, side_attention=True), check_classifier(base)):
        assert result in ("works", "none") or any(reason in result for reason in (*REASONS, "side_attention", "head"))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "gemma3n_text"])
def test_in_bfloat16(family: str) -> None:
    """The side stream has one dtype, also where the base keeps its own residual stream in float32."""
    base = small_base(*families()[family]).to(torch.bfloat16)
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, tap_every=1, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    with model.disable_adapter():
        expected = logits(model, tokens())
    assert not torch.equal(logits(model, tokens()), expected)
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()


def test_the_followed_stream_is_what_the_base_predicts_from() -> None:
    """Of Gemma 3n's streams, side blocks read the active one."""
    base = small_base(*families()["gemma3n_text"])
    active = base.config.altup_active_idx
    seen: list[torch.Tensor] = []
    base.model.layers[1].register_forward_hook(lambda block, args, output: seen.append(output[active]))
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, layers_to_transform=[1], downsample="avgpool"))
    tapped: list[torch.Tensor] = []
    network = base.model.norm.qst_side_network["default"]
    network.taps[0].down.register_forward_pre_hook(lambda down, args: tapped.append(args[0]))
    logits(model, tokens())
    assert torch.equal(tapped[0], seen[0])


def test_the_page_shows_the_rows() -> None:
    assert table(json.loads(RESULTS.read_text(encoding="utf-8"))) in DOCUMENT.read_text(encoding="utf-8")
