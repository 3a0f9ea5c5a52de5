"""Write-back: fresh it is the base, the base is in no graph, exact feedback is autograd's, fitted feedback learns."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).parent.parent
if not (REPOSITORY / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not installed with the package", allow_module_level=True)
sys.path.insert(0, str(REPOSITORY))

from benchmarks import methods, rows  # noqa: E402
from benchmarks.quality import write_back_runs  # noqa: E402
from benchmarks.quality.tasks import Task  # noqa: E402
from benchmarks.quality.write_back import Variant, WriteBack  # noqa: E402

VOCABULARY, BLOCKS = 96, 4


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def task() -> Task:
    """Rows with a common prefix that is worth caching, and an answer that repeats one of two tokens."""
    draw = torch.Generator().manual_seed(0)
    encoded = []
    for number in range(48):
        prompt = [*range(10, 30), *torch.randint(3, VOCABULARY, (4 + number % 7,), generator=draw).tolist()]
        answer = [1 + number % 2] * (3 + number % 3)
        encoded.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Task("tiny", None, encoded[:32], encoded[32:40], encoded[40:], padding=0)


def learner(base: LlamaForCausalLM, task: Task, variant: Variant, steps: int = 20, rate: float = 5e-3) -> WriteBack:
    torch.manual_seed(0)
    return WriteBack(variant, methods.apply(methods.find("side"), base), task, rate, steps, seed=0)


@pytest.mark.parametrize("rank", [0, 8])
def test_fresh_writes_are_the_base(rank: int, base: LlamaForCausalLM, task: Task) -> None:
    model = learner(base, task, Variant(blocks=3, rank=rank))
    model.prepare()
    batch = task.batch(task.train[:8])
    passed = model.follow(batch)
    total = model.loss(passed)[0]
    model.model.unload()
    expected = sum(base(**task.batch([row])).loss * sum(label > 0 for label in row["labels"]) for row in task.train[:8])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    bare = learner(base, task, Variant()).follow(batch)
    for mine, theirs in zip(passed.states.blocks, bare.states.blocks, strict=True):
        assert torch.equal(mine[1], theirs[1])


def test_no_tensor_of_the_base_is_in_the_graph(base: LlamaForCausalLM, task: Task) -> None:
    model = learner(base, task, Variant(blocks=3, rank=8))
    model.prepare()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        model.step(task.batch(task.train[:8]))
    of_blocks = {p.data_ptr() for name, p in base.named_parameters() if ".layers." in name}
    assert saved
    assert not of_blocks & {tensor.data_ptr() for tensor in saved}
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("variant", [Variant(blocks=3, rank=8), Variant(blocks=2, rank=4), Variant(blocks=3, rank=0)])
def test_exact_feedback_is_the_gradient_of_autograd(variant: Variant, base: LlamaForCausalLM, task: Task) -> None:
    model = learner(base.double(), task, replace(variant, network=False, feedback="exact"))
    model.prefix = None
    torch.nn.init.normal_(model.writes.up, std=0.3)
    batch = task.batch(task.train[:8])
    passed = model.follow(batch, keep=True)
    total, leaf = model.loss(passed)
    (last,) = torch.autograd.grad(total, leaf)
    model._learn(passed, last, exact=True)
    found = [parameter.grad.clone() for parameter in model.writes.parameters() if parameter.grad is not None]

    model.model.unload()
    handles = [
        base.model.layers[index].register_forward_hook(
            lambda _, __, output, at=index - model.first: output + model.writes(output, at)
        )
        for index in range(model.first, BLOCKS)
    ]
    model.writes.zero_grad()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    (base(**batch).loss * tokens).backward()
    for handle in handles:
        handle.remove()
    expected = [parameter.grad for parameter in model.writes.parameters() if parameter.grad is not None]
    assert len(found) == len(expected) == (2 if variant.rank else 1)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() < 1e-5 * theirs.norm()  # Llama's norms are in float32, whatever its dtype


def test_the_fit_finds_a_linear_map_and_one_exact_row_removes_its_bias(base: LlamaForCausalLM, task: Task) -> None:
    for block in base.model.layers:  # whose blocks add nothing: every gradient is that of the last block
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    variant = Variant(blocks=3, rank=8)
    model = learner(base, task, variant)
    model.prepare()
    torch.testing.assert_close(model.cosines(task.batch(task.validation)), [1.0] * 3, rtol=0, atol=0.05)

    model.model.unload()
    model = learner(base.double(), task, replace(variant, exact_rows=8))
    model.prepare()
    model.feedback.normal_()  # whatever the guess is: all rows' exact gradients correct it
    torch.nn.init.normal_(model.writes.up)
    found: list[torch.Tensor] = []
    for chosen in (model.variant, replace(variant, feedback="exact")):
        model.variant, model.optimizer.step = chosen, lambda: found.append(model.writes.up.grad.clone())
        model.step(task.batch(task.train[:8]))
    corrected, exact = (gradient / gradient.norm() for gradient in found)  # they are clipped
    assert (corrected - exact).norm() < 1e-4


def test_the_command_resumes_and_records_what_diverges(
    base: LlamaForCausalLM, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QTUNING_RESULTS", str(tmp_path))
    monkeypatch.setattr(write_back_runs, "smollm2_tokenizer", lambda: None)
    monkeypatch.setattr(write_back_runs, "load", lambda *_: task)
    monkeypatch.setattr(write_back_runs, "load_base", lambda *_: base)
    names = ["read-only", "last-1", "last-3+refit-2+one-exact"]
    monkeypatch.setitem(write_back_runs.CHANGES, "refit-2", {"refit_every": 2})
    words = [
        "",
        "--data",
        "x",
        "--variants",
        *names,
        "--steps",
        "4",
        "--evaluated-rows",
        "8",
        "--rates",
        "1e-2",
        "1e30",
    ]
    for worker in ("0/2", "1/2", "0/1"):
        monkeypatch.setattr(sys, "argv", [*words, "--worker", worker])
        write_back_runs.main()
    found = rows.read("write_back")
    assert len(found) == len({write_back_runs.key(row) for row in found}) == 6
    assert not [row["error"] for row in found if "error" in row]
    for row in found:
        json.dumps(row, allow_nan=False)
        assert row["diverged"] == (row["learning_rate"] > 1)
        if not row["diverged"]:
            assert row["validation"] < row["loss_at_start"]
            assert row["step_over_forward"] > 0
