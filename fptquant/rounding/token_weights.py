"""How much the error at each token counts: its part of the Fisher information of a linear's output.

To second order, errors e_t at the outputs of a linear change the next-token distributions by sum_t (g_t . e_t)^2 / 2 on average,
with g_t the gradient of -log p(label) at the output of token t and the label drawn from the model's own distribution: the
divergence of the quantized model from itself in full precision. The rows of a weight are rounded for one Hessian, and so the
weight of a token is |g_t|^2, and the Hessian sum_t |g_t|^2 x_t x_t^T in place of sum_t x_t x_t^T. Tokens that nothing later
depends on count little; massive ones do not drown all others.

The gradients are those of the model as it stands, transforms merged and quantizers off: one pass forward and one back for each
window, block by block, without gradients of weights. Memory: the hidden states of one window before every block, the activations of
one block, and float32 [linears, windows, window].

Source: GuidedQuant (Kim et al., arXiv 2505.07004), which has several groups of rows, and the true next token as the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.evaluation.hidden import logit_chunks, output_head
from fptquant.files import KeptFile, KeptFiles, read_file, to_bytes
from fptquant.fingerprint import model_digest, tensors_digest
from fptquant.models.adapter import LINEAR_NAMES, view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import get_context, quantizers_off
from fptquant.models.streaming import PartialDecoder, PartState
from fptquant.stages.distributed import own, rank, reduced, world_size
from fptquant.stages.progress import Progress, quiet, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenWeights = dict[str, Tensor]
"""By linear, ``layers.3.q_proj``: [windows, window], float32 (float64 for a model of that), 1 on average."""

_DESCRIPTION = "weights of tokens"


@torch.no_grad()
def find_token_weights(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    seed: int,
    kept: KeptFiles | None = None,
    belongs_to: str = "",
    resume: bool = False,
    progress: Progress = quiet,
) -> TokenWeights:
    """The weight of each token for each linear of an instrumented model whose transforms are merged.

    Several processes share the windows if there are enough for all; each gets the weights of those that it reads
    (`fptquant.stages.distributed.own`), and their mean is that of all.

    Shape:
        windows: [windows, window], int64, the calibration text.

    Args:
        seed: of the labels, which are drawn for each window by its number.
        kept: where what was found for finished windows is kept.
        belongs_to: what decides the result besides windows, weights and static ranges.
        resume: go on with the windows that are kept, if they belong to this run.

    Raises:
        UserError: if a gradient is not finite; names the linear and the window.
    """
    shared = len(windows) >= world_size()
    numbers = torch.arange(len(windows))
    numbers = own(numbers) if shared else numbers
    file = None
    if kept is not None:
        belongs_to = f"{belongs_to} {seed} {world_size()} {tensors_digest(windows)} {model_digest(model)}"
        file = kept.file(f"token-weights-{rank()}.safetensors")
    found = _read(file, belongs_to) if file is not None and resume else []
    fisher = _Fisher(model)
    with quantizers_off(model):
        for number in numbers[len(found) :].tolist():
            found.append(fisher.of_window(windows[number].to(model.device), seed, number))
            if file is not None:
                _write(file, belongs_to, found)
            tell(progress, len(found), len(numbers), _DESCRIPTION, "")
    return _normalized(found, shared)


def _normalized(found: Sequence[TokenWeights], shared: bool) -> TokenWeights:
    """1 on average over the windows of all processes; where no token counts, all count the same."""
    weights: TokenWeights = {}
    for name in found[0]:
        own_weights = torch.stack([each[name] for each in found])
        sums = torch.stack([own_weights.double().sum(), own_weights.new_tensor(own_weights.numel(), dtype=torch.float64)])
        total, number = (reduced(sums, "sum") if shared else sums).unbind()
        weights[name] = own_weights * (number / total).to(own_weights.dtype) if total > 0 else torch.ones_like(own_weights)
    return weights


def _write(file: KeptFile, belongs_to: str, found: Sequence[TokenWeights]) -> None:
    """When it is time (`KeptFiles`)."""

    def content() -> bytes:
        return to_bytes(
            {f"{number}/{name}": value.cpu() for number, each in enumerate(found) for name, value in each.items()},
            {"belongs_to": belongs_to, "windows": len(found)},
        )

    file.write(content)


def _read(file: KeptFile, belongs_to: str) -> list[TokenWeights]:
    """What is kept of finished windows; nothing if there is no file of this run."""
    if not file.path.is_file():
        return []
    tensors, rest = read_file(file.path)
    if rest["belongs_to"] != belongs_to:
        return []
    found: list[TokenWeights] = [{} for _ in range(rest["windows"])]
    for key, value in tensors.items():
        number, _, name = key.partition("/")
        found[int(number)][name] = value
    return found


class _Fisher:
    """Gradients of one window after the other, block by block from the last one on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.view = view_model(model)
        self.decoder = PartialDecoder(model, get_context(model))

    def of_window(self, window: Tensor, seed: int, number: int) -> TokenWeights:
        """|g_t|^2 of every linear's output, [window] each, for labels that are drawn by seed and number.

        Raises:
            UserError: if a gradient is not finite; names the linear and the window.
        """
        layers = self.view.num_layers
        state: PartState | None = None
        states: list[PartState] = []  # before each block, and before the final norm
        for part in range(-1, layers):
            with self.decoder.only(part):
                state = self.decoder.run(window[None], state)
            states.append(state)
        generator = torch.Generator(window.device).manual_seed((seed * 2**32 + number) % 2**63)
        gradients = self._of_head(window, states.pop(), generator)
        found: TokenWeights = {}
        for index in reversed(range(layers)):
            # backwards, so that the first gradient that is not finite is where that began
            linears = {f"layers.{index}.{name}": self.view.blocks[index].linear(name) for name in reversed(LINEAR_NAMES)}
            gradients, outputs = self._back(index, window, states.pop(), gradients, list(linears.values()))
            for name, gradient in zip(linears, outputs, strict=True):
                weight = gradient[0].to(torch.promote_types(gradient.dtype, torch.float32)).square().sum(-1)
                if not bool(weight.isfinite().all()):
                    raise UserError(
                        f"the gradient at the output of {name} is not finite in window {number} of the calibration text; set "
                        "rounding.token_weights=equal, or use a wider dtype (dtype=float32)"
                    )
                found[name] = weight
        return found

    def _of_head(self, window: Tensor, state: PartState, generator: torch.Generator) -> list[Tensor | None]:
        """Gradients of the sum over tokens of -log p(label) at what the final norm reads."""
        head = output_head(self.model)
        with self.decoder.only(self.view.num_layers), torch.enable_grad():
            leaves = _leaves(state)
            normalized = self.decoder.run(window[None], leaves).hidden
            gradient = torch.empty_like(normalized)
            hidden = normalized[0].detach().requires_grad_()
            for where, logits in logit_chunks(head, self.model.config.vocab_size, hidden):
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = ops.cross_entropy(logits, labels).sum()
                gradient[0, where] = torch.autograd.grad(loss, hidden)[0][where]
            return _gradients([normalized], [gradient], _inputs(leaves))

    def _back(
        self, part: int, window: Tensor, state: PartState, gradients: list[Tensor | None], watched: Sequence[nn.Module]
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Gradients of a block's inputs, and of the outputs of the watched modules, from those of its outputs."""
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            outputs[module] = output

        with self.decoder.only(part), torch.enable_grad(), hooked(module.register_forward_hook(keep) for module in watched):
            leaves = _leaves(state)
            after = _inputs(self.decoder.run(window[None], leaves))
            inputs = [*_inputs(leaves), *(outputs[module] for module in watched)]
            found = _gradients(after, gradients, inputs)
        number = len(_inputs(leaves))
        at_outputs = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in zip(inputs, found, strict=True)]
        return found[:number], at_outputs[number:]


def _leaves(state: PartState) -> PartState:
    """The same numbers, of which gradients can be taken."""
    scale = state.running_scale
    return PartState(state.hidden.detach().requires_grad_(), None if scale is None else scale.detach().requires_grad_())


def _inputs(state: PartState) -> list[Tensor]:
    return [state.hidden] if state.running_scale is None else [state.hidden, state.running_scale]


def _gradients(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Of the inputs; None for one that the outputs do not depend on."""
    pairs = [(output, gradient) for output, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
    graded = [(output, gradient) for output, gradient in pairs if output.requires_grad]
    return list(torch.autograd.grad([o for o, _ in graded], list(inputs), [g for _, g in graded], allow_unused=True))
