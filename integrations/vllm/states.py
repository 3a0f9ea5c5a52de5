"""What a pooling model of vLLM's returns for a prompt: scores and states where something is asked of it.

    row of the answer:  [ scores, float32, as bits of the base's dtype | h_0 | h_i of the tapped blocks i | f_N ]

One row for every position that is asked for, in order, also where vLLM runs the prompt in chunks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.pooler import Pooler

from qtuning_peft.eu_plane.batching import CHUNK_ELEMENTS, CHUNK_ELEMENTS_ELSEWHERE, scores_of_logits

TASK = "token_embed"


class StatesPooler(Pooler):
    """Reads the rows of `models.Tapped`."""

    def __init__(
        self, parts: Callable[[Tensor], tuple[Tensor, dict[int, Tensor]]], logits: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.parts, self.logits = parts, logits
        self.chunk = 1

    def get_supported_tasks(self) -> set[str]:
        """The one task."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """For every prompt that is finished its answer, from the rows (tokens, (2 + taps) d) of the batch."""
        cursor = pooling_metadata.get_pooling_cursor()
        chunks = hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist())
        answers: list[Tensor | None] = []
        for chunk, stop, params, state, done in zip(
            chunks, cursor.seq_lens_cpu.tolist(), pooling_metadata.pooling_params, pooling_metadata.pooling_states,
            cursor.get_finished_mask(), strict=True,
        ):  # fmt: skip
            state.hidden_states_cache.append(self.answer(chunk, stop - len(chunk), params.extra_kwargs or {}))
            answers.append(torch.cat(state.hidden_states_cache) if done else None)
            if done:
                state.clean()
        return answers

    def answer(self, chunk: Tensor, start: int, asked: Mapping[str, Any]) -> Tensor:
        """The answer's rows that lie in `chunk`, which begins at position `start` of its prompt."""
        positions, targets = (torch.tensor(asked.get(key, []), dtype=torch.int64) for key in ("positions", "targets"))
        inside = (positions >= start) & (positions < start + len(chunk))
        rows = chunk[(positions[inside] - start).to(chunk.device)]  # (asked, (2 + taps) d)
        targets = targets[inside].to(chunk.device)
        normed, states = self.parts(rows)
        columns = [states[index] for index in states] + [normed] if asked.get("states") else []
        return torch.cat([self.scores(normed, targets, asked.get("scores", [])), *columns], dim=-1)

    def scores(self, normed: Tensor, targets: Tensor, names: list[str]) -> Tensor:
        """Scores of tokens, (rows, scores) in float32, as bits of the rows' dtype."""
        found = [normed.new_empty(0, len(names), dtype=torch.float32)]
        elements = CHUNK_ELEMENTS.get(normed.device.type, CHUNK_ELEMENTS_ELSEWHERE)
        while sum(map(len, found)) < len(normed):
            done = sum(map(len, found))
            logits = self.logits(normed[done : done + self.chunk])
            scores = scores_of_logits(logits, targets[done : done + self.chunk], names)
            found.append(torch.stack([scores[name].float() for name in names], dim=-1))
            self.chunk = max(1, elements // logits.shape[-1])
        return torch.cat(found).view(normed.dtype)
