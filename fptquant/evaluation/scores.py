"""What a model scored on each window of a text, kept in a file from which an evaluation that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fptquant.files import KeptFile


@dataclass(frozen=True)
class Score:
    """Sums over the predictions of windows; divergence and agreement are 0 without a reference."""

    nll: float = 0.0
    jsd: float = 0.0
    agreed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time that this took."""
    kl: float = 0.0

    @staticmethod
    def of_all(scores: Sequence[Score]) -> Score:
        """One score for all windows."""
        return Score(*(sum(getattr(score, part.name) for score in scores) for part in fields(Score)))


def read_scores(file: KeptFile, belongs_to: Mapping[str, Any]) -> list[Score]:
    """The scores of the first windows; none if there is no such file, or that of another model or text."""
    try:
        kept = json.loads(file.path.read_text(encoding="utf-8"))
        names = {part.name for part in fields(Score)}
        complete = kept["belongs_to"] == belongs_to and all(score.keys() == names for score in kept["scores"])
        return [Score(**score) for score in kept["scores"]] if complete else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def write_scores(file: KeptFile, belongs_to: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """Replaces the scores that the file holds, when it is time."""
    file.write(lambda: json.dumps({"belongs_to": belongs_to, "scores": [asdict(score) for score in scores]}).encode())
