"""Rows of every format as tokens with labels, against TRL and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny
from datasets import Dataset
from transformers import AutoTokenizer

from qtuning_peft import EUScorer
from qtuning_peft.eu_plane.rows import RowEncoder
from qtuning_peft.eu_plane.tokenized import EncodedRow, RowError

pytestmark = pytest.mark.smollm2

QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]
ANSWER = [{"role": "assistant", "content": "It scatters blue light.\nMostly."}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *QUESTION,
    *ANSWER,
    {"role": "user", "content": "And at dusk?"},
    {"role": "assistant", "content": "Red."},
]
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def encode(tokenizer: Any, row: dict[str, Any], **options: Any) -> EncodedRow:
    encoder = RowEncoder(tokenizer, **options)
    return encoder.encode(row, encoder.format_of(list(row)))


def supervised_text(tokenizer: Any, encoded: EncodedRow) -> str:
    return tokenizer.decode([encoded.labels[index] for index in encoded.positions()])


def test_every_assistant_turn_is_supervised_and_nothing_else(tokenizer: Any) -> None:
    encoded = encode(tokenizer, {"messages": TALK})
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert supervised_text(tokenizer, encoded) == "It scatters blue light.\nMostly.<|im_end|>\nRed.<|im_end|>\n"


def test_formats_say_the_same(tokenizer: Any) -> None:
    question, answer = QUESTION[0]["content"], ANSWER[0]["content"]
    expected = encode(tokenizer, {"messages": [*QUESTION, *ANSWER]})
    for row in (
        {"prompt": question, "completion": answer},
        {"prompt": QUESTION, "completion": ANSWER},
        {"instruction": question, "input": "", "output": answer},
        {"instruction": question, "output": answer},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        # As `datasets` hands over messages some of which have further keys.
        {"messages": [message | {"tool_calls": None} for message in [*QUESTION, *ANSWER]]},
    ):
        assert encode(tokenizer, row) == expected
    renamed = encode(tokenizer, {"q": question, "a": answer}, columns={"prompt": "q", "completion": "a"})
    assert renamed == expected
    with_input = encode(tokenizer, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert with_input == encode(tokenizer, {"prompt": "Add.\n\n1 2", "completion": "3"})


def test_text_is_supervised_from_its_second_token_to_its_end(tokenizer: Any) -> None:
    encoded = encode(tokenizer, {"text": "One two three."})
    assert encoded.labels[0] == -100
    assert encoded.labels[1:] == encoded.input_ids[1:]
    assert encoded.input_ids[-1] == tokenizer.eos_token_id


def test_without_a_template_prompt_and_completion_are_joined(tokenizer: Any) -> None:
    row = {"prompt": "2 + 2 =", "completion": " 4"}
    encoded = encode(tokenizer, row, chat_template=False)
    assert tokenizer.decode(encoded.input_ids) == "2 + 2 = 4<|im_end|>"
    assert supervised_text(tokenizer, encoded) == " 4<|im_end|>"
    alpaca = encode(tokenizer, {"instruction": "Add.", "input": "1 2", "output": "3"}, chat_template=False)
    assert supervised_text(tokenizer, alpaca) == "3<|im_end|>"
    assert "### Input:\n1 2" in tokenizer.decode(alpaca.input_ids)


def test_a_template_that_marks_the_assistant_is_believed(tokenizer: Any) -> None:
    marked = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    marked.chat_template = MARKED
    encoded = encode(marked, {"messages": TALK})
    assert supervised_text(marked, encoded) == "It scatters blue light.\nMostly.<|im_end|>Red.<|im_end|>"


@pytest.mark.parametrize("kind", ["prompt-completion", "messages"])
def test_tokens_and_labels_are_those_of_trl(tokenizer: Any, kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL: pip install trl")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    if kind == "messages":
        tokenizer.chat_template = MARKED
        rows = [{"messages": [*QUESTION, *ANSWER]}, {"messages": TALK}]
    else:
        rows = [{"prompt": QUESTION, "completion": ANSWER}, {"prompt": TALK[:4], "completion": TALK[4:]}]
    trainer = trl.SFTTrainer(
        tiny(vocab_size=len(tokenizer)),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), report_to="none", assistant_only_loss=kind == "messages", use_cpu=True
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for row, theirs in zip(rows, trainer.train_dataset, strict=True):
        ours = encode(tokenizer, row)
        assert ours.input_ids == theirs["input_ids"]
        if "labels" in theirs:
            expected = theirs["labels"]
        else:
            mask = theirs["assistant_masks" if kind == "messages" else "completion_mask"]
            expected = [token if on else -100 for token, on in zip(theirs["input_ids"], mask, strict=True)]
        assert ours.labels == expected


def test_masks_of_trl_are_read() -> None:
    rows = {"input_ids": [[5, 6, 7, 8]], "completion_mask": [[0, 0, 1, 1]]}
    assert EUScorer(tiny())(rows)["labels"][0].tolist() == [-100, -100, 7, 8]
    rows = {"input_ids": [[5, 6, 7, 8]], "assistant_masks": [[0, 1, 0, 1]]}
    assert EUScorer(tiny())(rows)["labels"][0].tolist() == [-100, 6, -100, 8]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": None}, "no messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"prompt": "x", "completion": None}, "is not"),
        ({"prompt": "x", "completion": 4}, "is not"),
        ({"text": ""}, "empty"),
        ({"text": None}, "instead of a string"),
        ({"input_ids": [1, 2], "position_ids": [1, 2]}, "do not count up"),
        ({"input_ids": [1, 2], "seq_lengths": [3]}, "add up to 3"),
        ({"input_ids": [1, 2], "seq_lengths": [3, -1]}, "seq_lengths holds -1"),
        ({"input_ids": [True, False]}, "something other than integers"),
        ({"instruction": None, "output": "x"}, "instruction is NoneType"),
        ({"conversations": [{"from": "bing", "value": "x"}]}, "from 'bing'"),
        ({"input_ids": [1.5, 2]}, "something other than integers"),
    ],
)
def test_a_broken_row_is_one_sentence_about_that_row(tokenizer: Any, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        encode(tokenizer, row)


def test_a_template_that_rewrites_earlier_turns_is_noticed(tokenizer: Any) -> None:
    rewriting = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    rewriting.chat_template = "{{ messages | length }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="writes earlier turns differently"):
        encode(rewriting, {"messages": TALK})


def test_an_assistant_that_speaks_first_is_supervised_without_its_header(tokenizer: Any) -> None:
    plain = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    plain.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoded = encode(plain, {"messages": [*ANSWER, *QUESTION]})
    assert supervised_text(plain, encoded) == ANSWER[0]["content"] + "<|im_end|>\n"


def test_keys_that_only_other_rows_have_are_not_rendered(tokenizer: Any) -> None:
    calling = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    calling.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m | tojson }}\n{% endfor %}"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "X", "unit": None}}}]}
    assert "unit" not in calling.decode(encode(calling, {"messages": [*QUESTION, call]}).input_ids)


def test_data_that_no_format_fits_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="columns are a, b; needed are input_ids"):
        RowEncoder(tokenizer).format_of(["a", "b"])
    with pytest.raises(ValueError, match="no column question"):
        RowEncoder(tokenizer, columns={"prompt": "question"}).format_of(["completion"])
    with pytest.raises(ValueError, match="columns names promt"):
        RowEncoder(tokenizer, columns={"promt": "question"})
    with pytest.raises(ValueError, match="tokenizer is None"):
        RowEncoder().format_of(["text"])
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        RowEncoder(bare).format_of(["messages"])
    with pytest.raises(ValueError, match="set chat_template to False"):
        RowEncoder(bare).format_of(["prompt", "completion"])
    assert RowEncoder(bare, chat_template=False).format_of(["prompt", "completion"]) == "prompt"


def test_no_padding_token_is_needed(tokenizer: Any) -> None:
    bare = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    bare.pad_token = None
    rows = {"text": ["One two three four five.", "One."]}
    scored = EUScorer(tiny(vocab_size=len(bare)), bare)(rows)
    assert not any(scored["unscored"])
