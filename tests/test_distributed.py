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

GROUPS = [(group, name) for group, cases in CASES.items() for name in cases]


def launch(group: str, folder: Path) -> str:
    """Run a group's cases by two processes; returns the end of what they print."""
    tests = Path(distributed_cases.__file__).parent
    own = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            distributed_cases.__file__, group, str(folder),
        ],
        env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.stdout[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of a case, what each of two processes returned; the cases of a group share a launch."""
    folders: dict[str, Path] = {}
    printed: dict[str, str] = {}

    def of(group: str, name: str) -> tuple[Path, list[dict[str, Any]]]:
        if group == "zero3" and importlib.util.find_spec("deepspeed") is None:
            pytest.skip("needs DeepSpeed: pip install deepspeed")
        if group not in folders:
            folders[group] = tmp_path_factory.mktemp(group)
            printed[group] = launch(group, folders[group])
        files = [folders[group] / name / f"{rank}.pt" for rank in (0, 1)]
        assert all(file.is_file() for file in files), printed[group]
        found = [torch.load(file) for file in files]
        for result in found:
            assert "error" not in result, result["error"]
        return folders[group] / name, found

    return of


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_two_processes_train_as_one(group: str, name: str, results: Any, tmp_path: Path) -> None:
    folder, (first, second) = results(group, name)
    alone = CASES[group][name](tmp_path)
    assert len(first["losses"]) >= 3
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-3 if "cache" in name or "prefix" in name else 1e-5)
    assert first.get("passes") == second.get("passes")
    if group.startswith("fsdp") and name != "prefix of one":
        assert first.get("passes") == alone.get("passes")
    assert first.get("kept") == second.get("kept") == alone.get("kept")
    assert first["tensors"].keys() == alone["tensors"].keys()
    for key, tensor in first["tensors"].items():
        assert torch.equal(tensor, second["tensors"][key]), key
    loaded = PeftModel.from_pretrained(tiny(), folder / "adapter")
    for key, tensor in loaded.named_parameters():
        if "qst_side_network" in key:
            assert torch.equal(tensor, first["tensors"][key]), key
    assert torch.isfinite(loaded(input_ids=token_ids()).logits).all()


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, cases in REFUSED.items() for name in cases])
def test_pruning_by_a_sharded_model_is_refused(group: str, name: str, results: Any) -> None:
    """Whether and how often a batch is scored depends on the batch, and the others would wait."""
    _, found = results(group, name)
    assert all("The model is sharded" in result["refused"] for result in found)


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
