"""What training holds of the base's hidden states: less of it changes no output, and gradients only as it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import EVERY_PART, randomize_side_network, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model
from test_no_gradient_in_base import saved_for_backward
from torch import Tensor

from qtuning_peft import SideTuningConfig, fit_projections
from qtuning_peft.loss import chunked_cross_entropy
from qtuning_peft.side_tuning.follow import record_states
from qtuning_peft.side_tuning.network.downsample import Projection
from qtuning_peft.side_tuning.network.quantize import Quantized

LEARNED = ("linear", "lora", "adapter")


def model_with(family: str = "llama", **config: object) -> PeftModel:
    model = get_peft_model(
        tiny(family), SideTuningConfig(**{"reduction_factor": 4, "task_type": "CAUSAL_LM", **EVERY_PART} | config)
    )
    randomize_side_network(model)
    return model.train()


def padded_batch() -> dict[str, Tensor]:
    ids, mask = token_ids(3, 10), torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def gradients(model: PeftModel, **batch: Tensor) -> dict[str, Tensor]:
    chunked_cross_entropy(model, **(batch or padded_batch())).backward()
    return {name: parameter.grad.clone() for name, parameter in side_parameters(model).items()}


@pytest.mark.parametrize("downsample", LEARNED)
@pytest.mark.parametrize(("storage", "error"), [("int8", 0.02), ("int4", 0.2)])
def test_quantized_taps_change_the_down_samplers_gradient_alone(downsample: str, storage: str, error: float) -> None:
    full, rounded = (gradients(model_with(downsample=downsample, tap_storage=storage)) for storage in ("full", storage))
    differ = {name for name in full if not torch.equal(full[name], rounded[name])}
    first = {name for name in full if name.endswith((".down.weight", ".down.0.weight"))}
    assert differ == first
    for name in first:
        assert (rounded[name] - full[name]).norm() < error * full[name].norm()


@pytest.mark.parametrize("shape", [(3, 5, 64), (2, 3, 96), (1, 3, 7)])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_within_half_a_step(shape: tuple[int, ...], bits: int) -> None:
    states = torch.randn(shape) * torch.logspace(-6, 3, shape[-1])
    restored = Quantized.of(states, bits).restore()
    groups = Quantized.of(states, bits).scales.shape[0]
    off = (restored - states).reshape(groups, -1).abs().amax(-1)
    largest = states.reshape(groups, -1).abs().amax(-1)
    # Half a step, and the scale itself in bfloat16.
    assert (off <= largest * (0.5 / (2 ** (bits - 1) - 1) + 2**-8)).all()
    assert torch.equal(Quantized.of(torch.zeros(shape), bits).restore(), torch.zeros(shape))


@pytest.mark.parametrize(
    ("config", "held_per_token"),
    [
        ({}, 64 * 4),
        ({"tap_storage": "int8"}, 64 + 2),
        ({"tap_storage": "int4"}, 32 + 2),
        ({"downsample": "projection", "downsample_rank": 8}, 8 * 4),
    ],
)
def test_what_a_tap_holds(config: dict[str, object], held_per_token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is held with a pooled tap, which needs nothing."""

    def held(**config: object) -> int:
        parts = {"reduction_factor": 4, "downsample_norm": False, **EVERY_PART} | config
        model = get_peft_model(tiny(num_hidden_layers=1), SideTuningConfig(**parts))
        with saved_for_backward(model.train()) as saved:
            model.get_base_model().model(token_ids(1, 50), use_cache=False)
        return sum(t.untyped_storage().nbytes() for t in saved if 50 in t.shape)

    assert held(**config) - held(downsample="avgpool") == 50 * 2 * held_per_token


def test_projections_are_frozen_and_travel_with_the_adapter(tmp_path: Path) -> None:
    model = model_with(downsample="projection", downsample_rank=8)
    projections = [m.weight for m in model.modules() if isinstance(m, Projection)]
    assert len(projections) == 4
    assert not any(name.endswith("down.0.weight") for name in side_parameters(model))
    fit_projections(model, [{"input_ids": token_ids(8, 20)}], progress=False)
    for weight in projections:
        torch.testing.assert_close(weight @ weight.T, torch.eye(8))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), tmp_path)
    ids = token_ids(seed=5)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_fitted_projections_keep_more_than_random_ones() -> None:
    batch = padded_batch()
    model = model_with(downsample="projection", downsample_rank=8)
    real = batch["attention_mask"].bool()
    states = record_states(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    taps = states.taps()
    projections = [m for m in model.modules() if isinstance(m, Projection)]

    def kept() -> list[float]:
        shares = []
        for projection, tap in zip(projections, taps, strict=True):
            centred = tap[real] - tap[real].mean(0)
            shares.append(float(projection(centred).square().sum() / centred.square().sum()))
        return shares

    random = kept()
    said = fit_projections(model, [batch], progress=False)
    assert kept() == pytest.approx(said, abs=1e-4)
    assert all(fitted > 2 * before for fitted, before in zip(said, random, strict=True))


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="downsample of the active side network is not projection"):
        fit_projections(model_with(), [])
    with pytest.raises(ValueError, match="downsample_rank is 8, but there are 4 tokens"):
        fit_projections(
            model_with(downsample="projection", downsample_rank=8), [{"input_ids": token_ids(1, 4)}], progress=False
        )


def test_blocks_share_one_mask() -> None:
    model = model_with(downsample="avgpool")
    with saved_for_backward(model) as saved:
        model.get_base_model().model(
            token_ids(2, 9), attention_mask=torch.tensor([[0, 0] + [1] * 7, [1] * 9]), use_cache=False
        )
    masks = {t.untyped_storage().data_ptr() for t in saved if t.shape[-2:] == (9, 9)}
    assert len(masks) == 1


@pytest.mark.parametrize("downsample", ["avgpool", "maxpool", "projection"])
def test_storage_of_what_is_not_held_is_refused(downsample: str) -> None:
    with pytest.raises(ValueError, match="tap_storage is int8"):
        SideTuningConfig(downsample=downsample, tap_storage="int8")
