"""The model that lm-eval asks: its own HFLM on a model in memory, with progress, and with answers that outlast a kill.

Imported only when tasks are evaluated, because lm-eval is an extra.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from fptquant.errors import UserError
from fptquant.files import KeptFile
from fptquant.fingerprint import model_digest
from fptquant.models.prefix import prefix_length
from fptquant.stages.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding would say it."""
Request = tuple[Any, list[int], list[int]]
"""What was asked as text, and the tokens of context and continuation."""


class LMEvalModel(HFLM):  # type: ignore[misc]
    """HFLM that answers task by task, in batches of texts of about one length.

    A batch is padded on the right and has no mask: attention is causal, kept tokens are the first ones and a prefix stands before
    each row, so no text sees its padding, and batches of any size give the same answers up to the order of sums.

    Args:
        kept: gives the file in which the answers of a task are kept while they are found, and found again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        progress: Progress,
        kept: Callable[[str], KeptFile] | None,
    ) -> None:
        narrow = model.dtype not in (torch.float32, torch.float64)
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
            batch_size=batch_size,
            max_length=int(model.config.max_position_embeddings) - prefix_length(model),
            softmax_dtype="float32" if narrow else None,
        )
        self.progress = progress
        self.kept = kept
        self.cut: dict[str, int] = {}
        """Requests of each task that were longer than the model's context, and lost their beginning."""
        self._digest = "" if kept is None else model_digest(model)
        self._task = ""
        self._last_logits = 0
        """How many positions at the end of a batch need logits; 0 for all."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """As HFLM, but no batch holds texts of two tasks: the result of one does not depend on the others."""
        answers: dict[int, Answer] = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            self._task = task
            mine = [index for index, request in enumerate(requests) if request.task_name == task]
            answers |= zip(mine, super().loglikelihood([requests[index] for index in mine], disable_tqdm=True), strict=True)
        return [answers[index] for index in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """The answers to all requests of one task."""
        if override_bs is not None:  # a batch of a rolling log-likelihood
            answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            return answers
        task, batches = self._task, make_batches(requests, self.batch_size)
        self.cut[task] = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        belongs_to = {"model": self._digest, "requests": _digest(requests), "batch_size": self.batch_size}
        file = None if self.kept is None else self.kept(task)
        found = [] if file is None else _read(file, belongs_to)
        done = 0
        for batch in batches:
            if done == len(found):  # else it was kept
                self.progress(done, len(requests), task)
                found += self._answer_batch([requests[index] for index in batch])
                if file is not None:
                    _write(file, belongs_to, found)
            done += len(batch)
        self.progress(len(requests), len(requests), task)
        by_request = dict(zip(chain.from_iterable(batches), found, strict=True))
        return [by_request[index] for index in range(len(requests))]

    def _answer_batch(self, batch: list[Request]) -> list[Answer]:
        pairs = [(len(context) + len(continuation), len(continuation)) for _, context, continuation in batch]
        lengths = [(min(both - 1, self.max_length), scored) for both, scored in pairs]  # the last token is no input
        self._last_logits = max(length for length, _ in lengths) - min(length - scored for length, scored in lengths)
        rows = {(*context, *continuation[:-1]) for _, context, continuation in batch}
        splits = {(len(context), *context, *continuation[:-1]) for _, context, continuation in batch}
        self.logits_cache = len(rows) == len(splits)  # HFLM reads wrong positions where a shared row is split in two ways
        try:
            answers: list[Answer] = super()._loglikelihood_tokens(batch, disable_tqdm=True)
        finally:
            self._last_logits = 0
        if not all(math.isfinite(loglikelihood) for loglikelihood, _ in answers):
            raise UserError(f"log-likelihoods of the task {self._task} are not finite; check the weights, or use a wider dtype")
        return answers

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits of the positions that are scored: HFLM counts them from the end.

        Shape: inps [B, T], int64; returns [B, last positions, vocabulary]
        """
        with torch.no_grad():
            logits: Tensor = self.model(inps, use_cache=False, logits_to_keep=self._last_logits).logits
        return logits


def make_batches(requests: Sequence[Request], rows: int) -> list[list[int]]:
    """Indices of the requests of each batch, longest texts first; requests that differ in the last token alone share a row.

    >>> make_batches([("", [1], [2]), ("", [5, 6], [7, 8]), ("", [1], [3]), ("", [4], [4])], 2)
    [[1, 0, 2], [3]]
    """

    def tokens(index: int) -> list[int]:
        return requests[index][1] + requests[index][2]

    order = sorted(range(len(requests)), key=lambda index: (-len(tokens(index)), tokens(index)))
    shared = [list(group) for _, group in groupby(order, key=lambda index: tokens(index)[:-1])]
    return [list(chain.from_iterable(shared[start : start + rows])) for start in range(0, len(shared), rows)]


def _digest(requests: Sequence[Request]) -> str:
    return hashlib.sha256(json.dumps([tokens for _, *tokens in requests]).encode()).hexdigest()


def _read(file: KeptFile, belongs_to: dict[str, Any]) -> list[Answer]:
    """The answers to the first batches; none if there is no such file, or that of another model or other requests."""
    try:
        kept = json.loads(file.path.read_text(encoding="utf-8"))
        return [(value, greedy) for value, greedy in kept["answers"]] if kept["belongs_to"] == belongs_to else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _write(file: KeptFile, belongs_to: dict[str, Any], answers: list[Answer]) -> None:
    file.write(lambda: json.dumps({"belongs_to": belongs_to, "answers": answers}).encode())
