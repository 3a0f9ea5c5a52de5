"""`qtuning compare`: a base and its tuned model answer the same questions, and a judge compares (see `comparison`)."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ..atomic import alone_with
from ..comparison.answers import Answers, adapter_digest, read_questions
from ..comparison.judge import Judge
from ..comparison.page import write_page
from ..loading import load_model
from .data import Overwrite, console, one_sentence

KEY = "JUDGE_API_KEY"


def compare(
    questions: Annotated[Path, typer.Argument(help="JSON lines with question_id, turns, and category if you like.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter: a side network, LoRA, any of PEFT's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Answers (.jsonl); the page goes beside it (.html).")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, draws.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 1,
    judge: Annotated[str | None, typer.Option(help="OpenAI-compatible endpoint: http://127.0.0.1:8000/v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    load_in_4bit: Annotated[bool, typer.Option(help="Quantize the base to NF4 with bitsandbytes.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the checkpoint's.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Let a base and its tuned model answer questions side by side, as on MT-Bench, in one HTML page.

    With --judge and --judge-model a model behind an OpenAI-compatible endpoint compares the answers in both orders; its
    key, if it needs one, is read from the environment variable JUDGE_API_KEY. Interrupted and started again, answering
    and judging go on where they stopped.
    """
    with one_sentence():
        if output.suffix != ".jsonl":
            raise ValueError(f"--output is {output.name}; name a file that ends in .jsonl.")
        if (judge is None) != (judge_model is None):
            raise ValueError("--judge and --judge-model go together; give both, or neither.")
        referee = Judge(judge, judge_model, os.environ.get(KEY)) if judge and judge_model else None
        settings = {
            "adapter": adapter.resolve().name, "fingerprint": adapter_digest(adapter), "max_new_tokens": max_new_tokens,
            "temperature": temperature, "load_in_4bit": load_in_4bit, "dtype": dtype,
        }  # fmt: skip
        page = output.with_suffix(".html")
        with alone_with(output):
            answers = Answers(output, read_questions(questions), settings, overwrite)
            if answers.unanswered:
                answers.answer(*load_model(str(adapter), load_in_4bit, dtype=dtype), batch_size)
                write_page(answers, page)
            try:
                if referee is not None:
                    referee.judge(answers)
            finally:
                write_page(answers, page, judge_model)
        console.print(f"{len(answers.rows)} questions: {page}", highlight=False)
