"""Training over several processes: gradients are averaged (DDP), frozen weights are spread over the processes (FSDP2) if wanted.

DDP sees the student's own parameters, which are all that is trained. The model is none of its modules, so that FSDP2 has the
decoder layers to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fptquant.stages.distributed import broadcast_, world_size
from fptquant.training.student import Student


@contextmanager
def over_processes(student: Student) -> Iterator[Callable[[Tensor], Tensor]]:
    """What computes the loss: the student itself or, with several processes, the student with averaged gradients.

    All processes start with what the main one has. When the block ends well, every process has the
    whole model again.
    """
    if world_size() == 1:
        yield student
        return
    # Here, because a single process does without them, and they take a second.
    from torch.nn.parallel import DistributedDataParallel

    from fptquant.training.shard_weights import sharded_weights

    model, shard = student.model, student.shard_weights
    broadcast_(student.shared_tensors())
    on_gpu = model.device.type == "cuda"
    with sharded_weights(model, on_gpu if shard is None else shard):
        # Every parameter takes part in every loss: none has to be searched for.
        yield DistributedDataParallel(student, device_ids=[model.device] if on_gpu else None)
