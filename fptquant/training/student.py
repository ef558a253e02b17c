"""What is trained of a quantized model, and the student and its full-precision teacher in one model.

`fptquant.training.block_student` trains transforms and ranges of one block for its output, `fptquant.training.transform_student`
those of all blocks end to end, `fptquant.training.range_student` ranges alone, end to end, after rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.config.training import EndToEndConfig, OptimizationConfig
from fptquant.data.windows import own_position
from fptquant.evaluation.hidden import first_nonfinite_module
from fptquant.fingerprint import tensors_digest
from fptquant.models.architectures import view_model
from fptquant.models.context import placed
from fptquant.models.instrument import get_context, iter_quantizers, quantizers_off
from fptquant.models.prefix import prefix_off
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.sites import kind_of
from fptquant.stages.distributed import world_size
from fptquant.transforms import Kronecker, ModelTransforms, Transform, ValueMixing
from fptquant.transforms.value_mixing import hold_mixings, release_mixings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


REMEMBERED_BYTES = 2**29
"""What the teacher's hidden states may take that are kept for windows which come again: held-out ones, and in later epochs all."""


class TrainedRange(nn.Module):
    """The range of one static quantizer as parameters: scale = start exp(log_scale), zero_point = start + steps shift.

    ``steps`` is the number of steps of the grid, so that one learning rate suits both: a relative change of the scale, and
    a shift as a share of the range. Symmetric grids have no shift.

    Shape: log_scale, shift: as the quantizer's scale; both start at 0.
    """

    def __init__(self, quantizer: Quantizer, *, shifts: bool = True) -> None:
        super().__init__()
        assert quantizer.scale is not None
        self._quantizer = (quantizer,)  # in a tuple: the module belongs to the model, not to this one
        self.name = quantizer.name
        self.start = quantizer.scale.detach()
        self.start_zero = None if quantizer.zero_point is None else quantizer.zero_point.detach()
        self.log_scale = nn.Parameter(torch.zeros_like(self.start))
        shifts = shifts and not quantizer.grid.symmetric and self.start_zero is not None
        self.shift = nn.Parameter(torch.zeros_like(self.start)) if shifts else None

    def apply_(self) -> None:
        """Gives the quantizer the range that the parameters stand for, with its graph."""
        (quantizer,) = self._quantizer
        quantizer.scale = self.start * self.log_scale.exp()
        if self.shift is not None:
            assert self.start_zero is not None
            quantizer.zero_point = self.start_zero + (quantizer.grid.qmax - quantizer.grid.qmin) * self.shift

    @torch.no_grad()
    def finish_(self) -> None:
        """Leaves the range in the quantizer as plain numbers; the zero point is rounded, as every use of it does."""
        (quantizer,) = self._quantizer
        self.apply_()
        assert quantizer.scale is not None
        quantizer.scale = quantizer.scale.detach().clone()
        if self.shift is not None:
            assert quantizer.zero_point is not None
            quantizer.zero_point = quantizer.zero_point.detach().round()


class TrainedClip(nn.Module):
    """What a dynamic quantizer clips as a parameter: the range of every token times start exp(log_scale).

    Shape: log_scale: one number, 0 at first.

    Source: learned clipping of activations as in FlatQuant, arXiv 2410.09426; the exponential is this project's choice.
    """

    def __init__(self, quantizer: Quantizer, device: torch.device) -> None:
        super().__init__()
        self._quantizer = (quantizer,)
        self.name = quantizer.name
        self.start = torch.ones((), device=device) if quantizer.clip is None else quantizer.clip.detach()
        self.log_scale = nn.Parameter(torch.zeros_like(self.start))

    def apply_(self) -> None:
        """Gives the quantizer what the parameter stands for, with its graph."""
        (quantizer,) = self._quantizer
        quantizer.clip = self.start * self.log_scale.exp()

    @torch.no_grad()
    def finish_(self) -> None:
        """Leaves it in the quantizer as a plain number."""
        self.apply_()
        (quantizer,) = self._quantizer
        assert quantizer.clip is not None
        quantizer.clip = quantizer.clip.detach().clone()


