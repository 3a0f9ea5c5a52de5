"""The texts of the quality benchmark's tasks, in training, validation and test sets.

| task         | training                  | validation           | test               | measure        |
|--------------|---------------------------|----------------------|--------------------|----------------|
| `gsm8k`      | train rows 0 to 6,999     | train 7,000 to 7,472 | test rows 0 to 299 | nats per token |
| `dolly`      | rows 0 to 2,395           | 2,396 to 2,695       | 2,696 to 2,995     | nats per token |
| `extraction` | 4,000 drawn               | 300 drawn            | 300 drawn          | nats per token |
| `sst2`       | train                     | dev                  | test               | accuracy       |
| `rte`        | train, but the last 300   | the last 300         | dev                | accuracy       |
| `mrpc`       | train, but 400            | 400 of them          | test               | accuracy       |
| `cola`       | train, but 400            | 400 of them          | in-domain dev      | accuracy       |
| `reward`     | 1,055 questions           | 132 questions        | 132 questions      | accuracy       |
| `intent`     | Dolly 0 to 2,395          | 2,396 to 2,695       | 2,696 to 2,995     | accuracy       |

Files are read from a folder (`gsm8k_train.jsonl` with `question` and `answer`, `dolly_3k.jsonl` with `instruction`,
`input`, `output` and `category`, `sst2_sentence_*.jsonl` and `cola_in_domain_*.jsonl` with `sentence` and `label`,
`rte_*.jsonl` with `premise`, `hypothesis` and `label`, `mrpc_*.jsonl` with `sentence1`, `sentence2` and `label`,
`gsm8k_model_solutions.jsonl` with `question`, `solution` and `is_correct`): the licences of some do not let them be
copied here. `extraction` is the demo's task, whose sets share no names and no phrases.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.json_extraction.messages import draw_rows

INSTRUCTION = 300  # characters of an instruction that its kind is told from


@dataclass(frozen=True)
class Texts:
    """A task's rows with `question`, `answer` and, where there are classes, `label`; `labels` counts the classes."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    labels: int | None = None


def texts_of(name: str, folder: Path | None) -> Texts:
    """The texts of the task called `name`.

    Raises:
        ValueError: when there is none, or its files are not in `folder`.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name}; choose one of {', '.join(TASKS)}.")
    return TASKS[name](folder)


def _read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None or not (folder / name).is_file():
        raise ValueError(f"data is {folder}, which has no {name}; name a folder that has it.")
    with (folder / name).open(encoding="utf-8") as lines:  # `splitlines` would also split within a string
        return [json.loads(line) for line in lines]


def _shuffled(rows: list[Any]) -> list[Any]:
    return random.Random(0).sample(rows, len(rows))


def _gsm8k(folder: Path | None) -> Texts:
    train, test = _read(folder, "gsm8k_train.jsonl"), _read(folder, "gsm8k_test.jsonl")
    return Texts(train[:7000], train[7000:], test[:300])


def _dolly(folder: Path | None) -> Texts:
    rows = [
        {"question": f"{row['instruction']}\n\n{row['input']}".strip(), "answer": row["output"]}
        for row in _read(folder, "dolly_3k.jsonl")
    ]
    return Texts(rows[:2396], rows[2396:2696], rows[2696:2996])


def _intent(folder: Path | None) -> Texts:
    """Which of eight kinds of request an instruction is, from its first sentences alone."""
    found = _read(folder, "dolly_3k.jsonl")
    kinds = tuple(sorted({row["category"] for row in found}))
    rows = [
        _classified(
            f"What kind of request is this?\n\n{row['instruction'][:INSTRUCTION]}", kinds, kinds.index(row["category"])
        )
        for row in found
    ]
    return Texts(rows[:2396], rows[2396:2696], rows[2696:], labels=len(kinds))


def _extraction(folder: Path | None) -> Texts:
    def drawn(part: str, count: int) -> list[dict[str, Any]]:
        return [{"question": row["prompt"], "answer": row["completion"]} for row in draw_rows(part, count)]

    return Texts(drawn("train", 4000), drawn("validation", 300), drawn("test", 300))


def _sst2(folder: Path | None) -> Texts:
    def read(part: str) -> list[dict[str, Any]]:
        return [
            _classified(
                f"Is the sentiment of this sentence positive or negative?\n\n{row['sentence']}",
                ("negative", "positive"),
                row["label"],
            )
            for row in _read(folder, f"sst2_sentence_{part}.jsonl")
        ]

    return Texts(read("train"), read("dev"), read("test"), labels=2)


def _rte(folder: Path | None) -> Texts:
    def read(part: str) -> list[dict[str, Any]]:
        found = []
        for row in _read(folder, f"rte_{part}.jsonl"):
            label = {"entailment": 0, "not_entailment": 1}.get(row["label"], row["label"])
            question = f"{row['premise']}\n\nDoes it follow that {row['hypothesis'].rstrip('.')}?"
            found.append(_classified(question, ("yes", "no"), label))
        return found

    train = read("train")
    return Texts(train[:-300], train[-300:], read("dev"), labels=2)


def _mrpc(folder: Path | None) -> Texts:
    def read(part: str) -> list[dict[str, Any]]:
        return [
            _classified(
                f"{row['sentence1']}\n\n{row['sentence2']}\n\nDo both sentences say the same?",
                ("no", "yes"),
                row["label"],
            )
            for row in _read(folder, f"mrpc_{part}.jsonl")
        ]

    train = _shuffled(read("train"))
    return Texts(train[:-400], train[-400:], read("test"), labels=2)


def _cola(folder: Path | None) -> Texts:
    def read(part: str) -> dict[str, dict[str, Any]]:
        return {
            row["sentence"]: _classified(
                f"Is this sentence grammatical?\n\n{row['sentence']}", ("no", "yes"), row["label"]
            )
            for row in _read(folder, f"cola_in_domain_{part}.jsonl")
        }

    train, test = read("train"), read("dev")
    # The file goes from source to source, and has a few sentences of the other one.
    rows = _shuffled([row for sentence, row in train.items() if sentence not in test])
    return Texts(rows[:-400], rows[-400:], list(test.values()), labels=2)


def _reward(folder: Path | None) -> Texts:
    """Whether a model's solution is right: as many right ones as wrong ones in each set, which share no question."""
    rows = _read(folder, "gsm8k_model_solutions.jsonl")
    questions = _shuffled(list(dict.fromkeys(row["question"] for row in rows)))
    tenth = round(len(questions) / 10)

    def of(chosen: list[str]) -> list[dict[str, Any]]:
        found = _shuffled([row for row in rows if row["question"] in set(chosen)])
        right, wrong = ([row for row in found if bool(row["is_correct"]) == kind] for kind in (True, False))
        return [
            _classified(
                f"{row['question']}\n\n{row['solution']}\n\nIs this solution right?", ("no", "yes"), row["is_correct"]
            )
            for pair in zip(right, wrong, strict=False)
            for row in pair
        ]

    parts = questions[: -2 * tenth], questions[-2 * tenth : -tenth], questions[-tenth:]
    return Texts(*(of(part) for part in parts), labels=2)


def _classified(question: str, answers: tuple[str, ...], label: Any) -> dict[str, Any]:
    return {"question": question, "answer": answers[int(label)], "label": int(label)}


TASKS: dict[str, Callable[[Path | None], Texts]] = {
    "gsm8k": _gsm8k, "dolly": _dolly, "extraction": _extraction, "sst2": _sst2, "rte": _rte, "mrpc": _mrpc,
    "cola": _cola, "reward": _reward, "intent": _intent,
}  # fmt: skip
