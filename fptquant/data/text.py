"""Text by name: Python's own reference text, WikiText-2, or a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fptquant.data.wikitext import WikiTextUnavailable, load_wikitext2
from fptquant.errors import UserError

Purpose = Literal["calibration", "evaluation"]

TEXT_SOURCES = {
    "topics": "Python's reference text (pydoc_data), on every machine; calibration and evaluation parts do not overlap",
    "wikitext2": "WikiText-2 raw, from FPTQUANT_WIKITEXT2 or the hub; test split to evaluate, train split to calibrate",
    "auto": "wikitext2 where it can be had, otherwise topics",
}
"""Names of text that need no file, each with what it is."""

_HELD_OUT_EVERY = 4
"""One topic in so many is held out for evaluation."""


@dataclass(frozen=True)
class Text:
    """A text and the name under which results on it are reported."""

    name: str
    content: str


def load_text(source: str, purpose: Purpose) -> Text:
    """The text that ``source`` names: one of ``TEXT_SOURCES``, or a path to a ``.txt`` or ``.jsonl`` file.

    A ``.jsonl`` file holds one object with a ``text`` per line; they are joined by blank lines.

    Raises:
        UserError: if the source is unknown, cannot be reached or cannot be read.
    """
    if source == "topics":
        return topics(purpose)
    if source == "wikitext2":
        return _wikitext2(purpose)
    if source == "auto":
        try:
            return _wikitext2(purpose)
        except WikiTextUnavailable:
            return topics(purpose)
    return _read_file(Path(source))


def _wikitext2(purpose: Purpose) -> Text:
    split: Literal["train", "test"] = "test" if purpose == "evaluation" else "train"
    return Text(f"WikiText-2 {split}", load_wikitext2(split))


def topics(purpose: Purpose) -> Text:
    """The calibration or the held-out part of Python's reference text.

    Every fourth topic, in alphabetical order, is held out. Topics repeat sections of one another, so every paragraph of
    the other topics that also stands in a held-out topic is left out of the calibration part.

    >>> calibration, held_out = topics("calibration"), topics("evaluation")
    >>> set(calibration.content.split("\\n\\n")) & set(held_out.content.split("\\n\\n"))
    set()
    """
    from pydoc_data.topics import topics as pages

    ordered = [pages[name] for name in sorted(pages)]
    held_out = [page for index, page in enumerate(ordered) if index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1]
    held_out_paragraphs = [paragraph for page in held_out for paragraph in _paragraphs(page)]
    if purpose == "evaluation":
        return Text("topics (held-out part)", "\n\n".join(held_out_paragraphs))
    forbidden = set(held_out_paragraphs)
    kept = [paragraph for page in ordered for paragraph in _paragraphs(page) if paragraph not in forbidden]
    return Text("topics (calibration part)", "\n\n".join(kept))


def _paragraphs(page: str) -> list[str]:
    return [paragraph.strip("\n") for paragraph in page.split("\n\n") if paragraph.strip()]


def _read_file(path: Path) -> Text:
    if path.suffix not in (".txt", ".jsonl"):
        names = ", ".join(TEXT_SOURCES)
        raise UserError(f"text {str(path)!r} is neither one of {names} nor a path that ends in .txt or .jsonl")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}") from error
    if path.suffix == ".jsonl":
        content = "\n\n".join(_json_texts(path, content))
    if not content.strip():
        raise UserError(f"the text {path} is empty")
    return Text(path.name, content)


def _json_texts(path: Path, content: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path}, line {number}: every line must be a JSON object with a "text"') from error
        texts.append(str(text))
    return texts
