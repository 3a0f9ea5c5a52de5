"""Two processes train as one does: the same losses, the same side network on both, and whole adapter files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_cases
import pytest
import torch
from conftest import side_parameters, tiny, token_ids
from distributed_cases import CASES, REFUSED
from peft import PeftModel, get_peft_model

from qtuning_peft import SideTuningConfig
from qtuning_peft.head import positions_at_once
from qtuning_peft.side_tuning.follow import find_decoder

# Of a base in 16 bits: whoever adds in another order rounds differently.
EXACT, ROUNDED = 1e-5, 1e-3


def launch(group: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run a group's cases by two processes; returns for every case what each of them returned."""
    tests = Path(distributed_cases.__file__).parent
    own = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            distributed_cases.__file__, group, str(folder),
        ],
        env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    found = {}
    for name in [*CASES[group], *REFUSED.get(group, {})]:
        files = [folder / name / f"{rank}.pt" for rank in (0, 1)]
        errors = [error for file in files if file.is_file() and (error := torch.load(file).get("error"))]
        assert not errors, f"{name}: " + "\n".join(errors)
        assert all(file.is_file() for file in files), f"{name}: {done.stdout[-4000:]}"
        found[name] = [torch.load(file) for file in files]
    assert done.returncode == 0, done.stdout[-4000:]
    return found


# One test for each launch: of several, tests that run at the same time would each make it.
@pytest.mark.parametrize("group", CASES)
def test_two_processes_train_as_one(group: str, tmp_path: Path) -> None:
    if group == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
    found = launch(group, tmp_path)
    for name, case in CASES[group].items():
        (tmp_path / "alone" / name).mkdir(parents=True)
        require_the_same(f"{group}, {name}", *found[name], case(tmp_path / "alone" / name))
        require_whole_file(name, tmp_path / name / "adapter", found[name][0])
    if "EUPruningSFTTrainer" in CASES[group]:
        # Measured where the base is there whole.
        card = (tmp_path / "EUPruningSFTTrainer" / "adapter" / "README.md").read_text()
        assert ("| time per generated token |" in card) == (group == "ddp")
        assert "| versions |" in card
    for name in REFUSED.get(group, {}):
        # Whether and how often a batch is scored depends on the batch, and the other process would wait.
        assert all("The model is sharded" in result["refused"] for result in found[name]), name


def require_the_same(name: str, first: dict[str, Any], second: dict[str, Any], alone: dict[str, Any]) -> None:
    """Losses as of one process; side networks of the two, to the bit."""
    tolerance = ROUNDED if "cache" in name or "prefix" in name else EXACT
    assert len(first["losses"]) >= 3
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=tolerance), name
    assert first["passes"] == second["passes"], name
    if name.startswith("fsdp") and "prefix of one" not in name:
        assert first["passes"] == alone["passes"], name
    assert first.get("kept") == second.get("kept") == alone.get("kept"), name
    assert first["tensors"].keys() == alone["tensors"].keys()
    for key, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][key]), f"{name}: {key}"


def require_whole_file(name: str, folder: Path, trained: dict[str, Any]) -> None:
    """One process loads what two have saved, and computes what they did."""
    # DeepSpeed computes in float32 with weights that were loaded in 16 bits.
    loaded_in = torch.bfloat16 if "cache" in name else trained["logits"].dtype
    loaded = PeftModel.from_pretrained(tiny().to(loaded_in).to(trained["logits"].dtype), folder)
    tensors = {key: tensor for key, tensor in loaded.state_dict().items() if "qst_side_network" in key}
    assert tensors.keys() == trained["tensors"].keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, trained["tensors"][key]), f"{name}: {key}"
    torch.testing.assert_close(
        loaded(input_ids=token_ids()).logits, trained["logits"], msg=lambda said: f"{name}: {said}"
    )


def test_a_partitioned_base_is_read_by_its_whole_shape() -> None:
    """ZeRO-3 leaves empty tensors with attributes; here without DeepSpeed."""
    base = tiny()
    expected = find_decoder(base)
    for parameter in base.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    found = find_decoder(base)
    assert (found.norm_path, found.shape) == (expected.norm_path, expected.shape)
    assert len(found.blocks) == len(expected.blocks)
    assert positions_at_once(base, 1000) == 10
    model = get_peft_model(base, SideTuningConfig(reduction_factor=4))
    assert side_parameters(model)
