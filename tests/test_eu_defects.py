"""What went wrong once in scoring, pruning and their files, and stays mended."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import randomize_side_network, tiny, word_tokenizer
from datasets import Dataset
from peft import get_peft_model
from test_eu_dataset import rows, run
from test_eu_pruner import scored_data
from torch import nn

from qtuning_peft import EUPruner, EUScorer, SideTuningConfig, add_few_shot_examples, score
from qtuning_peft.eu_plane.files import read_data, write_data

PLAIN: dict[str, Any] = {"chat_template": False, "progress": False}


# -- the fingerprint ---------------------------------------------------------------------------------------------------


def quantized() -> Any:
    """A tiny model whose linear layers are in NF4, on the CPU."""
    import bitsandbytes as bnb

    model = tiny()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            layer.load_state_dict(module.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    return model


def test_quantized_weights_and_their_scales_count() -> None:
    model = quantized()
    layer = model.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == torch.uint8
    first = EUScorer(model).fingerprint()
    EUScorer(model)({"input_ids": [[5, 6, 7, 8]]})
    assert EUScorer(model).fingerprint() == first
    with torch.inference_mode():
        layer.weight.data[3] ^= 1
        changed = EUScorer(model).fingerprint()
        layer.weight.quant_state.absmax[0] *= 2
    assert len({first, changed, EUScorer(model).fingerprint()}) == 3


def test_a_buffer_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny(), SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM"))
    randomize_side_network(model)
    data = Dataset.from_list(rows(4))
    before = score(data, model, word_tokenizer(), resume_dir=tmp_path, **PLAIN)
    mapped = data.map(EUScorer(model, word_tokenizer(), chat_template=False), batched=True)
    name, buffer = next((n, b) for n, b in model.named_buffers() if "qst" in n)
    with torch.no_grad():
        buffer += 1.0
    after = score(data, model, word_tokenizer(), resume_dir=tmp_path, **PLAIN)
    assert np.abs(np.array(after["error"]) - before["error"]).max() > 1e-6, name
    again = data.map(EUScorer(model, word_tokenizer(), chat_template=False), batched=True)
    assert again["error"][:] != mapped["error"][:]


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [int(os.environ.get("FUZZ_CASES", "100"))])
def test_no_damaged_part_is_believed(copies: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]]})
    model = tiny()
    expected = score(data, model, progress=False, resume_dir=tmp_path).to_dict()
    (part,) = tmp_path.iterdir()
    whole, draw = part.read_bytes(), np.random.default_rng(0)
    caplog.set_level(logging.WARNING, logger="qtuning_peft")
    for number in range(copies):
        content = bytearray(whole)
        place = int(draw.integers(len(content)))
        if number % 3 == 0:
            content[place] ^= 1 << int(draw.integers(8))
        elif number % 3 == 1:
            content[place : place + 512] = draw.bytes(len(content[place : place + 512]))
        else:
            del content[place:]
        part.write_bytes(content)
        caplog.clear()
        assert score(data, model, progress=False, resume_dir=tmp_path).to_dict() == expected
        assert [record.getMessage().endswith("its rows are scored again.") for record in caplog.records] == [True]
        assert part.read_bytes() == whole


def test_a_part_under_another_name_is_not_taken(tmp_path: Path) -> None:
    first, second = (Dataset.from_dict({"input_ids": [[5, 6, token]]}) for token in (7, 8))
    score(first, tiny(), progress=False, resume_dir=tmp_path)
    (part,) = tmp_path.iterdir()
    expected = score(second, tiny(), progress=False, resume_dir=tmp_path).to_dict()
    (other,) = {*tmp_path.iterdir()} - {part}
    shutil.copy(part, other)
    assert score(second, tiny(), progress=False, resume_dir=tmp_path).to_dict() == expected


# -- outputs -----------------------------------------------------------------------------------------------------------


def says(result: Any, sentence: str) -> None:
    """A failed command shows `sentence`, wherever its lines are broken."""
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    assert "".join(sentence.split()) in "".join(result.stderr.split())


@pytest.mark.parametrize("name", ["out.jsonl", "out"])
def test_a_finished_output_is_not_made_again(name: str, tmp_path: Path, checkpoint: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / name
    write_data(Dataset.from_list(rows(8)), source)
    command = ["score", source, checkpoint, "-o", output, "--no-chat-template"]
    assert run(*command).exit_code == 0
    before = read_data(output).to_dict()
    says(run(*command), "is there already; choose another output, or give --overwrite.")
    scored, kept = output, tmp_path / f"kept{output.suffix}"
    pruning = ["prune", scored, "-o", kept, "--num-samples", "3"]
    assert run(*pruning).exit_code == 0
    says(run(*pruning), "is there already")
    assert run(*pruning[:-1], "2", "--overwrite").exit_code == 0
    assert len(read_data(kept)) == 2
    assert read_data(output).to_dict() == before
    assert run(*command, "--overwrite").exit_code == 0


def test_two_processes_on_one_output(tmp_path: Path, checkpoint: Path) -> None:
    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write_data(Dataset.from_list(rows(8)), source)
    command = ["score", source, checkpoint, "-o", output, "--no-chat-template"]
    script = f"""
