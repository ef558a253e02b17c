"""Loads the C core, registers its operators with PyTorch, and says what was built.

The core is a plain shared library without Python's C API, loaded through ctypes; tensors never pass through ctypes, PyTorch's
dispatcher calls the C functions itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from fptquant.errors import CoreUnavailable

LIBRARY_PATH = Path(__file__).with_name("_C.abi3.so")


@functools.cache
def library() -> ctypes.CDLL:
    """The C core, with the instruction set chosen (``FPTQUANT_ISA`` or the best that this processor runs).

    Raises:
        CoreUnavailable: if the core was not built, or ``FPTQUANT_ISA`` names a set that is not built or not supported.
    """
    if not LIBRARY_PATH.exists():
        raise CoreUnavailable(f"fptquant's C core is not built ({LIBRARY_PATH} is missing): run `pip install .` in the repository")
    core = ctypes.CDLL(str(LIBRARY_PATH))
    for name in ("fptq_last_error", "fptq_isa", "fptq_isa_reason", "fptq_isas_built", "fptq_compiler", "fptq_register_torch"):
        getattr(core, name).restype = ctypes.c_char_p
    core.fptq_select_isa.argtypes = [ctypes.c_char_p]
    requested = os.environ.get("FPTQUANT_ISA", "")
    if core.fptq_select_isa(requested.encode() or None):
        raise CoreUnavailable(f"FPTQUANT_ISA={requested}: {core.fptq_last_error().decode()}")
    return core


def select_isa(name: str | None) -> None:
    """Switches every kernel to another instruction set, or back to the best one; tests run each of them in one process.

    Raises:
        ValueError: if the set is not built, or this processor lacks it.
    """
    if library().fptq_select_isa(None if name is None else name.encode()):
        raise ValueError(library().fptq_last_error().decode())


@functools.cache
def register_torch() -> None:
    """Registers the compiled CPU kernels with PyTorch's dispatcher.

    Raises:
        CoreUnavailable: if this PyTorch lacks a function that the core needs; the message names it.
    """
    import torch  # noqa: F401  its shared libraries must be loaded first

    message = library().fptq_register_torch()
    if message:
        raise CoreUnavailable(f"fptquant could not register its operators: {message.decode()}")


def build_info() -> dict[str, str]:
    """What was built and chosen: compiler, instruction sets built, the chosen one and why.

    >>> sorted(build_info())
    ['compiler', 'isa', 'isa_reason', 'isas_built', 'library']
    """
    core = library()
    reason = core.fptq_isa_reason().decode()
    if os.environ.get("FPTQUANT_ISA"):
        reason = f"FPTQUANT_ISA={os.environ['FPTQUANT_ISA']}"
    return {
        "compiler": core.fptq_compiler().decode(),
        "isas_built": core.fptq_isas_built().decode(),
        "isa": core.fptq_isa().decode(),
        "isa_reason": reason,
        "library": LIBRARY_PATH.name,
    }
