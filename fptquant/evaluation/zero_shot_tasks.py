"""Tasks of lm-eval (EleutherAI's evaluation harness): its own by name, and five of them on files of JSON lines.

A local task is lm-eval's own task of that name; prompts, targets and metrics are its own, and only its data come from the file. A
line has the fields of lm-eval's data set, or those of the files that many evaluation suites share:

    piqa, arc_easy, boolq    {"query": ..., "choices": [...], "gold": index of the right choice}
    winogrande               {"context_options": [...], "continuation": ..., "gold": index of the right context}
    lambada                  {"context": ..., "continuation": the last word}

Such a query contains the words "Question: " and "Passage: " with which lm-eval's prompt begins; they are taken away before.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fptquant.data.hub import offline_if_unreachable, quiet_dataset_bars
from fptquant.errors import UserError
from fptquant.stages.progress import Progress, quiet

Row = dict[str, Any]
"""One line of a file, or one document of lm-eval."""

_QUESTION, _PASSAGE = "Question: ", "Passage: "


@dataclass(frozen=True)
class LocalTask:
    """How lines of a file become documents of lm-eval's task ``name``."""

    name: str
    folder: str
    """Where lm-eval describes the task, in its own folder of tasks."""
    fields: frozenset[str]
    """What a document of lm-eval needs."""
    shared: frozenset[str]
    """What a line of the files that are in common use has instead."""
    convert: Callable[[Row], Row]
    """Turns such a line into a document; KeyError, TypeError, ValueError or IndexError if it cannot."""


def _piqa(row: Row) -> Row:
    first, second = _choices(row, "choices", 2)
    goal = row["query"].removeprefix(_QUESTION).removesuffix("\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": _gold(row, 2)}


def _arc(row: Row) -> Row:
    texts = _choices(row, "choices")
    labels = [chr(ord("A") + index) for index in range(len(texts))]
    question = row["query"].removeprefix(_QUESTION)
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": labels[_gold(row, len(texts))]}


def _boolq(row: Row) -> Row:
    if _choices(row, "choices", 2) != ["no", "yes"]:
        raise ValueError('the choices are not ["no", "yes"]')
    passage, separator, question = row["query"].rpartition("\n" + _QUESTION)
    if not separator:
        raise ValueError("the query has no line that begins with Question")
    return {"passage": passage.removeprefix(_PASSAGE), "question": question.removesuffix("?"), "label": _gold(row, 2)}


def _winogrande(row: Row) -> Row:
    # lm-eval puts an option where the sentence has its first underscore: here whole contexts, at the beginning
    first, second = _choices(row, "context_options", 2)
    sentence = "_ " + row["continuation"].strip()
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(1 + _gold(row, 2))}


def _lambada(row: Row) -> Row:
    word = row["continuation"].lstrip(" ")
    if not word or " " in word:
        raise ValueError(f"the continuation {row['continuation']!r} is not one word")
    return {"text": row["context"].rstrip(" ") + " " + word}


def _choices(row: Row, field: str, count: int | None = None) -> list[str]:
    texts = row[field]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or len(texts) != (count or len(texts)):
        raise ValueError(f"{field} is not a list of {count or 'several'} texts")
    return texts


def _gold(row: Row, count: int) -> int:
    gold = row["gold"]
    if not isinstance(gold, int) or not 0 <= gold < count:
        raise ValueError(f"gold = {gold!r} is none of 0 to {count - 1}")
    return gold


_QUERY = frozenset({"query", "choices", "gold"})
_LOCAL = (
    LocalTask("piqa", "piqa", frozenset({"goal", "sol1", "sol2", "label"}), _QUERY, _piqa),
    LocalTask("arc_easy", "arc", frozenset({"question", "choices", "answerKey"}), _QUERY, _arc),
    LocalTask("boolq", "super_glue/boolq", frozenset({"passage", "question", "label"}), _QUERY, _boolq),
    LocalTask(
        "winogrande", "winogrande", frozenset({"sentence", "option1", "option2", "answer"}),
        frozenset({"context_options", "continuation", "gold"}), _winogrande,
    ),
    LocalTask("lambada_openai", "lambada", frozenset({"text"}), frozenset({"context", "continuation"}), _lambada),
)  # fmt: skip
LOCAL_TASKS = {task.name: task for task in _LOCAL} | {"lambada": _LOCAL[-1]}
"""The tasks that files can be given for, by the names that files may have."""


@dataclass(frozen=True)
class TaskSpec:
    """One task that is asked for: a name of lm-eval, or one of `LOCAL_TASKS` with its file."""

    name: str
    file: Path | None = None


def parse_tasks(tasks: str | Sequence[str]) -> list[TaskSpec]:
    """What is asked for by ``piqa=FILE.jsonl``, by a folder of ``NAME.jsonl``, or by names that lm-eval knows.

    A string holds several, separated by commas.

    >>> parse_tasks("hellaswag, arc_challenge")
    [TaskSpec(name='hellaswag', file=None), TaskSpec(name='arc_challenge', file=None)]

    Raises:
        UserError: if nothing is asked for, a task is asked for twice, a file or its task does not exist.
    """
    items = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    specs = [spec for item in items if item.strip() for spec in _parse_item(item.strip())]
    names = [spec.name for spec in specs]
    if not specs:
        raise UserError(f"no task is given; write names of lm-eval, or {_example()}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the task {name} is given twice; give each once")
    return specs


def _example() -> str:
    return f"NAME=FILE.jsonl or a folder of NAME.jsonl, NAME being one of {', '.join(LOCAL_TASKS)}"


