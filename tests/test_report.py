"""The picture of the plane and the report: they show what the pruner does, whatever the data holds."""

from __future__ import annotations

import builtins
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from qtuning_peft.eu_plane.plot import plot_plane
from qtuning_peft.eu_plane.pruner import EUPruner
from qtuning_peft.eu_plane.report import MOST_TOKENS, write_report

pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")

WORDS = ["<script>alert(1)</script>", '"quoted"', "&amp;", "secret", *(f"w{i}" for i in range(30))]
SECRET = WORDS.index("secret")
VOID = {"meta", "br", "img", "input", "link", "hr"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False)


def data(rows: int = 40, unscored: tuple[int, ...] = (), answer: int = 12, **columns: list[Any]) -> Dataset:
    """Scored rows of a prompt of three tokens and an answer of `answer`, no two alike."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(rows):
        ids = [0, 1, 2, *rng.integers(0, len(WORDS), answer).tolist()]
        errors, uncertainties = rng.gamma(2, 1.0, answer), rng.gamma(2, 0.7, answer)
        row = {
            "input_ids": ids,
            "labels": [-100] * 3 + ids[3:],
            "error": errors.mean(),
            "uncertainty": uncertainties.mean(),
            "supervised_tokens": answer,
            "token_error": errors.tolist(),
            "token_uncertainty": uncertainties.tolist(),
            "repetition": 0.0,
            "unscored": "",
        }
        if index in unscored:
            row |= {"error": math.nan, "uncertainty": math.nan, "token_error": [], "token_uncertainty": [],
                    "unscored": "<b>no</b> tokens"}  # fmt: skip
        made.append(row | {name: values[index] for name, values in columns.items()})
    return Dataset.from_list(made)


def fitted(scored: Dataset, **settings: Any) -> EUPruner:
    settings = {"token_ratio": 0.5} | settings
    if "num_tokens" not in settings:
        settings.setdefault("sample_ratio", 0.5)
    pruner = EUPruner(**settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        return pruner.fit(scored)


class Page(HTMLParser):
    """A report: its text, its table's rows, and its samples as (quadrant, row, tokens)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.cells: dict[str, list[str]] = {}
        self.samples: list[dict[str, Any]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag == "tr" and "data-quadrant" in given:
            self.cells[str(given["data-quadrant"])] = []
        if tag == "td":
            next(reversed(self.cells.values())).append("")
        if tag == "article":
            section = next(found for name, found in self.open if name == "section")
            place = {"quadrant": section["data-quadrant"], "row": int(given["data-row"] or -1)}
            self.samples.append(place | {"tokens": [], "dim": "", "text": ""})
        if "t" in (given.get("class") or "").split() and self.samples:
            self.samples[-1]["tokens"].append({"struck": tag == "s", "title": given["title"], "text": ""})
        if tag not in VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        names = [name for name, _ in self.open]
        classes = [(found.get("class") or "").split() for _, found in self.open]
        if "td" in names:
            next(reversed(self.cells.values()))[-1] += data
        if "article" in names:
            self.samples[-1]["text"] += data
            if any("t" in found for found in classes):
                self.samples[-1]["tokens"][-1]["text"] += data
            elif any("dim" in found for found in classes):
                self.samples[-1]["dim"] += data


def report(tmp_path: Path, scored: Dataset, tokenizer: Any, pruner: EUPruner, **settings: Any) -> Page:
    path = tmp_path / "report.html"
    assert write_report(scored, tokenizer, pruner, path, **settings) == path
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    return Page(path)


# -- the report --------------------------------------------------------------------------------------------------------


def test_counts_and_means_are_the_pruners(tmp_path: Path, tokenizer: Any) -> None:
    scored = data(unscored=(3, 7), repetition=[0.9 if i == 5 else 0.1 for i in range(40)])
    pruner = fitted(scored, max_repetition=0.5)
    page = report(tmp_path, scored, tokenizer, pruner)
    assert pruner.pruned is not None
    assert {name: int(cells[1]) for name, cells in page.cells.items()} == pruner.pruned.counts
    assert set(pruner.pruned.counts) == {
        "noise", "misconception", "redundant", "calibration", "topped_up", "middle", "degenerate", "unscored"
    }  # fmt: skip
    error, quadrants = np.array(scored["error"][:]), pruner.quadrants(scored)
    for name in ("noise", "misconception", "redundant", "calibration"):
        assert float(page.cells[name][3]) == pytest.approx(error[quadrants == name].mean(), abs=5e-4)
    assert page.cells["noise"][-1] == "dropped"
    assert page.cells["misconception"][-1] == "kept, with 50% of their supervised tokens"
    assert page.cells["calibration"][-1] == page.cells["topped_up"][-1] == "kept whole"
    assert page.cells["middle"][-1] == "dropped"
    assert f"Samples kept{pruner.pruned.kept_samples}of 40" in page.text
    assert f"Supervised tokens kept{pruner.pruned.kept_tokens}of {40 * 12}" in page.text
    assert all(note in page.text for note in pruner.pruned.notes)
    assert len(pruner.pruned.notes) == 1


def test_examples_are_of_their_quadrant_and_reproducible(tmp_path: Path, tokenizer: Any) -> None:
    scored = data(100)
    pruner = fitted(scored)
    quadrants, error = pruner.quadrants(scored), np.array(scored["error"][:])
    page = report(tmp_path, scored, tokenizer, pruner, examples=4)
    for name in ("noise", "misconception", "redundant", "calibration"):
        rows = [sample["row"] for sample in page.samples if sample["quadrant"] == name]
        assert len(set(rows)) == 4
        assert (quadrants[rows] == name).all()
        # One of each quarter by error, so that they are spread.
        order = np.array_split(np.sort(error[quadrants == name]), 4)
        assert all(part[0] <= error[row] <= part[-1] for part, row in zip(order, rows, strict=True))
    first = (tmp_path / "report.html").read_bytes()
    report(tmp_path, scored, tokenizer, pruner, examples=4)
    assert (tmp_path / "report.html").read_bytes() == first
    other = report(tmp_path, scored, tokenizer, pruner, examples=4, seed=1)
    assert [sample["row"] for sample in other.samples] != [sample["row"] for sample in page.samples]
    assert not report(tmp_path, scored, tokenizer, pruner, examples=0).samples


@pytest.mark.parametrize("strategy", ["eu_plane", "longest"])
def test_struck_tokens_are_those_that_are_trimmed(tmp_path: Path, tokenizer: Any, strategy: str) -> None:
    scored = data()
    pruner = fitted(scored, strategy=strategy)
    page = report(tmp_path, scored, tokenizer, pruner)
    trimmed = 0
    for sample in page.samples:
        row = scored[sample["row"]]
        assert [token["text"].strip() for token in sample["tokens"]] == [WORDS[label] for label in row["labels"][3:]]
        assert sample["dim"] == " ".join(WORDS[:3])
        for token, error, uncertainty in zip(
            sample["tokens"], row["token_error"], row["token_uncertainty"], strict=True
        ):
            assert token["title"] == f"error {error:.3f}, uncertainty {uncertainty:.3f} nats"
        kept = np.ones(12, bool)
        if sample["quadrant"] in ("misconception", "kept"):
            kept, trimmed = pruner.kept_tokens(row), trimmed + 1
        assert [not token["struck"] for token in sample["tokens"]] == kept.tolist()
    assert trimmed == 5


def test_nothing_is_struck_where_whole_samples_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    scored = data()
    page = report(tmp_path, scored, tokenizer, fitted(scored, token_ratio=1.0))
    assert page.samples
    assert not any(token["struck"] for sample in page.samples for token in sample["tokens"])


def test_text_of_the_data_stays_text(tmp_path: Path, tokenizer: Any) -> None:
    scored = data(unscored=(4,))
    page = report(tmp_path, scored, tokenizer, fitted(scored))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert WORDS[0] in page.text
    assert "&amp;" in page.text
    assert "<b>no</b> tokens" in next(sample["text"] for sample in page.samples if sample["quadrant"] == "unscored")


def test_needs_no_network_and_has_the_picture(tmp_path: Path, tokenizer: Any) -> None:
    scored = data()
    page = report(tmp_path, scored, tokenizer, fitted(scored))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "http:" not in html
    assert "https:" not in html
    assert "svg" in page.tags
    assert not {"script", "link", "iframe"} & page.tags


def test_long_samples_are_cut_and_say_so(tmp_path: Path, tokenizer: Any) -> None:
    row = data(1, answer=MOST_TOKENS + 50)[0]
    row["input_ids"] = [SECRET] + [5] * 500 + row["input_ids"]
    row["labels"] = [-100] * 501 + row["labels"]
    scored = Dataset.from_list([row])
    (sample,) = report(tmp_path, scored, tokenizer, fitted(scored, sample_ratio=1.0)).samples
    assert len(sample["tokens"]) == MOST_TOKENS
    assert "50 more supervised tokens" in sample["text"]
    assert "prompt cut" in sample["text"]
    assert "secret" not in sample["dim"]
    assert len(sample["dim"]) == 200
    assert sample["dim"].endswith(" ".join(WORDS[:3]))


def test_several_turns_stay_in_their_order(tmp_path: Path, tokenizer: Any) -> None:
    row = data(1, answer=6)[0]
    row["input_ids"] = [4, 5, 6, 7, 8, 9]
    row["labels"] = [-100, 5, -100, 7, 8, -100]
    row |= {"token_error": [1.0, 2.0, 3.0], "token_uncertainty": [1.0, 2.0, 3.0], "supervised_tokens": 3}
    scored = Dataset.from_list([row])
    (sample,) = report(tmp_path, scored, tokenizer, fitted(scored, token_ratio=1.0, sample_ratio=1.0)).samples
    assert [token["text"].strip() for token in sample["tokens"]] == [WORDS[i] for i in (5, 7, 8)]
    assert sample["text"].endswith("3 supervised tokens" + " ".join(WORDS[i] for i in range(4, 10)))


def half_written(path: Path, text: str, **settings: Any) -> int:
    path.write_bytes(text[: len(text) // 2].encode())
    raise OSError("full")


def test_a_failed_report_leaves_the_old_one(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = data()
    pruner = fitted(scored)
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_text", half_written)
    with pytest.raises(OSError, match="full"):
        write_report(scored, tokenizer, pruner, path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    broken = scored.remove_columns("token_error").add_column("token_error", [[1.0]] * 40)
    with pytest.raises(ValueError, match="score the data again"):
        write_report(broken, tokenizer, pruner, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_refusals(tmp_path: Path, tokenizer: Any) -> None:
    scored, path = data(), tmp_path / "report.html"
    with pytest.raises(ValueError, match="call fit"):
        write_report(scored, tokenizer, EUPruner(sample_ratio=0.5), path)
    with pytest.raises(ValueError, match="fitted on 40 rows, not on these 10"):
        write_report(scored.select(range(10)), tokenizer, fitted(scored), path)
    with pytest.raises(ValueError, match="examples is -1"):
        write_report(scored, tokenizer, fitted(scored), path, examples=-1)
    assert not path.exists()


@pytest.mark.parametrize("settings", [{"num_tokens": 100}, {"sample_ratio": 0.05}, {"per_batch": True}])
def test_every_budget_has_a_report(tmp_path: Path, tokenizer: Any, settings: dict[str, Any]) -> None:
    scored = data()
    pruner = fitted(scored, **settings)
    page = report(tmp_path, scored, tokenizer, pruner)
    assert pruner.pruned is not None
    assert {name: int(cells[1]) for name, cells in page.cells.items()} == pruner.pruned.counts
    assert ("Budget100 tokens" in page.text) == ("num_tokens" in settings)
    assert ("in every batch" in page.text) == ("per_batch" in settings)


# -- the picture -------------------------------------------------------------------------------------------------------


def plane(figure: Any) -> Any:
    return next(axes for axes in figure.axes if axes.get_xlabel().startswith("uncertainty"))


def title(figure: Any) -> str:
    return "\n".join(axes.get_title(loc="left") for axes in figure.axes)


@pytest.mark.parametrize(
    ("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("b.PNG", b"\x89PNG")]
)
def test_saves_each_format(tmp_path: Path, name: str, magic: bytes) -> None:
    scored = data()
    plot_plane(scored, fitted(scored), path=tmp_path / "new" / name, title=r"costs $1\nothing and $2_")
    assert (tmp_path / "new" / name).read_bytes().startswith(magic)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [name]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg, \.pdf"):
        plot_plane(data(), path=tmp_path / "a.docx")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'qtuning-peft\[plot\]'"):
        plot_plane(data())


def test_points_thresholds_and_legend_are_the_pruners() -> None:
    scored = data(unscored=(3,))
    pruner = fitted(scored)
    figure = plot_plane(scored, pruner)
    places, quadrants = np.array([scored["uncertainty"][:], scored["error"][:]]).T, pruner.quadrants(scored)
    points = {group.get_label(): group for group in plane(figure).collections}
    assert {*points} == {*quadrants} - {"unscored"}
    assert len(points) == 6
    colours = {tuple(group.get_edgecolors()[0]) for group in points.values()}
    for name, group in points.items():
        np.testing.assert_allclose(group.get_offsets(), places[quadrants == name])
        # Hollow is what is dropped.
        kept = name in ("misconception", "calibration", "topped_up")
        assert bool(len(group.get_facecolors())) == kept
    faces = {tuple(group.get_facecolors()[0]) for group in points.values() if len(group.get_facecolors())}
    assert len(faces) == 3
    assert len(colours - faces) >= 3
    shapes = {name: len(group.get_paths()[0].vertices) for name, group in points.items()}
    assert shapes.pop("topped_up") not in shapes.values()
    thresholds = pruner.fitted.thresholds
    assert thresholds is not None
    lines = {tuple(line.get_xydata()[0]) for line in plane(figure).lines}
    assert lines == {
        (0, thresholds.error_low), (0, thresholds.error_high),
        (thresholds.uncertainty_low, 0), (thresholds.uncertainty_high, 0),
    }  # fmt: skip
    assert pruner.pruned is not None
    counts = {name: count for name, count in pruner.pruned.counts.items() if name != "unscored"}
    legend = [*(f"{name}: {n}" for name, n in counts.items()), "before pruning: 39"]
    assert [text.get_text() for text in figure.legends[0].texts] == legend
    assert f"39 samples, 20 kept, rank correlation {pruner.pruned.correlation:.2f}" in title(figure)
    assert "1 without a score left out" in title(figure)


def test_quadrants_are_shaded_from_their_thresholds_and_hold_their_points() -> None:
    for settings in ({"sample_ratio": 0.5}, {"sample_ratio": 0.1}, {"num_tokens": 1}):
        scored = data(200)
        pruner = fitted(scored, **settings)
        axes, quadrants = plane(plot_plane(scored, pruner)), pruner.quadrants(scored)
        boxes = {patch.get_label(): patch.get_bbox() for patch in axes.patches}
        assert {*boxes} == {"noise", "misconception", "redundant", "calibration"}
        corners = pruner.fitted.thresholds.corners(np.array(scored["error"][:]), np.array(scored["uncertainty"][:]))
        for name, box in boxes.items():
            inside = [
                (box.x0 < x < box.x1 or box.x1 < x < box.x0) and (box.y0 < y < box.y1 or box.y1 < y < box.y0)
                for x, y in zip(scored["uncertainty"], scored["error"], strict=True)
            ]
            assert inside == (corners == name).tolist()
        assert "topped_up" in quadrants or settings == {"num_tokens": 1}
    assert not plane(plot_plane(scored)).patches
    assert not plane(plot_plane(scored, EUPruner(sample_ratio=0.5, per_batch=True))).patches


def test_what_is_kept_stands_before_what_there_was() -> None:
    scored = data(200)
    pruner = fitted(scored)
    kept = np.isin(pruner.quadrants(scored), ("misconception", "calibration", "topped_up"))
    above, right = (axes for axes in plot_plane(scored, pruner).axes if not axes.axison)
    for axes, name, size in ((above, "uncertainty", "height"), (right, "error", "width")):
        bars, values = axes.patches, np.array(scored[name][:])
        counts = [getattr(bar, f"get_{size}")() for bar in bars]
        bins = len(bars) // 4  # before, and three ways to be kept
        assert sum(counts[:bins]) == 200
        assert sum(counts[bins:]) == kept.sum() == 100
        start = "y" if size == "width" else "x"
        ends = [getattr(bar, f"get_{start}")() for bar in bars[:bins]]
        edges = [*ends, ends[-1] + (ends[1] - ends[0])]
        np.testing.assert_array_equal(counts[:bins], np.histogram(values, edges)[0])
        np.testing.assert_array_equal(np.reshape(counts[bins:], (3, bins)).sum(0), np.histogram(values[kept], edges)[0])


def test_without_a_pruner_there_is_one_colour() -> None:
    figure = plot_plane(data())
    assert len({tuple(colour) for colour in plane(figure).collections[0].get_facecolors()}) == 1
    assert not plane(figure).lines
    assert not figure.legends


def test_low_ends_at_a_dashed_line_below_where_high_begins(tmp_path: Path) -> None:
    scored = data(200)
    pruner = fitted(scored, sample_ratio=0.05)
    thresholds = pruner.fitted.thresholds
    assert thresholds is not None
    assert thresholds.error_low < thresholds.error_high
    figure = plot_plane(scored, pruner, path=tmp_path / "a.png")
    styles = {line.get_linestyle(): line.get_ydata()[0] for line in plane(figure).lines[::2]}
    assert styles == {"--": thresholds.error_low, "-": thresholds.error_high}


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def half(figure: Figure, path: Path, **settings: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("full")

    path = tmp_path / "plane.png"
    path.write_text("old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        plot_plane(data(), path=path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["plane.png"]


@pytest.mark.filterwarnings("error:Attempting to set identical")
@pytest.mark.parametrize("rows", [1, 7])
def test_equal_rows(tmp_path: Path, tokenizer: Any, rows: int) -> None:
    scored = Dataset.from_list([data(1)[0]] * rows)
    pruner = fitted(scored, sample_ratio=1.0)
    figure = plot_plane(scored, pruner, path=tmp_path / "plane" / "a.png")
    assert "rank correlation undefined" in title(figure)
    (left, right), (bottom, top) = plane(figure).get_xlim(), plane(figure).get_ylim()
    assert left < scored["uncertainty"][0] < right
    assert bottom < scored["error"][0] < top
    write_report(scored, tokenizer, pruner, tmp_path / "report.html")
    assert "undefined" in Page(tmp_path / "report.html").text


def test_infinite_thresholds_are_not_drawn(tmp_path: Path) -> None:
    scored = Dataset.from_list([data(1)[0]] * 4)
    pruner = fitted(scored, num_tokens=1)
    thresholds = pruner.fitted.thresholds
    assert thresholds is not None
    levels = [thresholds.error_low, thresholds.error_high, thresholds.uncertainty_low, thresholds.uncertainty_high]
    figure = plot_plane(scored, pruner, path=tmp_path / "a.png")
    assert len(plane(figure).lines) == sum(map(math.isfinite, levels))


@pytest.mark.parametrize("rows", [50, 30_000])
def test_far_outliers_leave_the_view_and_are_counted(rows: int) -> None:
    rng = np.random.default_rng(0)
    error, uncertainty = rng.gamma(3, 1.0, rows), rng.gamma(3, 1.0, rows)
    error[:3] = 1e9
    figure = plot_plane({"error": error, "uncertainty": uncertainty})
    (left, right), (bottom, top) = plane(figure).get_xlim(), plane(figure).get_ylim()
    assert top < 100
    outside = (error < bottom) | (error > top) | (uncertainty < left) | (uncertainty > right)
    assert outside.sum() >= 3
    assert f"{outside.sum():,} outside of the view" in title(figure)
    # Beyond 20,000 rows cells are drawn in place of points.
    assert bool(plane(figure).images) == (rows > 20_000)
    assert bool(plane(figure).collections) == (rows <= 20_000)


def test_density_shows_each_quadrant_in_its_place() -> None:
    error, uncertainty = np.meshgrid(np.linspace(2, 5, 160), np.linspace(1, 2, 160))
    scored = {"error": error.ravel(), "uncertainty": uncertainty.ravel(), "supervised_tokens": np.ones(error.size)}
    pruner = fitted(scored, token_ratio=1.0)  # type: ignore[arg-type]  # arrays do for a table
    (image,) = plane(plot_plane(scored, pruner)).images
    cells = np.asarray(image.get_array())
    near = [cells[y - 4 : y + 4, x - 4 : x + 4].reshape(-1, 4) for y, x in ((25, 25), (25, 175), (175, 25), (175, 175))]
    found = [{tuple(np.round(c[:3] * 255).astype(int)) for c in part if c[3] > 0} for part in near]
    # Redundant below left, calibration right of it, misconception above, noise in the far corner.
    assert found == [{(140, 140, 140)}, {(0, 158, 115)}, {(0, 114, 178)}, {(213, 94, 0)}]


def test_data_that_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no column uncertainty; score the data"):
        plot_plane({"error": [1.0]})
    with pytest.raises(ValueError, match="None of the 2 rows has a score"):
        plot_plane({"error": [math.nan] * 2, "uncertainty": [math.nan] * 2})
