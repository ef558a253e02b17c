"""What an evaluation of saved models measures besides perplexity and divergence: zero-shot tasks, and samples of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from fptquant.errors import UserError
from fptquant.evaluation.samples import Continuation, continuations, sample_prompts
from fptquant.evaluation.zero_shot import BATCH_SIZE, ZeroShot, check_settings, check_tokenizer, evaluate_zero_shot
from fptquant.evaluation.zero_shot_tasks import load_tasks, parse_tasks
from fptquant.files import KeptFile
from fptquant.reports.samples import Samples
from fptquant.stages.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fptquant.reports.table import Row


@dataclass(frozen=True)
class Further:
    """What is asked for."""

    tasks: str | None = None
    """As in `fptquant.evaluate_zero_shot`; none by default."""
    limit: int | None = None
    batch_size: int = BATCH_SIZE
    seed: int = 0
    samples: int = 0
    """Prompts that every model goes on with."""

    def description(self) -> dict[str, Any]:
        """What is not left at its default: a run goes on only with the same."""
        return {name: value for name, value in asdict(self).items() if value != getattr(Further(), name)}


class FurtherMeasurements:
    """Measures one model after another, the full-precision one first.

    Raises:
        UserError: before any long work, if a task cannot be had or a number means nothing.
    """

    def __init__(self, asked: Further, windows: int | Literal["all"], progress: Progress) -> None:
        self.asked = asked
        self._said: list[tuple[str, list[Continuation]]] = []
        self._prompts: list[str] = []
        if asked.tasks is None and asked.limit is not None:
            raise UserError("a limit is the number of examples of zero-shot tasks; give tasks, too")
        check_settings(asked.limit, asked.batch_size)
        if asked.samples < 0 or (windows != "all" and asked.samples > windows):
            raise UserError(f"{asked.samples} samples are not possible with {windows} windows; each begins as a window does")
        self._tasks: Mapping[str, Any] = {} if asked.tasks is None else load_tasks(parse_tasks(asked.tasks), progress)

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses a tokenizer with which lm-eval cannot work.

        Raises:
            UserError: as `fptquant.evaluation.zero_shot.check_tokenizer`.
        """
        if self._tasks:
            check_tokenizer(tokenizer)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        row: Row,
        windows: Tensor,
        kept: Callable[[str], KeptFile] | None,
        progress: Progress,
    ) -> Row:
        """Measures one model, and gives its row with what it scored on zero-shot tasks.

        Args:
            kept: as in `fptquant.evaluate_zero_shot`.

        Shape: windows [n, window], int64: the evaluation text
        """
        if self.asked.samples:
            prompts = sample_prompts(windows, self.asked.samples)
            self._prompts = [str(tokenizer.decode(prompt)) for prompt in prompts]
            name = f"{row.method} {row.setting}"
            self._said.append((name, continuations(model, tokenizer, prompts, progress=progress)))
        if not self._tasks:
            return row
        asked: dict[str, Any] = {name: getattr(self.asked, name) for name in ("limit", "batch_size", "seed")}
        scores = evaluate_zero_shot(model, tokenizer, self._tasks, **asked, progress=progress, kept=kept)
        return replace(row, zero_shot=ZeroShot(scores, **asked))

    @property
    def samples(self) -> Samples | None:
        """What the models said, if they were asked."""
        return Samples(self._prompts, self._said) if self._said else None
