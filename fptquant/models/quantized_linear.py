"""A linear layer with quantizers, an optional online transform and the per-token scale of S_n."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fptquant.models.context import ForwardContext
from fptquant.models.linear_input import transform_and_quantize
from fptquant.models.merging import Merging
from fptquant.models.rescaling import Rescaling
from fptquant.quantizers.quantizer import Quantizer
from fptquant.transforms.base import Transform


class QuantizedLinear(nn.Linear):
    """Takes over weight and bias of a linear layer: y = Q_out(Q_weight(W) Q_in(T x) + b), where b has in it what Q_weight adds.

    While transforms are trained (``merging``) W and b are those before merging, and are merged anew in every pass; while ranges of
    rounded weights are trained (``rescaling``), W has scales of its own in every pass.

    With S_n (``scaled``) the whole row of a token is divided by its running scale sigma, so that the branch can be
    added to the normalized residual. On the ``input``: W Q_in(T x / sigma) + b / sigma, and the quantizer sees massive
    tokens at the range of the others. On the ``output``: (W Q_in(T x) + b) / sigma, before Q_out. Both are the same
    function.

    Shape: x [B, T, in_features]; sigma [B, T, 1] from the context; returns [B, T, out_features].
    """

    input_quantizer: Quantizer | None
    weight_quantizer: Quantizer | None
    output_quantizer: Quantizer | None

    def __init__(self, linear: nn.Linear, context: ForwardContext) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.train(linear.training)
        self.context = context
        self.scaled: Literal["input", "output"] | None = None
        self.online: tuple[Transform, ...] = ()
        """What transforms the input at run time (T_d, T_o, P, D), one after the other; the weight holds the inverse. In a
        tuple: their parameters are not the model's."""
        self.input_quantizer = None
        self.weight_quantizer = None
        self.output_quantizer = None
        self.merging: Merging | None = None
        """Transforms that the weight does not hold yet; None once they are merged."""
        self.rescaling: Rescaling | None = None
        """What is trained of a rounded weight; None when training is over."""

    @property
    def _untransformed(self) -> bool:
        """Whether this pass leaves out the transforms that are not merged yet."""
        return self.merging is not None and self.context.full_precision

    def merged_weight(self) -> Tensor:
        """The weight before quantization [out_features, in_features], with every transform."""
        return self.weight if self.merging is None else self.merging.weight(self.weight, None)

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it [out_features, in_features]."""
        if self._untransformed:
            return self.weight
        if self.rescaling is not None:
            return self.rescaling.unrounded if self.context.full_precision else self.rescaling.weight(self.weight)
        if self.merging is not None:
            return self.merging.weight(self.weight, self.weight_quantizer)
        return self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = self.bias
        if self.merging is not None and bias is not None and not self._untransformed:
            bias = self.merging.bias(bias)
        quantizer = self.weight_quantizer
        if quantizer is None or quantizer.bias is None or quantizer.mode != "on" or self.context.full_precision:
            return bias
        added = quantizer.bias.to(self.weight.dtype)
        return added if bias is None else bias + added

    def prepare_input(self, x: Tensor) -> Tensor:
        """The input as it meets the weight: scaled, transformed and quantized."""
        inverse = self.context.inverse_scale(x) if self.scaled == "input" else None
        if inverse is not None:
            x = (x * inverse).to(x.dtype)
        online = () if self._untransformed else self.online
        return transform_and_quantize(x, online, self.input_quantizer, self.context)

    def forward(self, x: Tensor) -> Tensor:
        y = self._linear(self.prepare_input(x))
        if self.output_quantizer is not None:
            y = self.output_quantizer(y, self.context.kept_tokens(y, self.output_quantizer.full_precision_tokens))
        return y

    def _linear(self, x: Tensor) -> Tensor:
        bias = self._bias()
        inverse = self.context.inverse_scale(x) if self.scaled is not None else None
        if inverse is None or (self.scaled == "input" and bias is None):
            return self._product(x, bias)
        if self.scaled == "input":
            assert bias is not None
            y = self._product(x, None)
            return (y + bias * inverse).to(y.dtype)
        y = self._product(x, bias)
        return (y * inverse).to(y.dtype)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rescaling = None if self.context.full_precision else self.rescaling
        factor = None if rescaling is None else rescaling.output_factor()
        if factor is None:
            return F.linear(x, self.quantized_weight(), bias)
        y = F.linear(x, self.weight)
        y = (y * factor).to(y.dtype)  # in the factor's precision
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        return extra if self.scaled is None else f"{extra}, scaled={self.scaled}"
