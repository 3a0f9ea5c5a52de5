"""`qtuning compare`: the base's answers are the base's, the judge's verdicts are counted, and the page shows both."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from conftest import randomize_side_network
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from qtuning_peft import SideTuningConfig
from qtuning_peft.cli import app

LENGTH = 6
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["w1 w2 w3", "w4"]},
    {"question_id": 82, "category": "writing", "turns": ["w9 w8", "w7 w6 w5 w4"]},
    {"question_id": "m1", "category": "<b>math</b>", "turns": ["w30 <script>alert(1)</script>", "w5 w6"]},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with adapters, side network and LoRA, that have left it, and questions."""
    folder = tmp_path_factory.mktemp("compare")
    pico.save_model(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # adapters of a base that is wherever they are
        side = get_peft_model(load("base"), SideTuningConfig(reduction_factor=4, task_type="CAUSAL_LM"))
        randomize_side_network(side, scale=0.3)
        side.save_pretrained("side")
        torch.manual_seed(1)
        config = LoraConfig(lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(load("base"), config).save_pretrained("lora")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with nothing answered."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def run(*options: object, adapter: str = "side") -> str:
    """Output of the command with a few tokens for each answer."""
    words = ["compare", "questions.jsonl", adapter, "-o", "answers.jsonl", "--max-new-tokens", LENGTH, *options]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 1), result.exception
    assert isinstance(result.exception, SystemExit | None)
    assert ("Error" in result.output) == bool(result.exit_code)
    return " ".join(result.output.split())  # however wide the terminal is


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, turns: list[str]) -> list[str]:
    """Answers to all turns, one token after the other and without a key-value cache."""
    text, replies = "", []
    for turn in turns:
        text += f"<|im_start|> user {turn} <|im_end|> <|im_start|> assistant "
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        while ids.shape[1] == start or (ids.shape[1] < start + LENGTH and ids[0, -1] != tokenizer.eos_token_id):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        replies.append(tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip())
        text += f"{replies[-1]} <|im_end|> "
    return replies


