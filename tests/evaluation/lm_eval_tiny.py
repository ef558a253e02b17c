"""Invented examples in the shapes of the five tasks, a tokenizer that lm-eval accepts, and lm-eval with less to say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tiny_tokenizer import tiny_tokenizer

SHARED: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"query": "Question: open a jar\n", "choices": ["twist the lid", "sing to it loudly"], "gold": 0},
        {"query": "Question: dry hair\n", "choices": ["water", "use a towel"], "gold": 1},
        {"query": "Question: boil\n", "choices": ["heat", "ice"], "gold": 0},
    ],
    "arc_easy": [
        {"query": "Question: What melts?", "choices": ["ice", "sand", "air", "a song"], "gold": 0},
        {"query": "Question: Which one flies?", "choices": ["stone", "bird", "desk"], "gold": 1},
    ],
    "boolq": [
        {"query": "Passage: Tea is hot.\nQuestion: is tea hot?", "choices": ["no", "yes"], "gold": 1},
        {"query": "Passage: A\nQuestion: why?\nQuestion: is it b?", "choices": ["no", "yes"], "gold": 0},
    ],
    "winogrande": [
        {"context_options": ["Ann beat Bo so Ann", "Ann beat Bo so Bo"], "continuation": "lost.", "gold": 1},
        {"context_options": ["The cup and_lid: the cup", "The cup and_lid: the lid"], "continuation": "fell off.", "gold": 0},
    ],
    "lambada_openai": [
        {"context": "She had a dog,  so she walked the", "continuation": "dog"},
        {"context": "\"Stop,\" he said.\n\"Who said", "continuation": "stop?\"\n\"Me"},
        {"context": "One and one is", "continuation": "two"},
    ],
}  # fmt: skip
"""As files that many suites share have them."""

OWN: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "open a jar", "sol1": "twist the lid", "sol2": "sing to it loudly", "label": 0, "idx": 7},
        {"goal": "dry hair", "sol1": "water", "sol2": "use a towel", "label": 1},
        {"goal": "boil", "sol1": "heat", "sol2": "ice", "label": 0},
    ],
    "arc_easy": [
        {"question": "What melts?", "choices": {"text": ["ice", "sand", "air", "a song"], "label": list("1234")}, "answerKey": "1"},
        {"question": "Which one flies?", "choices": {"text": ["stone", "bird", "desk"], "label": list("ABC")}, "answerKey": "B"},
    ],
    "boolq": [
        {"passage": "Tea is hot.", "question": "is tea hot", "label": 1},
        {"passage": "A\nQuestion: why?", "question": "is it b", "label": 0},
    ],
    "winogrande": [
        {"sentence": "Ann beat Bo so _ lost.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        {"sentence": "_ fell off.", "option1": "The cup and_lid: the cup", "option2": "The cup and_lid: the lid", "answer": "1"},
    ],
    "lambada_openai": [
        {"text": "She had a dog,  so she walked the dog"},
        {"text": "\"Stop,\" he said.\n\"Who said stop?\"\n\"Me"},
        {"text": "One and one is two"},
    ],
}  # fmt: skip
"""The same as lm-eval's data sets have them."""

PROMPTS: dict[str, list[tuple[str, str]]] = {
    "piqa": [
        ("Question: open a jar\nAnswer:", " twist the lid"),
        ("Question: open a jar\nAnswer:", " sing to it loudly"),
        ("Question: dry hair\nAnswer:", " water"),
        ("Question: dry hair\nAnswer:", " use a towel"),
        ("Question: boil\nAnswer:", " heat"),
        ("Question: boil\nAnswer:", " ice"),
    ],
    "arc_easy": [
        *(("Question: What melts?\nAnswer:", answer) for answer in (" ice", " sand", " air", " a song")),
        *(("Question: Which one flies?\nAnswer:", answer) for answer in (" stone", " bird", " desk")),
    ],
    "boolq": [
        ("Tea is hot.\nQuestion: is tea hot?\nAnswer:", " no"),
        ("Tea is hot.\nQuestion: is tea hot?\nAnswer:", " yes"),
        ("A\nQuestion: why?\nQuestion: is it b?\nAnswer:", " no"),
        ("A\nQuestion: why?\nQuestion: is it b?\nAnswer:", " yes"),
    ],
    "winogrande": [
        ("Ann beat Bo so Ann", " lost."),
        ("Ann beat Bo so Bo", " lost."),
        ("The cup and_lid: the cup", " fell off."),
        ("The cup and_lid: the lid", " fell off."),
    ],
    "lambada_openai": [
        ("She had a dog,  so she walked the", " dog"),
        ('"Stop," he said.\n"Who said', ' stop?"\n"Me'),
        ("One and one is", " two"),
    ],
}
"""Context and continuation of every request, as the published descriptions of the tasks make them."""

GOLD = {"piqa": [0, 1, 0], "arc_easy": [0, 1], "boolq": [1, 0], "winogrande": [1, 0]}


def write_tasks(folder: Path, examples: dict[str, list[dict[str, Any]]]) -> Path:
    """A folder with a file for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in examples.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


def write_lines(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of bytes, with an end of text."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def leave_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine after every evaluation, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
