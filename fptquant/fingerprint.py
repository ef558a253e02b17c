"""What a checkpoint belongs to: what must be the same when a run goes on, and what decides its last bits."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fptquant._core import build_info
from fptquant.float32_products import float32_products

_SAMPLES = 4096
"""Values of each tensor that decide a digest of weights."""


def tensors_digest(*tensors: Tensor) -> str:
    """SHA-256 of shapes, dtypes and every value.

    >>> tensors_digest(torch.arange(4)) == tensors_digest(torch.arange(4)), tensors_digest(torch.arange(4))[:8]
    (True, '7ac13a6e')
    """
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes, dtypes and up to 4,096 values spread over each tensor: another model is another digest."""
    sha = hashlib.sha256()
    for name, tensor in named:
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        sha.update(f"{name} {tensors_digest(flat[::stride][:_SAMPLES])} {tuple(tensor.shape)};".encode())
    return sha.hexdigest()


def model_digest(model: nn.Module) -> str:
    """`weights_digest` of all parameters and buffers: quantizers' ranges, a prefix and the rest that decides what a model says."""
    return weights_digest(chain(model.named_parameters(), model.named_buffers()))


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """What may differ between two parts of one run, at the price of the last bits of its result."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "float32 products": float32_products(),
        "instruction set of the C core": build_info()["isa"],
        "threads": torch.get_num_threads(),
        "processes": processes,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