def _parse_item(item: str) -> list[TaskSpec]:
    name, equals, file = item.partition("=")
    if equals:
        if name not in LOCAL_TASKS:
            raise UserError(f"there is no task {name} for a file; write {_example()}")
        return [TaskSpec(LOCAL_TASKS[name].name, _existing(Path(file).expanduser()))]
    folder = Path(item).expanduser()
    if folder.is_dir():
        found = [folder / f"{known}.jsonl" for known in LOCAL_TASKS if (folder / f"{known}.jsonl").is_file()]
        if not found:
            raise UserError(f"the folder {folder} has no file for a task; it needs one of {', '.join(LOCAL_TASKS)} as NAME.jsonl")
        return [TaskSpec(LOCAL_TASKS[path.stem].name, path) for path in found]
    if folder.suffix == ".jsonl" or "/" in item:
        raise UserError(f"{item} is neither a folder nor a name of lm-eval; write {_example()}")
    return [TaskSpec(item)]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"the file {path} of a zero-shot task does not exist; write {_example()}")
    return path


def read_documents(task: LocalTask, path: Path) -> list[Row]:
    """The documents of lm-eval's task that a file holds.

    Raises:
        UserError: names the line that is no such document.
    """
    documents = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    documents.append(_document(task, line, f"{path}, line {number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not documents:
        raise UserError(f"{path} is empty; it should hold one JSON object in each line")
    return documents


def _document(task: LocalTask, line: str, where: str) -> Row:
    wanted = f"lines for {task.name} need {_listed(task.shared)}, or {_listed(task.fields)}"
    try:
        row = json.loads(line)
        if task.fields <= row.keys():
            return {field: row[field] for field in sorted(task.fields)}
        return task.convert(row)
    except KeyError as error:
        raise UserError(f"{where}: there is no {error}; {wanted}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}; {wanted}") from error


def _listed(fields: frozenset[str]) -> str:
    return ", ".join(sorted(fields))


def check_lm_eval() -> None:
    """Refuses zero-shot tasks where lm-eval is not installed.

    Raises:
        UserError: says what to install.
    """
    if find_spec("lm_eval") is None:
        raise UserError("zero-shot tasks need a package: pip install 'fptquant[eval]'")


def load_tasks(specs: Sequence[TaskSpec], progress: Progress = quiet) -> dict[str, Any]:
    """lm-eval's task objects by name, with their data; a group of lm-eval gives all of its tasks.

    Raises:
        UserError: if lm-eval is not installed, knows no such task, or its data cannot be had.
    """
    check_lm_eval()
    files = {spec.name: spec.file for spec in specs if spec.file is not None}
    documents = {name: read_documents(LOCAL_TASKS[name], file) for name, file in files.items()}
    names = [spec.name for spec in specs if spec.file is None]
    with quiet_lm_eval():
        local = _load_local(documents) if documents else {}
        named = _load_named(names, progress) if names else {}
    twice = sorted(local.keys() & named.keys())
    if twice:
        raise UserError(f"the task {twice[0]} is given as a file and by a name of lm-eval; give each once")
    return local | named


def _load_local(documents: dict[str, list[Row]]) -> dict[str, Any]:
    import lm_eval.tasks
    from datasets import Dataset

    def overrides(name: str) -> Row:
        data = {"test": Dataset.from_list(documents[name])}
        splits = {"test_split": "test", "training_split": None, "validation_split": None, "fewshot_split": None}
        return {"task": name, "dataset_path": None, "dataset_name": None, "custom_dataset": lambda **unused: data, **splits}

    home = Path(lm_eval.tasks.__file__).parent
    folders = [str(home / LOCAL_TASKS[name].folder) for name in documents]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)  # the others would take seconds
    loaded: dict[str, Any] = manager.load([{"group": "local", "task": [overrides(name) for name in documents]}])["tasks"]
    return loaded


def _load_named(names: list[str], progress: Progress) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    what = "tasks of lm-eval"
    progress(0, 1 + len(names), what)
    manager = TaskManager()  # reads 14,000 descriptions
    known = set(manager.all_tasks)
    for name in names:
        if name not in known:
            close = get_close_matches(name, sorted(known), 3)
            hint = f"did you mean {' or '.join(close)}? `lm-eval ls tasks` lists all" if close else "`lm-eval ls tasks` lists all"
            raise UserError(f"lm-eval knows no task {name}; {hint}; a file is given as {_example()}")
    loaded: dict[str, Any] = {}
    with offline_if_unreachable(), quiet_dataset_bars():
        for number, name in enumerate(names, start=1):
            progress(number, 1 + len(names), what)
            for task, found in _load_data(manager, name).items():
                if task in loaded:
                    raise UserError(f"the task {task} is given twice, by a group of tasks; give each once")
                loaded[task] = found
    progress(1 + len(names), 1 + len(names), what)
    return loaded


def _load_data(manager: Any, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = manager.load([name])["tasks"]
    except Exception as error:  # network, file formats, packages that a task needs: they have no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the data of lm-eval's task {name} cannot be had ({reason}); it is read from the Hugging Face hub or its cache. "
            f"Check the network, or give a file: {_example()}"
        ) from error
    return found


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Without lm-eval's bar over its requests, its warnings that a model is given as an object and data by a function, and its
    question to git for a commit, which git answers with an error outside of a repository.
    """
    import lm_eval.api.task as module
    from lm_eval import evaluator

    logger, bar, ask_git = logging.getLogger("lm_eval"), module.tqdm, evaluator.get_git_commit_hash
    level = logger.level
    logger.setLevel(logging.ERROR)
    module.tqdm = lambda items, **unused: items
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        module.tqdm = bar
        evaluator.get_git_commit_hash = ask_git
        logger.setLevel(level)
