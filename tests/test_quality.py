"""The quality benchmark: tasks and their order, methods as they are written, ablations on cached states, the page."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny, word_tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).parent.parent
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(REPOSITORY))

from benchmarks import document, rows  # noqa: E402
from benchmarks.quality import ablations, from_states, page, states, targets, train  # noqa: E402
from benchmarks.quality.fit import Data, Rates, fit, optimizers  # noqa: E402
from benchmarks.quality.learner import factor  # noqa: E402
from benchmarks.quality.muon import orthogonal  # noqa: E402
from benchmarks.quality.networks import Network, Options, SideAttention, Whitening, sampled  # noqa: E402
from benchmarks.quality.tasks import Task, load  # noqa: E402
from benchmarks.quality.texts import TASKS, Texts, texts_of  # noqa: E402
from benchmarks.quality.train import parse  # noqa: E402

VOCABULARY = 96
DATA = REPOSITORY.parent / "shared" / "data"  # whose licences do not let it be copied into the repository


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTUNING_RESULTS", str(tmp_path / "results"))


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """As many blocks as SmolLM2, and little else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=30, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.norm.weight.uniform_(0.5, 1.5)  # a network must not forget it
    return model


@pytest.fixture(scope="module")
def task() -> Task:
    """Rows of several lengths: a prompt, and an answer that repeats one of two tokens."""
    draw = torch.Generator().manual_seed(0)
    encoded = []
    for number in range(60):
        prompt = torch.randint(3, VOCABULARY, (4 + number % 7,), generator=draw).tolist()
        answer = [1 + number % 2] * (3 + number % 3)
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Task("tiny", None, encoded[:40], encoded[40:], [], padding=0)


@pytest.fixture(scope="module")
def data(base: LlamaForCausalLM, task: Task) -> Data:
    train = states.read(base, [task.batch(part) for part in task.epochs(40, 8, 1, seed=0)])
    return Data(train, states.read(base, task.evaluated(task.validation, 8)), base.lm_head.weight)


def names(batch: list[dict]) -> list[str]:
    return [json.dumps(row) for row in batch]


def test_an_epoch_has_each_row_at_most_once_and_the_same_seed_the_same_batches(task: Task) -> None:
    batches = [names(batch) for batch in task.epochs(36, 8, 2, seed=3)]
    assert len(batches) == 8
    assert all(len(batch) == 8 for batch in batches)
    for epoch in (batches[:4], batches[4:]):
        seen = [name for batch in epoch for name in batch]
        assert len(set(seen)) == len(seen) == 32
        assert set(seen) <= set(names(task.train[:36]))
    assert batches[:4] != batches[4:]
    assert [names(batch) for batch in task.epochs(36, 8, 2, seed=3)] == batches
    assert [names(batch) for batch in task.epochs(36, 8, 2, seed=4)] != batches


