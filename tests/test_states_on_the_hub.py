"""A folder of states on the Hub: pushed and got by huggingface_hub's own functions, and read as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import tiny, token_ids
from datasets import Dataset
from loopback_hub import LoopbackHub

from qtuning_peft import SideTuningConfig, StatesCollator, compute_states, load_states, model_from_states

CONFIG = SideTuningConfig(reduction_factor=4, layers_to_transform=[0, 2])
PUSH = """
import sys
from pathlib import Path
from datasets import Dataset
from huggingface_hub import HfApi, snapshot_download
from qtuning_peft import load_states

folder, place = sys.argv[1:]
HfApi().create_repo("qst/states", repo_type="dataset")
HfApi().upload_folder(folder_path=folder, repo_id="qst/states", repo_type="dataset")
print(snapshot_download("qst/states", repo_type="dataset", local_dir=place))
# In the cache, files are links to others of other names.
rows = load_states(folder)
assert load_states(snapshot_download("qst/states", repo_type="dataset")).to_dict() == rows.to_dict()
# As rows without a folder, in Parquet.
rows.push_to_hub("qst/rows")
files = sorted(map(str, Path(snapshot_download("qst/rows", repo_type="dataset")).glob("data/*.parquet")))
assert Dataset.from_parquet(files).to_dict() == rows.to_dict()
"""


def test_a_folder_is_pushed_and_got(tmp_path: Path) -> None:
    ids = token_ids(12, 20).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": [-100] * 8 + row[8:]} for row in ids])
    folder = tmp_path / "states"
    compute_states(data, tiny(), None, CONFIG, folder, rows_per_part=5, progress=False)
    with LoopbackHub() as hub:
        environment = os.environ | hub.environment | {"HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-c", PUSH, str(folder), str(tmp_path / "got")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        pushed = {*hub.repo("datasets/qst/states").at("main").files}
    assert pushed == {file.name for file in folder.iterdir()}
    batches = [StatesCollator(each)(list(load_states(each))) for each in (folder, tmp_path / "got")]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert model_from_states(tmp_path / "got", CONFIG).train()(**batches[1]).loss.isfinite()
