"""Answers of a base and its tuned model to questions of several turns, in a file that an interrupted run goes on with.

There is one model in memory: the base is the tuned one with its adapter switched off. In a later turn each of the two
goes on from its own earlier answers.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftModel
from peft.utils import CONFIG_NAME
from tqdm.auto import tqdm

from ..atomic import replacing
from ..eu_plane.files import json_rows
from ..evaluation import eval_mode

BASE, TUNED = "base", "tuned"


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Questions from JSON lines: rows with `question_id` and `turns`, what the user says, and a `category` if any.

    Raises:
        ValueError: when a row is something else, or two have one `question_id`.
    """
    questions = list(json_rows(path))
    if not questions:
        raise ValueError(f"{path} has no questions.")
    seen = set()
    for question in questions:
        name, turns = question.get("question_id"), question.get("turns")
        if not isinstance(name, str | int) or name in seen:
            raise ValueError(f"{path} has a question_id {name!r:.80}; give every question a name or number of its own.")
        seen.add(name)
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path} has turns {turns!r:.80} in question {name}; give a list of what the user says.")
    return questions


def adapter_digest(folder: Path) -> str:
    """Fingerprint of an adapter's configuration and weights; a ValueError where there is no adapter."""
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} is no folder with an {CONFIG_NAME}; name an adapter (`qtuning pull` copies one).")
    digest = xxhash.xxh3_128()
    for file in sorted(folder.glob("adapter_*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Answers:
    """Rows of a file, in the questions' order: each a question with both models' answers, and verdicts if it has any.

    Args:
        path: The file; it is written anew after every change.
        questions: As `read_questions` gives them.
        settings: What the answers depend on; every row has it.
        overwrite: Answer anew what is answered there.

    Raises:
        ValueError: when the file's answers are to other questions or of other settings.
    """

    def __init__(
        self, path: Path, questions: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path, self.settings = path, dict(settings)
        self.rows = [{**question, "settings": self.settings} for question in questions]
        there = list(json_rows(path)) if path.exists() and not overwrite else []
        places = {row["question_id"]: index for index, row in enumerate(self.rows)}
        for row in there:
            index = places.get(row.get("question_id"))
            if index is None or any(row.get(name) != value for name, value in self.rows[index].items()):
                raise ValueError(
                    f"{path} has answers to other questions or of other settings; choose another output, or give "
                    "--overwrite."
                )
            self.rows[index] = row

    @property
    def unanswered(self) -> list[dict[str, Any]]:
        """The rows without answers."""
        return [row for row in self.rows if TUNED not in row]

    def save(self) -> None:
        """Write the answered rows."""
        with replacing(self.path) as unfinished:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows if TUNED in row)
            unfinished.write_text("".join(lines), encoding="utf-8", errors="replace")

    def answer(self, model: PeftModel, tokenizer: Any, batch_size: int = 1) -> None:
        """Have both models answer what is unanswered; the file is saved after every batch.

        Args:
            model: The base with its adapter.
            tokenizer: One with a chat template, which is the same for both.
            batch_size: Questions answered at a time.
        """
        if not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template; set its chat_template, and save it with the adapter.")
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows = self.unanswered
        with tqdm(total=len(rows), desc="Answering", unit=" questions") as bar, eval_mode(model):
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                for name in (BASE, TUNED):
                    with model.disable_adapter() if name == BASE else nullcontext():
                        replies = self._converse(model, tokenizer, [row["turns"] for row in batch])
                    for row, reply in zip(batch, replies, strict=True):
                        row[name] = reply
                self.save()
                bar.update(len(batch))

    def _converse(self, model: Any, tokenizer: Any, turns: list[list[str]]) -> list[list[str]]:
        """The model's answers to all turns of several conversations, (conversations, turns)."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.settings["temperature"]:
            torch.manual_seed(0)
            sampling = {"do_sample": True, "temperature": self.settings["temperature"]}
        replies: list[list[str]] = [[] for _ in turns]
        for turn in range(max(map(len, turns))):
            asked = [index for index, of in enumerate(turns) if turn < len(of)]
            talks = [conversation(turns[index], replies[index]) for index in asked]
            inputs = tokenizer.apply_chat_template(
                talks, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(model.device)
            ids = model.generate(
                **inputs,
                **sampling,
                max_new_tokens=self.settings["max_new_tokens"],
                pad_token_id=tokenizer.pad_token_id,
            )  # (conversations, prompt + answer)
            answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, answer in zip(asked, answers, strict=True):
                replies[index].append(answer.strip())
        return replies


def conversation(turns: Sequence[str], replies: Sequence[str]) -> list[dict[str, str]]:
    """Messages: the user's turns with the replies so far, and the turn to reply to if there is one more."""
    messages = []
    for index, turn in enumerate(turns[: len(replies) + 1]):
        messages.append({"role": "user", "content": turn})
        if index < len(replies):
            messages.append({"role": "assistant", "content": replies[index]})
    return messages
