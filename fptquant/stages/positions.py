"""Over how many positions windows are spread on which static ranges are set and learned.

RoPE turns keys by their positions, so that ranges and centers of keys hold for those positions at which they were seen. What a
model computes depends on differences of positions alone: windows may stand anywhere, as if a long text were before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fptquant.config.schema import Config
from fptquant.data.windows import check_window
from fptquant.models.prefix import check_movable, is_movable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST = 2048
"""What ``calibration.context: auto`` stands for where the model's context is no shorter: the usual window of evaluations."""


def with_positions(model: PreTrainedModel, config: Config) -> Config:
    """The same config with a number in place of ``calibration.context: auto``; null where windows cannot be spread.

    Raises:
        UserError: if a number was given that is longer than the model's context, or RoPE depends on the length of the text.
    """
    context = config.calibration.context
    if isinstance(context, int):
        check_window(model.config, context, "calibration.context")
        check_movable(model, "to spread windows over positions", "calibration.context")
    if context != "auto":
        return config
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))
    found = longest if is_movable(model) and longest >= config.calibration.window else None
    return config.model_copy(update={"calibration": config.calibration.model_copy(update={"context": found})})
