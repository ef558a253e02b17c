"""Perplexity of a model, and its divergence from and agreement with the full-precision model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.data.text import Text, load_text
from fptquant.data.windows import check_window, token_windows
from fptquant.errors import UserError
from fptquant.evaluation.hidden import check_finite, last_hidden_states, logit_chunks, output_head
from fptquant.evaluation.metrics import relative_error
from fptquant.evaluation.scores import Score, read_scores, write_scores
from fptquant.evaluation.teacher import ProgressCallback, TeacherCache
from fptquant.files import KeptFile, KeptFiles
from fptquant.fingerprint import model_digest, tensors_digest
from fptquant.float32_products import fast_float32_products
from fptquant.models.prefix import prefix_length
from fptquant.stages.distributed import gathered, own, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Evaluation:
    """Results on one text; divergence and agreement are None without a reference model."""

    perplexity: float
    """``exp`` of the mean negative log-likelihood per token."""
    jsd: float | None
    """Mean Jensen-Shannon divergence from the reference's next-token distributions, in nats."""
    top1_agreement: float | None
    """Share of positions at which both models find the same token likeliest, 0 to 1."""
    tokens: int
    """Predictions that were scored: one fewer than there are tokens in each window."""
    seconds: float
    text_name: str
    kl: float | None = None
    """Mean KL(p || q), p the reference's next-token distributions, in nats; None in results of before it was measured."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluation_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | Text, windows: int | Literal["all"], window: int
) -> tuple[Tensor, str]:
    """The first windows of the evaluation text, and the name of that text.

    Shape:
        result: [windows, window], int64

    Raises:
        UserError: if the window is longer than the model's context or the text too short.
    """
    before = prefix_length(model)
    check_window(model.config, window + before, "the evaluation window" + (f" with a prefix of {before} tokens" if before else ""))
    loaded = load_text(text, "evaluation") if isinstance(text, str) else text
    return token_windows(tokenizer, loaded, windows, window), loaded.name


@fast_float32_products
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Text = "auto",
    windows: int | Literal["all"] = 8,
    window: int = 1024,
    reference: PreTrainedModel | TeacherCache | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Measures a model on the first ``windows`` windows of a text, or on all of them, each read on its own.

    A window of 1,024 tokens gives 1,023 predictions: its first token has no context and is not scored. Special tokens
    are not added, but for the BOS of some tokenizers before the whole text (`fptquant.data.text.Text`).

    Args:
        text: a name of `fptquant.data.text.TEXT_SOURCES`, a path to a .txt or .jsonl file, or a `Text`.
        reference: the full-precision model, or what it said (`build_reference`); divergence and agreement need it.

    Raises:
        UserError: if the text is too short, the window longer than the context, the reference was computed on other
            tokens, or logits are not finite.
    """
    tokens, name = evaluation_windows(model, tokenizer, text, windows, window)
    if reference is not None and not isinstance(reference, TeacherCache):
        reference = TeacherCache.from_model(reference, tokens, text_name=name, progress=progress)
    return evaluate_windows(model, tokens, text_name=name, reference=reference, progress=progress)


@fast_float32_products
def build_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Text = "auto",
    windows: int | Literal["all"] = 8,
    window: int = 1024,
    progress: ProgressCallback | None = None,
    shared: bool = False,
    kept: KeptFiles | None = None,
) -> tuple[TeacherCache, Evaluation]:
    """What the full-precision model says on the evaluation text, and its own evaluation; errors as in `evaluate`.

    Args:
        shared: every process takes its share of the windows, and gets the evaluation of all.
        kept: where windows are kept when they are done, and found again.
    """
    tokens, name = evaluation_windows(model, tokenizer, text, windows, window)
    if shared:
        tokens = own(tokens)
    cache = TeacherCache.from_model(model, tokens, text_name=name, progress=progress, kept=kept)

    def score(index: int) -> Score:
        found = _score_window(model, cache.head, tokens[index], cache.hidden[index], None, index)
        return replace(found, agreed=found.tokens)

    file = None if kept is None else kept.file("scores.json")
    scores = _scores(model, tokens, None, score, "full precision: perplexity", file, progress)
    return cache, _evaluation([*scores, Score(seconds=cache.seconds)], name, compared=True, shared=shared)


