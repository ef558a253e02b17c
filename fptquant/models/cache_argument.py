"""How the model library names the argument that holds a cache of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names under which the model library's modules take a cache: since its version 5.24, and before."""


def cache_argument(kind: type[Any]) -> str:
    """The name under which models, decoders or attentions of a class take a cache."""
    return _argument_of(kind.forward)


@cache
def _argument_of(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in parameters)


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the arguments of a pass, under either name; None if there is none."""
    return next((arguments[name] for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
