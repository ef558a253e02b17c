"""T_n: a scale per channel of a norm's output, undone in the linears that read it."""

from __future__ import annotations

from typing import ClassVar

from fptquant.transforms.channel_scaling import ChannelScaling


class NormScaling(ChannelScaling):
    """Scales the channels of an RMSNorm's output, by its gain.

    The gain comes after the division by the root mean square, so the residual and the norm's statistics stay as they are.

    Shape: log_scale [H]; activations [..., H]; gain [H] of the norm (side ``norm``), weight [out, H] of a linear that reads it
    (side ``read``; its bias is not touched).

    Source: Xiao et al., SmoothQuant (arXiv 2211.10438), which migrates outliers from activations to weights in this way.
    """

    symbol: ClassVar[str] = "T_n"
    learning_rate: ClassVar[str | None] = "norm_scaling"
    sides: ClassVar[tuple[str, ...]] = ("norm", "read")


class AttentionInputScaling(NormScaling):
    """T_n of the norm before attention, read by q, k and v."""

    name: ClassVar[str] = "attn_in_scaling"


class MLPInputScaling(NormScaling):
    """T_n of the norm before the MLP, read by gate and up."""

    name: ClassVar[str] = "mlp_in_scaling"
