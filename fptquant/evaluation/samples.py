"""What models say when they go on with the same beginnings, most likely token after most likely token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.models.prefix import prefix_length
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_TOKENS = 32
NEW_TOKENS = 48


@dataclass(frozen=True)
class Continuation:
    """What one model said after one prompt."""

    tokens: list[int]
    text: str

    def agreement(self, other: Continuation) -> int:
        """How many first tokens both have in common."""
        same = [mine == theirs for mine, theirs in zip(self.tokens, other.tokens, strict=False)]
        return same.index(False) if False in same else len(same)


def sample_prompts(windows: Tensor, count: int) -> Tensor:
    """The beginnings of the first ``count`` windows of an evaluation text.

    Shape: windows [n, window], int64; returns [count, at most half a window]

    Raises:
        UserError: if there are not so many windows.
    """
    if not 1 <= count <= len(windows):
        raise UserError(f"{count} samples need as many windows of the text, and there are {len(windows)}; give more windows")
    return windows[:count, : min(PROMPT_TOKENS, windows.shape[1] // 2)]


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, *, progress: Progress = quiet
) -> list[Continuation]:
    """Greedy decoding after each prompt, one prompt at a time, until the end of the text or of the model's context.

    Shape: prompts [n, T], int64
    """
    room = int(model.config.max_position_embeddings) - prefix_length(model) - prompts.shape[1]
    found = []
    for number, prompt in enumerate(prompts):
        progress(number, len(prompts), "samples")
        ids = prompt[None].to(model.device)
        end = tokenizer.eos_token_id
        said = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=min(NEW_TOKENS, room),
            eos_token_id=end,
            pad_token_id=end,
        )
        tokens = said[0, ids.shape[1] :].tolist()
        found.append(Continuation(tokens, str(tokenizer.decode(tokens))))
    progress(len(prompts), len(prompts), "samples")
    return found
