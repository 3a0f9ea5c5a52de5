"""Adapter files: their names and tensors, a round trip, and refusal of everything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import EVERY_PART, VOCABULARY, randomize_side_network, tiny, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qtuning_peft import SideTuningConfig

PREFIX = "base_model.model.model.norm.qst_side_network."
BLOCK = {
    "attention.o_proj.weight": (16, 16),
    "attention.qkv_proj.weight": (48, 16),
    "attention_norm.weight": (16,),
    "mlp.down_proj.weight": (16, 32),
    "mlp.up_proj.weight": (64, 16),
    "mlp_norm.weight": (16,),
}
Tensors = dict[str, torch.Tensor]


def side_tuned(**options: object) -> PeftModel:
    model = get_peft_model(
        tiny(), SideTuningConfig(**{"reduction_factor": 4, "task_type": "CAUSAL_LM", **EVERY_PART} | options)
    )
    randomize_side_network(model)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def test_the_exact_tensors_of_a_saved_adapter(tmp_path: Path) -> None:
    side_tuned().save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = {"embedding_tap.down.weight": (16, 64), "embedding_tap.norm.weight": (16,), "norm.weight": (16,)}
    expected |= {"mix.up_proj.weight": (64, 16), "mix.up_proj.bias": (64,), "mix.weight": (1,)}
    expected |= {f"{tap}.center": (64,) for tap in ("embedding_tap", "taps.0", "taps.1", "taps.2")}
    for i in range(3):
        expected |= {f"taps.{i}.down.weight": (16, 64), f"taps.{i}.norm.weight": (16,), f"gates.{i}.weight": (1,)}
        expected |= {f"blocks.{i}.{name}": shape for name, shape in BLOCK.items()}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in saved.items()} == {PREFIX + k: v for k, v in expected.items()}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_config_is_plain_data(tmp_path: Path) -> None:
    side_tuned().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "QST"
    assert (config["base_hidden_size"], config["base_num_layers"]) == (64, 3)
    assert config["target_modules"] == ["model.norm"]
    assert (config["reduction_factor"], config["mixing"], config["downsample"]) == (4, "paper", "linear")


@pytest.mark.parametrize("name", ["default", "qst", "qst_side_network", "weight", "0", "blocks", "norm"])
def test_a_round_trip_under_any_adapter_name(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"), adapter_name=name)
    randomize_side_network(model)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    assert all(key.startswith(PREFIX) for key in load_file(folder / "adapter_model.safetensors"))
    assert not any(
        f".{name}." in key.removeprefix(PREFIX) for key in load_file(folder / "adapter_model.safetensors")
    ) or (name in ("weight", "0", "blocks", "norm"))
    for other in ("default", name, "other"):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny(), folder, adapter_name=other)), logits(model))


def test_saving_one_of_two_adapters(tmp_path: Path) -> None:
    model = side_tuned()
    model.add_adapter("second", SideTuningConfig(reduction_factor=8, downsample="avgpool", task_type="CAUSAL_LM"))
    randomize_side_network(model, seed=4)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["second"]
    model.set_adapter("second")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny(), tmp_path / "second")), logits(model))


def test_a_model_state_dict_round_trip() -> None:
    model, twin = (
        side_tuned(),
        get_peft_model(tiny(seed=5), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM", **EVERY_PART)),
    )
    assert not twin.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(logits(model), logits(twin))


def test_smaller_than_lora_on_smollm2() -> None:
    """SmolLM2-135M's shapes: parameters of the default adapter against LoRA r=16 on all linear layers."""
    shape = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        side = get_peft_model(tiny(**shape, intermediate_size=1536), SideTuningConfig(task_type="CAUSAL_LM"))
        lora = get_peft_model(
            tiny(**shape, intermediate_size=1536), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    assert side.get_nb_trainable_parameters()[0] == 2_989_728
    assert side.get_nb_trainable_parameters()[0] < lora.get_nb_trainable_parameters()[0] == 4_884_480


# -- refusals ------------------------------------------------------------------------------------------------------

FIRST = PREFIX + "blocks.0.mlp.up_proj.weight"


def without_first(tensors: Tensors) -> None:
    del tensors[FIRST]


def with_another(tensors: Tensors) -> None:
    tensors[PREFIX + "blocks.3.mlp_norm.weight"] = torch.ones(16)


def with_foreign(tensors: Tensors) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)


def misnamed(tensors: Tensors) -> None:
    for key in list(tensors):
        tensors[key.replace("model.norm", "transformer.ln_f")] = tensors.pop(key)


def empty(tensors: Tensors) -> None:
    tensors.clear()


def reshaped(tensors: Tensors) -> None:
    tensors[FIRST] = torch.zeros(64, 8)


def not_finite(tensors: Tensors) -> None:
    tensors[FIRST][0, 0] = float("nan")


DAMAGE: list[tuple[Callable[[Tensors], None], str]] = [
    (without_first, "lacks blocks.0.mlp.up_proj.weight"),
    (with_another, "has .*blocks.3.mlp_norm.weight too many"),
    (with_foreign, "has .*lora_A.weight too many"),
    (misnamed, "lacks blocks.0"),
    (empty, "lacks blocks.0"),
    (reshaped, r"up_proj.weight has shape \(64, 8\), the side network needs \(64, 16\)"),
    (not_finite, "up_proj.weight holds values that are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_damaged_adapter_is_refused_whole(damage: Callable[[Tensors], None], message: str, tmp_path: Path) -> None:
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load") and damage in (with_foreign, misnamed, empty):
        pytest.skip("before 0.21 PEFT shows the tuner only keys of its own layers, and warns about missing ones itself")
    side_tuned().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)

    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny(), tmp_path)

    model = side_tuned()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, adapter_name="damaged")
    assert torch.equal(logits(model), before)
    if hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        assert list(model.peft_config) == ["default"]
        assert not any(".damaged." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 128}, "base_hidden_size of the adapter is 64, but this base has 128"),
        ({"num_hidden_layers": 4}, "base_num_layers of the adapter is 3, but this base has 4"),
    ],
)
def test_another_base_is_refused(other: dict[str, int], message: str, tmp_path: Path) -> None:
    side_tuned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny(**other), tmp_path)


def test_a_resized_vocabulary_does_not_put_the_base_s_embeddings_into_the_adapter(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(VOCABULARY + 4)
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    model.save_pretrained(tmp_path / "adapter")
    assert all("qst_side_network" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    expected = model(token_ids()).logits
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter").eval()
    assert torch.equal(again(token_ids()).logits, expected)


@pytest.mark.parametrize("twice", [True, False], ids=["scales quantized too", "scales as they are"])
def test_a_quantized_base_computes_the_same_after_saving_and_loading(twice: bool, tmp_path: Path) -> None:
    """bitsandbytes changes a layer on some CPUs when its state is taken."""
    tiny(hidden_size=128, intermediate_size=256).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=twice,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM")).eval()
    randomize_side_network(model)
    with torch.no_grad():
        before = model(input_ids=token_ids()).logits
        for _ in range(2):
            model.save_pretrained(tmp_path / "adapter")
            assert torch.equal(model(input_ids=token_ids()).logits, before)
        model.load_adapter(tmp_path / "adapter", "again")
        assert torch.equal(model(input_ids=token_ids()).logits, before)
