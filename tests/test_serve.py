"""`qtuning serve --engine transformers`: over HTTP, each adapter by its name, with the tokens that PEFT generates."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from conftest import randomize_side_network, tiny, word_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from qtuning_peft.integrations.transformers_serve import join
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available
from typer.testing import CliRunner

from qtuning_peft import SideTuningConfig
from qtuning_peft.cli import app

NEW_TOKENS = 12
QUESTION = [{"role": "user", "content": "w5 w6 w7"}]


def tokenizer() -> Any:
    found = word_tokenizer()
    found.chat_template = "{% for message in messages %}w1 {{ message.content }} {% endfor %}w2"
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `red` and `blue`."""
    folder = tmp_path_factory.mktemp("serve")
    tiny().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for seed, name in enumerate(("red", "blue")):
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(base, SideTuningConfig(reduction_factor=2, task_type="CAUSAL_LM"))
        randomize_side_network(model, seed, 0.5)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A server's."""
    if not is_serve_available():
        pytest.skip("needs the extra serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "qtuning_peft.cli", "serve", "base", "--engine", "transformers", "--adapter", "red=red",
        "--adapter", "blue=blue", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
    ]  # fmt: skip
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as server:
        try:
            for _ in range(600):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health").close()
                    break
                except URLError:
                    assert server.poll() is None, "the server did not start"
                    time.sleep(0.5)
            else:
                pytest.fail("The server did not start.")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)
    assert not [*temporary.glob("qtuning-serve-*")], "the server left its folder behind"


def ask(address: str, model: str) -> str:
    body = {"model": model, "temperature": 0, "max_tokens": NEW_TOKENS, "messages": QUESTION}
    request = Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request) as answer:
        content: str = json.load(answer)["choices"][0]["message"]["content"]
        return content


def expected(folder: Path, name: str | None) -> str:
    words = tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    if name:
        model = PeftModel.from_pretrained(model, folder / name)
    prompt = words.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(words.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_each_name_has_its_own_answer(folder: Path, address: str) -> None:
    answers = {name: ask(address, name) for name in ("base", "red", "blue")}
    assert answers == {name: expected(folder, None if name == "base" else name) for name in answers}
    assert len({*answers.values()}) == 3


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a@b", "base"])
def test_a_name_that_is_no_folder_is_refused(folder: Path, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--adapter gives the name"):
        join(folder / "base", {name: str(folder / "red")}, tmp_path)


def test_other_methods_and_bases_that_are_not_here_are_refused(folder: Path, tmp_path: Path) -> None:
    get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    (tmp_path / "joined").mkdir()
    with pytest.raises(ValueError, match="adapter of"):
        join(folder / "base", {"lora": str(tmp_path / "lora")}, tmp_path / "joined")
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--engine", "transformers"])
    assert result.exit_code == 1
    assert "folder of a model" in " ".join(result.output.split()) or not is_serve_available()
    result = CliRunner().invoke(app, ["serve", "base", "--engine", "triton"])
    assert result.exit_code == 1
    assert "choose one of vllm, transformers" in " ".join(result.output.split())
