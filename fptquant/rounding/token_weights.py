"""How much the error at each token counts: its part of the Fisher information of a linear's output.

Let e_t be the error at a linear's output at token t, and g_t the gradient of -log p(label) there, the label drawn from the model's
own distribution. To second order, the divergence of the model from itself in full precision is half the mean over labels of
(sum_t g_t . e_t)^2. Three approximations lead to one Hessian for all rows of a weight: products of two tokens are left out,
|g_t|^2 times the identity stands for g_t g_t^T, and one draw of labels for their mean. Then a token's weight is |g_t|^2, and the
Hessian sum_t |g_t|^2 x_t x_t^T in place of sum_t x_t x_t^T. Tokens that nothing later depends on count little; massive ones do
not drown all others.

The gradients are those of the model as it stands, transforms merged and quantizers off: two passes forward and one back for each
window, block by block, without gradients of weights. Memory: the hidden states of one window before every block, the activations of
one block, and float32 [linears, windows, window].

Source: GuidedQuant (Kim et al., arXiv 2505.07004), which has several groups of rows, and the true next token as the label.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.evaluation.hidden import check_finite, logit_chunks, output_head
from fptquant.files import KeptFile, KeptFiles, read_file, to_bytes
from fptquant.fingerprint import model_digest, tensors_digest
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.hooks import hooked
from fptquant.models.instrument import get_context, quantizers_off
from fptquant.models.streaming import PartialDecoder, PartState
from fptquant.rounding.round_blocks import linears_to_round
from fptquant.stages.distributed import gathered, is_main, on_main, rank
from fptquant.stages.progress import Progress, quiet, tell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenWeights = dict[str, Tensor]
"""By linear, ``layers.3.q_proj``: [windows, window], float32 (float64 for a model of that) on the CPU, 1 on average."""

_FILE = "token-weights.safetensors"
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
) -> tuple[TokenWeights, float]:
    """The weight of each token for each linear of an instrumented model, and the seconds that they took in all parts of the run.

    Several processes share the windows, and each gets the weights of all.

    Shape:
        windows: [windows, window], int64, the calibration text.

    Args:
        seed: of the labels, which are drawn for each window by its number.
        kept: where what was found for finished windows is kept, by the main process.
        belongs_to: what decides the result besides seed, windows, weights and static ranges.
        resume: go on with the windows that are kept, if they belong to this run.

    Raises:
        UserError: if a weight has no quantizer or transforms are not merged yet, before any work; if logits or a gradient are not
            finite, with the names of the window and of the module or linear.
    """
    for block in view_model(model).blocks:
        linears_to_round(block)
    file, found, before = None, list[TokenWeights](), 0.0
    if kept is not None:
        file = kept.file(_FILE)
        belongs_to = f"{belongs_to} {seed} {tensors_digest(windows)} {model_digest(model)}"
        found, before = on_main(lambda: _read(file, belongs_to)) if resume else (found, before)
    start, fisher = time.perf_counter() - before, _Fisher(model)
    with quantizers_off(model):
        while len(found) < len(windows):
            number = len(found) + rank()
            mine = fisher.of_window(windows[number].to(model.device), seed, number) if number < len(windows) else None
            found += [each for each in gathered(mine) if each is not None]
            if file is not None and is_main():
                _write(file, belongs_to, found, time.perf_counter() - start)
            tell(progress, len(found), len(windows), _DESCRIPTION, "")
    return _normalized(found), time.perf_counter() - start


def _normalized(found: Sequence[TokenWeights]) -> TokenWeights:
    """1 on average; where no token counts, all count the same."""
    weights: TokenWeights = {}
    for name in found[0]:
        whole = torch.stack([each[name] for each in found])
        mean = float(whole.double().mean())
        weights[name] = whole / mean if mean > 0 else torch.ones_like(whole)
    return weights


def _write(file: KeptFile, belongs_to: str, found: Sequence[TokenWeights], seconds: float) -> None:
    """When it is time (`KeptFiles`)."""
    rest = {"belongs_to": belongs_to, "seconds": seconds}
    finished = list(found)
    file.write(lambda: to_bytes({name: torch.stack([each[name] for each in finished]) for name in finished[0]}, rest))


def _read(file: KeptFile, belongs_to: str) -> tuple[list[TokenWeights], float]:
    """What is kept of finished windows, and their seconds; nothing if there is no file of this run."""
    if not file.path.is_file():
        return [], 0.0
    tensors, rest = read_file(file.path)
    if rest["belongs_to"] != belongs_to:
        return [], 0.0
    finished = min(len(value) for value in tensors.values())
    return [{name: value[number] for name, value in tensors.items()} for number in range(finished)], rest["seconds"]


def _generator(seed: int, number: int, device: torch.device) -> torch.Generator:
    """Of the labels of a window. A generator may keep no more than 32 bits of its seed, so both are mixed into those."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "little"))


class _Fisher:
    """Gradients of one window after the other, block by block from the last one on."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.view = view_model(model)
        self.decoder = PartialDecoder(model, get_context(model))

    def of_window(self, window: Tensor, seed: int, number: int) -> TokenWeights:
        """|g_t|^2 of every linear's output, [window] each on the CPU, for labels that are drawn by seed and number.

        Raises:
            UserError: as `find_token_weights`.
        """
        layers = self.view.num_layers
        # One block of memory for what is kept: many small ones among what is freed would keep all of that from being used again.
        wide = torch.promote_types(self.model.dtype, torch.float32)
        rows = iter(torch.empty(layers * len(LINEAR_NAMES), len(window), dtype=wide))
        state: PartState | None = None
        states: list[PartState] = []  # before each block, and before the final norm
        for part in range(-1, layers):
            with self.decoder.only(part):
                state = self.decoder.run(window[None], state)
            states.append(state)
        gradients = self._of_head(window, states.pop(), _generator(seed, number, window.device), number)
        found: TokenWeights = {}
        for index in reversed(range(layers)):
            # backwards, so that the first gradient that is not finite is where that began
            linears = {f"layers.{index}.{name}": self.view.blocks[index].linear(name) for name in reversed(LINEAR_NAMES)}
            gradients, outputs = self._back(index, window, states.pop(), gradients, list(linears.values()))
            for name, gradient in zip(linears, outputs, strict=True):
                weight = gradient[0].to(wide).square().sum(-1)
                if not bool(weight.isfinite().all()):
                    raise UserError(
                        f"the gradient at the output of {name} is not finite in window {number} of the calibration text; set "
                        "rounding.token_weights=equal, or use a wider dtype (dtype=float32)"
                    )
                found[name] = next(rows).copy_(weight)
        return found

    def _of_head(self, window: Tensor, state: PartState, generator: torch.Generator, number: int) -> list[Tensor | None]:
        """Gradients of the sum over tokens of -log p(label) at what the final norm reads."""
        with self.decoder.only(self.view.num_layers), torch.enable_grad():
            leaves = _leaves(state)
            normalized = self.decoder.run(window[None], leaves).hidden
        hidden = normalized[0].detach().requires_grad_()
        gradient = torch.empty_like(hidden)
        with torch.enable_grad():
            for where, logits in logit_chunks(output_head(self.model), self.model.config.vocab_size, hidden):
                check_finite(self.model, window, logits.detach().logsumexp(-1), where.start, number)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = ops.cross_entropy(logits, labels).sum()
                gradient[where] = torch.autograd.grad(loss, hidden)[0][where]
        return _gradients([normalized], [gradient[None]], _inputs(leaves))

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
