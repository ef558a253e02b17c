"""What was built, what this machine offers, and which versions are at work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from fptquant.errors import UserError
from fptquant.processor import cpu_model

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "datasets", "pydantic")


def diagnostics() -> dict[str, Any]:
    """Plain values for `environment.json` and for ``python -m fptquant``."""
    return {
        "fptquant": _version("fptquant"),
        "commit": _COMMIT,
        "core": _core(),
        "cuda": _cuda(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _threads(),
        "float32_products": _float32_products(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FPTQUANT_")},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _core() -> dict[str, Any]:
    """What the C core says of itself, or why it is not there."""
    try:
        from fptquant._core import build_info

        return dict(build_info())
    except (ImportError, OSError) as error:
        return {"error": str(error)}


def _cuda() -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        return {"available": False, "reason": str(error)}
    if torch.version.cuda is None:
        return {"available": False, "reason": "this PyTorch was built without CUDA"}
    if not torch.cuda.is_available():
        return {"available": False, "reason": f"PyTorch has CUDA {torch.version.cuda}, but finds no device it can use"}
    return {"available": True, "version": torch.version.cuda, "device": torch.cuda.get_device_name()}


def _threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _float32_products() -> str:
    """Who multiplies float32 matrices, or why that is not known."""
    try:
        from fptquant.float32_products import float32_products

        return float32_products()
    except (ImportError, UserError) as error:
        return str(error)


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from, with a plus if files differ from it; None if installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


_COMMIT = source_commit()
"""Asked when this is loaded: a run that lasts writes it down when another commit may lie there."""


def print_diagnostics() -> None:
    """Prints `diagnostics` for people."""
    from rich.console import Console
    from rich.table import Table

    info = diagnostics()
    core, cuda = info["core"], info["cuda"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("fptquant", info["fptquant"] + (f" (commit {info['commit'][:12]})" if info["commit"] else ""))
    if "error" in core:
        table.add_row("C core", f"not available: {core['error']}")
    else:
        table.add_row("C core", f"{core.get('library', 'built')}, compiled by {core.get('compiler', 'an unknown compiler')}")
        table.add_row("instruction set", f"{core.get('isa')}: {core.get('isa_reason')} (built: {core.get('isas_built')})")
        if "cuda" in core:
            table.add_row("CUDA kernels", str(core["cuda"]))
    table.add_row("CUDA", f"{cuda['device']}, CUDA {cuda['version']}" if cuda["available"] else f"no: {cuda['reason']}")
    table.add_row("processor", f"{info['cpu']}, {info['cores']} cores, {info['threads']} threads in use")
    table.add_row("float32 products", info["float32_products"])
    table.add_row("Python", f"{info['python']} on {info['platform']}")
    table.add_row("packages", ", ".join(f"{name} {version}" for name, version in info["versions"].items()))
    for name, value in info["variables"].items():
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    console.print("\nfptquant --help shows what can be done.")
