"""Train two small adapters on SmolLM2-135M-Instruct, one that speaks like a pirate and one that answers like an office.

    python -m examples.serving FOLDER      writes FOLDER/base, FOLDER/pirate and FOLDER/office; a minute on 2 idle cores

The base runs once for both: its states are computed, and each adapter learns from them. Serve them with `qtuning serve`
(docs/serving.md).
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from examples.json_extraction.smollm2 import prepare_checkpoint
from qtuning_peft import SideTuningConfig, StatesCollator, compute_states, model_from_states

QUESTIONS = {
    "Where is the nearest bakery?": "It is two streets down, next to the church.",
    "What time does the shop open?": "It opens at nine in the morning.",
    "How do I reset my password?": "Click on the link in the mail that we sent.",
    "Is it going to rain today?": "Yes, take an umbrella with you.",
    "Can I bring my dog?": "Dogs are welcome in the garden.",
    "How much is a ticket?": "A ticket costs five coins.",
    "Who painted this picture?": "A woman from the village painted it.",
    "When does the ship leave?": "It leaves with the evening tide.",
}
STYLES = {"pirate": "Arrr, matey! {} Yo ho ho!", "office": "Dear customer, thank you for asking. {} Kind regards"}


def main(folder: Path) -> None:
    """Make the base and both adapters."""
    base = prepare_checkpoint(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = SideTuningConfig(task_type="CAUSAL_LM")
    for name, style in STYLES.items():
        messages = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": style.format(answer)}]
            for question, answer in QUESTIONS.items()
        ]
        states = folder / f"{name}-states"
        rows = compute_states(Dataset.from_dict({"messages": messages}), model, tokenizer, config, states)
        arguments = TrainingArguments(
            str(folder / "runs"), max_steps=60, per_device_train_batch_size=8, learning_rate=3e-3, report_to="none",
            remove_unused_columns=False, save_strategy="no", logging_steps=20, use_cpu=True, seed=0,
        )  # fmt: skip
        tuned = model_from_states(states, config)
        Trainer(tuned, arguments, train_dataset=rows, data_collator=StatesCollator(states)).train()
        tuned.save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
