"""Whatever files hold, reading, scoring, pruning and plotting them ends in a result or in one sentence."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import tiny, word_tokenizer
from datasets import Dataset, disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_eu_pruner import scored_data

from qtuning_peft import EUPruner, score
from qtuning_peft.cli.data import USER_ERRORS
from qtuning_peft.eu_plane.files import read_data, write_data
from qtuning_peft.eu_plane.plot import plot_plane
from qtuning_peft.eu_plane.report import write_report

pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")

MODEL, TOKENIZER = tiny(), word_tokenizer()
SCORED = scored_data(6).to_list()
COLUMNS = [*SCORED[0], "attention_mask", "position_ids", "seq_lengths", "quadrant", "token_el2n"]
TEXT = ["messages", "conversations", "prompt", "completion", "instruction", "output", "text", "tools"]
# FUZZ_CASES=5000 for a long look.
CASES = pytest.mark.parametrize("cases", [int(os.environ.get("FUZZ_CASES", "100"))])

numbers = st.one_of(st.integers(), st.integers(-3, 120), st.floats())
leaves = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
keys = st.sampled_from(["role", "content", "from", "value", "assistant", "x", ""])
values = st.recursive(
    leaves, lambda v: st.one_of(st.lists(v, max_size=5), st.dictionaries(keys, v, max_size=3)), max_leaves=12
)
raw_rows = st.lists(st.dictionaries(st.sampled_from([*TEXT, "input_ids", "labels"]), values, max_size=4), max_size=4)


@st.composite
def spoilt_rows(draw: Any) -> list[dict[str, Any]]:
    """Scored rows with some columns replaced, in every row or in one."""
    rows = [dict(row) for row in SCORED]
    for name in draw(st.lists(st.sampled_from(COLUMNS), max_size=3)):
        lists = st.lists(numbers, max_size=8)
        new = draw(st.sampled_from([numbers, lists, values]))
        for row in draw(st.sampled_from([rows, rows[:1], rows[3:4]])):
            row[name] = draw(new)
    return rows


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """`content` with some bytes changed, or cut, or other bytes altogether."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64))
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.booleans()) else changed)


def each_ends_well(file: Path) -> None:
    """Everything that the commands do with a file."""
    data: list[Dataset] = []

    def read() -> None:
        data.append(read_data(file))

    def prune() -> None:
        pruner = EUPruner(sample_ratio=0.5, token_ratio=0.5, tokenizer=TOKENIZER, protect="w1.*", max_repetition=0.8)
        kept = data[0].map(pruner.fit(data[0]), batched=True, keep_in_memory=True)
        for name in ("kept.jsonl", "kept.parquet"):
            write_data(kept, file.with_name(name))
        if crc32(file.read_bytes()) % 4 == 0:  # a report takes longer than all else
            write_report(data[0], TOKENIZER, pruner, file.with_name("report.html"), examples=1)

    steps: list[Callable[[], object]] = [read]
    steps += [lambda: score(data[0], MODEL, TOKENIZER, progress=False, chat_template=False), prune]
    steps += [lambda: plot_plane(data[0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in steps:
            with contextlib.suppress(*USER_ERRORS):
                step()
            if not data:
                return


def fuzz(cases: int, inputs: st.SearchStrategy[Any], test: Callable[[Any, Path], None]) -> None:
    disable_progress_bars()

    @settings(max_examples=cases, deadline=None, suppress_health_check=[*HealthCheck], derandomize=cases < 1000)
    @given(inputs)
    def case(given: Any) -> None:
        # Of this process alone: others share the machine.
        start = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            test(given, Path(folder))
        assert time.process_time() - start < 5

    plot_plane({"error": [1.0], "uncertainty": [1.0]})  # finds fonts, once
    case()


def fuzz_file(cases: int, contents: st.SearchStrategy[bytes], name: str) -> None:
    """Of a file called `name`, whatever it holds."""

    def test(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        each_ends_well(folder / name)

    fuzz(cases, contents, test)


def lines(rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


@CASES
@pytest.mark.parametrize("kind", ["bytes", "damaged", "rows", "spoilt"])
def test_json_lines(cases: int, kind: str) -> None:
    inputs: dict[str, st.SearchStrategy[bytes]] = {
        "bytes": st.binary(max_size=200),
        "damaged": damaged(lines(SCORED[:2])),
        "rows": st.one_of(st.lists(values, max_size=4), raw_rows).map(lines),
        "spoilt": spoilt_rows().map(lines),
    }

    fuzz_file(cases, inputs[kind], "rows.jsonl")


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, sink)
    return sink.getvalue()


@st.composite
def parquet_files(draw: Any, rows: st.SearchStrategy[list[dict[str, Any]]]) -> bytes:
    try:
        return parquet(draw(rows))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return b""


@CASES
@pytest.mark.parametrize("kind", ["bytes", "damaged", "rows", "spoilt"])
def test_parquet(cases: int, kind: str) -> None:
    inputs: dict[str, st.SearchStrategy[bytes]] = {
        "bytes": st.binary(max_size=200),
        "damaged": damaged(parquet(SCORED[:2])),
        "rows": parquet_files(raw_rows),
        "spoilt": parquet_files(spoilt_rows()),
    }

    fuzz_file(cases, inputs[kind], "rows.parquet")


@pytest.fixture(scope="module")
def part() -> Iterator[tuple[Dataset, str, bytes, dict[str, Any]]]:
    """Data, and the name and content of its one part of scores, and the scores."""
    data = Dataset.from_dict({"input_ids": [[5, 6, 7, 8], [9, 10, 11]]})
    with tempfile.TemporaryDirectory() as folder:
        scores = score(data, MODEL, progress=False, resume_dir=folder).to_dict()
        (file,) = Path(folder).iterdir()
        yield data, file.name, file.read_bytes(), scores


@CASES
def test_parts_of_scores(cases: int, part: tuple[Dataset, str, bytes, dict[str, Any]]) -> None:
    data, name, content, scores = part

    def test(found: bytes, folder: Path) -> None:
        (folder / name).write_bytes(found)
        assert score(data, MODEL, progress=False, resume_dir=folder).to_dict() == scores

    fuzz(cases, damaged(content), test)
