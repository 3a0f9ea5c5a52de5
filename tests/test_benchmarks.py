"""The benchmarks run, resume, survive what kills them, count right, and write their pages."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import bitsandbytes as bnb
import pytest
import torch

REPOSITORY = Path(__file__).parent.parent
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
from benchmarks import bases, document, grid, methods, models_page, page, pruning_page, rows, saved_for_backward, step  # noqa: E402
from benchmarks.quality import page as quality_page  # noqa: E402


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTUNING_RESULTS", str(tmp_path / "results"))


def here(run: grid.Run, device: str, timeout: float | None) -> str | None:
    """In place of a process for each run."""
    arguments = sys.argv
    sys.argv = ["benchmarks.step", *run.arguments(), "--device", device]
    try:
        step.main()
    finally:
        sys.argv = arguments
    return None


def tiny(name: str, batch: int = 2, length: int = 16) -> grid.Run:
    return grid.Run("tiny", name, batch, length, steps=2)


def test_a_run_in_its_own_process_leaves_one_row() -> None:
    assert grid.call(tiny("side"), "cpu", timeout=None) is None
    (row,) = rows.read("steps")
    assert row["command"].startswith("python -m benchmarks.step --base tiny --method side")
    assert str(Path.home()) not in json.dumps(row)
    assert not row["out_of_memory"]
    assert row["peak_resident"] > row["weight_bytes"] > 0
    assert row["step_seconds"]["quartile_1"] <= row["step_seconds"]["median"] <= row["step_seconds"]["quartile_3"]
    assert row["loss_at_end"] < row["loss_at_start"]


def test_a_grid_resumes_and_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "call", here)
    runs = grid.shuffled(grid.GRIDS["tiny"], seed=0)
    assert grid.work(runs[:2], "cpu", minutes=None, again=False) == (0, 0)
    first = rows.read("steps")
    assert grid.work(runs, "cpu", minutes=None, again=False) == (0, 0)
    assert rows.read("steps")[:2] == first
    assert len(rows.read("steps")) == len(runs) == len(grid.done())
    assert grid.work(runs, "cpu", minutes=1e-9, again=True) == (0, len(runs))

    mark = "saved-for-backward"
    written = (
        f"Before.\n<!-- tiny -->\nold\n<!-- end tiny -->\nBetween.\n<!-- {mark} -->\n<!-- end {mark} -->\nAfter.\n"
    )
    text = document.filled(written, tmp_path, page.TABLES)
    assert text.startswith("Before.\n<!-- tiny -->\n| base |")
    assert "\nold\n" not in text
    assert text.count("| tiny | side |") == 2
    assert "Between." in text
    assert "Not measured yet. Run `python -m benchmarks.saved_for_backward`." in text
    assert text.endswith("After.\n")
    assert document.filled(text, tmp_path, page.TABLES) == text


def test_a_plot_is_the_same_for_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    lines = {"side": [(1.0, 2.0), (2.0, 3.0)]}
    assert "images/plot.svg" in document.plot(tmp_path / "plot.svg", lines, "x", "y")
    first = (tmp_path / "plot.svg").read_bytes()
    document.plot(tmp_path / "plot.svg", lines, "x", "y")
    assert (tmp_path / "plot.svg").read_bytes() == first


def test_every_line_of_a_plot_has_a_look_of_its_own_and_a_label(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    names = [f"line {number}" for number in range(24)]
    document.plot(tmp_path / "plot.svg", {name: [(1.0, 2.0)] for name in names}, "x", "y")
    looks = re.findall(r'<use xlink:href="#(\w+)"[^>]*stroke: (#\w+)', (tmp_path / "plot.svg").read_text())
    assert len(set(looks)) == len(names) + 2  # and the ticks of both axes
    assert set(names) <= set(labels(tmp_path / "plot.svg"))


def test_out_of_memory_is_a_row_and_ends_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bases, "build", exhausted)
    here(tiny("qlora", length=32), "cpu", None)
    (row,) = rows.read("steps")
    assert row["out_of_memory"]
    assert grid.too_large(tiny("qlora", length=64), grid.done())
    assert not grid.too_large(tiny("qlora", length=16), grid.done())
    assert not grid.too_large(tiny("side", length=64), grid.done())
    assert page.step_line(row, 11)[3] == "out of memory"


def test_a_cpu_without_memory_is_out_of_memory_too() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert step.is_out_of_memory(caught.value)
    assert not step.is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_torn_last_line_costs_its_own_row_alone() -> None:
    rows.append("steps", {"a": 1})
    with rows.results_file("steps").open("a") as file:
        file.write('{"a": 2, "torn')
    assert rows.read("steps") == [{"a": 1}]
    rows.append("steps", {"a": 3})
    assert rows.read("steps") == [{"a": 1}, {"a": 3}]


@pytest.mark.parametrize("name", saved_for_backward.METHODS)
def test_what_is_counted_on_shapes_is_what_a_real_run_saves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "compute_dtype", lambda device: torch.bfloat16)
    lengths = (16, 48)
    model = methods.apply(methods.find(name), bases.build("tiny", four_bit=False))
    real = [saved_for_backward.saved_bytes(model, torch.zeros(1, length, dtype=torch.int64)) for length in lengths]
    assert saved_for_backward.count("tiny", name, lengths) == real
    assert saved_for_backward.row_of("tiny", name, lengths, real)["bytes_per_token"] > 0


def test_a_quantized_base_gets_the_quantized_lora() -> None:
    model = methods.apply(methods.find("qlora"), bases.build("tiny", four_bit=True))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert layer.base_layer.weight.dtype == torch.uint8
    assert not any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    assert bases.weight_bytes(bases.build("tiny", True)) < bases.weight_bytes(bases.build("tiny", False)) / 2


def test_a_changed_option_is_another_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny("lora").key()
    monkeypatch.setitem(methods.METHODS, "lora", methods.Method("lora", "LoraConfig", {"r": 4}, four_bit=False))
    assert tiny("lora").key() != before


def test_names_that_do_not_exist_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"method is sidr; choose one of side, "):
        methods.find("sidr")
    with pytest.raises(ValueError, match=r"base is gpt-5; choose one of opt-1.3b, "):
        bases.shape("gpt-5")
    with pytest.raises(ValueError, match=r"mark steps names no table"):
        document.filled("<!-- steps -->\n<!-- end steps -->\n", Path(), page.TABLES)


def labels(svg: Path) -> list[str]:
    """The texts of a plot; matplotlib draws them as outlines, each after a comment."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "pages", [page, quality_page, models_page, pruning_page], ids=["benchmarks", "quality", "models", "pruning"]
)
def test_the_committed_page_is_what_the_committed_rows_give(
    pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    monkeypatch.delenv("QTUNING_RESULTS")
    text = pages.DOCUMENT.read_text(encoding="utf-8")
    marks = set(re.findall(r"^<!-- (?!end )(\S+) -->$", text, re.MULTILINE))
    assert marks == pages.TABLES.keys() - {"tiny"}
    assert document.filled(text, tmp_path, pages.TABLES) == text, "run make bench-docs"
    drawn = sorted(file.name for file in tmp_path.iterdir())
    assert drawn == sorted(set(re.findall(r"\]\(images/(\S+\.svg)\)", text)))
    for name in drawn:
        assert labels(tmp_path / name) == labels(pages.DOCUMENT.parent / "images" / name), "run make bench-docs"


def commands() -> list[str]:
    """Every command of the benchmarks that a page or the Makefile shows."""
    files = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md", REPOSITORY / "Makefile"]
    joined = "\n".join(file.read_text(encoding="utf-8") for file in files).replace("\\\n", " ")
    joined = joined.replace("$(PYTHON)", "python")
    assert "python benchmarks/" not in joined, "write python -m benchmarks.NAME"
    return sorted({found.strip() for found in re.findall(r"python (-m benchmarks\.[^`\n|;]*)", joined)})


def test_every_command_in_the_documents_exists_with_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = commands()
    assert len(shown) > 15
    for command in shown:
        module, *words = command.removeprefix("-m ").split("#")[0].split()
        source = (REPOSITORY / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        if options:
            monkeypatch.setattr(sys, "argv", [module, "--help"])
            with pytest.raises(SystemExit) as ended:
                importlib.import_module(module).main()
            assert ended.value.code == 0
            known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
            assert options <= known, command
        assert "__main__" in source, command
