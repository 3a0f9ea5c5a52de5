"""vLLM serves side networks: in one batch, each request's tokens are those of transformers and PEFT."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GROUPED, config_of, randomize_side_network, word_tokenizer
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig
from typer.testing import CliRunner

pytest.importorskip("vllm.entrypoints", reason="needs an environment of its own: bash scripts/test_vllm.sh")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import openai
from qtuning_peft.integrations.vllm import engine_options
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from qtuning_peft import SideTuningConfig
from qtuning_peft.cli import app

OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "max_model_len": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "gates": {"reduction_factor": 8, "tap_every": 5, "mixing": "paper", "layers_to_transform": [3, 17]},
    "every": {"downsample": "lora", "tap_every": 1, "center_taps": False},
}
# How far from the base, so that each says something else.
NOISE = {"default": 0.05, "gates": 0.3, "every": 0.05}
PROMPTS = ["The capital of France is", "def fib(n):", "Once upon a time", "1, 2, 3,"]
NEW_TOKENS = 12


def model_of(base: Path, folders: dict[str, Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for index, (name, folder) in enumerate(folders.items()):
        if index:
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model.eval()


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters of different settings, each of which says something else than the base."""
    found = {}
    for index, (name, settings) in enumerate(SETTINGS.items()):
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
        model = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", **settings))
        randomize_side_network(model, seed=index, scale=NOISE[name])
        found[name] = tmp_path_factory.mktemp("adapters") / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def expected(smollm2: Path, adapters: dict[str, Path]) -> dict[tuple[str | None, str], list[int]]:
    """What transformers and PEFT generate, greedily, by adapter and prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2), model_of(smollm2, adapters)
    answers = {}
    for name in [None, *adapters]:
        if name is not None:
            model.set_adapter(name)
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
        with model.disable_adapter() if name is None else nullcontext():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        for prompt, own in zip(PROMPTS, tokens[:, inputs.input_ids.shape[1] :].tolist(), strict=True):
            end = tokenizer.eos_token_id
            answers[name, prompt] = own[: own.index(end) + 1] if end in own else own
    # None of these tests could fail if all said the same.
    assert len({tuple(answers[name, PROMPTS[2]]) for name in [None, *adapters]}) == len(adapters) + 1
    return answers


def small_pair(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """A small random model with an adapter, and the options that serve both."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config_of("llama", **GROUPED | {"hidden_size": 128, "head_dim": 32}))
    base.to(dtype).save_pretrained(folder / "base")
    word_tokenizer().save_pretrained(folder / "base")
    side = get_peft_model(base, SideTuningConfig(task_type="CAUSAL_LM", layers_to_transform=[1])).eval()
    randomize_side_network(side, scale=0.5)
    side.save_pretrained(folder / "side")
    options = engine_options(str(folder / "base"), {"side": folder / "side"})
    return side, options | OPTIONS | {"max_model_len": 64, "dtype": str(dtype).removeprefix("torch.")}


def prompt_likelihoods(answer: Any) -> torch.Tensor:
    return torch.tensor([next(iter(entry.values())).logprob for entry in answer.prompt_logprobs[1:]])