@pytest.mark.parametrize("adapter", ["side", "lora"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_both_answer_as_they_do_alone(folder: Path, adapter: str, batch_size: int) -> None:
    run("--batch-size", batch_size, adapter=adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = load("base")
    expected = [greedy(base, tokenizer, row["turns"]) for row in QUESTIONS]
    tuned = PeftModel.from_pretrained(base, folder / adapter).eval()
    found = answers(folder)
    assert [{name: row[name] for name in QUESTIONS[0]} for row in found] == QUESTIONS
    assert [row["base"] for row in found] == expected
    assert [row["tuned"] for row in found] == [greedy(tuned, tokenizer, row["turns"]) for row in QUESTIONS]
    assert all(row["base"] != row["tuned"] for row in found)


def test_it_goes_on_where_it_stopped(folder: Path) -> None:
    run()
    whole = answers(folder)
    for row in whole[:2]:
        row["tuned"] = ["mine", "own"]
    (folder / "answers.jsonl").write_text(json.dumps(whole[1]) + "\n")
    run()
    again = answers(folder)
    assert again[1] == whole[1], "what is answered is not answered again"
    assert again[2] == whole[2]
    assert [row["question_id"] for row in again] == [81, 82, "m1"]
    assert again[0]["tuned"] != ["mine", "own"]
    # Nothing is left to answer: no model is needed.
    shutil.rmtree(folder / "base")
    assert "3 questions" in run()
    assert answers(folder) == again


def test_answers_of_another_run_are_not_mixed_with_these(folder: Path) -> None:
    run()
    before = answers(folder)
    assert "answers.jsonl has answers to other questions or of other settings" in run("--temperature", 0.7)
    retrained = PeftModel.from_pretrained(load("base"), folder / "side", is_trainable=True)
    randomize_side_network(retrained, seed=5)
    retrained.save_pretrained(folder / "side")
    assert "answers.jsonl has answers to other questions or of other settings" in run()
    assert answers(folder) == before
    run("--overwrite")
    assert [row["base"] for row in answers(folder)] == [row["base"] for row in before]
    assert [row["tuned"] for row in answers(folder)] != [row["tuned"] for row in before]


# -- the judge ---------------------------------------------------------------------------------------------------------


class Endpoint(BaseHTTPRequestHandler):
    """An endpoint that speaks the chat-completions format, and judges by what its server's `says` returns."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))  # type: ignore[attr-defined]
        status, reply = self.server.says(body)  # type: ignore[attr-defined]
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            reply = json.dumps({"object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        server.requests = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def judge(server: Any) -> list[str]:
    return ["--judge", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "umpire"]


def last_answers(body: dict[str, Any]) -> list[str]:
    """What the judge reads of A and of B last."""
    text = body["messages"][-1]["content"]
    parts = re.split(r"</conversation of assistant [AB]>", text)[:2]
    return [re.split(r"Assistant [AB]:\n", part)[-1].strip() for part in parts]


def rank(answer: str) -> int:
    """A taste of some judge."""
    return sum(map(ord, answer)) % 3


def prefers(body: dict[str, Any]) -> tuple[int, str]:
    first, second = map(rank, last_answers(body))
    return 200, f"[[B]]? No. <i>Verdict</i>: [[{'C' if first == second else 'A' if first > second else 'B'}]]"


class Page(HTMLParser):
    """A page whose tags are closed: its tags, its text, and the text of every answer."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.answers: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "article":
            self.answers.append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "article" in self.open:
            self.answers[-1] += data


def shown(folder: Path) -> Page:
    return Page(folder / "answers.html")


def test_verdicts_are_counted_and_shown(folder: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "of-the-judge")
    monkeypatch.setenv("HF_TOKEN", "of-the-hub")
    monkeypatch.setenv("OPENAI_API_KEY", "of-somebody-else")
    server.says = prefers
    run(*judge(server))
    found = answers(folder)
    expected = []
    for row in found:
        pairs = zip(map(rank, row["base"]), map(rank, row["tuned"]), strict=True)
        winners = ["tie" if base == tuned else "base" if base > tuned else "tuned" for base, tuned in pairs]
        assert [verdict["winner"] for verdict in row["verdicts"]["umpire"]] == winners
        expected += winners
    assert len(set(expected)) > 1

    # Every turn in both orders, with its own key and no other.
    assert len(server.requests) == 2 * 2 * len(QUESTIONS)
    for path, headers, body in server.requests:
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer of-the-judge"
        assert body["model"] == "umpire"
        assert not re.search("of-the-hub|of-somebody-else", f"{headers}{body}")
    asked = [last_answers(body) for *_, body in server.requests]
    assert asked[::2] == [pair[::-1] for pair in asked[1::2]]
    assert asked[::2] == [[row["base"][turn], row["tuned"][turn]] for row in found for turn in (0, 1)]
    assert "of-the-judge" not in (folder / "answers.jsonl").read_text() + (folder / "answers.html").read_text()

    page, counts = shown(folder), Counter(expected)
    tiles = re.findall(r"(Wins|Ties|Losses)(\d+)of 6 turns", page.text)
    assert tiles == [("Wins", str(counts["tuned"])), ("Ties", str(counts["tie"])), ("Losses", str(counts["base"]))]

    # Judged again, by the same judge, there is nothing to do; another one adds its verdicts.
    shutil.rmtree(folder / "base")
    run(*judge(server))
    assert len(server.requests) == 12
    server.says = lambda body: (200, "[[C]]")
    run(*judge(server)[:-1], "second")
    assert [row["verdicts"]["umpire"] for row in answers(folder)] == [row["verdicts"]["umpire"] for row in found]
    assert "Wins0of 6 turns" in shown(folder).text


@pytest.mark.parametrize(("says", "outcome"), [("[[A]]", "tie"), ("[[B]]", "tie"), ("who knows", "unreadable")])
def test_a_judge_that_favours_a_place_gives_ties(folder: Path, server: Any, says: str, outcome: str) -> None:
    server.says = lambda body: (200, says)
    run(*judge(server))
    assert {verdict["winner"] for row in answers(folder) for verdict in row["verdicts"]["umpire"]} == {outcome}
    label = {"tie": "Ties", "unreadable": "Unreadable"}[outcome]
    assert f"{label}6of 6 turns" in shown(folder).text


def test_the_same_answer_is_a_tie_without_a_judge(folder: Path, server: Any) -> None:
    get_peft_model(load("base"), SideTuningConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "fresh")
    run(*judge(server), adapter="fresh")
    assert all(row["base"] == row["tuned"] for row in answers(folder))
    assert not server.requests
    assert "Ties6of 6 turns" in shown(folder).text


def test_an_interrupted_judge_goes_on(folder: Path, server: Any) -> None:
    def tired(body: dict[str, Any]) -> tuple[int, str | bytes]:
        return (429, b'{"error": "slow down"}') if len(server.requests) > 6 else prefers(body)

    server.says = tired
    output = run(*judge(server))
    assert re.search(r'refuses with 429 Too Many Requests: \{"error": "slow down"\}', output)
    assert ["verdicts" in row for row in answers(folder)] == [True, False, False]
    assert "of 2 turns" in shown(folder).text
    server.says = prefers
    run(*judge(server))
    assert len(server.requests) == 7 + 8, "the first question is not judged again"
    assert all("umpire" in row["verdicts"] for row in answers(folder))


@pytest.mark.parametrize(
    ("status", "reply"),
    [(200, b"<html>welcome</html>"), (200, b'{"choices": []}'), (200, b"[1]"), (200, b"\xff\xfe"), (200, b"")],
)
def test_what_is_no_chat_completion_is_one_sentence(folder: Path, server: Any, status: int, reply: bytes) -> None:
    server.says = lambda body: (status, reply)
    assert re.search(
        r"Error: What answers at http://127\S+ is no chat completion; check the address", run(*judge(server))
    )
    assert len(answers(folder)) == 3, "the answers are kept"


def test_no_endpoint_is_one_sentence(folder: Path, server: Any) -> None:
    options = judge(server)
    server.server_close()
    server.shutdown()
    assert "Error: No judge answers at http://127.0.0.1" in run(*options)


# -- the page, and what is refused -------------------------------------------------------------------------------------


def test_the_page_is_one_file_without_scripts(folder: Path) -> None:
    run()
    page, text = shown(folder), (folder / "answers.html").read_text()
    assert not page.tags & {"script", "link", "img", "iframe", "b", "i"}
    assert not re.search(r"https?:|@import|url\(|\bon\w+=", text)
    assert "<script>alert(1)</script>" in page.text, "as text"
    pairs = [(name, row[name][turn]) for row in answers(folder) for turn in (0, 1) for name in ("base", "tuned")]
    assert page.answers == [name + reply for name, reply in pairs]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("", "questions.jsonl has no questions."),
        ("{not json", "questions.jsonl, line 1 is no JSON object"),
        ('{"question_id": 1}', "questions.jsonl has turns None in question 1; give a list of what the user says"),
        ('{"question_id": 1, "turns": [3]}', "questions.jsonl has turns [3] in question 1"),
        ('{"turns": ["w1"]}', "questions.jsonl has a question_id None"),
        ('{"question_id": 1, "turns": ["w1"]}\n' * 2, "questions.jsonl has a question_id 1; give every question"),
    ],
)
def test_bad_questions_are_one_sentence(folder: Path, rows: str, said: str) -> None:
    (folder / "questions.jsonl").write_text(rows)
    assert said in run()
    assert not (folder / "answers.jsonl").exists()


def test_other_mistakes_are_one_sentence(folder: Path) -> None:
    assert "base is no folder with an adapter_config.json" in run(adapter="base")
    assert "--judge and --judge-model go together" in run("--judge", "http://127.0.0.1:1")
    assert "--judge is 'file:///etc/passwd'" in run("--judge", "file:///etc/passwd", "--judge-model", "x")
    assert "--output is answers.txt; name a file that ends in .jsonl" in run("-o", "answers.txt")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = None
    (folder / "base" / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder / "base")
    assert "The tokenizer has no chat template" in run()
    (folder / "questions.jsonl").unlink()
    assert "questions.jsonl" in run()
