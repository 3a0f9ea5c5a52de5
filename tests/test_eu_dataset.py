"""Scoring and pruning whole data sets: resuming after a kill, files, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny, word_tokenizer
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from qtuning_peft import EUPruner, EUScorer, prune, score
from qtuning_peft.atomic import replacing
from qtuning_peft.cli import app
from qtuning_peft.eu_plane.files import read_data, write_data


def rows(count: int = 50, seed: int = 0) -> list[dict[str, str]]:
    draw = np.random.default_rng(seed)
    return [
        {
            "prompt": " ".join(f"w{i}" for i in draw.integers(3, 98, 3)),
            "completion": "".join(f" w{i}" for i in draw.integers(3, 98, draw.integers(2, 12))),
        }
        for _ in range(count)
    ]


def counting(model: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_resumed_is_uninterrupted_and_scores_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, options = Dataset.from_list(rows(40)), {"chat_template": False, "rows_per_part": 8, "progress": False}
    model = tiny()
    calls = counting(model)
    expected = score(data, model, word_tokenizer(), **options)
    needed = len(calls)

    # Interrupted in the third of five parts.
    seen: list[int] = []
    original = EUScorer.__call__

    def interrupted(self: EUScorer, *args: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(EUScorer, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score(data, model, word_tokenizer(), resume_dir=tmp_path / "parts", **options)
    monkeypatch.setattr(EUScorer, "__call__", original)
    assert len(list((tmp_path / "parts").iterdir())) == 2

    calls.clear()
    resumed = score(data, model, word_tokenizer(), resume_dir=tmp_path / "parts", **options)
    assert len(calls) == needed * 3 // 5
    assert resumed.to_dict() == expected.to_dict()
    calls.clear()
    score(data, model, word_tokenizer(), resume_dir=tmp_path / "parts", **options)
    assert calls == []


def test_parts_of_other_data_models_and_settings_are_not_taken(tmp_path: Path) -> None:
    data, tokenizer = Dataset.from_list(rows(10)), word_tokenizer()
    options = {"chat_template": False, "progress": False, "resume_dir": tmp_path}
    first = score(data, tiny(), tokenizer, **options)
    for changed in (
        score(Dataset.from_list(rows(10, seed=1)), tiny(), tokenizer, **options),
        score(data, tiny(seed=1), tokenizer, **options),
        score(data, get_peft_model(tiny(), LoraConfig(init_lora_weights=False)), tokenizer, **options),
    ):
        assert changed["error"][0] != first["error"][0]
    assert "el2n" in score(data, tiny(), tokenizer, scores=("el2n",), **options).column_names


def test_a_killed_process_loses_at_most_one_part(tmp_path: Path, checkpoint: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    write_data(Dataset.from_list(rows(3000)), source)
    command = [sys.executable, "-m", "qtuning_peft.cli", "score", str(source), str(checkpoint)]
    command += ["--output", str(output), "--no-chat-template", "--tokens-per-batch", "256"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "scored.jsonl.parts"
    try:
        for _ in range(1200):
            if parts.is_dir() and len(list(parts.glob("*.arrow"))) >= 3:
                break
            assert process.poll() is None, "the process ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists()
    finished = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.arrow")}
    assert 3 <= len(finished) < 12
    subprocess.run([*command, "--resume-dir", str(parts)], env=environment, check=True, stderr=subprocess.DEVNULL)
    assert {name: (parts / name).stat().st_mtime_ns for name in finished} == finished
    expected = score(read_data(source), tiny(), word_tokenizer(), chat_template=False, tokens_per_batch=256)
    scored = read_data(output)
    assert len(scored) == 3000
    np.testing.assert_allclose(scored["error"][:], expected["error"][:], atol=1e-5)


@pytest.mark.parametrize("damage", [b"", b"garbage", "half"])
def test_a_damaged_part_is_computed_again(tmp_path: Path, damage: bytes | str) -> None:
    data, options = Dataset.from_list(rows(10)), {"chat_template": False, "progress": False, "resume_dir": tmp_path}
    expected = score(data, tiny(), word_tokenizer(), **options)
    (part,) = tmp_path.iterdir()
    content = part.read_bytes()
    part.unlink()
    part.write_bytes(content[: len(content) // 2] if isinstance(damage, str) else damage)
    assert score(data, tiny(), word_tokenizer(), **options).to_dict() == expected.to_dict()


def test_another_tokenizer_makes_other_parts(tmp_path: Path) -> None:
    data, options = Dataset.from_list(rows(3)), {"chat_template": False, "progress": False, "resume_dir": tmp_path}
    tokenizer = word_tokenizer()
    assert score(data, tiny(), tokenizer, **options)["input_ids"][0][-1] == 99
    tokenizer.eos_token = "w7"
    assert score(data, tiny(), tokenizer, **options)["input_ids"][0][-1] != 99


def test_splits_and_streams_are_scored() -> None:
    data = Dataset.from_list(rows(12))
    options = {"chat_template": False, "progress": False}
    expected = score(data, tiny(), word_tokenizer(), **options)["error"][:]
    splits = score(DatasetDict({"train": data, "test": data.select([3])}), tiny(), word_tokenizer(), **options)
    np.testing.assert_allclose(splits["train"]["error"][:], expected, atol=1e-5)
    assert splits["test"]["error"][0] == pytest.approx(expected[3], abs=1e-5)
    stream = score(data.to_iterable_dataset(), tiny(), word_tokenizer(), **options)
    np.testing.assert_allclose([row["error"] for row in stream], expected, atol=1e-5)


def test_one_line_prunes() -> None:
    data, tokenizer = Dataset.from_list(rows(40)), word_tokenizer()
    scoring = {"chat_template": False, "progress": False}
    kept = prune(data, tiny(), tokenizer, sample_ratio=0.25, token_ratio=0.5, scoring=scoring)
    assert len(kept) == 10
    # A misconception's end-of-sequence token is special, and stays.
    trimmed = [row for row in kept if row["quadrant"] == "misconception"]
    assert trimmed
    assert all(row["labels"][-1] == 99 for row in trimmed)
    scored = score(data, tiny(), tokenizer, **scoring)
    by_hand = scored.map(EUPruner(sample_ratio=0.25, token_ratio=0.5, tokenizer=tokenizer).fit(scored), batched=True)
    assert kept["labels"][:] == by_hand["labels"][:]
    streamed = prune(data.to_iterable_dataset(), tiny(), tokenizer, sample_ratio=0.5, per_batch=True, scoring=scoring)
    assert len(list(streamed)) == 20


def test_what_cannot_be_scored_or_pruned_is_refused() -> None:
    data = Dataset.from_list(rows(4))
    with pytest.raises(ValueError, match=r"pass dataset\['train'\]"):
        prune(DatasetDict({"train": data}), tiny(), sample_ratio=0.5)
    with pytest.raises(ValueError, match="set per_batch to True"):
        prune(data.to_iterable_dataset(), tiny(), sample_ratio=0.5)
    with pytest.raises(ValueError, match="The data is empty"):
        score(data.select([]), tiny(), word_tokenizer(), chat_template=False)
    with pytest.raises(ValueError, match="rows_per_part is 0"):
        score(data, tiny(), word_tokenizer(), rows_per_part=0)


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data"])
def test_files_give_back_what_was_written(tmp_path: Path, name: str) -> None:
    scored = score(Dataset.from_list(rows(9)), tiny(), word_tokenizer(), chat_template=False, progress=False)
    write_data(scored, tmp_path / name)
    back = read_data(tmp_path / name)
    assert back.to_dict() == scored.to_dict()
    write_data(scored.select([0]), tmp_path / name)
    assert len(read_data(tmp_path / name)) == 1
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "rows.JSONL"
    lines = ['{"text": "2020-01-01", "id": 1}', "", '{"text": "x", "more": [1.5]}']
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_data(file).to_list() == [
        {"text": "2020-01-01", "id": 1, "more": None},
        {"text": "x", "id": None, "more": [1.5]},
    ]
    file.write_text('[{"text": "a"},\n {"text": "b"}]')
    assert read_data(file)["text"][:] == ["a", "b"]


def test_what_killed_processes_left_is_cleared_away(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(3))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".data.jsonl.{dead.pid}.x8_4abcd"
    left.mkdir()
    (left / "data.jsonl").write_text("half")
    (tmp_path / ".data.jsonl.mine").write_text("mine")
    write_data(data, tmp_path / "data.jsonl")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".data.jsonl.mine", "data.jsonl"]
    # Killed between putting a folder aside and the new one in its place.
    write_data(data, tmp_path / "folder")
    (tmp_path / f".folder.{dead.pid}.x8_4abcd").mkdir()
    (tmp_path / "folder").rename(tmp_path / f".folder.{dead.pid}.x8_4abcd" / "former")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "folder"):
        raise ZeroDivisionError
    assert read_data(tmp_path / "folder").to_list() == data.to_list()


def test_links_stay_links_and_devices_are_left_alone(tmp_path: Path) -> None:
    data = Dataset.from_list(rows(3))
    for name in ("data.jsonl", "folder"):
        write_data(data.select([0]), tmp_path / name)
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        write_data(data, tmp_path / f"link-{name}")
        assert (tmp_path / f"link-{name}").is_symlink()
        assert len(read_data(tmp_path / name)) == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        write_data(data, tmp_path / "pipe")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = score(Dataset.from_list(rows(9)), tiny(), word_tokenizer(), chat_template=False, progress=False)
    write_data(scored, tmp_path / "data.jsonl")
    before = (tmp_path / "data.jsonl").read_bytes()

    def failing(*args: Any, **kwargs: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dumps", failing)
    with pytest.raises(OSError, match="No space"):
        write_data(scored.select([0]), tmp_path / "data.jsonl")
    assert (tmp_path / "data.jsonl").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_commands_score_prune_and_plot(tmp_path: Path, checkpoint: Path) -> None:
    write_data(Dataset.from_list(rows(40)), tmp_path / "rows.jsonl")
    scored, kept = tmp_path / "scored.parquet", tmp_path / "kept.jsonl"
    result = run("score", tmp_path / "rows.jsonl", checkpoint, "-o", scored, "--no-chat-template", "--score", "el2n")
    assert result.exit_code == 0, result.stderr
    assert "el2n" in read_data(scored).column_names
    assert not (tmp_path / "scored.parquet.parts").exists()
    result = run(
        "prune", scored, "-o", kept, "--sample-ratio", "0.25", "--token-ratio", "0.5", "--tokenizer", checkpoint
    )
    assert result.exit_code == 0, result.stderr
    assert "kept 10 of 40 samples" in " ".join(result.stderr.split())
    assert len(read_data(kept)) == 10
    for output, options in (
        ("plane.png", []),
        ("plane.svg", ["--sample-ratio", "0.5"]),
        ("report.html", ["--sample-ratio", "0.5", "--token-ratio", "0.5", "--tokenizer", checkpoint]),
    ):
        result = run("plot", scored, "-o", tmp_path / output, *options)
        assert result.exit_code == 0, result.stderr
        assert (tmp_path / output).stat().st_size > 1000


def test_an_adapter_can_be_scored_from_the_command_line(tmp_path: Path, checkpoint: Path) -> None:
    write_data(Dataset.from_list(rows(5)), tmp_path / "rows.jsonl")
    base = type(tiny()).from_pretrained(checkpoint)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained(
        tmp_path / "adapter"
    )
    errors = []
    for model in (checkpoint, tmp_path / "adapter"):
        output = ("-o", tmp_path / "out.jsonl", "--overwrite")
        result = run("score", tmp_path / "rows.jsonl", model, *output, "--no-chat-template")
        assert result.exit_code == 0, result.stderr
        errors.append(read_data(tmp_path / "out.jsonl")["error"][0])
    assert abs(errors[0] - errors[1]) > 1e-4


def test_bad_input_is_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    good = tmp_path / "rows.jsonl"
    write_data(Dataset.from_list(rows(5)), good)
    (tmp_path / "cut.jsonl").write_text(good.read_text()[:-20])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    (tmp_path / "mixed.jsonl").write_text('{"text": "a"}\n{"text": 4}\n')
    (tmp_path / "numbers.jsonl").write_text("[1, 2]")
    (tmp_path / "odd.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "something").write_text("mine")
    output = tmp_path / "out.jsonl"
    for arguments, sentence in (
        (("score", tmp_path / "cut.jsonl", checkpoint, "-o", output), "line 5 is no JSON object"),
        (("score", tmp_path / "empty.jsonl", checkpoint, "-o", output), "has no rows"),
        (("score", tmp_path / "latin.jsonl", checkpoint, "-o", output), "line 1 is no JSON object"),
        (("score", tmp_path / "mixed.jsonl", checkpoint, "-o", output), "column of several types"),
        (("score", tmp_path / "numbers.jsonl", checkpoint, "-o", output), "other than objects"),
        (("score", good, checkpoint, "-o", output, "--split", "train"), "leave --split out"),
        (("score", tmp_path / "odd.csv", checkpoint, "-o", output), "ends in .csv"),
        (("score", tmp_path / "nothing.jsonl", checkpoint, "-o", output), "There is no data"),
        (("score", good, checkpoint, "-o", tmp_path / "folder"), "something other than a data set"),
        (("score", good, checkpoint, "-o", good / "x.jsonl"), "not a folder that can be written to"),
        (("score", good, checkpoint, "-o", output), "no chat template"),
        (("score", good, checkpoint, "-o", output, "--column", "prompt"), "write it as prompt=question"),
        (("score", good, checkpoint, "-o", output, "--column", "prompt=q"), "no column q"),
        (("score", good, checkpoint, "-o", output, "--dtype", "int8"), "dtype is 'int8'"),
        (("prune", good, "-o", output, "--sample-ratio", "0.5"), "no column error"),
        (("prune", good, "-o", output, "--sample-ratio", "2"), "sample_ratio is 2.0"),
        (("prune", good, "-o", output), "No budget is given"),
        (("plot", good, "-o", tmp_path / "report.html"), "give --tokenizer and --sample-ratio"),
    ):
        result = run(*arguments)
        assert result.exit_code == 1, (arguments, result.output)
        assert sentence in " ".join(result.stderr.split()), (arguments, result.stderr)
        assert "Traceback" not in result.stderr
        assert not output.exists()
    assert (tmp_path / "folder" / "something").read_text() == "mine"


def test_help_reads_well() -> None:
    for command in ("score", "prune", "plot"):
        result = run(command, "--help")
        assert result.exit_code == 0
        assert "--output" in result.stdout
