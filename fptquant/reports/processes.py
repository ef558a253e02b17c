"""The processes of one run, as torchrun starts them: how they find each other, share the machine, and end.

Of several processes only the main one writes files and prints. An error ends them all; the first to fail says so, and the others,
which lose their connection to it, keep quiet. A process that dies cannot speak: then the first to notice does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from fptquant.errors import ProcessLost, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

FROZEN = timedelta(minutes=30)
"""After so long without an answer a process counts as dead. (One that has died is noticed at once.)"""

_GRACE = 20.0
"""Seconds that a process has to end by itself once it is told to; torchrun kills it after 30."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_stores: list[Store] = []
"""Where the processes agree on who speaks; empty until they have found each other."""


@dataclass(frozen=True)
class Launch:
    """What torchrun says of this process in its environment."""

    rank: int
    world_size: int
    local_rank: int
    """Its number on this machine."""
    local_world_size: int

    @property
    def threads(self) -> int:
        """OMP_NUM_THREADS, or an even share of the processors.

        torchrun itself sets the variable to 1 if nobody else has: 1 means not set.
        """
        given = os.environ.get("OMP_NUM_THREADS", "")
        if given.isdecimal() and int(given) > 1:
            return int(given)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.local_world_size)


def launched() -> Launch | None:
    """How this process was started, if it is one of several."""
    if any(name not in os.environ for name in _VARIABLES):
        return None
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    launch = Launch(rank, world_size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    return launch if launch.world_size > 1 else None


def check_one_process(what: str) -> None:
    """Refuses torchrun where it has nothing to share.

    Raises:
        UserError: if it has started this process.
    """
    if launched() is not None:
        raise UserError(f"{what} works in one process; start it without torchrun")


def speaks() -> bool:
    """Whether this process is the one that tells the user about the error that ends it: the first to ask."""
    launch = launched()
    if launch is None:
        return True
    if not _stores:  # what fails so early fails everywhere
        return launch.rank == 0
    try:
        return _stores[0].add("speakers", 1) == 1
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def leaves_lost_run() -> bool:
    """Whether this process is on its way out because another one is lost, and will say so: then there is no need to stop it."""
    error = sys.exc_info()[1] if launched() is not None else None
    while error is not None:
        if isinstance(error, ProcessLost) or (isinstance(error, Exception) and _is_loss(error)):
            return True
        error = error.__context__
    return False


def resolve_device(name: str) -> torch.device:
    """The device that ``auto`` or a name means; of several processes each has a GPU of its own.

    Raises:
        UserError: if CUDA is asked for and not there, or there are more processes than GPUs.
    """
    import torch

    launch = launched()
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device = {name}: PyTorch finds no CUDA device here; choose device=cpu or device=auto")
    if launch is None:
        return torch.device("cuda" if name == "auto" else name)
    if ":" in name:
        raise UserError(f"device = {name}, but {launch.world_size} processes need a GPU each; choose device=cuda")
    if launch.local_world_size > torch.cuda.device_count():
        raise UserError(
            f"{launch.local_world_size} processes need a GPU each, and PyTorch finds {torch.cuda.device_count()}; "
            "start fewer (torchrun --nproc-per-node) or choose device=cpu"
        )
    return torch.device("cuda", launch.local_rank)


@contextmanager
def processes(device: str, threads: int | None = None) -> Iterator[None]:
    """The processes of this run work together while the block runs; with a single one, only its threads are set.

    Args:
        device: as in configs.
        threads: processor threads of this process; by default as `Launch.threads`, or PyTorch's choice for a single process.

    Raises:
        ProcessLost: if one of the others dies or fails; what the error says about going on is kept.
    """
    import torch

    launch = launched()
    if threads is not None or launch is not None:
        torch.set_num_threads(threads or (launch.threads if launch else 1))
    if launch is None:
        yield
        return
    _join(resolve_device(device))
    try:
        with _ending_in_time(), warnings.catch_warnings():
            if launch.rank:
                _keep_quiet()
            yield
        torch.distributed.barrier()
    except SystemExit as end:
        end.add_note("this process was told to stop: another one has died or failed, or the whole run was stopped")
        raise
    except Exception as error:
        if not _is_loss(error):
            raise
        lost = ProcessLost(
            f"one of the {launch.world_size} processes has died or failed; the cause stands above, or in the system's log "
            "if it was killed (for want of memory, for example)"
        )
        lost.__notes__ = getattr(error, "__notes__", [])
        raise lost from error
    # Not after an error: where a process is missing, taking leave of it may last.
    _stores.clear()
    torch.distributed.destroy_process_group()


def _join(device: torch.device) -> None:
    """Finds the other processes."""
    import torch
    from torch.distributed.distributed_c10d import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Python sees no signal while it waits for processes that may never come; without a handler it ends at once.
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, signal.SIG_DFL) if in_main_thread else None
    try:
        store, rank, world_size = next(rendezvous("env://"))
        init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=world_size, timeout=FROZEN)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
    _stores[:] = [PrefixStore("fptquant", store)]


@contextmanager
def _ending_in_time() -> Iterator[None]:
    """Ends a process that is told to stop and cannot, because it waits for one that is gone: with NCCL it would wait for ever.

    Python runs no signal handler while the main thread waits inside a library, but the bytes of a wakeup descriptor come at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), daemon=True).start()
    previous = signal.set_wakeup_fd(writing)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)


def _watch(reading: int) -> None:
    while os.read(reading, 1)[0] != signal.SIGTERM:
        pass
    time.sleep(_GRACE)
    if speaks():
        sys.stderr.write(
            "error: told to stop, this process did not come to an end: another one has died, or a step lasts too long. A run that "
            "trains is kept until its last checkpoint: the same command with --resume goes on\n"
        )
        sys.stderr.flush()
    os._exit(128 + signal.SIGTERM)


def _keep_quiet() -> None:
    """Warnings and bars of libraries come from the main process alone."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    disable_progress_bars()


def _is_loss(error: Exception) -> bool:
    """Whether an error says that another process does not answer. Gloo has no class for it, only a source file in the text."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))
