"""Frozen weights over several processes (FSDP2): each keeps its part of every decoder layer, and has a layer whole while it runs.

What is trained is no part of the layers and stays whole in every process, as do embedding, last norm and head. In the backward
pass autograd keeps the merged copy of every weight, so that sharding saves little without ``training.activation_checkpointing``;
with it, a process holds 1/n of the layers and about two of them whole (the one at work, and the next on its way).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import _composable_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fptquant.models.architectures import view_model
from fptquant.stages.distributed import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def sharded_weights(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """The decoder layers of a model are spread over the processes while the block runs, and whole again when it ends well.

    Every process has to make the same forward passes meanwhile. After an error the model stays as it is: what is missing is with
    processes that may be gone.
    """
    if not enabled or world_size() == 1:
        yield
        return
    decoder, layers = view_model(model).decoder, view_model(model).layers
    before = {module: _Before(module) for module in decoder.modules()}
    mesh = init_device_mesh(model.device.type, (world_size(),))
    replicated = {*model.parameters()} - {*layers.parameters()}
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # The decoder has no part of its own: as the common root it lets the next layer come while one is at work.
    fully_shard(decoder, mesh=mesh, ignored_params=replicated)
    yield
    _unshard(decoder)
    for module, state in before.items():
        state.restore_(module)


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters of a module that this process keeps between two passes."""
    kept = (parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in module.parameters())
    return sum(part.numel() * part.element_size() for part in kept)


@torch.no_grad()
def _unshard(module: nn.Module) -> None:
    """Replaces every sharded parameter by the whole one."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, DTensor):
                part._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=False)


class _Before:
    """What a module was before FSDP2 put its class, hooks and attributes on it, for which it has no way back of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.kind = type(module)
        self.attributes = set(vars(module))
        self.hooks = {name: set(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}

    def restore_(self, module: nn.Module) -> None:
        """Takes them away; the model library, and a second sharding, would know the module by them."""
        module.__class__ = self.kind
        current: dict[str, Any] = vars(module)
        for name in set(current) - self.attributes:
            del current[name]
        for name, kept in self.hooks.items():
            for key in set(current[name]) - kept:
                del current[name][key]
        _composable_state._module_state_mapping.pop(module, None)