from pathlib import Path
from qtuning_peft.atomic import alone_with
with alone_with(Path({str(output)!r})):
    print("held", flush=True)
    input()
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    says(run(*command), f"Another process is at work on {output}; wait for it")
    other.communicate("\n")
    assert run(*command).exit_code == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.jsonl", "rows.jsonl"]


def test_folders_and_lines_that_cannot_be_read(tmp_path: Path, checkpoint: Path) -> None:
    folder, deep = tmp_path / "folder", tmp_path / "deep.jsonl"
    write_data(Dataset.from_list(rows(2)), folder)
    (folder / "state.json").write_text("{}")
    says(run("prune", folder, "-o", tmp_path / "x", "--num-samples", "1"), "folder that datasets cannot read")
    deep.write_text('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}")
    says(run("score", deep, checkpoint, "-o", tmp_path / "x"), "deep.jsonl, line 1 is no JSON object")


# -- as a function for map ---------------------------------------------------------------------------------------------


def test_another_process_gets_a_sentence() -> None:
    data, scorer = Dataset.from_list(rows(4)), EUScorer(tiny(), word_tokenizer(), chat_template=False)
    with pytest.raises(ValueError, match="cannot be sent to another process; call map without num_proc"):
        data.map(scorer, batched=True, num_proc=1)


def test_a_single_conversation_is_refused() -> None:
    turns = [{"role": "user", "content": "w5"}], [{"role": "assistant", "content": "w6"}]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    for row in ({"prompt": turns[0], "completion": turns[1]}, {"messages": turns[0] + turns[1]}):
        with pytest.raises(ValueError, match="call map with batched=True"):
            Dataset.from_list([row]).map(EUScorer(tiny(), tokenizer))


@pytest.mark.parametrize("kind", ["arrow", "pandas", "torch", "numpy"])
def test_data_of_every_format_is_scored_and_pruned(kind: str) -> None:
    plain = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12], [4, 8, 15, 16]]})
    expected, data = score(plain, tiny(), progress=False), plain.with_format(kind)
    scored = score(data, tiny(), progress=False)
    assert scored.format["type"] == kind
    mapped = data.map(EUScorer(tiny()), batched=True)
    for found in (scored, mapped):
        np.testing.assert_allclose(found.with_format(None)["error"][:], expected["error"][:], atol=1e-6)
    pruner = EUPruner(num_samples=2)
    kept = scored.map(pruner.fit(scored), batched=True).with_format(None)
    assert kept["labels"][:] == expected.map(EUPruner(num_samples=2).fit(expected), batched=True)["labels"][:]


def test_columns_of_the_users_own_are_not_overwritten() -> None:
    data = Dataset.from_dict({"input_ids": [[5, 6, 7]], "error": ["none"]})
    for scoring in (lambda: score(data, tiny(), progress=False), lambda: data.map(EUScorer(tiny()), batched=True)):
        with pytest.raises(ValueError, match="has a column error of its own, which scoring would replace; rename it"):
            scoring()
    scored = scored_data(6)
    own = scored.add_column("quadrant", ["north-west"] * 6)
    with pytest.raises(ValueError, match="has a column quadrant of its own, which pruning would replace; rename it"):
        own.map(EUPruner(sample_ratio=0.5).fit(own), batched=True)
    twice = scored.map(EUPruner(sample_ratio=0.5, keep_dropped=True).fit(scored), batched=True)
    assert len(twice.map(EUPruner(sample_ratio=0.5).fit(twice), batched=True)) == 3


def test_pruning_with_indices() -> None:
    scored = scored_data(6)
    pruner = EUPruner(sample_ratio=0.5).fit(scored)
    assert scored.map(pruner, batched=True, with_indices=True)["id"][:] == scored.map(pruner, batched=True)["id"][:]


def test_scores_of_a_trimmed_row_are_those_of_its_tokens() -> None:
    scored = scored_data(100)
    kept = scored.map(EUPruner(sample_ratio=0.5, token_ratio=0.5).fit(scored), batched=True)
    trimmed = [row for row in kept if row["quadrant"] == "misconception"]
    assert trimmed
    for row in kept:
        assert row["error"] == pytest.approx(np.mean(row["token_error"]), abs=1e-6)
        if row["quadrant"] == "misconception":
            assert row["uncertainty"] == pytest.approx(np.mean(row["token_uncertainty"]), abs=1e-6)
            assert row["repetition"] == scored[row["id"]]["repetition"]