def likelihoods(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_in_16_bits(tmp_path: Path) -> None:
    side, options = small_pair(tmp_path, torch.bfloat16)
    llm = LLM(**options)
    ids = [5, 6, 7, 50, 51, 52]
    sampling, request = (
        SamplingParams(max_tokens=1, prompt_logprobs=0),
        LoRARequest("side", 300, str(tmp_path / "side")),
    )
    prompts = [{"prompt_token_ids": ids}] * 2
    answers = llm.generate(prompts, sampling, lora_request=[None, request], use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    plain, tuned = map(prompt_likelihoods, answers)
    torch.testing.assert_close(tuned, likelihoods(side, ids), atol=0.05, rtol=0)
    with side.disable_adapter():
        torch.testing.assert_close(plain, likelihoods(side, ids), atol=0.05, rtol=0)
    assert (plain - tuned).abs().max() > 0.5


@pytest.mark.smollm2
def test_a_batch_of_adapters_and_the_base(
    smollm2: Path, adapters: dict[str, Path], expected: dict[tuple[str | None, str], list[int]], tmp_path: Path
) -> None:
    requests = {name: LoRARequest(name, 1 + i, str(folder)) for i, (name, folder) in enumerate(adapters.items())}
    llm = LLM(**engine_options(str(smollm2), adapters), **OPTIONS, max_num_batched_tokens=1024)
    # Another engine in this process, with an adapter of the same number.
    side, options = small_pair(tmp_path)
    other = LLM(**options)

    wanted = list(expected)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=0)
    chosen = [None if name is None else requests[name] for name, _ in wanted]
    for _ in range(2):
        answers = llm.generate([prompt for _, prompt in wanted], sampling, lora_request=chosen, use_tqdm=False)
        assert [answer.outputs[0].token_ids for answer in answers] == [expected[one] for one in wanted]
        theirs = side.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=8, pad_token_id=0)[0, 3:]
        mine = other.generate(
            {"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
            lora_request=LoRARequest("side", 1, str(tmp_path / "side")), use_tqdm=False,
        )  # fmt: skip
        assert list(mine[0].outputs[0].token_ids)[: len(theirs)] == theirs.tolist()

    # The likelihood of a prompt is the adapter's too, at every token.
    model = model_of(smollm2, adapters)
    for (name, _), answer in zip(wanted, answers, strict=True):
        if name is not None:
            model.set_adapter(name)
        with model.disable_adapter() if name is None else nullcontext():
            theirs = likelihoods(model, answer.prompt_token_ids)
        torch.testing.assert_close(prompt_likelihoods(answer), theirs, atol=2e-4, rtol=0)

    # What the base has cached of a long prompt, in several passes of it, serves every adapter.
    long = {"prompt_token_ids": torch.randint(3, 40000, (900,), generator=torch.Generator().manual_seed(0)).tolist()}
    cached = []
    for name in [None, *adapters]:
        chosen = None if name is None else requests[name]
        sampling = SamplingParams(temperature=0, max_tokens=4)
        answer = llm.generate(long, sampling, lora_request=chosen, use_tqdm=False)[0]
        cached.append(answer.num_cached_tokens)
        if name is not None:
            model.set_adapter(name)
        with model.disable_adapter() if name is None else nullcontext():
            ids = torch.tensor([long["prompt_token_ids"]])
            tokens = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)[0, 900:]
        assert answer.outputs[0].token_ids == tokens.tolist()
    assert cached[0] == 0
    assert min(cached[1:]) >= 768
    for engine in (llm, other):
        engine.llm_engine.engine_core.shutdown()


