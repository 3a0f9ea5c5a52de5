"""Few-shot examples before every conversation, in the tokenizer's chat template.

A frozen base that has read a few questions with their answers continues in kind before anything is trained (in-context
learning, Brown et al., 2020), and a side network learns from hidden states that are nearer to the task. The examples
are tokens that all rows share: training computes them once (see `states.prefix`). They are part of the chat
template, so that whatever renders it (TRL, `generate`, a server) puts them there, and it is saved with the tokenizer.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

ROLES = ("user", "assistant")
# No whitespace control at its end: the template behind it may begin with a line break of its own.
BEFORE = (
    "{% set qtuning_examples = EXAMPLES %}"
    "{% set qtuning_first = 1 if messages and messages[0]['role'] in ('system', 'developer') else 0 %}"
    "{% set messages = messages[:qtuning_first] + qtuning_examples + messages[qtuning_first:] %}{{ '' }}"
)
MARK = BEFORE.partition("EXAMPLES")[0]


def add_few_shot_examples(tokenizer: Any, messages: Sequence[Mapping[str, str]], max_length: int | None = None) -> None:
    """Put `messages` behind the system prompt of every conversation that `tokenizer` renders from now on.

    Train on the answer alone (TRL: `prompt` and `completion` columns): the examples are not to be memorized.

    Args:
        tokenizer: One with a chat template, which is changed. `save_pretrained` saves it.
        messages: Turns with `role` and `content`, a user's and the assistant's by turns.
        max_length: Tokens at which training cuts rows, if the tokenizer's own `model_max_length` is not what counts.

    Raises:
        ValueError: when `messages` are not such turns, or the tokenizer has no chat template, or one with examples, or
            rows would be cut before they reach a prompt of their own.
    """
    turns = [{"role": message.get("role"), "content": message.get("content")} for message in messages]
    if not turns or len(turns) % 2:
        raise ValueError(f"messages are {len(turns)} turns; give questions, each followed by its answer.")
    for index, turn in enumerate(turns):
        if turn["role"] != ROLES[index % 2] or not isinstance(turn["content"], str):
            raise ValueError(
                f"messages[{index}] has role {turn['role']!r} and content of type {type(turn['content']).__name__}; "
                f"give a string of role {ROLES[index % 2]!r} there."
            )
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            f"tokenizer.chat_template is {'a list of several' if template else 'unset'}; set it to one template first."
        )
    if template.startswith(MARK):
        raise ValueError(
            "tokenizer.chat_template has few-shot examples already; load the tokenizer anew to choose others."
        )
    longest, field = (
        (max_length, "max_length") if max_length else (tokenizer.model_max_length, "tokenizer.model_max_length")
    )
    if longest < 2**31:  # transformers gives a number beyond that to tokenizers without one
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        length = len(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])
        if length >= longest:
            raise ValueError(
                f"The few-shot examples are {length} tokens, and rows are cut at {field}, {longest}: nothing of a row "
                "would be left; give fewer or shorter examples, or raise the maximum."
            )
    # Jinja reads JSON's lists, mappings and strings; characters beyond ASCII as they are, for it has no surrogates.
    tokenizer.chat_template = BEFORE.replace("EXAMPLES", json.dumps(turns, ensure_ascii=False)) + template