def test_the_learning_rate_warms_up_for_a_tenth_and_ends_near_zero() -> None:
    rates = [factor(step, 50) for step in range(50)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == max(rates)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert factor(0, 1) == 1


def test_a_method_is_read_with_its_options_and_its_rate() -> None:
    entrant = parse("side(reduction_factor=4,few_shot_examples=3,four_bit=False,layers_to_transform=[1,2])=2e-3")
    assert (entrant.method.name, entrant.rate, entrant.few_shot_examples) == ("side", 2e-3, 3)
    assert entrant.method.arguments == {"reduction_factor": 4, "layers_to_transform": [1, 2]}
    assert not entrant.method.four_bit
    assert parse("side").method.four_bit
    assert parse("lora").rate == parse("lora").method.learning_rate
    with pytest.raises(
        ValueError, match=r"method is side\(reduction_factor=4; give NAME, NAME=RATE or NAME\(FIELD=VALUE,...\)=RATE\."
    ):
        parse("side(reduction_factor=4")
    with pytest.raises(ValueError, match=r"method is nonsense; choose one of side, "):
        parse("nonsense=1e-3")


@pytest.mark.parametrize("name", ["gsm8k", "sst2"])
def test_few_shot_examples_precede_every_row_and_change_no_order(name: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    texts = [{"question": f"w{n} " * (1 + n % 9), "answer": f"w{90 - n}"} for n in range(40)]
    sentences = [{"sentence": row["question"], "label": n % 2} for n, row in enumerate(texts)]
    for part in ("train", "dev", "test"):
        for file, written in ((f"gsm8k_{part}", texts * 200), (f"sst2_sentence_{part}", sentences)):
            (tmp_path / f"{file}.jsonl").write_text("\n".join(map(json.dumps, written)))
    plain, shown = (load(name, tokenizer, tmp_path, number) for number in (0, 3))
    assert plain.few_shot_examples == 0
    assert shown.few_shot_examples > 6
    examples = shown.train[0]["input_ids"][: shown.few_shot_examples]
    for mine, theirs in zip(plain.train[:40], shown.train[:40], strict=True):
        assert theirs["input_ids"] == examples + mine["input_ids"]
        assert theirs["labels"] == ([-100] * len(examples) + mine["labels"] if name == "gsm8k" else mine["labels"])
    orders = [
        [[row["input_ids"][task.few_shot_examples :] for row in batch] for batch in task.epochs(40, 8, 1, 0)]
        for task in (plain, shown)
    ]
    assert orders[0] == orders[1]


def chat_tokenizer() -> Any:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    return tokenizer


def test_another_base_is_another_run(tmp_path: Path) -> None:
    """Of a folder; a run that has its row is not repeated, and the page tells the bases apart."""
    for name in ("first", "second"):
        tiny().save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
    texts = [{"question": f"w{n} " * (1 + n % 9), "answer": f"w{90 - n}"} for n in range(40)]
    for part in ("train", "test"):
        (tmp_path / f"gsm8k_{part}.jsonl").write_text("\n".join(map(json.dumps, texts * 200)))
    words = ["--task", "gsm8k", "--data", str(tmp_path), "--rows", "8", "--validation-rows", "4", "--test-rows", "4"]
    words += ["--methods", "lora=1e-3", "side(four_bit=False)=1e-3"]
    for name in ("first", "first", "second"):
        train.main([*words, "--base", str(tmp_path / name)])
    found = rows.read("quality")
    assert [row["model"] for row in found] == ["first"] * 2 + ["second"] * 2
    assert [row["validation"] for row in found[:2]] == pytest.approx([row["validation"] for row in found[2:]])
    assert all(0 <= row["exact"] <= 1 for row in found)
    assert [len(page.runs(tested=True, model=name)) for name in ("first", page.BASE)] == [2, 0]


def test_kinds_of_requests_are_classes(tmp_path: Path) -> None:
    kinds = ("open_qa", "classification", "summarization")
    written = [
        {"instruction": f"w{n} " * 200, "category": kinds[n % 3], "input": "", "output": ""} for n in range(2700)
    ]
    (tmp_path / "dolly_3k.jsonl").write_text("\n".join(map(json.dumps, written)))
    found = load("intent", chat_tokenizer(), tmp_path, 3)
    assert found.labels == 3
    assert [row["labels"] for row in found.train[:3]] == [1, 0, 2]  # by name
    assert (len(found.train), len(found.validation), len(found.test)) == (2396, 300, 4)
    assert max(len(row["input_ids"]) for row in found.train) - found.few_shot_examples < 120


def test_cached_states_are_the_base_and_are_read_once(
    base: LlamaForCausalLM, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    monkeypatch.setattr(states, "smollm2", lambda: loads.append(1) or (base, None))
    train, validation = states.cached(task, 16, 8)
    assert len(loads) == 1
    assert [batch["input_ids"].tolist() for batch in validation] == [
        batch["input_ids"].tolist() for batch in task.evaluated(task.validation[:8], 8)
    ]
    batch = train[0]
    embeddings = base.model.embed_tokens(batch["input_ids"])
    assert torch.equal(batch["taps"][0], embeddings.bfloat16())
    assert batch["taps"].shape == (31, *embeddings.shape)
    # The last is before the norm, and the norm's output is its own.
    close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(base.model.norm(batch["taps"][-1].float()), batch["normed"].float(), **close)

    again, _ = states.cached(task, 16, 8)
    assert len(loads) == 1
    assert torch.equal(again[1]["taps"], train[1]["taps"])
    other = Task("tiny", None, task.train[::-1], task.validation, [], task.padding)
    states.cached(other, 16, 8)
    assert len(loads) == 2


@pytest.mark.parametrize("ablation", ablations.ABLATIONS, ids=lambda ablation: ablation.name)
def test_an_ablation_starts_as_the_base_and_a_step_trains_all_of_it(
    ablation: ablations.Ablation, base: LlamaForCausalLM, data: Data
) -> None:
    torch.manual_seed(0)
    network, batch = Network(ablation.options, base, data.train), data.train[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    final = network(batch["taps"], batch["normed"].float())
    real = batch["attention_mask"].bool()
    # Blocks that run again start from a rounded state.
    close = {"rtol": 0.03, "atol": 0.03} if ablation.options.late else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(final[real], batch["normed"].float()[real], **close)

    covered = [
        p for optimizer in optimizers(network, ablation.rates) for g in optimizer.param_groups for p in g["params"]
    ]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(map(id, covered)) == sorted(map(id, trained))
    for _ in fit(data, network, ablation.rates, steps=3, seed=0):
        pass
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == (name in frozen or "white" in name), name


def test_no_position_sees_a_later_one(base: LlamaForCausalLM, data: Data) -> None:
    batch = data.train[0]
    for name in ("every-third-d4", "base-attention", "late-injection-6"):
        (ablation,) = ablations.chosen([name])
        network = Network(ablation.options, base, data.train)
        for parameter in network.parameters():
            if not parameter.any():
                nn.init.normal_(parameter)
        changed = batch["taps"].clone()
        changed[:, :, 5:] += 1
        normed = batch["normed"].float()
        torch.testing.assert_close(network(changed, normed)[:, :5], network(batch["taps"], normed)[:, :5])
        assert not torch.allclose(network(changed, normed)[:, 5:], network(batch["taps"], normed)[:, 5:])


def test_attention_counts_positions_relative_to_each_other() -> None:
    torch.manual_seed(0)
    attention, x = SideAttention(8), torch.randn(1, 1, 8).expand(1, 6, 8)
    torch.testing.assert_close(attention(x, x), attention(x, x)[:, :1].expand(1, 6, 8))


@pytest.mark.parametrize("white", [False, True])
def test_a_linear_map_of_cached_states_lowers_the_loss(white: bool, base: LlamaForCausalLM, data: Data) -> None:
    network = Network(Options(blocks=(), linear=(30,), white=white), base, data.train)
    fitted = Data(data.train, data.train, base.lm_head.weight)
    start = fitted.measure(network)
    curve = list(fit(fitted, network, Rates(5e-3), steps=40, seed=0))
    assert [step for step, _, _ in curve] == [10, 20, 30, 40]
    assert curve[-1][2] < 0.7 * start


def test_validation_loss_is_the_base_s_own(base: LlamaForCausalLM, task: Task, data: Data) -> None:
    measured = data.measure(Network(Options(blocks=()), base, data.train))
    total = count = 0.0
    for batch in task.evaluated(task.validation, 8):
        tokens = int((batch["labels"] != -100).sum())
        total, count = total + base(**batch).loss.item() * tokens, count + tokens
    assert measured == pytest.approx(total / count, rel=0.01)


def test_whitened_states_are_uncorrelated_and_of_like_size(data: Data) -> None:
    sample = sampled(30, data.train)
    white = Whitening(sample)(sample)
    covariance = white.T @ white / len(white)
    torch.testing.assert_close(covariance, torch.diag(covariance.diag()), rtol=0, atol=1e-3)
    assert covariance.diag().max() <= 1.001
    assert white.mean(0).abs().max() < 1e-3


def test_muon_moves_every_direction_as_far() -> None:
    torch.manual_seed(0)
    for shape in ((12, 30), (30, 12)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_side_networks_may_start_from_the_base(base: LlamaForCausalLM, data: Data) -> None:
    (ablation,) = ablations.chosen(["from-base-weights"])
    side = Network(ablation.options, base, data.train).side
    assert side is not None
    weight = side.down[1].weight
    assert torch.equal(weight.sum(1), torch.ones(16))
    channels = weight.argmax(1)
    assert len(channels.unique()) == 16
    mlp, own = side.blocks[0].mlp, base.model.layers[2].mlp
    rows_of_base = own.gate_proj.weight[:, channels]
    assert all(any(torch.equal(row, other) for other in rows_of_base) for row in mlp.gate.weight)


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ablations", *words])
    ablations.main()


def test_the_command_resumes_where_it_stopped(
    base: LlamaForCausalLM, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablations, "smollm2_tokenizer", lambda: None)
    monkeypatch.setattr(ablations, "load", lambda *_: task)
    monkeypatch.setattr(states, "smollm2", lambda: (base, None))
    monkeypatch.setattr(states, "dequantized", lambda: base)
    words = ("--rows", "16", "--steps", "2", "--validation-rows", "8", "--only", "linear-last", "three-epochs-linear")
    command(monkeypatch, *words[:-1])
    first = rows.read("ablations")
    command(monkeypatch, *words)
    both = rows.read("ablations")
    command(monkeypatch, *words)
    assert rows.read("ablations") == both
    assert both[0] == first[0]
    assert [(row["name"], row["steps"]) for row in both] == [("linear-last", 2), ("three-epochs-linear", 6)]
    for row in both:
        assert row["loss_at_end"] == row["curve"][-1][-1] != row["loss_at_start"]
        assert row["seconds"] > 0
        assert row["trained_parameters"] == len(row["options"]["linear"]) * (64 * 64 + 64)
        assert row["predicted"].endswith(".")


def test_the_command_lists_and_refuses_in_a_sentence(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "--list")
    assert (
        len(capsys.readouterr().out.splitlines())
        == len(ablations.ABLATIONS)
        == len({x.name for x in ablations.ABLATIONS})
    )
    monkeypatch.setattr(ablations, "smollm2_tokenizer", lambda: None)
    with pytest.raises(SystemExit):
        command(monkeypatch, "--only", "ablation")
    assert "only is ablation; choose from every-block-d8, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch)
    assert "data is None, which has no gsm8k_train.jsonl; name a folder that has it." in capsys.readouterr().err
    monkeypatch.setattr(ablations, "load", lambda *_: task)
    with pytest.raises(SystemExit):
        command(monkeypatch, "--rows", "4")
    assert "rows is 4; give 8 to 40." in capsys.readouterr().err


def run(method: str, **row: object) -> list[dict]:
    given = {
        "task": "gsm8k", "rows": 80, "epochs": 1, "few_shot_examples": 0, "method": method, "validation": 1.0,
        "test": 1.0, "test_rows": 300, "seconds": 100.0, "options": {"four_bit": False},
        "environment": {"device": "one"},
    }  # fmt: skip
    return [{**given, **row}]


def test_targets_compare_with_the_best_lora_at_equal_time_and_from_equal_data() -> None:
    groups = [
        run("lora", validation=1.1, test=0.5),  # better on test rows, by luck
        run("lora-r8", validation=1.0, test=1.0),
        run("side", validation=1.2, test=1.04, seconds=39.0),
        run("side", rows=200, validation=0.9, test=0.99, seconds=104.0),
        run("side", rows=900, validation=0.5, test=0.5, seconds=300.0),
        3 * run("side", task="sst2", validation=0.8, test=0.8),
        3 * run("lora", task="sst2", validation=0.9, test=0.9),
        3 * run("side", task="rte", validation=0.8, test=0.8),
        run("lora", task="rte", validation=0.9, test=0.9),
        run("qlora", options={"four_bit": True}),  # nothing beside it
    ]
    equal_time, equal_data, accuracy, one_seed = (*targets.of_losses(groups), *targets.of_accuracy(groups))
    assert equal_time[2:4] == ["1.000 in 100 s, 80 x 1 rows, 1 seed", "0.990 in 104 s, 200 x 1 rows, 1 seed"]
    assert equal_time[4] == "met: -0.010 in 1.04 of the time"
    assert equal_data[4] == "met: +0.040 in 0.39 of the time"
    assert accuracy[4] == "**missed**: -10.0 ± 2.9 points"
    assert one_seed[4] == "open, as it takes 3 seeds: -10.0 ± 2.9 points"
    (guessing,) = targets.of_accuracy([3 * run(name, task="rte", test=0.53) for name in ("side", "lora")])
    assert guessing[4] == "open, as LoRA learned nothing: +0.0 ± 4.1 points"
    memory = list(targets.of_memory({"side": 1.0, "lora": 4.0, "qlora": 1.5}))
    assert [line[4] for line in memory] == ["met: 0.25", "**missed**: 0.67"]


def test_the_page_takes_each_method_at_its_best_rate_on_validation_rows() -> None:
    def side(centered: bool, **row: object) -> list[dict]:
        options = {"four_bit": True, "arguments": {"center_taps": centered}}
        return run("side", learning_rate=1e-3, options=options, **row)

    good, bad = (run("lora", learning_rate=rate, validation=loss) for rate, loss in ((3e-3, 0.9), (6e-3, 1.1)))
    lucky = run("lora", learning_rate=1e-3, validation=1.0, test=0.1)
    best_accuracy = run("lora", task="sst2", learning_rate=3e-3, validation=0.8)
    accuracies = [best_accuracy, run("lora", task="sst2", learning_rate=1e-3, validation=0.6)]
    old, new, alone = side(False, validation=0.5), side(True), side(False, rows=20)
    assert page.best([good, bad, lucky, *accuracies, old, new, alone]) == [good, best_accuracy, new, alone]


def test_a_peak_is_shown_only_beside_rows_of_what_was_measured() -> None:
    memory = {"side": 1.0, "lora": 4.0}
    (four_bit,) = run("side", options={"four_bit": True})
    (full,) = run("side")
    (lora,) = run("lora")
    assert (page.peak(four_bit, memory), page.peak(full, memory), page.peak(lora, memory)) == (1.0, None, 4.0)
    assert page.peak({**four_bit, "few_shot_examples": 4}, memory) is None
    assert page.peak({**lora, "task": "sst2"}, memory) is None
    assert page.peak({**lora, "method": "lora-r8"}, memory) is None


def question(row: dict) -> str:
    return row["question"]


def problem(row: dict) -> str:
    """Of a solved problem, without its solution."""
    return row["question"].split("\n\n")[0]


def written(folder: Path, name: str, found: list[dict]) -> None:
    (folder / name).write_text("\n".join(map(json.dumps, found)))


def sentences(name: str, folder: Path) -> Texts:
    """The task, of sentences that are made up; some of the test set are in the training file too."""
    pairs = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "label": n % 2} for n in range(900)]
    single = [{"sentence": f"s{n}", "label": n % 2} for n in range(900)]
    for part, start in (("train", 0), ("test", 600)):
        written(folder, f"mrpc_{part}.jsonl", pairs[start : start + 600 if part == "train" else None])
    for part, start, end in (("train", 0, 650), ("dev", 640, 900)):
        written(folder, f"cola_in_domain_{part}.jsonl", single[start:end])
    # Of four solutions of a problem, three are right.
    solutions = [
        {"question": f"q{n}", "solution": f"{n}.{k}", "is_correct": k < 3} for n in range(50) for k in range(4)
    ]
    written(folder, "gsm8k_model_solutions.jsonl", solutions)
    return texts_of(name, folder)


def real(name: str, folder: Path) -> Texts:
    if not DATA.is_dir():
        pytest.skip(f"there is no {DATA}, the data of the quality benchmark")
    return texts_of(name, DATA)


@pytest.mark.parametrize("source", [sentences, real])
@pytest.mark.parametrize(("name", "of"), [("mrpc", question), ("cola", question), ("reward", problem)])
def test_no_question_is_in_two_sets_and_right_solutions_are_as_many_as_wrong(
    name: str, of: Callable[[dict], str], source: Callable[[str, Path], Texts], tmp_path: Path
) -> None:
    texts = source(name, tmp_path)
    parts = (texts.train, texts.validation, texts.test)
    asked = [{of(row) for row in part} for part in parts]
    assert all(len(questions) > 4 for questions in asked)
    assert sum(map(len, asked)) == len(set.union(*asked))
    assert {row["label"] for part in parts for row in part} == {0, 1}
    if name == "reward":
        for part in parts:
            assert sum(row["label"] for row in part) * 2 == len(part)


def test_extraction_s_sets_share_no_question() -> None:
    texts = texts_of("extraction", None)
    asked = [{question(row) for row in part} for part in (texts.train, texts.validation, texts.test)]
    assert sum(map(len, asked)) == len(set.union(*asked))


def test_a_missing_file_and_an_unknown_task_are_one_sentence(tmp_path: Path) -> None:
    for name in TASKS.keys() - {"extraction"}:
        with pytest.raises(ValueError, match=r"^data is .*, which has no .*\.jsonl; name a folder that has it\.$"):
            texts_of(name, tmp_path)
    with pytest.raises(ValueError, match=r"^task is nothing; choose one of gsm8k, "):
        texts_of("nothing", tmp_path)


def appended(name: str, start: Any) -> None:
    start.wait(60)
    for number in range(200):
        rows.append("many", {"of": name, "number": number, "text": name * 3000})


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # what is forked starts no thread
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, as the imports of new processes take longer than the test")
def test_rows_of_processes_that_append_at_the_same_time_are_all_whole() -> None:
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(2)
    processes = [fork.Process(target=appended, args=(name, start)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    found = rows.read("many")
    for name in "ab":
        assert [row["number"] for row in found if row["of"] == name] == list(range(200))
    assert all(row["text"] == row["of"] * 3000 for row in found)


def test_the_page_without_rows_says_what_to_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws: pip install matplotlib")
    for table in page.TABLES.values():
        assert table(tmp_path).startswith("Not measured yet. Run `python -m benchmarks.quality.")
    assert not list(tmp_path.glob("*.svg"))


def test_a_table_of_tasks_has_those_that_both_were_measured_on(tmp_path: Path) -> None:
    """From any machine, which is named; runs that read stored states are in no table of times."""

    def measured(task: str, method: str, device: str, **row: object) -> None:
        environment = {"device": device, "threads": row.pop("threads", None), **dict.fromkeys(document.VERSIONS, "1")}
        (one,) = run(method, task=task, seed=0, rows=2000, learning_rate=1e-3, test=0.9, majority=0.5, **row)
        fields = {"peak_allocated": 2**30, "environment": environment, "commit": "c", "dirty": False, "date": "2026"}
        fields["model"] = page.BASE
        options = {"options": {"four_bit": False, "arguments": {"center_taps": True}}, "command": "train"}
        rows.append("quality", {**one, **fields, **options})

    measured("sst2", "lora", "one")
    assert page.tasks(tmp_path).startswith("Not measured yet.")
    measured("sst2", "side", "other", threads=2, states=True, few_shot_examples=16)
    measured("mrpc", "lora", "one")
    lines = [line.split("|")[1:-1] for line in page.tasks(tmp_path).splitlines() if line.startswith("| sst2 | ")]
    shown = [[line[column].strip() for column in (2, 4, -1)] for line in lines]
    assert shown == [["lora", "-", "one"], ["side", "16", "other"]]
    assert "| mrpc | " not in page.tasks(tmp_path)
    measured("extraction", "lora", "one")
    text = {"task": "extraction", "rows": 2000, "epochs": 3, "environment": {"device": "other"}}
    for rate, seed in ((1e-3, 0), (2e-3, 0), (2e-3, 1)):  # what was tried with one seed alone is not shown
        losses = {of: {"loss": 0.5, "exact": 0.8} for of in ("validation", "test")}
        rows.append("stored_task", {**text, "learning_rate": rate, "seed": seed, **losses})
    found = " | ".join(f"{value} ± 0.0000" for value in ("0.5000", "0.5000", "0.8000"))
    line = f"| extraction | 2000 x 3 | side | float32 | - | 0.002 | 2 | {found} |"
    assert page.tasks(tmp_path).count("| extraction | 2000 x 3 ") == page.tasks(tmp_path).count(line) == 1
    assert page.runs(tested=True) == []


def test_a_softmax_over_a_part_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all of it training is the same; afterwards the head is whole again."""
    draw, base = random.Random(0), tiny()
    data = [[draw.randrange(3, 100) for _ in range(9)] for _ in range(4)]
    found = [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in data]
    monkeypatch.setattr(from_states, "LIKELY", 5)
    folder = from_states.stored("tiny", found, lambda: base)
    parts = from_states.Rows.of(folder)

    def trained(vocabulary: Any) -> dict[str, torch.Tensor]:
        model = from_states.fresh(folder, 0)
        head = model.get_output_embeddings().weight
        from_states.learn(model, from_states.batches_of(parts, 2, 0, size=2), vocabulary)
        assert model.get_output_embeddings().weight is head
        return {name: own.detach().clone() for name, own in model.named_parameters() if own.requires_grad}

    whole, every = trained(None), trained(torch.arange(base.config.vocab_size))
    for name, own in whole.items():
        torch.testing.assert_close(every[name], own, rtol=1e-5, atol=1e-7, msg=name)
    some = from_states.vocabulary_of(from_states.fresh(folder, 0), parts)
    assert {token for ids in data for token in ids[2:]} <= {*some.tolist()}
