"""Every recipe for Axolotl holds keys that it knows, is valid, and trains a pico model for two steps."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import yaml
from safetensors.torch import load_file
from test_axolotl import train, validated

from qtuning_peft import recipes

pytest.importorskip("axolotl.cli", reason="axolotl is not installed; run scripts/test_axolotl.sh")

NAMES = [name for name in recipes.names() if name.startswith("axolotl/")]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid(name: str, tmp_path: Path) -> None:
    from axolotl.integrations.config import merge_input_args

    # Axolotl reads the model's configuration, and logs to the output folder; everything else is the recipe's.
    model = pico.save_model(tmp_path / "model")
    recipe = recipes.load(name) | {"base_model": str(model), "output_dir": str(tmp_path / "out")}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    cfg = validated(file)
    assert cfg.overrides_of_model_kwargs["quantization_config"]["load_in_4bit"] is True
    # Axolotl drops what it does not know without a word.
    assert set(recipe) <= set(merge_input_args()[0].model_fields)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name: str, tmp_path: Path) -> None:
    pico.save_model(tmp_path / "model")
    data = {"path": str(pico.write_chat(tmp_path / "chat.jsonl")), "ds_type": "json", "type": "chat_template"}
    # The pico model and its rows, on a CPU, for two steps; everything else is the recipe's.
    recipe = recipes.load(name) | {
        "base_model": str(tmp_path / "model"), "datasets": [data], "chat_template": "tokenizer_default",
        "dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "out"),
        "special_tokens": {}, "sequence_len": 128, "max_steps": 2, "val_set_size": 4, "optimizer": "adamw_torch",
        "bf16": False, "tf32": False, "micro_batch_size": 4,
    }  # fmt: skip
    if "layers_to_transform" in recipe["qst"]:
        recipe["qst"]["layers_to_transform"] = [1, 3]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    output = train(file)
    assert "(4-bit)" in output
    assert all("qst_side_network" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
