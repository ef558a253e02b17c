"""WikiText-2 raw, from a path or from the Hugging Face hub."""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path
from typing import Literal

from fptquant.data.hub import offline_if_unreachable, quiet_dataset_bars
from fptquant.errors import UserError

WIKITEXT2_VARIABLE = "FPTQUANT_WIKITEXT2"
"""Environment variable: the text of the test split, or a folder that holds it or the data set itself."""

_REPOSITORY = "Salesforce/wikitext"
_CONFIGURATION = "wikitext-2-raw-v1"

Split = Literal["train", "test"]


class WikiTextUnavailable(UserError):
    """Neither a path nor the hub gives WikiText-2."""


def load_wikitext2(split: Split = "test") -> str:
    """A split of WikiText-2 raw, its rows joined by two newlines, as papers evaluate it.

    The rows are those of the hub: a line of the original files with its line break, or nothing for a blank one.

    ``FPTQUANT_WIKITEXT2`` is tried first: a text file, or a folder with ``raw-test.txt``, ``wiki.test.raw`` or the data
    set as the hub keeps it; a file may be an original one or hold the joined rows (`joined_rows`). Without it the hub is asked; a
    machine without network is told so within seconds.

    Raises:
        WikiTextUnavailable: says what was tried and what to do.
        UserError: if the variable is set to something that is not there or cannot be read.
    """
    given = os.environ.get(WIKITEXT2_VARIABLE)
    return _from_path(Path(given), split) if given else _from_hub(split)


def _from_path(path: Path, split: Split) -> str:
    files = [path / f"raw-{split}.txt", path / f"wiki.{split}.raw"] if path.is_dir() else [path]
    if path.is_file() and split != "test":
        raise UserError(
            f"{WIKITEXT2_VARIABLE}={path} is one file, taken as the test split: calibrating on the evaluation's text "
            f"would flatter the result; give a folder with raw-{split}.txt, or calibrate on another text"
        )
    try:
        for file in files:
            if file.is_file():
                return joined_rows(file.read_text(encoding="utf-8"))
        if (path / _CONFIGURATION).is_dir():
            return _load(str(path), split)
    except (OSError, ValueError) as error:
        raise UserError(f"{WIKITEXT2_VARIABLE}={path} cannot be read: {error}") from error
    raise UserError(
        f"{WIKITEXT2_VARIABLE}={path}: there is no such text; give a text file, or a folder that holds "
        f"raw-{split}.txt, wiki.{split}.raw or {_CONFIGURATION}/{split}-*.parquet"
    )


def joined_rows(content: str) -> str:
    r"""The text of a file with its rows joined by two newlines; one that holds them joined already stays as it is.

    An original file is known by two lines with words one after the other, as its paragraphs are, or by a blank line that holds
    a space. Joined rows have neither: two newlines stand between any two of them, and a blank row is empty.

    >>> joined_rows(" \n = Title = \n \n One. \n Two. \n")
    '\n\n = Title = \n\n\n\n\n One. \n\n\n Two. \n'
    >>> joined_rows('\n\n = Title = \n\n\n\n\n One. \n\n\n Two. \n')
    '\n\n = Title = \n\n\n\n\n One. \n\n\n Two. \n'
    """
    lines = list(io.StringIO(content))  # at line feeds alone, as the hub's rows
    with_words = [bool(line.strip()) for line in lines]
    padded = any(line.strip("\n") and not words for line, words in zip(lines, with_words, strict=True))
    if not padded and not any(first and second for first, second in pairwise(with_words)):
        return content
    return "\n\n".join(line if words else "" for line, words in zip(lines, with_words, strict=True))


def _from_hub(split: Split) -> str:
    with offline_if_unreachable():
        try:
            return _load(_REPOSITORY, split)
        except (OSError, ValueError) as error:
            raise WikiTextUnavailable(
                f"WikiText-2 could not be loaded from the Hugging Face hub ({type(error).__name__}); "
                f"set {WIKITEXT2_VARIABLE} to its text, or choose another text (topics needs no download)"
            ) from error


def _load(repository: str, split: Split) -> str:
    import datasets

    try:
        with quiet_dataset_bars():
            rows = datasets.load_dataset(repository, _CONFIGURATION, split=split)
        return "\n\n".join(rows["text"])
    except datasets.exceptions.DatasetsError as error:  # some of these are neither OSError nor ValueError
        raise OSError(str(error)) from error
