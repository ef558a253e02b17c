"""Text by name: Python's own reference text, WikiText-2, a data set of the Hugging Face hub, or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fptquant.data.hub import DCLM_EDU, HUB_PREFIX, hub_documents, parquet_documents, parse_hub_set, split_options
from fptquant.data.wikitext import WikiTextUnavailable, load_wikitext2
from fptquant.errors import UserError

Purpose = Literal["calibration", "evaluation"]

TEXT_SOURCES = {
    "topics": "Python's reference text (pydoc_data), on every machine; calibration and evaluation parts do not overlap",
    "wikitext2": "WikiText-2 raw, from FPTQUANT_WIKITEXT2 or the hub; test split to evaluate, train split to calibrate",
    "auto": "wikitext2 where it can be had, otherwise topics; to train on: dclm-edu where the hub answers, otherwise topics",
    "dclm-edu": "HuggingFaceTB/dclm-edu from the hub, web pages of educational value; read only as far as needed",
    "hub:NAME,config=...,split=...,column=...": "any data set of the hub or a folder laid out like one; split train, column text",
    "model": "text that the full-precision model itself writes, kept in the cache folder; only to train on",
}
"""Names of text that need no file, each with what it is."""

LONGEST_TEXT = 4_000_000
"""Characters after which `load_text` reads no further document: about a million tokens."""

_BOS = re.compile(r",add_bos_token=([^,]*)")
_OPTIONS = re.compile(r"\.(jsonl|parquet),")
_HELD_OUT_EVERY = 4
"""One topic in so many is held out for evaluation."""


@dataclass(frozen=True)
class Text:
    """A text and the name under which results on it are reported."""

    name: str
    content: str
    add_bos_token: bool = True
    """Whether the tokenizer may put its BOS before the whole text, once, as the programs of GPTQ and QuaRot let it: published
    perplexities of Llama are measured so. Tokenizers that put none (SmolLM2's, Qwen's) give the same tokens either way."""


@dataclass(frozen=True)
class Documents:
    """Documents that are read one after the other, and the name under which results on them are reported."""

    name: str
    texts: Iterator[str]


def load_text(source: str, purpose: Purpose) -> Text:
    """The text that ``source`` names: one of ``TEXT_SOURCES``, or a path to a ``.txt``, ``.jsonl`` or ``.parquet`` file.

    A ``.jsonl`` file holds one object with a ``text`` per line, a ``.parquet`` file a column ``text``; ``FILE,column=NAME``
    takes another one. Their documents, and those of the hub, are joined by blank lines until there are ``LONGEST_TEXT``
    characters. With ``,add_bos_token=false`` behind any source the tokenizer puts no BOS before the text (`Text`).

    Raises:
        UserError: if the source is unknown, cannot be reached or cannot be read.
    """
    plain, add_bos_token = split_bos(source)
    text = _load_plain(plain, purpose)
    return text if add_bos_token else replace(text, name=f"{text.name} without BOS", add_bos_token=False)


def split_bos(source: str) -> tuple[str, bool]:
    """A source without its option ``add_bos_token``, and the value of that, true by default.

    >>> split_bos("lines.jsonl,column=body,add_bos_token=false")
    ('lines.jsonl,column=body', False)

    Raises:
        UserError: if the value is neither true nor false.
    """
    found: list[str] = _BOS.findall(source)
    if set(found) - {"true", "false"}:
        raise UserError(f"text {source!r}: add_bos_token is true or false")
    return _BOS.sub("", source), "false" not in found


def _load_plain(source: str, purpose: Purpose) -> Text:
    if source == "topics":
        return topics(purpose)
    if source == "wikitext2":
        return _wikitext2(purpose)
    if source == "auto":
        try:
            return _wikitext2(purpose)
        except WikiTextUnavailable:
            return topics(purpose)
    if source == "model":
        raise UserError("text sampled from the model is there to train on (training.text=model); choose another text here")
    documents = open_documents(source)
    return _read_file(Path(source).expanduser()) if documents is None else _read_documents(documents)


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


def open_documents(source: str) -> Documents | None:
    """The documents that ``source`` holds: a data set of the hub, a ``.jsonl`` or a ``.parquet`` file; None if it is one text.

    Nothing is read before the first document is asked for, and no more is kept than the one at hand.

    Raises:
        UserError: if an option of the source is unknown; while reading, if it cannot be read.
    """
    if source == "dclm-edu":
        return Documents(DCLM_EDU.label, hub_documents(DCLM_EDU))
    if source.startswith(HUB_PREFIX):
        wanted = parse_hub_set(source)
        return Documents(wanted.label, hub_documents(wanted))
    name, options = split_options(source, ("column",)) if _OPTIONS.search(source) else (source, {})
    path, column = Path(name).expanduser(), options.get("column", "text")
    if path.suffix == ".parquet":
        return Documents(path.name, parquet_documents(path, column))
    if path.suffix == ".jsonl":
        return Documents(path.name, _json_documents(path, column))
    return None


def _read_documents(documents: Documents) -> Text:
    """Documents joined by blank lines, up to ``LONGEST_TEXT`` characters."""
    kept, length = [], 0
    for document in documents.texts:
        if document.strip():
            kept.append(document)
            length += len(document) + 2
        if length >= LONGEST_TEXT:
            break
    if not kept:
        raise UserError(f"the text {documents.name} is empty")
    return Text(documents.name, "\n\n".join(kept))


def _read_file(path: Path) -> Text:
    if path.suffix != ".txt":
        names = ", ".join(TEXT_SOURCES)
        raise UserError(f"text {str(path)!r} is neither one of {names} nor a path that ends in .txt, .jsonl or .parquet")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}") from error
    if not content.strip():
        raise UserError(f"the text {path} is empty")
    return Text(path.name, content)


def _json_documents(path: Path, column: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_text(line, column, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the text {path}: {error}") from error


def _json_text(line: str, column: str, where: str) -> str:
    try:
        return str(json.loads(line)[column])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{where}: every line must be a JSON object with a "{column}"; FILE.jsonl,column=NAME takes another key'
        ) from error
