"""A model of which only one part is in memory: the library's own classes on the meta device, filled part by part.

The library's forward pass of the whole decoder runs for every part, with stand-ins for all the others: the embedding's
returns stored hidden states, those of other layers pass them on, the final norm's catches what comes out. Masks, position
embeddings, hooks and the forward context are therefore those of any other pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import ModelView
from fptquant.models.architectures import view_model
from fptquant.models.cache_argument import cache_argument
from fptquant.models.context import ForwardContext, placed
from fptquant.models.loading import check_finite_weight
from fptquant.models.shards import Checkpoint

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


def meta_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a folder in evaluation mode: parameters on the meta device, buffers (of RoPE) on ``device``."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            build: Any = type(module)
            model.set_submodule(name, build(config=model.config).to(device))
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    model.train(False)
    return model


def check_checkpoint(view: ModelView, checkpoint: Checkpoint) -> bool:
    """Compares the headers of a checkpoint with the model; tells whether ``lm_head`` shares the embedding's weight.

    Raises:
        UserError: names a tensor that is missing, has another shape, or that the model has no place for.
    """
    embedding, head = (f"{getattr(view.adapter, name)}.weight" for name in ("embedding", "lm_head"))
    tied = bool(view.model.config.tie_word_embeddings)
    if tied and embedding in checkpoint and head in checkpoint:
        tied = checkpoint.equal(embedding, head, 2048)  # as the library does, which trusts the tensors more
    expected = {name: tuple(parameter.shape) for name, parameter in view.model.named_parameters()}
    if tied:
        expected.pop(head, None)
    else:
        expected[head] = tuple(view.lm_head.weight.shape)
    for name, shape in expected.items():
        if name not in checkpoint:
            raise UserError(f"{checkpoint.folder} lacks the tensor {name}; copy or download the model again")
        if checkpoint.shape(name) != shape:
            raise UserError(
                f"{name} of {checkpoint.folder} has the shape {list(checkpoint.shape(name))}, but config.json needs "
                f"{list(shape)}; the two do not belong together: copy or download the model again"
            )
    surplus = [name for name in sorted(checkpoint.files) if name.endswith("_proj.weight") and name not in expected]
    if surplus:
        raise UserError(f"{checkpoint.folder} holds {surplus[0]}, which config.json has no place for; they do not belong together")
    return tied


@torch.no_grad()
def fill_(module: nn.Module, prefix: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Reads the parameters of a module from a checkpoint, where their names begin with ``prefix``.

    Raises:
        UserError: names a tensor that holds NaN or infinity.
    """
    for name, _ in list(module.named_parameters()):
        tensor = checkpoint.tensor(prefix + name).to(device, dtype, copy=True)
        check_finite_weight(prefix + name, tensor)
        put_parameter_(module, name, tensor)


def put_parameter_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of a parameter of another device."""
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner).register_parameter(last, nn.Parameter(tensor, requires_grad=False))


def empty_(module: nn.Module) -> None:
    """Moves the parameters of a module to the meta device: their memory is free."""
    for name, parameter in list(module.named_parameters()):
        put_parameter_(module, name, torch.empty_like(parameter, device="meta"))


@dataclass
class PartState:
    """What flows from part to part for some windows: hidden states [B, T, H] and, with S_n, the running scale [B, T, 1]."""

    hidden: Tensor
    running_scale: Tensor | None = None

    def rows(self, rows: Tensor | slice) -> PartState:
        """Some of the windows."""
        return PartState(self.hidden[rows], None if self.running_scale is None else self.running_scale[rows])

    def residual(self) -> Tensor:
        """The true residual, also where S_n carries another, [B, T, H], in float32 or wider."""
        hidden = self.hidden.to(torch.promote_types(self.hidden.dtype, torch.float32))
        return hidden if self.running_scale is None else hidden * self.running_scale

    def errors(self, exact: PartState, objective: Literal["relative_mse", "mse"]) -> Tensor:
        """Mean squared errors of the tokens [B, T], of the true residual, in float32 or wider; in proportion to each one's own
        mean square, or not.
        """
        target = exact.residual()
        squared = (self.residual() - target).square().mean(-1)
        if objective == "mse":
            return squared
        return squared / target.square().mean(-1).clamp(min=torch.finfo(target.dtype).tiny)

    @staticmethod
    def joined(parts: Sequence[PartState]) -> PartState:
        """Windows of several states, one after the other."""
        scales = [part.running_scale for part in parts if part.running_scale is not None]
        return PartState(torch.cat([part.hidden for part in parts]), torch.cat(scales) if scales else None)


class _Stored(nn.Module):
    """Stands for the embedding: returns hidden states that an earlier part left."""

    def __init__(self, context: ForwardContext | None) -> None:
        super().__init__()
        self.context = context
        self.state: PartState | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        assert self.state is not None
        if self.context is not None:
            self.context.running_scale = self.state.running_scale
        return self.state.hidden


class _PassOn(nn.Module):
    """Stands for a decoder layer, or the final norm: changes nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _Caught(nn.Module):
    """Stands for the final norm: catches the running scale before the end of the pass clears it."""

    def __init__(self, context: ForwardContext | None) -> None:
        super().__init__()
        self.context = context
        self.running_scale: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.running_scale = None if self.context is None else self.context.running_scale
        return hidden_states


class PartialDecoder:
    """Runs one part of a decoder at a time: its embedding, one of its layers, or its final norm.

    The context is that of an instrumented model; None for a plain one.
    """

    def __init__(self, model: PreTrainedModel, context: ForwardContext | None = None) -> None:
        self.view = view_model(model)
        self._decoder = self.view.decoder
        self._stored, self._caught = _Stored(context), _Caught(context)

    @contextmanager
    def only(self, part: int) -> Iterator[None]:
        """All parts but one are replaced for a while: -1 is the embedding, the number of layers the final norm."""
        view = self.view
        layers, embedding, norm = list(view.layers), view.embedding, view.final_norm
        for index in range(len(layers)):
            if index != part:
                view.layers[index] = _PassOn()
        if part != -1:
            view.replace("embedding", self._stored)
        if part != len(layers):
            view.replace("final_norm", self._caught)
        try:
            yield
        finally:
            for index, layer in enumerate(layers):
                view.layers[index] = layer
            view.replace("embedding", embedding)
            view.replace("final_norm", norm)

    def run(self, tokens: Tensor, state: PartState | None, cache: Cache | None = None, *, first: Sequence[int] = ()) -> PartState:
        """Windows through the part that `only` left in place.

        Args:
            cache: takes the keys and values of the part; none are kept by default.
            first: the position at which each window begins; 0 by default.

        Shape: tokens [B, T], int64, whose values only the embedding reads; state: what the part before returned.
        """
        self._stored.state, self._caught.running_scale = state, None
        kept = {cache_argument(type(self._decoder)): cache, "use_cache": cache is not None}
        output = self._decoder(input_ids=tokens, **kept, **placed(tokens, first)).last_hidden_state
        return PartState(output, self._caught.running_scale)

    def run_in_parts(self, tokens: Tensor, state: PartState | None, at_once: int, *, first: Sequence[int] = ()) -> PartState:
        """As `run`, with so many windows at once."""
        parts = [slice(begin, begin + at_once) for begin in range(0, len(tokens), at_once)]
        states = [self.run(tokens[part], None if state is None else state.rows(part), first=first[part]) for part in parts]
        return PartState.joined(states)
