"""Zero-shot tasks against log-likelihoods computed by hand, in batches of any size, on all kinds of quantized models."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel

pytest.importorskip("lm_eval", reason="needs lm-eval (pip install 'fptquant[eval]')")

import lm_eval.tasks
from lm_eval.api.instance import Instance

from fptquant import evaluate_zero_shot
from fptquant.errors import UserError
from fptquant.evaluation.lm_eval_model import Answer, LMEvalModel
from fptquant.evaluation.zero_shot import TaskScore
from fptquant.evaluation.zero_shot_tasks import LOCAL_TASKS, load_tasks, parse_tasks
from fptquant.files import KeptFiles
from fptquant.fingerprint import model_digest
from fptquant.models.instrument import set_modes
from fptquant.models.prefix import compute_prefix_
from fptquant.stages.progress import quiet
from tests.evaluation.lm_eval_tiny import (
    GOLD,
    OWN,
    PROMPTS,
    SHARED,
    closing_tokenizer,
    leave_machine_alone,
    write_lines,
    write_tasks,
)
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import tiny_model
from tests.tiny_tokenizer import VOCABULARY

PREFIX = [17, 5]
MODELS: dict[str, dict[str, Any]] = {
    "static": {"bits": 5, "weight_bits": 4},
    "dynamic": {"bits": 4, "dynamic": True},
    "kept": {"bits": 4, "full_precision_tokens": 3},
    "prefix": {"bits": 4, "prefix": PREFIX},
    "prefix everywhere": {"bits": 5, "prefix": PREFIX, "sites": "all", "full_precision_tokens": 1},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_machine_alone(monkeypatch)


def make(name: str) -> PreTrainedModel:
    """In float64, where no value comes within a rounding of the middle between two steps."""
    options = {"vocab_size": VOCABULARY, "dtype": torch.float64}
    if name == "full precision":
        return tiny_model("LlamaForCausalLM", **options)
    ids = torch.randint(1, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(3))
    transforms: dict[str, Any] = {"residual_scaling": "input"} if "everywhere" in name else {}
    model = quantized_model("LlamaForCausalLM", setting(**MODELS[name]), ids=ids, options=options, **transforms)
    if "prefix" in name:
        set_modes(model, "off")
        compute_prefix_(model, PREFIX)
        set_modes(model, "on")
    return model


def by_hand(model: PreTrainedModel, context: str, continuation: str) -> Answer:
    """Log-likelihood of the continuation, one text at a time, and whether each of its tokens is the likeliest."""
    tokenizer = closing_tokenizer()
    before, both = (tokenizer(text)["input_ids"] for text in (context, context + continuation))
    with torch.no_grad():
        logits = model(torch.tensor([both])).logits[0].double().log_softmax(-1)
    scored = [(logits[at - 1, both[at]], int(logits[at - 1].argmax()) == both[at]) for at in range(len(before), len(both))]
    return float(sum(value for value, _ in scored)), all(likeliest for _, likeliest in scored)


def answers(model: PreTrainedModel, prompts: list[tuple[str, str]], batch_size: int) -> list[Answer]:
    asked = LMEvalModel(model, closing_tokenizer(), batch_size=batch_size, progress=quiet, kept=None)
    requests = [
        Instance("loglikelihood", {}, prompt, number, metadata=("task", number, 1)) for number, prompt in enumerate(prompts)
    ]
    return asked.loglikelihood(requests)


@pytest.mark.parametrize("examples", [SHARED, OWN], ids=["shared", "own"])
def test_prompts_are_those_of_lm_eval(tmp_path: Path, examples: dict[str, list[dict[str, Any]]]) -> None:
    tasks = load_tasks(parse_tasks(str(write_tasks(tmp_path, examples))))
    assert list(tasks) == [task.name for task in dict.fromkeys(LOCAL_TASKS.values())]
    for name, task in tasks.items():
        task.build_all_requests()
        assert [request.args for request in task.instances] == PROMPTS[name]
        if name in GOLD and name != "winogrande":
            assert [task.doc_to_target(doc) for doc in task.eval_docs] == GOLD[name]
        if name == "winogrande":  # there the target is the text, and the text before it is the choice
            assert [task.doc_to_text(doc) for doc in task.eval_docs] == GOLD[name]


@pytest.mark.parametrize("name", ["full precision", "static", "prefix everywhere"])
def test_scores_are_those_computed_by_hand(tmp_path: Path, name: str) -> None:
    model, tokenizer = make(name), closing_tokenizer()
    before = model_digest(model)
    found = evaluate_zero_shot(model, tokenizer, str(write_tasks(tmp_path, SHARED)), batch_size=3)
    assert model_digest(model) == before
    assert tokenizer.pad_token is None
    for task, gold in GOLD.items():
        told = iter([(by_hand(model, *prompt)[0], len(prompt[1].lstrip(" "))) for prompt in PROMPTS[task]])
        counts = [len(row.get("choices", row.get("context_options"))) for row in SHARED[task]]
        rows = [[next(told) for _ in range(count)] for count in counts]
        right = [max(range(len(row)), key=lambda i, row=row: row[i][0]) == answer for row, answer in zip(rows, gold, strict=True)]
        expected = {"acc": sum(right) / len(right)}
        if task in ("piqa", "arc_easy"):
            per_letter = [[value / letters for value, letters in row] for row in rows]
            normed = [row.index(max(row)) == answer for row, answer in zip(per_letter, gold, strict=True)]
            expected["acc_norm"] = sum(normed) / len(normed)
        assert found[task].metrics == pytest.approx(expected)
        share, count = expected["acc"], len(right)
        assert found[task].stderr["acc"] == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))
        assert found[task].examples == count
    values = torch.tensor([by_hand(model, *prompt)[0] for prompt in PROMPTS["lambada_openai"]], dtype=torch.float64)
    said = [by_hand(model, *prompt)[1] for prompt in PROMPTS["lambada_openai"]]
    perplexity = float((-values.mean()).exp())
    expected = {"perplexity": perplexity, "acc": sum(said) / len(said)}
    assert found["lambada_openai"].metrics == pytest.approx(expected, rel=1e-9)
    assert found["lambada_openai"].stderr["perplexity"] == pytest.approx(perplexity * float(values.std()) / math.sqrt(3), rel=1e-9)
    assert [found[task].version for task in ("piqa", "boolq")] == ["1.0", "2.0"]


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_any_size_gives_the_answers_of_single_texts(name: str) -> None:
    """Texts of several lengths beside each other: padding, kept tokens and the prefix of each row stay where they belong."""
    model = make(name)
    one_token_apart = [("One:", " ab"), ("One:", " ac"), ("One: a", "d"), ("One:", " ab")]  # these share a row
    prompts = [prompt for task in PROMPTS.values() for prompt in task] + one_token_apart
    expected = [by_hand(model, *prompt) for prompt in prompts]
    for batch_size in (1, 4, len(prompts)):
        found = answers(model, prompts, batch_size)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-9)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("name", ["kept", "prefix everywhere"])
def test_generated_answers_do_not_depend_on_the_batch(name: str) -> None:
    """Tasks of lm-eval that generate pad on the left, with a mask."""
    model = make(name)
    texts = ["One", "Two and two is", "Q: a long question, which needs room. A:"]
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, settings), number) for number, text in enumerate(texts)]
    found = [
        LMEvalModel(model, closing_tokenizer(), batch_size=size, progress=quiet, kept=None).generate_until(
            requests, disable_tqdm=True
        )
        for size in (1, 3)
    ]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_one_task_does_not_depend_on_the_others_and_the_first_examples_are_taken(tmp_path: Path) -> None:
    model, folder = make("static"), write_tasks(tmp_path, SHARED)
    shown: list[tuple[int, int, str]] = []
    both = evaluate_zero_shot(
        model, closing_tokenizer(), [f"piqa={folder}/piqa.jsonl", f"lambada={folder}/lambada_openai.jsonl"],
        limit=2, batch_size=1, progress=lambda *step: shown.append(step),
    )  # fmt: skip
    alone = evaluate_zero_shot(model, closing_tokenizer(), f"lambada={folder}/lambada_openai.jsonl", limit=2, batch_size=1)
    assert both["lambada_openai"] == alone["lambada_openai"]
    assert (both["piqa"].examples, both["lambada_openai"].examples) == (2, 2)
    assert shown == [*((done, 4, "piqa") for done in range(5)), *((done, 2, "lambada_openai") for done in range(3))]


def test_nothing_is_printed_outside_of_a_git_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tasks = f"lambada={write_tasks(tmp_path, SHARED)}/lambada_openai.jsonl"
    monkeypatch.chdir(tmp_path)
    evaluate_zero_shot(make("static"), closing_tokenizer(), tasks, limit=2)
    assert capfd.readouterr() == ("", "")


def test_what_is_longer_than_the_context_is_counted(tmp_path: Path) -> None:
    long = {"context": "word " * 40 + "last", "continuation": "word"}
    file = write_lines(tmp_path / "lambada.jsonl", [long, SHARED["lambada_openai"][2]])
    model = make("prefix")
    found = evaluate_zero_shot(model, closing_tokenizer(), f"lambada={file}")["lambada_openai"]
    assert found.cut == 1
    # the context has room for 128 tokens, two of them the prefix, and the last token of a text is no input
    kept = by_hand(model, (long["context"])[-(128 - 2 + 1 - len(" word")) :], " word")[0]
    other = by_hand(model, *PROMPTS["lambada_openai"][2])[0]
    assert found.metrics["perplexity"] == pytest.approx(math.exp(-(kept + other) / 2), rel=1e-9)


def test_a_killed_evaluation_goes_on(tmp_path: Path) -> None:
    model, folder = make("full precision"), write_tasks(tmp_path / "tasks", SHARED)
    tasks = f"{folder}/piqa.jsonl"
    count, last = [0], [4]

    def forward(*unused: object) -> None:
        count[0] += 1
        if count[0] == last[0]:
            raise KeyboardInterrupt

    def measure(kept: Path | None) -> TaskScore:
        files = None if kept is None else KeptFiles(kept, seconds=0)
        return evaluate_zero_shot(
            model, closing_tokenizer(), f"piqa={tasks}", batch_size=1,
            kept=None if files is None else lambda task: files.file(f"{task}.json"),
        )["piqa"]  # fmt: skip

    expected = measure(None)
    model.model.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "kept")
    assert measure(tmp_path / "kept") == expected
    assert count[0] == 6 + 1  # the one that was interrupted came twice
    assert measure(tmp_path / "kept") == expected
    assert count[0] == 6 + 1
    (tmp_path / "kept" / "piqa.json").write_text("{")
    assert measure(tmp_path / "kept") == expected
    assert count[0] == 6 + 1 + 6
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    measure(tmp_path / "kept")
    assert count[0] == 6 + 1 + 6 + 6  # another model


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "no task is given"),
        ("piqa=nowhere.jsonl", r"nowhere\.jsonl of a zero-shot task does not exist"),
        ("hellaswag={folder}/piqa.jsonl", "there is no task hellaswag for a file; write NAME=FILE.jsonl or a folder"),
        ("{folder}/nowhere", "neither a folder nor a name"),
        ("{folder}/empty", "has no file for a task; it needs one of piqa"),
        ("{folder},piqa={folder}/piqa.jsonl", "piqa is given twice"),
        ("piqa={folder}/winogrande.jsonl", r"line 1: there is no 'choices'; lines for piqa need choices, gold, query, or goal"),
        ("boolq={folder}/piqa.jsonl", r"line 1: the choices are not \[\"no\", \"yes\"\]"),
        ("arc_easy={folder}/gold.jsonl", "line 2: gold = 4 is none of 0 to 1"),
        ("piqa={folder}/text.jsonl", r"line 1: .*; lines for piqa need"),
        ("piqa={folder}/nothing.jsonl", "is empty"),
    ],
)
def test_bad_tasks_are_refused(tmp_path: Path, asked: str, message: str) -> None:
    folder = write_tasks(tmp_path / "tasks", SHARED)
    (folder / "empty").mkdir()
    write_lines(folder / "gold.jsonl", [SHARED["piqa"][0], SHARED["piqa"][1] | {"gold": 4}])
    (folder / "text.jsonl").write_text("no JSON\n", encoding="utf-8")
    (folder / "nothing.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tasks(parse_tasks(asked.format(folder=folder)))


@pytest.fixture
def _few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval knows piqa alone: all of its descriptions take long to read; and the hub does not answer."""
    home = Path(lm_eval.tasks.__file__).parent / "piqa"
    few = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=[str(home)])
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("_few_tasks")
def test_names_of_lm_eval_are_its_own_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{key: row[key] for key in ("goal", "sol1", "sol2", "label")} for row in OWN["piqa"]]
    parts = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    asked: list[object] = []
    monkeypatch.setattr("datasets.load_dataset", lambda path, **options: asked.append(path) or parts)
    shown: list[tuple[int, int, str]] = []
    named = load_tasks(parse_tasks("piqa"), lambda *step: shown.append(step))
    assert asked == ["baber/piqa"]
    assert shown == [(done, 2, "tasks of lm-eval") for done in range(3)]
    model, file = make("full precision"), write_tasks(tmp_path, SHARED) / "piqa.jsonl"
    assert evaluate_zero_shot(model, closing_tokenizer(), named) == evaluate_zero_shot(model, closing_tokenizer(), f"piqa={file}")
    with pytest.raises(UserError, match="the task piqa is given twice"):
        load_tasks([*parse_tasks("piqa"), *parse_tasks("piqa")])


