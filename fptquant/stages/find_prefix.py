"""The prefix of a config as token ids: a text's tokens, or a search for the tokens that keep massive activations away.

A massive activation is a residual above 100 that is at least 1,000 times the median magnitude of its layer (Sun et al., "Massive
Activations in Large Language Models", arXiv 2402.17762). A few tokens carry them, often the first of a text whatever it is,
and static ranges must then span them. Tokens before the text that take them over free it of them (PrefixQuant,
arXiv 2410.05265).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fptquant.config.labels import AUTO_PREFIX
from fptquant.config.schema import Config
from fptquant.data.windows import check_window
from fptquant.errors import UserError
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.prefix import check_prefix_length, check_prefix_model
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASSIVE = 100.0
"""Magnitude above which a residual may be massive."""
MASSIVE_RATIO = 1000.0
"""How many times the median magnitude of its layer a massive residual is at least."""
LONGEST = 4
"""Tokens of the longest prefix that is tried."""
FREQUENT = 4
"""How many of the most frequent massive tokens are tried, besides the tokenizer's own special tokens."""
WINDOWS = 8
"""Windows that the search reads; each candidate reads them again."""


@dataclass(frozen=True)
class FoundPrefix:
    """What the search found."""

    ids: list[int]
    """Empty where no token of the text is massive, or no prefix leaves fewer."""
    text: str
    massive_tokens_before: int
    massive_tokens_after: int
    searched_tokens: int
    candidates: list[int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class MassiveTokens(Protocol):
    """`massive_tokens`, or another way to the same result."""

    def __call__(self, model: PreTrainedModel, windows: Tensor, prefix: Sequence[int] = ()) -> Tensor: ...


def is_massive(residual: Tensor) -> Tensor:
    """Which tokens of one window have a massive activation after some block.

    Shape:
        residual: [T, H]
        result: [T], bool
    """
    magnitude = residual.abs().float()
    largest = magnitude.amax(-1)
    return (largest > MASSIVE) & (largest >= MASSIVE_RATIO * magnitude.median())


@torch.inference_mode()
def massive_tokens(model: PreTrainedModel, windows: Tensor, prefix: Sequence[int] = ()) -> Tensor:
    """Which tokens of the windows have a massive activation after some block, where a prefix stands before each window.

    Shape:
        windows: [windows, window], int64
        result: [windows, window], bool
    """
    view, found = view_model(model), torch.zeros_like(windows, dtype=torch.bool)
    row = 0

    def look(module: nn.Module, args: Any, output: Any) -> None:
        residual = (output[0] if isinstance(output, tuple) else output)[0, len(prefix) :]
        found[row] |= is_massive(residual).to(found.device)

    before = torch.tensor(list(prefix), dtype=torch.int64)
    with hooked(layer.register_forward_hook(look) for layer in view.layers):
        for row, window in enumerate(windows):  # noqa: B007 - the hook reads the row
            view.decoder(input_ids=torch.cat([before, window])[None].to(model.device), use_cache=False)
    return found


def prefix_candidates(tokenizer: PreTrainedTokenizerBase, massive: Tensor) -> list[int]:
    """Tokens to try: the tokenizer's first and last token of a text, then the most frequent massive ones.

    Shape:
        massive: [n], the ids of the massive tokens
    """
    ids, counts = torch.unique(massive, return_counts=True)
    frequent = ids[counts.argsort(descending=True, stable=True)][:FREQUENT].tolist()
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    return list(dict.fromkeys([*special, *frequent]))


def find_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    *,
    longest: int = LONGEST,
    look: MassiveTokens = massive_tokens,
    progress: Progress = quiet,
) -> FoundPrefix:
    """The shortest prefix after which no token of the windows is massive; if there is none, the one that leaves fewest.

    A prefix grows by the candidate that leaves fewest massive tokens, the earlier one where several do.

    Args:
        model: the plain full-precision model.
        longest: tokens of the longest prefix that is tried.
        look: runs the model; the other way is that of a model that is read block by block.

    Shape:
        windows: [windows, window], int64; the first 8 are read
    """
    windows = windows[:WINDOWS]
    where = look(model, windows)
    before = fewest = int(where.sum())
    candidates = prefix_candidates(tokenizer, windows[where]) if fewest else []
    best: list[int] = []
    grown: list[int] = []
    tried = 0
    while fewest and len(grown) < longest:
        left: dict[int, int] = {}
        for token in candidates:
            left[token] = int(look(model, windows, [*grown, token]).sum())
            tried += 1
            progress(tried, longest * len(candidates), "search for a prefix")
            if left[token] == 0:
                break
        grown = [*grown, min(left, key=lambda token: left[token])]
        if min(left.values()) < fewest:
            best, fewest = grown, min(left.values())
    text = str(tokenizer.decode(best)) if best else ""
    return FoundPrefix(best, text, before, fewest, windows.numel(), candidates)


def _given_ids(tokenizer: PreTrainedTokenizerBase, prefix: str | list[int]) -> list[int]:
    if isinstance(prefix, list):
        return prefix
    ids: list[int] = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _longest(model: PreTrainedModel) -> int:
    return min(LONGEST, getattr(model.config, "sliding_window", None) or LONGEST)


def check_prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config, windows: Mapping[str, int]) -> None:
    """Finds what a config's prefix asks of a model that cannot be, before any work is done.

    Args:
        windows: lengths of the windows that will be read behind the prefix, by the settings that name them.

    Raises:
        UserError: for a RoPE whose frequencies depend on the length, token ids outside of the vocabulary, a text without
            tokens, or a prefix that does not fit the context together with a window.
    """
    prefix = config.quantization.prefix
    if prefix is None or not config.quantization.has_prefix:
        return
    check_prefix_model(model)
    length = _longest(model)
    if prefix != AUTO_PREFIX:
        ids = _given_ids(tokenizer, prefix)
        vocabulary = int(model.config.vocab_size)
        if not ids or max(ids) >= vocabulary:
            what = f"token {max(ids)} is none of the model's {vocabulary:,}" if ids else f"{prefix!r} has no token"
            raise UserError(f"quantization.prefix: {what}; give other tokens, a text, or auto")
        length = len(ids)
        check_prefix_length(model, length)
    for key, window in windows.items():
        check_window(model.config, window + length, f"{key} = {window:,} and a prefix of up to {length} tokens, together")


def resolve_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    windows: Tensor,
    *,
    look: MassiveTokens = massive_tokens,
    progress: Progress = quiet,
) -> tuple[Config, dict[str, Any]]:
    """The config with its prefix as token ids, and what was found.

    It has none if the search finds that none is needed, or if what is quantized needs none (`QuantizationConfig.has_prefix`).

    Args:
        model: the plain full-precision model.
        look: as in `find_prefix`.

    Shape:
        windows: calibration windows [windows, window], int64
    """
    prefix = config.quantization.prefix
    if prefix is None:
        return config, {}
    ids: list[int] = []
    report: dict[str, Any] = {"ids": ids, "text": ""}
    if config.quantization.has_prefix and prefix == AUTO_PREFIX:
        found = find_prefix(model, tokenizer, windows, longest=_longest(model), look=look, progress=progress)
        ids, report = found.ids, found.as_dict()
    elif config.quantization.has_prefix:
        ids = _given_ids(tokenizer, prefix)
        report = {"ids": ids, "text": str(tokenizer.decode(ids))}
    return with_prefix(config, ids or None), {"prefix": report}


def with_prefix(config: Config, ids: list[int] | None) -> Config:
    """The same config with these token ids for its prefix."""
    return config.model_copy(update={"quantization": config.quantization.model_copy(update={"prefix": ids})})
