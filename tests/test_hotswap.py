"""Another adapter's weights in place of a loaded one's: the same tensors, the same graph, or nothing changed at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomize_side_network, side_parameters, tiny, token_ids
from peft import PeftModel, get_peft_model

from qtuning_peft import SideTuningConfig, hotswap_adapter


def saved(folder: Path, seed: int, **fields: Any) -> Path:
    model = get_peft_model(tiny(), SideTuningConfig(**{"reduction_factor": 4, "task_type": "CAUSAL_LM"} | fields))
    randomize_side_network(model, seed)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / str(seed), seed) for seed in (1, 2)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(), use_cache=False).logits


def test_the_swapped_is_as_loaded_afresh(adapters: list[Path]) -> None:
    """In one graph: what is compiled is not compiled again. The other adapter of the model stays what it is."""
    expected = [logits(PeftModel.from_pretrained(tiny(), folder)) for folder in adapters]
    assert not torch.allclose(*expected)
    model = PeftModel.from_pretrained(tiny(), adapters[0])
    model.load_adapter(adapters[0], "other")
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled), expected[0])
    compiled_once, parameters = len(graphs), list(model.parameters())
    for index in (1, 0, 1):
        hotswap_adapter(compiled, adapters[index])
        torch.testing.assert_close(logits(compiled), expected[index])
    assert len(graphs) == compiled_once
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), expected[0])


@pytest.mark.parametrize("fields", [{"reduction_factor": 8}, {"mixing": "paper"}, {"tap_every": 1}], ids=str)
def test_other_settings_are_refused_and_nothing_changes(
    fields: dict[str, Any], adapters: list[Path], tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(tiny(), adapters[0])
    expected = logits(model)
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is "):
        hotswap_adapter(model, saved(tmp_path / "other", 3, **fields))
    assert torch.equal(logits(model), expected)


def test_a_damaged_file_and_a_wrong_name_are_refused(adapters: list[Path]) -> None:
    model = PeftModel.from_pretrained(tiny(), adapters[0])
    before = {name: parameter.clone() for name, parameter in side_parameters(model).items()}
    with pytest.raises(ValueError, match="adapter_name is 'nobody'"):
        hotswap_adapter(model, adapters[1], "nobody")
    file = adapters[1] / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no valid safetensors file"):
        hotswap_adapter(model, adapters[1])
    for name, parameter in side_parameters(model).items():
        assert torch.equal(parameter, before[name])
