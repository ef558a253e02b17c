"""NaN and infinity while training: the run ends in every process at once, with the step, what is wrong, and where it began."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fptquant.errors import UserError
from fptquant.stages.distributed import gathered, largest, total
from fptquant.training.trainable import Trainable


def stop_if(
    what: str | None, when: str, key: str, student: Trainable, parameters: Mapping[str, Tensor], windows: Sequence[Tensor]
) -> None:
    """Ends the run if something is wrong in one of the processes, each of which calls this.

    Args:
        what: what is wrong in this process, or None.
        when: the step, in words.
        key: where the settings of this training stand in a config.
        windows: what this process was working on, [windows, window] each.

    Raises:
        UserError: the same in every process, with the tensor from which it came in the first that has something wrong.
    """
    device = next(iter(parameters.values())).device
    if total(float(what is not None), device) == 0:
        return
    source = _source(student, [row[None] for piece in windows for row in piece], int(largest(sum(map(len, windows)), device)))
    where = "every tensor of the forward pass is finite" if source is None else f"the first tensor that is not: {source}"
    bad = next((name for name, value in parameters.items() if not bool(value.detach().isfinite().all())), None)
    parameter = "" if bad is None else f"; the parameter {bad} is not finite"
    message = (
        f"training stopped at {when}: {what}; {where}{parameter}. "
        f"Lower {key}.lr, clip more ({key}.clip_norm) or compute wider ({key}.autocast=none, dtype=float32)"
    )
    raise UserError(next(found for wrong, found in gathered((what is not None, message)) if wrong))


def _source(student: Trainable, windows: Sequence[Tensor], passes: int) -> str | None:
    """The first tensor that is not finite; as many passes in every process, which may have to gather weights together."""
    found = [student.nonfinite_source(windows[min(index, len(windows) - 1)]) for index in range(passes)]
    return next((name for name in found if name is not None), None)