class Student(nn.Module):
    """Ranges, and the transforms of some blocks, as parameters in groups of one learning rate each.

    The model is instrumented, its ranges are set and switched on; transforms are attached by
    `fptquant.training.transform_student.attach_transforms_`. `finish_` leaves what was trained in the model.

    Args:
        transforms: those of the model; none are trained by default.
        blocks: whose transforms are trained.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: OptimizationConfig,
        transforms: ModelTransforms | None = None,
        blocks: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: frozen weights are neither parameters nor state of this module
        self._transforms = (None if transforms is None else transforms.requires_grad_(False),)
        self.settings = settings
        self.ranges = nn.ModuleDict()
        self.trained = nn.ModuleDict()
        self._groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        self._collect_ranges()
        used = [] if transforms is None else [(f"layers_{i}", t) for i in blocks for t in transforms.block(i).used()]
        self._mixings = [transform for _, transform in used if isinstance(transform, ValueMixing)]
        self._products = [transform for _, transform in used if isinstance(transform, Kronecker)]
        self._collect_transforms(used)

    @property
    def model(self) -> PreTrainedModel:
        return self._model[0]

    @property
    def shard_weights(self) -> bool | None:
        """Whether frozen weights are spread over the processes; None: on GPUs only."""
        return False

    def shared_tensors(self) -> list[Tensor]:
        """What all processes begin with alike, besides trained parameters."""
        (transforms,) = self._transforms
        of_transforms = [] if transforms is None else [*transforms.parameters(), *transforms.buffers()]
        return [*self.model.buffers(), *of_transforms]

    def _collect_transforms(self, used: Sequence[tuple[str, Transform]]) -> None:
        for where, transform in used:
            group = transform.learning_rate or transform.name
            if getattr(self.settings.lr, group, None) is None:
                continue
            self.trained[f"{where}_{transform.name}"] = transform
            for name, parameter in transform.named_parameters():
                parameter.requires_grad_(True)
                self._groups.setdefault(group, []).append((f"{where}.{transform.name}.{name}", parameter))

    def _collect_ranges(self) -> None:
        for name, quantizer in iter_quantizers(self.model):
            group = f"{kind_of(name)}_range"
            if quantizer.mode == "off" or getattr(self.settings.lr, group) is None:
                continue
            trained = TrainedClip(quantizer, self.model.device) if quantizer.dynamic else self._trained_range(name, quantizer)
            self.ranges[name.replace(".", "_")] = trained
            for part, parameter in trained.named_parameters():
                self._groups.setdefault(group, []).append((f"{name}.{part}", parameter))

    @property
    def trained_ranges(self) -> dict[str, TrainedRange | TrainedClip]:
        """The ranges that are trained, by the name of their quantizer."""
        return {trained.name: trained for trained in self.ranges.children() if isinstance(trained, TrainedRange | TrainedClip)}

    def _trained_range(self, name: str, quantizer: Quantizer) -> TrainedRange:
        return TrainedRange(quantizer)

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """What is trained, by the field of ``training.lr`` that gives its learning rate; names are unique and stable."""
        order = [name for name in type(self.settings.lr).model_fields if name in self._groups]
        return {name: self._groups[name] for name in order}

    def trainable_state(self) -> dict[str, Tensor]:
        """Copies of all trained parameters by name."""
        return {name: p.detach().clone() for group in self._groups.values() for name, p in group}

    @torch.no_grad()
    def load_trainable_state_(self, state: dict[str, Tensor]) -> None:
        """Puts back what `trainable_state` gave.

        Raises:
            KeyError: if a parameter is missing.
        """
        for group in self._groups.values():
            for name, parameter in group:
                parameter.copy_(state[name])

    def _prepare(self) -> None:
        """Computes what the weights of this step share, before the first of them needs it."""
        release_mixings(self._mixings)
        hold_mixings(self._mixings)
        for product in self._products:
            product.hold()
        for trained in self.trained_ranges.values():
            trained.apply_()

    def _nonfinite_range(self) -> str | None:
        """The first range that holds NaN, infinity, or a scale of 0 or less."""
        for name, quantizer in iter_quantizers(self.model):
            for scale in (quantizer.scale, quantizer.clip):
                if scale is not None and not bool(scale.isfinite().all() and (scale > 0).all()):
                    return f"the range of {name}"
        return None

    @torch.no_grad()
    def finish_(self) -> None:
        """Leaves the ranges in their quantizers as plain numbers; the student is of no more use."""
        release_mixings(self._mixings)
        for product in self._products:
            product.release()
        for trained in self.trained_ranges.values():
            trained.finish_()


class EndToEndStudent(Student):
    """Student and teacher on one copy of the base weights: ``forward`` gives the loss.

    A prefix, if any, has its keys and values. `finish_` leaves an ordinary calibrated model.

    Args:
        positions: the student reads each window at a place of its own among so many positions, so that the ranges of keys, which
            RoPE turns, are learned for all of these; by default at the beginning. What the teacher says does not depend on it.
    """

    settings: EndToEndConfig

    def __init__(
        self,
        model: PreTrainedModel,
        settings: EndToEndConfig,
        transforms: ModelTransforms | None = None,
        *,
        positions: int | None = None,
    ) -> None:
        super().__init__(model, settings, transforms, range(view_model(model).num_layers))
        self.positions = positions
        self.context = get_context(model)
        self.view = view_model(model)
        self._remembered: dict[str, Tensor] = {}
        if settings.activation_checkpointing:
            self._checkpoint_activations(True)

    @property
    def shard_weights(self) -> bool | None:
        return self.settings.shard_weights

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """The model without quantizers, without a prefix, and without transforms that are not merged."""
        with quantizers_off(self.model), self.context.teacher(), prefix_off(self.model):
            yield

    def _hidden(self, tokens: Tensor, **places: Tensor) -> Tensor:
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.autocast == "bfloat16"):
            hidden: Tensor = self.view.decoder(input_ids=tokens.to(device), use_cache=False, **places)[0]
        return hidden

    def _places(self, tokens: Tensor) -> dict[str, Tensor]:
        """Where the student reads these windows, as arguments of its passes."""
        return placed(tokens.to(self.model.device), [own_position(window, self.positions) for window in tokens])

    def _student_hidden(self, tokens: Tensor) -> Tensor:
        self._prepare()
        return self._hidden(tokens, **self._places(tokens))

    @torch.no_grad()
    def _teacher_hidden(self, tokens: Tensor) -> Tensor:
        # Several processes pass through sharded layers together: one must not leave out a pass that another makes.
        if REMEMBERED_BYTES == 0 or world_size() > 1:
            with self._as_teacher():
                return self._hidden(tokens)
        key = tensors_digest(tokens)
        hidden = self._remembered.get(key)
        if hidden is None:
            with self._as_teacher():
                hidden = self._hidden(tokens)
            if hidden.nbytes + sum(known.nbytes for known in self._remembered.values()) <= REMEMBERED_BYTES:
                self._remembered[key] = hidden
        return hidden

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss per predicted token, with gradients for everything trained.

        Shape: tokens [B, T], int64; the last position of each window predicts nothing that is known, and is left out.
        """
        settings, head = self.settings, self.view.lm_head
        if settings.objective == "cross_entropy":
            student = self._student_hidden(tokens)[:, :-1]
            targets = tokens[:, 1:].to(student.device)
            loss = ops.linear_cross_entropy(student, targets, head.weight, head.bias, temperature=settings.temperature)
            return loss.mean()
        # the teacher first: what checkpointing replays in the backward pass must be the last pass of the model
        teacher = self._teacher_hidden(tokens)[:, :-1]
        student = self._student_hidden(tokens)[:, :-1]
        if settings.objective == "hidden_mse":
            wide = torch.promote_types(student.dtype, torch.float32)
            return (student - teacher).to(wide).square().mean() / teacher.to(wide).square().mean()
        loss = ops.linear_divergence(
            student, teacher, head.weight, head.bias, kind=settings.objective, temperature=settings.temperature
        )
        return loss.mean()

    @torch.no_grad()
    def divergence(self, tokens: Tensor) -> Tensor:
        """Mean Jensen-Shannon divergence from the teacher, at temperature 1, in nats."""
        student = self._student_hidden(tokens)[:, :-1]
        teacher = self._teacher_hidden(tokens)[:, :-1]
        return ops.linear_jsd(student, teacher, self.view.lm_head.weight, self.view.lm_head.bias).mean()

    @torch.no_grad()
    def nonfinite_source(self, tokens: Tensor) -> str | None:
        """The first range, or else the first module in the order of execution, with NaN or infinity; None if all is finite.

        Shape: tokens [B, T]; each window is run by itself.
        """
        self._prepare()
        found = (first_nonfinite_module(self.model, window[None], **self._places(window[None])) for window in tokens)
        return self._nonfinite_range() or next((f"the output of {name}" for name in found if name is not None), None)

    def _checkpoint_activations(self, enable: bool) -> None:
        """Recomputes each layer in the backward pass instead of keeping its activations; dropout stays off."""
        model: Any = self.model
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # the library's older name
        if enable:
            getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(model, f"{name}_checkpointing_disable")()
        for module in (self.view.decoder, *self.view.layers):
            module.training = enable

    @torch.no_grad()
    def finish_(self) -> None:
        """Leaves what was trained in the model, which is an ordinary calibrated one; the student is of no more use."""
        if self.settings.activation_checkpointing:
            self._checkpoint_activations(False)
        self._remembered.clear()
        super().finish_()
