"""Zero-shot tasks, evaluated by lm-eval (EleutherAI's evaluation harness) on a model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fptquant.errors import UserError
from fptquant.evaluation.zero_shot_tasks import check_lm_eval, load_tasks, parse_tasks, quiet_lm_eval
from fptquant.files import KeptFile, KeptFiles
from fptquant.float32_products import fast_float32_products
from fptquant.stages.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task."""

    task: str
    version: str
    """Of lm-eval's description of the task."""
    metrics: dict[str, float]
    """By lm-eval's names: acc, acc_norm (of log-likelihoods per character), perplexity and others, where the task has them."""
    stderr: dict[str, float]
    """Standard errors of those metrics that are means, and of perplexity."""
    examples: int
    """How many were scored."""
    cut: int
    """Requests that were longer than the model's context, and lost their beginning."""

    @property
    def main(self) -> str:
        """The metric that a table shows: accuracy, or what the task names first."""
        return "acc" if "acc" in self.metrics else next(iter(self.metrics))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ZeroShot:
    """What a model scored on several tasks, and how it was asked."""

    scores: Mapping[str, TaskScore]
    limit: int | None
    batch_size: int
    seed: int

    @property
    def mean_accuracy(self) -> float | None:
        """Over the tasks that have an accuracy, each counting the same; None where there is none."""
        accuracies = [score.metrics["acc"] for score in self.scores.values() if "acc" in score.metrics]
        return sum(accuracies) / len(accuracies) if accuracies else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        tasks = {name: score.as_dict() for name, score in self.scores.items()}
        return {"mean_accuracy": self.mean_accuracy, "tasks": tasks} | {
            name: getattr(self, name) for name in ("limit", "batch_size", "seed")
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ZeroShot:
        """What `as_dict` came from."""
        scores = {name: TaskScore(**score) for name, score in data["tasks"].items()}
        return cls(scores, data["limit"], data["batch_size"], data["seed"])


@fast_float32_products
def evaluate_zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | Mapping[str, Any],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: Progress = quiet,
    kept: Callable[[str], KeptFile] | None = None,
) -> dict[str, TaskScore]:
    """Scores a model, quantized or not, with lm-eval's own prompts, targets and metrics; no examples are shown before a question.

    Special tokens are those that the tokenizer adds, as everywhere in lm-eval.

    Args:
        tasks: names that lm-eval knows (their data come from the hub), ``NAME=FILE.jsonl``, or a folder of ``NAME.jsonl`` for
            piqa, winogrande, arc_easy, boolq, lambada; or what `fptquant.evaluation.zero_shot_tasks.load_tasks` made of these.
        limit: the number of first examples of each task; all by default.
        batch_size: texts that are read at once; it decides the order of sums, and with it the last bits.
        seed: of tasks that draw at random (none of the five does); Python's, NumPy's and PyTorch's generators are set to it.
        kept: gives the file in which the answers of a task are kept while they are found, and found again.

    Raises:
        UserError: before any long work, if lm-eval is missing, or a task, its file or its data cannot be had; later, if a
            log-likelihood is not finite.
    """
    check_settings(limit, batch_size)
    check_lm_eval()
    check_tokenizer(tokenizer)
    loaded = tasks if isinstance(tasks, Mapping) else load_tasks(parse_tasks(tasks), progress)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from fptquant.evaluation.lm_eval_model import LMEvalModel

    with quiet_lm_eval():
        asked = LMEvalModel(model, tokenizer, batch_size=batch_size, progress=progress, kept=kept)
        results = simple_evaluate(
            model=asked,
            tasks=list(loaded.values()),
            limit=limit,
            bootstrap_iters=0,  # it would start processes and print
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            task_manager=TaskManager(include_defaults=False),  # the tasks are loaded: it reads no descriptions
        )
    return {name: _score(name, task, results, asked.cut.get(name, 0)) for name, task in loaded.items()}


def _score(name: str, task: Any, results: Mapping[str, Any], cut: int) -> TaskScore:
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in results["results"][name].items():
        metric, comma, kind = key.partition(",")  # such as "acc,none"; a filter of answers stands in the place of none
        if not comma or metric.endswith("_stderr"):
            continue
        label = metric if kind == "none" else key
        metrics[label] = float(value)
        values = [sample[metric] for sample in results["samples"][name] if sample["filter"] == kind]
        error = _standard_error(task.aggregation()[metric], value, values)
        if error is not None:
            stderr[label] = error
    examples = int(results["n-samples"][name]["effective"])
    return TaskScore(name, str(results["versions"][name]), metrics, stderr, examples, cut)


def _standard_error(aggregation: Any, value: float, values: Sequence[float]) -> float | None:
    """Of a mean: sample deviation / sqrt(n), as lm-eval has it; of perplexity = exp(-mean): perplexity times that."""
    from lm_eval.api.metrics import mean, perplexity

    if aggregation not in (mean, perplexity) or len(values) < 2:
        return None
    average = sum(values) / len(values)
    error = math.sqrt(sum((each - average) ** 2 for each in values) / (len(values) - 1) / len(values))
    return error if aggregation is mean else value * error


def kept_tasks(kept: KeptFiles | None, name: str) -> Callable[[str], KeptFile] | None:
    """The files of one model among those of several; the answers of each task in one."""
    return None if kept is None else lambda task: kept.file(f"{name}-{task.replace('/', '-')}.json")


def check_settings(limit: int | None, batch_size: int) -> None:
    """Refuses numbers that mean nothing.

    Raises:
        UserError: names the setting.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} = {value} is not possible; give at least 1")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer with which lm-eval cannot work.

    Raises:
        UserError: if it has neither a first nor a last token of texts.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("lm-eval needs a tokenizer with a BOS or EOS token, which it puts before an empty context; give it one")
