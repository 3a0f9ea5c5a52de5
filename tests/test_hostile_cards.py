"""What an untrusted card, repository or config can do to `qtuning info`, `pull` and `push`: nothing."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import tiny
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # imported there, not exported
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qtuning_peft import SideTuningConfig
from qtuning_peft.cli import app
from qtuning_peft.hub import sharing
from qtuning_peft.hub.card import MARKS, OURS, complete
from qtuning_peft.hub.metadata import TrainingMetadata

BEGIN, END = MARKS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})


TENFOLD = (f"{after}: &{after} [{','.join([f'*{name}'] * 10)}]" for name, after in itertools.pairwise("abcdefghi"))
BOMB = "\n".join(["a: &a [x]", *TENFOLD, ""])
RESULT = {"task": {"type": "t"}, "dataset": {"name": None, "type": "d"}, "metrics": [{"type": "loss", "value": None}]}
CARDS = {
    "no YAML": "---\nlicense: [mit\n---\n",
    "an object of Python's": "---\nx: !!python/object/apply:os.system [true]\n---\n",
    "a bomb of merge keys": "---\n"
    + "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
    + "---\n",
    "a bomb as a result": f"---\n{BOMB}model-index: [{{name: x, results: [{{task: {{type: t}}, dataset: {{name: d, "
    "type: d}, metrics: [{type: loss, value: *i}]}]}]\n---\n",
    "much metadata": "---\n" + "".join(f"k{i}: [v, v]\n" for i in range(200_000)) + "---\n",
    "a bomb as data": f"---\n{BOMB}datasets: *i\n---\n",
    "numbers": "---\ndatasets: 7\nlanguage: {a: 1}\nlicense: true\ntags: 9\nbase_model: 5\n---\n",
    "lists in lists": "---\ndatasets: [1, {a: b}, null, [x]]\ntags: [1, null, {a: 1}]\nbase_model: [[1]]\n---\n",
    "Norwegian": "---\nlanguage: [no, en]\nlicense: 2020-01-01\n---\n",
    "itself": "---\ndatasets: &x [*x]\n---\n",
    "a result without a name": f"---\nmodel-index: {json.dumps([{'name': ['x'], 'results': [RESULT]}])}\n---\n",
    "beginnings without an end": "---\nlicense: mit\n---\n" + OURS[0] * 30_000,
    "a table for patterns": f"---\na: b\n---\n{BEGIN}\n" + ("| a " + " | x" * 5000 + "\n") * 60 + END,
    "a long table": f"---\nlicense: mit\n---\n{BEGIN}\n" + "| a | b |\n" * 50_000 + END,
    "too large": "x" * 2**23,
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_any_card_is_shown_or_said_to_be_bad_in_a_moment(name: str, folder: Path) -> None:
    (folder / "README.md").write_text(CARDS[name])
    start = time.perf_counter()
    shown = run("info", folder)
    assert (shown.exit_code, shown.exception) == (0, None)
    assert "parameters" in shown.output
    assert len(shown.output) < 20_000
    try:
        complete(folder / "README.md", sharing.read_config(folder))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (most cards are no error)
    assert time.perf_counter() - start < 10


def test_a_card_has_no_say_in_what_is_known_and_ends_where_it_ends(folder: Path) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{BEGIN}\n| base model | famous/model |\n{END}")
    assert "famous" not in run("info", folder).output
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\n{BEGIN}\n| steps | 7 |\n\nmy own words")
    assert "steps" not in run("info", folder).output


def test_a_card_that_cannot_be_read_stays_and_the_adapter_is_saved(folder: Path) -> None:
    card = "---\nlicense: &a mit\nlicense_name: *a\n---\nmine"
    (folder / "README.md").write_text(card)
    (folder / "adapter_model.safetensors").unlink()
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match=r"\*a is an alias; write out what it stands for.* The card stays as it is"):
        model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == card
    assert (folder / "adapter_model.safetensors").is_file()


def test_what_a_card_links_to_is_neither_changed_nor_pushed(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("private")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(other)
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match=r"README.md is a link"):
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"README.md is a link"):
        sharing.push(folder, "user/name")
    assert other.read_text() == "private"


def test_a_card_cannot_fake_a_line_of_another_name(folder: Path) -> None:
    (folder / "README.md").write_text('---\nlicense: "mit\\nbase model  famous/model"\n---\n')
    assert not any(line.startswith("base model  famous") for line in run("info", folder).output.splitlines())


def test_a_single_tag_is_not_taken_for_its_letters(folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: mine\n---\n")
    complete(folder / "README.md", sharing.read_config(folder))
    assert "- mine\n" in (folder / "README.md").read_text()


def test_what_a_config_says_commands_neither_rich_nor_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SideTuningConfig(base_model_name_or_path="[bold]x[/] [/]")
    monkeypatch.setattr(sharing, "pull", lambda *_: config)
    done = run("pull", "user/name", "-o", tmp_path / "new")
    assert done.exit_code == 0
    assert "[bold]x[/] [/]" in done.output

    def refuse(*_: object) -> None:
        raise ValueError("Invalid filename '\x1b[31mx'")

    monkeypatch.setattr(sharing, "pull", refuse)
    assert "\x1b[31m" not in run("pull", "user/name", "-o", tmp_path / "new").output


@pytest.mark.parametrize("content", ['{"peft_type": "NEWER"}', "[1]", "7"])
def test_a_config_that_peft_cannot_read_is_an_error_of_one_sentence(content: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content)
    done = run("info", folder)
    assert done.exit_code == 1
    assert "Error:" in done.output


def test_a_hub_that_cannot_be_reached_is_an_error_of_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise HTTPError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    done = run("push", folder, "user/name")
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert "Error: Name or service not known" in done.output


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_repository_without_an_adapter_is_not_pulled(
    missing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, local_dir: Path, **__: object) -> None:
        (folder / missing).unlink()
        folder.rename(local_dir)

    monkeypatch.setattr(sharing, "snapshot_download", download)
    with pytest.raises(ValueError, match=f"user/name has no {missing}"):
        sharing.pull("user/name", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_shared_but_what_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    private = ["eu_report.html", "tokenizer.pkl", "tokenizer.bin", "tokenizer_old/optimizer.pt", "tokenizer.json.bak"]
    assert list(filter_repo_objects(private, allow_patterns=sharing.SHARED)) == []


def test_a_folder_is_no_name_of_training_data(folder: Path) -> None:
    before = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="/home/me/rows is no name on the Hub"):
        sharing.push(folder, "user/name", training=TrainingMetadata(datasets=("/home/me/rows",)))
    assert (folder / "README.md").read_text() == before


def test_a_base_in_a_folder_is_noted_when_pushed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/home/me/base"}))
    monkeypatch.setattr(sharing, "HfApi", lambda: pytest.skip("pushed"))
    with (
        pytest.warns(UserWarning, match="its base is /home/me/base, a folder.* --base-model"),
        pytest.raises(pytest.skip.Exception),
    ):
        sharing.push(folder, "user/name")


def test_many_tensors_take_time_in_proportion(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({f"side.{i}.gate": torch.zeros(0) for i in range(100_000)} | load_file(weights), weights)
    before = time.process_time()
    assert "parameters" in run("info", folder).output
    assert time.process_time() - before < 5


def test_a_large_header_is_not_read(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes((2**24 + 1).to_bytes(8, "little") + b"{}")
    done = run("info", folder)
    assert done.exit_code == 1
    assert "has a header of 16777217 bytes" in " ".join(done.output.split())
    for content in (b"", b"\2" + bytes(7) + b"[]", (10**5).to_bytes(8, "little") + b"[" * 10**5):
        (folder / "adapter_model.safetensors").write_bytes(content)
        assert "Error:" in run("info", folder).output


def test_weights_are_not_loaded_to_be_shown(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    save_file({"large": torch.ones(15 * 2**20), "large.gate": torch.ones(2**20)} | load_file(weights), weights)
    script = f"""
