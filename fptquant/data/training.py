"""Windows of tokens to train on, windows held out, and the proof that neither holds text that is evaluated on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fptquant.data.overlap import Passages
from fptquant.data.sampling import SAMPLED_NAME, sample_windows
from fptquant.data.text import Documents, Text, load_text, open_documents, split_bos
from fptquant.errors import UserError
from fptquant.fingerprint import tensors_digest
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BETWEEN = "\n\n"
"""What joins documents: no special token, because windows of the evaluation hold none in a text, and in SmolLM2 the one that its
makers put between documents carries a massive activation wherever it stands (14,600; without it, the largest of 256 tokens
after the first: 730)."""

SAMPLED_WINDOWS = 128
"""Different windows that a model writes at most, unless more are asked for: each takes seconds on a CPU."""
_SHUFFLED_DOCUMENTS = 256
_SHUFFLED_CHARACTERS = 8_000_000
_BATCH_CHARACTERS = 1_000_000
_CUTTING = "cutting training windows"


@dataclass(frozen=True)
class TrainingData:
    """The windows of a whole run, in the order in which it takes them: 8 bytes per token."""

    train: Tensor
    """[windows, window], int64; step k of batch b takes rows k * b to (k + 1) * b, so resuming needs only the step."""
    held_out: Tensor
    """[held_out, window], int64; of other documents, without a passage that the training windows hold."""
    source: str
    """The name under which to report the text."""
    digest: str
    """SHA-256 of both tensors: a resumed run must find the same."""
    epochs: float
    """Passes over the different training windows. Above 1 the text was too short; a stream is read only as far as needed."""
    dropped: int
    """Windows left out because they share a passage with an excluded text or with the held-out windows."""


@dataclass(frozen=True)
class _Pool:
    """Different windows, before the order of the run: [n, window] and [held_out, window], int32."""

    name: str
    train: NDArray[np.int32]
    held_out: NDArray[np.int32]
    dropped: int


def training_windows(
    tokenizer: PreTrainedTokenizerBase,
    source: str | Text,
    *,
    windows: int,
    window: int,
    held_out: int,
    seed: int,
    distinct: int | None = None,
    model: PreTrainedModel | None = None,
    excluded: Sequence[Text] = (),
    cache_folder: Path | None = None,
    progress: Progress = quiet,
) -> TrainingData:
    """Windows to train on, shuffled by ``seed``, and held-out ones from other documents.

    Documents are joined by blank lines and cut every ``window`` tokens; no padding and no special token is added. Data sets of
    the hub, .jsonl and .parquet files are read as streams, shuffled within 256 documents, only as far as needed; the first
    documents are held out. Of one text (topics, wikitext2, .txt) the end is held out, from a paragraph on, and the training
    windows are drawn from all the rest. Windows with a passage (`fptquant.data.overlap`) of an excluded text are left out,
    training windows with one of the held-out windows too. If too few are left, they repeat, newly shuffled each time.

    The result takes 8 bytes per token; while it is made, 4 more, and for one text 4 per token of the whole text.

    Args:
        source: a name of ``TEXT_SOURCES``, a path, or a text; ``auto`` is dclm-edu where the hub answers, otherwise topics.
        windows: training windows of the whole run (steps x batch).
        distinct: how many of them may differ; with None, as many as the source has, of text that the model writes
            `SAMPLED_WINDOWS`.
        model: the full-precision model as it was loaded, for ``source="model"``.
        excluded: texts that the result is evaluated on.
        cache_folder: where sampled text is kept; `fptquant.models.smollm2.cache_folder` by default.

    Raises:
        UserError: if the source is unknown or cannot be read, if it gives fewer than ``held_out + 1`` windows, or if all its
            windows share passages with the excluded texts.
    """
    if distinct is None and source == "model":
        distinct = SAMPLED_WINDOWS
    wanted = windows if distinct is None else min(windows, distinct)
    if min(wanted, window - 1) < 1 or held_out < 0:
        raise UserError(f"{windows} windows of {window} tokens and {held_out} held out cannot be trained on; ask for more")
    if isinstance(source, str) and split_bos(source)[0] != source:
        raise UserError(f"text {source!r}: add_bos_token has no effect, because windows to learn from never hold one; leave it out")
    cutter = _Cutter(tokenizer, window, Passages(excluded), progress)
    if source == "model":
        if model is None:
            raise UserError('text sampled from the model (source "model") needs the model: give it as model=...')
        sampled = sample_windows(
            model, tokenizer, windows=held_out + wanted, window=window, seed=seed, cache_folder=cache_folder, progress=progress
        )
        pool = _from_windows(cutter, sampled, held_out)
    else:
        pool = _documents_or_text(cutter, source, wanted, held_out, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pool.train), generator=generator)[:distinct]
    count = len(chosen)
    epochs = [chosen, *(chosen[torch.randperm(count, generator=generator)] for _ in range((windows - 1) // count))]
    train = torch.from_numpy(pool.train)[torch.cat(epochs)[:windows]].long()
    held = torch.from_numpy(pool.held_out).long()
    return TrainingData(train, held, pool.name, tensors_digest(train, held), windows / count, pool.dropped)


def _documents_or_text(cutter: _Cutter, source: str | Text, windows: int, held_out: int, seed: int) -> _Pool:
    if isinstance(source, Text):
        return _from_text(cutter, source, held_out)
    documents = _first_choice() if source == "auto" else open_documents(source)
    if documents is not None:
        return _from_documents(cutter, documents, windows, held_out, seed)
    return _from_text(cutter, load_text("topics" if source == "auto" else source, "calibration"), held_out)


def _first_choice() -> Documents | None:
    """DCLM-Edu if its first document can be had."""
    documents = open_documents("dclm-edu")
    assert documents is not None
    try:
        first = next(documents.texts)
    except (UserError, StopIteration):
        return None
    return Documents(documents.name, chain([first], documents.texts))


def _from_documents(cutter: _Cutter, documents: Documents, windows: int, held_out: int, seed: int) -> _Pool:
    texts = _shuffled((text + _BETWEEN for text in documents.texts if text.strip()), seed)
    held, dropped = cutter.cut(texts, held_out)
    cutter.hold_out(held)
    train, also_dropped = cutter.cut(texts, windows)
    return cutter.checked(_Pool(documents.name, train, held, dropped + also_dropped), held_out)


def _from_text(cutter: _Cutter, text: Text, held_out: int) -> _Pool:
    content, wanted = text.content, held_out * cutter.window  # characters: no token has less than about one
    while True:
        cut = _paragraph_end(content, len(content) - wanted) if held_out else len(content)
        held, dropped = cutter.cut(iter([content[cut:]]), held_out)
        if len(held) == held_out or cut == 0:
            break
        wanted += wanted // 2
    cutter.hold_out(held)
    train, also_dropped = cutter.cut(_pieces(content[:cut]), None)
    return cutter.checked(_Pool(text.name, train, held, dropped + also_dropped), held_out)


def _from_windows(cutter: _Cutter, sampled: Tensor, held_out: int) -> _Pool:
    rows = sampled.to(torch.int32).numpy()
    rows = rows[cutter.unknown(rows)]
    cutter.hold_out(rows[:held_out])
    train = rows[held_out:]
    train = train[cutter.unknown(train)]
    return cutter.checked(_Pool(SAMPLED_NAME, train, rows[:held_out], len(sampled) - held_out - len(train)), held_out)


def _paragraph_end(content: str, limit: int) -> int:
    """The end of the last paragraph before ``limit``; of the last line or word where a paragraph is very long; 0 if none."""
    if limit <= 0:
        return 0
    for separator in (_BETWEEN, "\n", " "):
        place = content.rfind(separator, 0, limit)
        if place > limit // 2:
            return place + len(separator)
    return limit


def _pieces(content: str) -> Iterator[str]:
    """A text in parts that end with a paragraph: the tokenizer needs 100 bytes and more for every token of a part."""
    begin = 0
    while begin < len(content):
        end = content.find(_BETWEEN, begin + _BATCH_CHARACTERS)
        end = len(content) if end < 0 else end + len(_BETWEEN)
        yield content[begin:end]
        begin = end


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """The texts, each in place of a random one of the last 256; fewer where they are long."""
    draw = random.Random(seed)
    buffer: list[str] = []
    characters = 0
    for text in texts:
        buffer.append(text)
        characters += len(text)
        while len(buffer) > _SHUFFLED_DOCUMENTS or (characters > _SHUFFLED_CHARACTERS and len(buffer) > 1):
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            characters -= len(buffer[-1])
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


class _Cutter:
    """Cuts texts into windows, and leaves out those that share a passage with known texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, window: int, known: Passages, progress: Progress) -> None:
        self.tokenizer, self.window, self.known, self.progress = tokenizer, window, known, progress

    def hold_out(self, held: NDArray[np.int32]) -> None:
        """From now on, windows that share a passage with these are left out, too."""
        if len(held):
            self.known.add(Text("its own held-out part", "".join(self._decode(held))))

    def unknown(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which windows share no passage with the known texts: [rows]."""
        return ~self.known.shared(self._decode(rows))

    def cut(self, texts: Iterator[str], count: int | None) -> tuple[NDArray[np.int32], int]:
        """The first ``count`` windows, or all, that share nothing with the known texts: [count or fewer, window]; those left out.

        No more texts are taken than needed, or a few: as many characters at a time as tokens are missing.
        """
        kept: list[NDArray[np.int32]] = []
        found, dropped = 0, 0
        rest = np.empty(0, dtype=np.int32)
        while count is None or found < count:
            missing = _BATCH_CHARACTERS if count is None else (count - found) * self.window - rest.size
            batch = _take(texts, min(missing, _BATCH_CHARACTERS))
            if not batch:
                break
            tokens = np.concatenate([rest, *self._tokens(batch)])
            rows = tokens[: tokens.size // self.window * self.window].reshape(-1, self.window)
            rest = tokens[rows.size :]
            clean = rows[self.unknown(rows)]
            kept.append(clean)
            dropped += len(rows) - len(clean)
            found += len(clean)
            if count:
                self.progress(min(found, count), count, _CUTTING)
        return np.concatenate([np.empty((0, self.window), dtype=np.int32), *kept])[:count], dropped

    def _tokens(self, texts: list[str]) -> list[NDArray[np.int32]]:
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [np.array(row, dtype=np.int32) for row in ids]

    def _decode(self, rows: NDArray[np.int32]) -> list[str]:
        return [str(self.tokenizer.decode(row, clean_up_tokenization_spaces=False)) for row in rows.tolist()]

    def checked(self, pool: _Pool, held_out: int) -> _Pool:
        """The pool, if there is something to train on and as much as asked for is held out.

        Raises:
            UserError: names the text, and what its windows overlap with if that is why.
        """
        if len(pool.train) and len(pool.held_out) == held_out:
            return pool
        left = len(pool.train) + len(pool.held_out)
        if pool.dropped:
            raise UserError(
                f"{pool.dropped} windows of the training text {pool.name} share passages with {' and '.join(self.known.names)}, "
                f"and {left} others are not enough for {held_out} held-out windows and one to train on; "
                "train on another text than is evaluated on, or on a longer one"
            )
        raise UserError(
            f"the training text {pool.name} gives {left} windows of {self.window:,} tokens; {held_out} held-out windows and at "
            "least one to train on are needed: ask for shorter or fewer windows, or give a longer text"
        )


def _take(texts: Iterator[str], characters: int) -> list[str]:
    taken: list[str] = []
    length = 0
    while length < characters and (text := next(texts, None)) is not None:
        taken.append(text)
        length += len(text)
    return taken
