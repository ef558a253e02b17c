"""Labels of settings, such as ``w4a8kv8-static``: bits of weights, activations and cache, and how ranges are set."""

from __future__ import annotations

import re
from typing import Any, Final

from fptquant.errors import UserError

_LABEL = re.compile(r"w(?P<w>\d+)a(?P<a>\d+)(?:kv(?P<kv>\d+))?(?:-(?P<ranges>static|dynamic))?(?:-g(?P<group>\d+))?")

AUTO_PREFIX: Final = "auto"
"""The prefix is searched for."""

EXAMPLE_LABELS: dict[str, str] = {
    "w16a16": "full precision",
    "w4a16": "4-bit weights alone",
    "w4a16-g64": "4-bit weights with one scale per group of 64",
    "w4a8kv8-static": "4-bit weights; 8-bit activations and cache, ranges fixed by calibration",
    "w4a4kv4-static": "4 bits everywhere, ranges fixed by calibration",
    "w4a4kv4-dynamic": "4 bits everywhere, ranges computed for every token",
}
"""Settings that tables of results use, each with what it means."""


def expand_label(label: str) -> dict[str, dict[str, Any]]:
    """The quantization mapping that a label stands for.

    The form is ``wN aN [kvN] [-static|-dynamic] [-gGROUP]`` without spaces; the cache stays in full precision where it
    is not named, and ranges are static unless the label says dynamic. 16 bits mean full precision.

    Raises:
        UserError: if the label does not have that form; bits are checked by the schema.

    >>> expand_label("w4a8kv8-dynamic")["kv_cache"]
    {'bits': 8, 'dynamic': True}
    >>> expand_label("w4a16-g64")["weight"]
    {'bits': 4, 'granularity': 'per_group', 'group_size': 64}
    """
    match = _LABEL.fullmatch(label)
    if match is None:
        raise UserError(
            f"{label!r} is not a setting; write wN aN [kvN] [-static|-dynamic] [-gGROUP] without spaces, "
            f"for example {', '.join(EXAMPLE_LABELS)}"
        )
    dynamic = match["ranges"] == "dynamic"
    weight: dict[str, Any] = {"bits": int(match["w"])}
    if match["group"] is not None:
        weight |= {"granularity": "per_group", "group_size": int(match["group"])}
    return {
        "weight": weight,
        "activation": {"bits": int(match["a"]), "dynamic": dynamic},
        "kv_cache": {"bits": int(match["kv"] or 16), "dynamic": dynamic},
    }


def setting_label(
    weight: int,
    activation: int,
    cache: int,
    *,
    activation_dynamic: bool = False,
    cache_dynamic: bool = False,
    group_size: int | None = None,
) -> str:
    """The shortest label of a setting.

    Where activations and cache differ in how their ranges are set, which no label can say, the name ends in ``-mixed``.

    >>> setting_label(4, 8, 8)
    'w4a8kv8-static'
    >>> setting_label(4, 16, 16, group_size=64)
    'w4a16-g64'
    """
    label = f"w{weight}a{activation}" + (f"kv{cache}" if cache < 16 else "")
    modes = {dynamic for bits, dynamic in ((activation, activation_dynamic), (cache, cache_dynamic)) if bits < 16}
    if modes:
        label += "-mixed" if len(modes) == 2 else "-dynamic" if True in modes else "-static"
    return label if group_size is None else f"{label}-g{group_size}"


def canonical_label(label: str) -> str:
    """The shortest label that stands for the same setting.

    >>> canonical_label("w4a16kv16-static")
    'w4a16'
    """
    parts = expand_label(label)
    return setting_label(
        parts["weight"]["bits"],
        parts["activation"]["bits"],
        parts["kv_cache"]["bits"],
        activation_dynamic=parts["activation"]["dynamic"],
        cache_dynamic=parts["kv_cache"]["dynamic"],
        group_size=parts["weight"].get("group_size"),
    )