def test_copies_are_reported() -> None:
    scored = scored_data(20)
    copied = Dataset.from_list([*scored, *scored.select([4, 5]), *scored.select([4])])
    with pytest.warns(UserWarning, match="3 of 23 rows score exactly as another one, as copies do"):
        EUPruner(sample_ratio=1.0).fit(copied)


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    write_data(Dataset.from_list(rows(2)), tmp_path / "rows.jsonl")
    missing = tmp_path / "no" / "model"
    result = run("score", tmp_path / "rows.jsonl", missing, "-o", tmp_path / "x.jsonl")
    says(result, f"There is no folder {missing}, and no model of this name")


def test_rows_without_scores_name_the_command(tmp_path: Path) -> None:
    write_data(Dataset.from_list(rows(2)), tmp_path / "rows.jsonl")
    options = ("-o", tmp_path / "x", "--num-samples", "1", "--strategy", "ifd")
    says(run("prune", tmp_path / "rows.jsonl", *options), "first, from a shell with qtuning score --score ifd.")


@pytest.mark.parametrize("token", [-5, 2**40])
def test_tokens_that_are_none(token: int, tmp_path: Path, checkpoint: Path) -> None:
    rows_of = scored_data(8).map(lambda row: {"input_ids": [token, *row["input_ids"][1:]]})
    write_data(rows_of, tmp_path / "scored.parquet")
    options = ("-o", tmp_path / "report.html", "--sample-ratio", "0.5", "--tokenizer", checkpoint)
    says(run("plot", tmp_path / "scored.parquet", *options), f"A row has the token {token}, which no tokenizer knows")


def test_a_report_without_matplotlib_says_what_to_install(tmp_path: Path, checkpoint: Path) -> None:
    write_data(scored_data(8), tmp_path / "scored.parquet")
    script = (
        "import sys; sys.modules['matplotlib'] = None; sys.argv[0] = 'qtuning'; from qtuning_peft.cli import app; app()"
    )
    command = [sys.executable, "-c", script, "plot", str(tmp_path / "scored.parquet"), "--sample-ratio", "0.5"]
    for more in (["-o", "a.png"], ["-o", "a.html", "--tokenizer", str(checkpoint)]):
        found = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path)
        assert found.returncode == 1
        assert "pipinstall'qtuning-peft[plot]'" in "".join(found.stderr.split())


def test_few_shot_examples_longer_than_rows_may_be() -> None:
    turns = [{"role": "user", "content": "w5 w6 w7"}, {"role": "assistant", "content": "w8 w9"}]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(ValueError, match="few-shot examples are 5 tokens, and rows are cut at max_length, 5"):
        add_few_shot_examples(tokenizer, turns, max_length=5)
    tokenizer.model_max_length = 4
    with pytest.raises(ValueError, match=r"rows are cut at tokenizer\.model_max_length, 4"):
        add_few_shot_examples(tokenizer, turns)
    assert tokenizer.chat_template == template
    add_few_shot_examples(tokenizer, turns, max_length=6)


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_plane_names_its_quadrants() -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    from qtuning_peft.eu_plane.plot import plot_plane

    scored = scored_data(40)
    figure = plot_plane(scored, EUPruner(sample_ratio=0.5).fit(scored))
    plane = next(axes for axes in figure.axes if axes.get_xlabel().startswith("uncertainty"))
    corners = {text.get_text(): text.get_position() for text in plane.texts if text.get_text() in QUADRANT_NAMES}
    assert {name: (round(x), round(y)) for name, (x, y) in corners.items()} == QUADRANT_NAMES
    by_error = plot_plane(scored, EUPruner(sample_ratio=0.5, strategy="highest_perplexity").fit(scored))
    assert not any(text.get_text() in QUADRANT_NAMES for axes in by_error.axes for text in axes.texts)


QUADRANT_NAMES = {
    "noise (hard and uncertain)": (1, 1), "misconception": (0, 1), "redundant": (0, 0), "calibration": (1, 0)
}  # fmt: skip


def test_examples_show_prompts_without_what_all_begin_with(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    from test_report import Page

    from qtuning_peft.eu_plane.report import write_report

    system = [40 + i % 50 for i in range(30)]
    made = []
    for index, row in enumerate(scored_data(12)):
        prompt = [*system, 10 + index, 22]
        made.append(row | {"input_ids": prompt + row["input_ids"][2:], "labels": [-100] * 32 + row["labels"][2:]})
    scored = Dataset.from_list(made)
    write_report(scored, word_tokenizer(), EUPruner(sample_ratio=0.5).fit(scored), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.samples
    for sample in page.samples:
        assert sample["dim"].split() == [f"w{10 + sample['row']}", "w22"]
    assert "noise (hard and uncertain)" in page.text