@fast_float32_products
@torch.inference_mode()
def evaluate_windows(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    text_name: str,
    reference: TeacherCache | None = None,
    progress: ProgressCallback | None = None,
    shared: bool = False,
    kept: KeptFile | None = None,
) -> Evaluation:
    """`evaluate` on windows of tokens that are at hand.

    Args:
        shared: these windows are this process's share; the result is that of all processes.
        kept: where the score of each window is kept when it is known, and found again.

    Shape:
        tokens: [windows, window], int64
    """
    if reference is not None and not torch.equal(reference.tokens, tokens):
        raise UserError(
            f"the reference was computed on {reference.text_name}, {list(reference.tokens.shape)} tokens, the model is "
            f"evaluated on {text_name}, {list(tokens.shape)} tokens; build it with the same text, windows and window"
        )
    head = output_head(model)

    def score(index: int) -> Score:
        return _score_window(model, head, tokens[index], last_hidden_states(model, tokens[index]), reference, index)

    scores = _scores(model, tokens, reference, score, "evaluation", kept, progress)
    return _evaluation(scores, text_name, compared=reference is not None, shared=shared)


def _scores(
    model: PreTrainedModel,
    tokens: Tensor,
    reference: TeacherCache | None,
    score: Callable[[int], Score],
    what: str,
    kept: KeptFile | None,
    progress: ProgressCallback | None,
) -> list[Score]:
    """The score of every window; those that a file has kept are not asked for again."""
    belongs_to: dict[str, str] = {}
    scores: list[Score] = []
    if kept is not None:
        said = "" if reference is None else reference.digest()
        belongs_to = {"model": model_digest(model), "tokens": tensors_digest(tokens), "reference": said}
        scores = read_scores(kept, belongs_to)
    for index in range(len(scores), len(tokens)):
        if progress is not None:
            progress(index, len(tokens), what)
        start = time.perf_counter()
        found = score(index)
        scores.append(replace(found, seconds=time.perf_counter() - start))
        if kept is not None:
            write_scores(kept, belongs_to, scores)
    if progress is not None:
        progress(len(tokens), len(tokens), what)
    return scores


@torch.inference_mode()
def _score_window(
    model: PreTrainedModel,
    head: nn.Module,
    window: Tensor,
    hidden: Tensor,
    reference: TeacherCache | None,
    index: int,
) -> Score:
    """The sums of one window; every position but the last predicts the token after it."""
    sums = Score()
    vocabulary = int(model.config.vocab_size)
    targets = window[1:].to(hidden.device)
    teacher = None if reference is None else reference.hidden[index, :-1]
    for where, logits in logit_chunks(head, vocabulary, hidden[:-1]):
        nll = ops.cross_entropy(logits, targets[where])
        check_finite(model, window, nll, where.start, index)
        found = Score(nll=_sum(nll), tokens=len(logits))
        if reference is not None and teacher is not None:
            expected = reference.head(teacher[where]).to(logits)  # the reference may be on another device
            found = replace(
                found,
                jsd=_sum(ops.divergence(logits, expected, kind="jsd")),
                kl=_sum(ops.divergence(logits, expected, kind="forward_kl")),
                agreed=int((logits.argmax(-1) == expected.argmax(-1)).sum()),
            )
        sums = Score.of_all((sums, found))
    return sums


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _evaluation(scores: Sequence[Score], text_name: str, *, compared: bool, shared: bool) -> Evaluation:
    sums = Score.of_all(gathered(Score.of_all(scores)) if shared else scores)
    mean = sums.nll / sums.tokens
    return Evaluation(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        jsd=sums.jsd / sums.tokens if compared else None,
        top1_agreement=sums.agreed / sums.tokens if compared else None,
        tokens=sums.tokens,
        seconds=sums.seconds / world_size() if shared else sums.seconds,
        text_name=text_name,
        kl=sums.kl / sums.tokens if compared else None,
    )


@fast_float32_products
@torch.inference_mode()
def relative_logits_error(reference: PreTrainedModel, model: PreTrainedModel, tokens: Tensor) -> float:
    """``max |z - z'| / max |z|`` over the logits of two models that should compute the same function.

    Shape:
        tokens: [windows, window], int64
    """
    worst = 0.0
    for window in tokens:
        ids = window[None]
        expected = reference(input_ids=ids.to(reference.device), use_cache=False).logits
        found = model(input_ids=ids.to(model.device), use_cache=False).logits
        worst = max(worst, relative_error(expected, found.to(expected.device)))
    return worst
