"""A pass over blocks that sees the Hessian of what meets each weight: what GPTQ and the search for clipping ratios share.

The linears of a block are worked on in the order of its data flow: q, k and v, then o, gate and up, then down. All calibration
windows go through a block at once; where they reach a linear, the Hessian of its input is summed, each token by its weight, and its
weight or range changed before the pass goes on. So one pass of each block is enough, and one Hessian is in memory at a time.

Memory: hidden states of all windows, and while a block runs its activations for all windows (about five times
tokens x intermediate_size), and the Hessian, columns^2 in float64.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.streaming import PartState
from fptquant.quantizers.gptq import Hessian
from fptquant.quantizers.quantizer import Quantizer
from fptquant.rounding.round_blocks import BlockMethod, Linears, Tick
from fptquant.rounding.token_weights import TokenWeights
from fptquant.stages.distributed import broadcast_, own, reduced, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HessianPass(BlockMethod):
    """All windows go through a block at once, and its linears are worked on where they are reached.

    Several processes share the windows, and all get the weights and ranges of the main one.

    Args:
        token_weights: how much each token of the windows counts for each linear; all the same by default.

    Raises:
        UserError: if the weights of tokens are not those of these windows and linears.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, token_weights: TokenWeights | None = None) -> None:
        super().__init__(model, windows)
        if token_weights is not None:
            _check_token_weights(model, windows, token_weights)
        self._token_weights = token_weights
        self._shared = len(windows) >= world_size()
        self._state: PartState | None = None
        self._last: tuple[Tensor, Tensor] | None = None
        self._reports: dict[str, Any] = {}

    @abstractmethod
    def work_(self, linear: QuantizedLinear, quantizer: Quantizer, hessian: Tensor, name: str) -> dict[str, Any]:
        """Changes a weight or its range; returns what is reported of it.

        Without weights of tokens, linears that read the same get the same Hessian.
        """

    def begin(self) -> None:
        tokens = self.windows.to(self.model.device)
        self._tokens = own(tokens) if self._shared else tokens
        self.go_on()

    def round_(self, linears: Linears, tick: Tick) -> dict[str, Any]:
        self._reports, self._last = {}, None
        with hooked(linear.register_forward_pre_hook(self._reached) for linear in linears.values()):
            self.go_on()
        return self._reports

    def go_on(self) -> None:
        self._state = self.decoder.run(self._tokens, self._state)

    def _reached(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of a `QuantizedLinear` with a weight quantizer."""
        assert isinstance(linear, QuantizedLinear)
        quantizer = linear.weight_quantizer
        assert quantizer is not None
        name = quantizer.name.removesuffix(".weight")
        self._reports[name] = self.work_(linear, quantizer, self._hessian(linear, args[0], name), name)
        # Processors differ in the last bits, and then in the rounding.
        broadcast_(part for part in (linear.weight, quantizer.scale, quantizer.zero_point) if part is not None)

    def _hessian(self, linear: QuantizedLinear, x: Tensor, name: str) -> Tensor:
        """Of the inputs as they meet the weight, or that of the last linear if it read the same."""
        weighted = self._token_weights is not None
        changed = weighted or linear.input_quantizer is not None or bool(linear.online) or linear.scaled is not None
        if self._last is not None and self._last[0] is x and not changed:
            return self._last[1]
        self._last = None
        inputs = linear.prepare_input(x)
        inverse = linear.context.inverse_scale(x) if linear.scaled == "output" else None
        inputs = inputs if inverse is None else inputs * inverse
        weights = None
        if self._token_weights is not None:
            weights = self._token_weights[name]
            weights = (own(weights) if self._shared else weights).to(x.device)
        hessian = Hessian(linear.in_features, x.device)
        hessian.add(inputs, weights)
        matrix = hessian.matrix()
        self._last = (x, reduced(matrix, "sum") if self._shared else matrix)
        return self._last[1]


def _check_token_weights(model: PreTrainedModel, windows: Tensor, token_weights: TokenWeights) -> None:
    names = {f"layers.{block.index}.{name}" for block in view_model(model).blocks for name in LINEAR_NAMES}
    if names - token_weights.keys():
        raise UserError(f"no weights of tokens for {min(names - token_weights.keys())}; find them with find_token_weights")
    for name, weights in token_weights.items():
        if weights.shape != windows.shape:
            raise UserError(
                f"the weights of tokens for {name} have the shape {list(weights.shape)}, but the windows {list(windows.shape)}; "
                "find them with find_token_weights for these windows"
            )
