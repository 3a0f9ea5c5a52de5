"""Rows as people have them, as tokens with labels: what is supervised is what the assistant says.

    messages                [{"role": …, "content": …}, …], every assistant turn supervised (`conversations` too)
    prompt, completion      strings, or lists of messages
    instruction, output     Alpaca, with or without `input`
    text                    supervised from its second token on
    input_ids               tokens; with `labels`, `completion_mask` or `assistant_masks`, else supervised throughout;
                            packed with `position_ids` or `seq_lengths`

Conversations go through the model's chat template; a turn's tokens are those that overlap its text, its end-of-turn
token included, as in TRL. A packed row is taken apart: its samples never see each other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..loss import IGNORE_INDEX
from .tokenized import EncodedRow, RowError, tokenized

FORMATS: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
# The prompts of Stanford Alpaca, for models without a chat template.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class RowEncoder:
    """Turns rows into tokens with labels.

    Args:
        tokenizer: The model's tokenizer, a fast one; `None` if the rows are tokens.
        columns: The data's own names for the columns above, such as `{"prompt": "question", "completion": "answer"}`.
        chat_template: Use the chat template; without it, prompt, completion and the end-of-sequence token are joined.
    """

    def __init__(
        self, tokenizer: Any = None, columns: Mapping[str, str] | None = None, chat_template: bool = True
    ) -> None:
        known = {name for names in FORMATS.values() for name in names} | OPTIONAL_COLUMNS
        unknown = sorted(set(columns or ()) - known)
        if unknown:
            raise ValueError(f"columns names {', '.join(unknown)}; choose from {', '.join(sorted(known))}.")
        self.tokenizer = tokenizer
        self.columns = dict(columns or {})
        # Columns that are read: those of the formats, and the data's own.
        self.known = known | {*self.columns.values()}
        self.chat_template = chat_template

    def format_of(self, names: Sequence[str]) -> str:
        """Which format rows with columns `names` have; a ValueError if none that the tokenizer can serve."""
        missing = sorted(own for own in self.columns.values() if own not in names)
        if missing:
            raise ValueError(f"The data has no column {', '.join(missing)}; its columns are {', '.join(names)}.")
        canonical = {*names, *self.columns}
        fitting = [name for name, needed in FORMATS.items() if canonical.issuperset(needed)]
        # Named columns are meant, even beside tokens that an earlier scoring left.
        named = [name for name in fitting if not self.columns.keys().isdisjoint(FORMATS[name])]
        found = next(iter([*named, *fitting]), None)
        if found is None:
            raise ValueError(
                f"The data's columns are {', '.join(names) or 'none'}; needed are input_ids, messages, prompt and "
                "completion, instruction and output, or text: name yours with columns, such as "
                "{'prompt': 'question', 'completion': 'answer'}."
            )
        if found == "tokens":
            return found
        if self.tokenizer is None:
            raise ValueError("tokenizer is None, but the rows are not tokenized; pass the model's tokenizer.")
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot say which text a token stands for; load a fast one, "
                "or pass rows with input_ids and labels."
            )
        needs_template = found in ("messages", "conversations") or (self.chat_template and found != "text")
        if needs_template and not getattr(self.tokenizer, "chat_template", None):
            advice = "" if found in ("messages", "conversations") else ", or set chat_template to False"
            raise ValueError(f"The tokenizer has no chat template; set tokenizer.chat_template to the model's{advice}.")
        return found

    def encode(self, row: Mapping[str, Any], kind: str) -> EncodedRow:
        """Tokens of one row, of the format `kind` that `format_of` found; a RowError if it has none."""
        row = {**row, **{name: row[own] for name, own in self.columns.items()}}
        try:
            if kind == "tokens":
                return tokenized(row)
            if kind == "text":
                return self._text(row)
            if kind in ("messages", "conversations"):
                return self._conversation(row[kind], row)
            prompt, answer = self._alpaca(row) if kind == "alpaca" else (row["prompt"], row["completion"])
            return self._answer(prompt, answer, row)
        except RowError:
            raise
        except Exception as error:
            # Rows are other people's data, and templates are programs: whatever goes wrong is about this row alone.
            reason = str(error).strip().splitlines()
            raise RowError(f"{type(error).__name__}: {reason[0] if reason else 'no message'}") from error

    def _text(self, row: Mapping[str, Any]) -> EncodedRow:
        text, end = _string(row["text"], "text"), self.tokenizer.eos_token or ""
        if not text:
            raise RowError("empty: text has no characters")
        return self._tokens(text if text.endswith(end) else text + end, None, add_special_tokens=True)

    def _alpaca(self, row: Mapping[str, Any]) -> tuple[str, str]:
        context, instruction = row.get("input") or "", _string(row["instruction"], "instruction")
        answer = _string(row["output"], "output")
        if self.chat_template:
            return f"{instruction}\n\n{context}" if context else instruction, answer
        more = ", paired with an input that provides further context" if context else ""
        given = f"### Input:\n{context}\n\n" if context else ""
        return ALPACA_PROMPT.format(more=more, instruction=instruction, input=given), answer

    def _answer(self, prompt: Any, answer: Any, row: Mapping[str, Any]) -> EncodedRow:
        if isinstance(prompt, str) != isinstance(answer, str):
            raise RowError("one of prompt and completion is a string and the other is not")
        if not isinstance(prompt, str):
            before = self._render(prompt, row, add_generation_prompt=True)
            text = self._render([*prompt, *answer], row)
            return self._tokens(text, [(_length_of_prefix(text, before), len(text))])
        if self.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            return self._conversation(turns, row)
        text = prompt + answer + (self.tokenizer.eos_token or "")
        return self._tokens(text, [(len(prompt), len(text))], add_special_tokens=True)

    def _conversation(self, turns: Any, row: Mapping[str, Any]) -> EncodedRow:
        # `datasets` fills keys that only some messages have with None, which templates take for a value.
        messages = _without_none([_of_sharegpt(turn) if "from" in turn else turn for turn in turns or ()])
        if not messages:
            raise RowError("empty: no messages")
        if "{% generation" in self.tokenizer.chat_template.replace("{%-", "{%"):
            # The template marks the assistant's text itself.
            options = {"return_dict": True, "return_assistant_tokens_mask": True, **_template_arguments(row)}
            encoding = self.tokenizer.apply_chat_template(messages, **options)
            return tokenized({key: encoding[key] for key in ("input_ids", "assistant_masks")})
        text = self._render(messages, row)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = messages[:index]
                before = self._render(prompt, row, True) if prompt else self._opening(text, messages, row)
                after = self._render(messages[: index + 1], row)
                spans.append((_length_of_prefix(text, before), _length_of_prefix(text, after)))
        return self._tokens(text, spans)

    def _opening(self, text: str, messages: list[Any], row: Mapping[str, Any]) -> str:
        """What of `text` stands before the words of an assistant that speaks first; templates refuse to render that."""
        prompted = self._render(messages, row, add_generation_prompt=True)
        header = prompted[len(text) :] if prompted.startswith(text) else ""
        return text[: text.index(header) + len(header)] if header and header in text else ""

    def _render(self, messages: Sequence[Any], row: Mapping[str, Any], add_generation_prompt: bool = False) -> str:
        arguments = _template_arguments(row) | {"add_generation_prompt": add_generation_prompt, "tokenize": False}
        text: str = self.tokenizer.apply_chat_template(list(messages), **arguments)
        return text

    def _tokens(self, text: str, spans: list[tuple[int, int]] | None, add_special_tokens: bool = False) -> EncodedRow:
        """Tokens of `text`, supervised where they overlap one of the character ranges `spans`, or everywhere."""
        encoding = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        input_ids, labels = list(encoding["input_ids"]), []
        for token, (start, end) in zip(input_ids, encoding["offset_mapping"], strict=True):
            inside = spans is None or any(start < stop and end > begin for begin, stop in spans)
            labels.append(token if inside else IGNORE_INDEX)
        return EncodedRow(input_ids, labels)


OPTIONAL_COLUMNS = {
    "input", "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths",
    "tools", "chat_template_kwargs",
}  # fmt: skip


def _template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"tools": _without_none(row.get("tools")) or None, **(row.get("chat_template_kwargs") or {})}


def _of_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    if turn["from"] not in SHAREGPT_ROLES:
        raise RowError(f"a turn is from {turn['from']!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {type(value).__name__} instead of a string")
    return value


def _length_of_prefix(text: str, prefix: str) -> int:
    if not text.startswith(prefix):
        raise RowError(
            "the chat template writes earlier turns differently once later ones follow, so that turns cannot be told "
            "apart; pass one conversation per answer as prompt and completion, or tokens with labels"
        )
    return len(prefix)
