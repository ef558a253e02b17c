"""Where two mappings differ, key by key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

ABSENT = "absent"
"""Stands for a key that only one of two mappings has."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], *, ignored: Collection[str] = ()) -> list[str]:
    """``key: saved value, now current value`` for every key, written with dots, whose values differ.

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}, ignored={"d"})
    ['a.c: 2, now 3']
    """
    old, new = dict(flat(saved)), dict(flat(current))
    keys = [*old, *(key for key in new if key not in old)]
    return [
        f"{key}: {old.get(key, ABSENT)}, now {new.get(key, ABSENT)}"
        for key in keys
        if key not in ignored and old.get(key, ABSENT) != new.get(key, ABSENT)
    ]


def flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its key, those of mappings within written with dots.

    >>> list(flat({"a": {"b": 1, "c": {}}, "d": (2,)}))
    [('a.b', 1), ('a.c', {}), ('d', [2])]
    """
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", list(value) if isinstance(value, tuple) else value