@pytest.mark.usefixtures("_few_tasks")
def test_names_that_lm_eval_does_not_know_and_data_that_cannot_be_had() -> None:
    with pytest.raises(UserError, match=r"lm-eval knows no task piqaa; did you mean piqa\?"):
        load_tasks(parse_tasks("piqaa"))
    with pytest.raises(UserError, match=r"data of lm-eval's task piqa cannot be had \(.*baber/piqa.*give a file: NAME=FILE\.jsonl"):
        load_tasks(parse_tasks("piqa"))


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, folder = make("full precision"), write_tasks(tmp_path, SHARED)
    with pytest.raises(UserError, match="limit = 0 is not possible; give at least 1"):
        evaluate_zero_shot(model, closing_tokenizer(), str(folder), limit=0)
    endless = closing_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="a tokenizer with a BOS or EOS token"):
        evaluate_zero_shot(model, endless, str(folder))
    with torch.no_grad():
        model.lm_head.weight[3, 4] = math.nan
    with pytest.raises(UserError, match="log-likelihoods of the task piqa are not finite"):
        evaluate_zero_shot(model, closing_tokenizer(), str(folder))
    monkeypatch.setattr("fptquant.evaluation.zero_shot_tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fptquant\[eval\]'"):
        evaluate_zero_shot(model, closing_tokenizer(), str(folder))
