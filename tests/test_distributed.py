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
from conftest import tiny, token_ids
from distributed_cases import CASES
from peft import PeftModel

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
    if group == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed: pip install deepspeed")
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