def broken(folder: Path, to: Path) -> Path:
    """A copy of an adapter with a value that is not finite."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    tensors = load_file(to / "adapter_model.safetensors")
    next(iter(tensors.values())).flatten()[0] = float("nan")
    save_file(tensors, to / "adapter_model.safetensors")
    return to


@pytest.fixture(scope="module")
def server(
    smollm2: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """`qtuning serve` with two of the adapters, and blocks for the third."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "qtuning_peft.cli", "serve", smollm2, "--served-model-name", "base"]
    command += ["--adapter", f"default={adapters['default']}", "--adapter", f"every={adapters['every']}"]
    command += ["--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "16"]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        process = subprocess.Popen([str(c) for c in command], stdout=output, stderr=output, env=environment)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    try:
        for _ in range(600):
            time.sleep(1)
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                continue
        else:
            pytest.fail(f"The server did not start: {log.read_text()[-5000:]}")
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def complete(client: openai.OpenAI, model: str, prompt: str) -> list[int]:
    extra = {"return_token_ids": True}
    answer = client.completions.create(
        model=model, prompt=prompt, temperature=0, max_tokens=NEW_TOKENS, extra_body=extra
    )
    return answer.choices[0].token_ids


@pytest.mark.smollm2
def test_the_server_under_traffic(
    server: openai.OpenAI, adapters: dict[str, Path], expected: dict[tuple[str | None, str], list[int]], tmp_path: Path
) -> None:
    assert [model.id for model in server.models.list()] == ["base", "default", "every"]
    served = [(name, prompt) for name, prompt in expected if name != "gates"]
    tasks = [served[index % len(served)] for index in range(200)]
    bad = broken(adapters["default"], tmp_path / "broken")
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(complete, server, name or "base", prompt) for name, prompt in tasks]
        # Meanwhile one is loaded, used and unloaded, and one is refused.
        time.sleep(2)
        assert not all(answer.done() for answer in answers)
        load = {"lora_name": "gates", "lora_path": str(adapters["gates"])}
        server.post("/load_lora_adapter", body=load, cast_to=str)
        assert complete(server, "gates", PROMPTS[0]) == expected["gates", PROMPTS[0]]
        with pytest.raises(openai.APIStatusError, match="not finite"):
            server.post("/load_lora_adapter", body={"lora_name": "bad", "lora_path": str(bad)}, cast_to=str)
        server.post("/unload_lora_adapter", body={"lora_name": "gates"}, cast_to=str)
        assert [answer.result() for answer in answers] == [expected[task] for task in tasks]
    for unknown in ("gates", "bad", "nobody"):
        with pytest.raises(openai.NotFoundError):
            complete(server, unknown, PROMPTS[0])
    said = {
        server.chat.completions.create(
            model=name, messages=[{"role": "user", "content": "Who are you?"}], temperature=0, max_tokens=8
        ).choices[0].message.content
        for name in ("base", "default", "every")
    }  # fmt: skip
    assert len(said) == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--adapter", "bad={bad}"], "not finite"),
        (["--adapter", "other={other}"], "base_hidden_size of the adapter is 128, but this base has 576"),
        (["--adapter", "attends={attends}"], "side_attention of"),
        (["--adapter", "nowhere"], "write it as NAME=PATH"),
        (["--adapter", "a={bad}", "--adapter", "a={bad}"], "a name twice"),
        (["--lora-modules", "a=b"], "qtuning serve fills it in"),
    ],
)
@pytest.mark.smollm2
def test_what_cannot_be_served_is_refused_before_vllm_starts(
    arguments: list[str], sentence: str, smollm2: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folders = {"bad": broken(adapters["default"], tmp_path / "bad")}
    small = AutoModelForCausalLM.from_config(config_of("llama", **GROUPED | {"hidden_size": 128, "head_dim": 32}))
    get_peft_model(small, SideTuningConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "other")
    folders["other"] = tmp_path / "other"
    shutil.copytree(adapters["default"], tmp_path / "attends")
    folders["attends"] = tmp_path / "attends"
    settings = json.loads((tmp_path / "attends" / "adapter_config.json").read_text())
    (tmp_path / "attends" / "adapter_config.json").write_text(json.dumps(settings | {"side_attention": True}))
    done = CliRunner().invoke(app, ["serve", str(smollm2), *(word.format(**folders) for word in arguments)])
    assert done.exit_code == 1
    assert sentence in " ".join(done.output.split())


def test_a_base_that_vllm_does_not_hand_out(tmp_path: Path) -> None:
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 1
    assert "OPTForCausalLM cannot be followed in vLLM" in " ".join(done.output.split())


# Last: beside numba, which this imports, vLLM 0.32 makes no second engine in a process.
def test_draft_models_are_refused(tmp_path: Path) -> None:
    _, options = small_pair(tmp_path)
    draft = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    with pytest.raises(ValueError, match="draft models do not know side networks"):
        LLM(**options, speculative_config=draft)
