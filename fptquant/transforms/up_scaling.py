"""T_u: a scale per channel of the up projection, undone in the down projection."""

from __future__ import annotations

from typing import ClassVar

from fptquant.transforms.channel_scaling import ChannelScaling


class UpScaling(ChannelScaling):
    """Scales the channels of the up projection's output.

    The gated product silu(gate) * up is linear in up, so the scale passes through it to the down projection.

    Shape: log_scale [I]; activations [..., I]; up_proj weight [I, in] or bias [I] (side ``up``), down_proj weight
    [out, I] (side ``down``; its bias is not touched).

    Source: FPTQuant (arXiv 2506.04985), pseudodynamic up/down scaling.
    """

    symbol: ClassVar[str] = "T_u"
    name: ClassVar[str] = "up_scaling"
    sides: ClassVar[tuple[str, ...]] = ("up", "down")