from resource import RUSAGE_SELF, getrusage
from qtuning_peft.hub.sharing import describe
before = getrusage(RUSAGE_SELF).ru_maxrss
assert "MiB" in describe({str(folder)!r})["size"]
print(getrusage(RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20 * 1024


def test_many_unknown_fields_are_refused_in_one_sentence(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {f"field{i}": i for i in range(20_000)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"adapter_config.json has many unknown fields, as \['field0'") as error:
            PeftModel.from_pretrained(tiny(), folder)
    assert len(str(error.value)) < 500 + len(str(folder))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "{", "7"])
def test_json_that_cannot_be_read_is_an_error_that_names_the_file(content: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config.json is no configuration \(") as error:
        PeftModel.from_pretrained(tiny(), folder)
    assert "\n" not in str(error.value)
    assert "is no configuration" in " ".join(run("info", folder).output.split())


@pytest.mark.parametrize("pattern", ["[", "(" * 900 + ")" * 900, "x" * 10**7, "(((\\w*)*)*)*X"])
def test_a_pattern_in_a_config_is_never_run(pattern: str, folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": pattern}))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny(), folder)
        tiny().load_adapter(str(folder))
    assert model.peft_config["default"].target_modules == ["model.norm"]
    assert time.perf_counter() - start < 10
