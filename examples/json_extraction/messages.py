"""Synthetic messages to a restaurant and, as JSON, what is to be extracted from them, drawn from `messages.yaml`.

Training, validation and test rows share no names and no phrases: the task is learned, not its words.
"""

import json
import random
from calendar import month_name
from pathlib import Path

import yaml


def draw_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of `"train"`, `"validation"` or `"test"`, the same for the same arguments.

    Returns:
        Each with `message`, `prompt` (instruction and message) and `completion` (JSON).

    Raises:
        ValueError: when there is no such split, or `count` is below 1.
    """
    data = yaml.safe_load(Path(__file__).with_name("messages.yaml").read_text(encoding="utf-8"))
    instruction = data.pop("instruction").strip()
    if split not in data or count < 1:
        raise ValueError(f"{count} rows of {split!r} cannot be drawn; choose 1 or more of {', '.join(data)}.")
    words, rng = data[split], random.Random(f"{split} {seed}")
    rows = []
    for _ in range(count):
        fields = {
            "phone": f"555-{rng.randint(0, 9999):04}",
            "date": f"{rng.choice(month_name[1:])} {rng.randint(1, 28)}",
            "name": f"{rng.choice(words['first'])} {rng.choice(words['last'])}",
        }
        guests = rng.randint(2, 12)
        opening, request, contact = (rng.choice(words[name]) for name in ("openings", "requests", "contacts"))
        if not opening or opening.endswith(". "):
            request = request[0].upper() + request[1:]
        # Guests give their name once.
        closing = "" if "{name}" in opening else " " + rng.choice(words["closings"])
        message = f"{opening}{request} {contact}{closing}".format(**fields, guests=guests)
        rows.append({"message": message, "prompt": f"{instruction}\n\n{message}", "completion": json.dumps(fields)})
    return rows


def corrupt(rows: list[dict[str, str]], share: float, seed: int) -> list[int]:
    """Give a share of `rows` each other's completions, as bad data to be found; returns their indices."""
    corrupted = sorted(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    completions = [rows[index]["completion"] for index in [*corrupted[1:], *corrupted[:1]]]
    for index, completion in zip(corrupted, completions, strict=True):
        rows[index]["completion"] = completion
    return corrupted
