"""The student whose transforms are trained: linears merge them anew in every pass.

The weights are those before the transforms of blocks (T_n, T_k, T_v, T_u, T_d, T_o, P, D) are merged. The student merges and
quantizes them anew in every pass, so that gradients reach transforms and ranges; the teacher is the same model with transforms
(T_h and P_h too) and quantizers left out.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fptquant.config.training import TrainingConfig
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.architectures import view_model
from fptquant.models.merging import Merging
from fptquant.models.prefix import model_prefixes
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.merge_transforms import BLOCK_SIDES, OUTPUT_SIDES, merge_blocks_, rotate_residual_, scale_norms_
from fptquant.training.student import EndToEndStudent
from fptquant.transforms import BlockTransforms, ModelTransforms, ResidualRotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformStudent(EndToEndStudent):
    """Trains transforms and ranges of a model whose transforms are attached by `attach_transforms_` instead of merged.

    `finish_` merges what was trained and leaves an ordinary calibrated model. A trained T_r starts at the identity, on top of the
    one that the weights hold.
    """

    settings: TrainingConfig

    def __init__(
        self, model: PreTrainedModel, transforms: ModelTransforms, settings: TrainingConfig, *, positions: int | None = None
    ) -> None:
        super().__init__(model, settings, transforms, positions=positions)
        self.rotation = self._start_rotation() if settings.lr.residual_rotation is not None else None
        if self.rotation is not None:
            self._collect_transforms([("model", self.rotation)])

    @property
    def transforms(self) -> ModelTransforms:
        (transforms,) = self._transforms
        assert transforms is not None
        return transforms

    def _start_rotation(self) -> ResidualRotation:
        rotation = ResidualRotation(self.view.hidden_size, start="identity").to(self.model.device)
        for block in self.view.blocks:
            for name, side in BLOCK_SIDES[rotation.name].items():
                linear = block.linear(name)
                assert isinstance(linear, QuantizedLinear)
                before = linear.merging or Merging((), ())
                turn = ((rotation, side),)
                linear.merging = Merging(turn + before.steps, (turn if side in OUTPUT_SIDES else ()) + before.bias_steps)
        self._embedding_hook = self.view.embedding.register_forward_hook(self._rotate_embedding)
        return rotation

    def _rotate_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.context.full_precision or self.rotation is None:
            return output
        return output @ self.rotation.matrix().to(output.dtype).mT

    def _prepare(self) -> None:
        if self.rotation is not None:
            self.rotation.held = None
            self.rotation.held = self.rotation.matrix().to(torch.promote_types(self.model.dtype, torch.float32))
        super()._prepare()

    def _student_hidden(self, tokens: Tensor) -> Tensor:
        hidden = super()._student_hidden(tokens)
        return hidden if self.rotation is None else hidden @ self.rotation.matrix().to(hidden.dtype)

    @torch.no_grad()
    def finish_(self) -> None:
        super().finish_()
        if self.rotation is not None:
            self._finish_rotation(self.rotation)
        merge_attached_(self.model, self.transforms)

    def _finish_rotation(self, rotation: ResidualRotation) -> None:
        rotation.held = None
        self._embedding_hook.remove()
        rotate_residual_(self.model, rotation)
        before = self.transforms.residual_rotation
        if before is not None:
            before.set_matrix_(rotation.matrix() @ before.matrix())
        else:
            self.transforms.residual_rotation = rotation


def attach_transforms_(model: PreTrainedModel, transforms: ModelTransforms) -> None:
    """Lets every linear of an instrumented model merge the transforms of its block anew in each pass, so that they can be
    trained; `merge_attached_` ends that. A prefix is transformed likewise; `compute_prefix_` finds it with the plain weights.
    """
    for block in view_model(model).blocks:
        used = list(transforms.block(block.index).used())
        for name in LINEAR_NAMES:
            linear = block.linear(name)
            assert isinstance(linear, QuantizedLinear)
            steps = tuple((t, side) for t in used if (side := BLOCK_SIDES[t.name].get(name)) is not None)
            biases = tuple((transform, side) for transform, side in steps if side in OUTPUT_SIDES)
            linear.merging = Merging(steps, biases) if steps else None
        for name in ("input_norm", "post_norm"):
            scalings = tuple(t for t in used if BLOCK_SIDES[t.name].get(name) == "norm")
            block.get(name).attached = scalings  # type: ignore[assignment]
    for index, prefix in enumerate(model_prefixes(model)):
        prefix.register_forward_hook(partial(_transform_prefix, transforms.block(index)))


def _transform_prefix(
    transforms: BlockTransforms, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """T_k and T_v on the keys and values of the prefix; T_k commutes with the RoPE that is in the keys already.

    Shape: output: key and value [kv_heads, P, head_dim].
    """
    transformed = []
    for x, transform in zip(output, (transforms.query_key_rotation, transforms.value_mixing), strict=True):
        if transform is not None:
            x = transform(x.transpose(0, 1).flatten(1)).unflatten(1, (x.shape[0], -1)).transpose(0, 1)
        transformed.append(x)
    return transformed[0], transformed[1]


@torch.no_grad()
def merge_attached_(model: PreTrainedModel, transforms: ModelTransforms) -> None:
    """Ends `attach_transforms_`: merges the transforms into weights and prefix as they are now."""
    for prefix in model_prefixes(model):
        if prefix.length:
            prefix.key, prefix.value = prefix()
        prefix._forward_hooks.clear()
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.merging = None
        if hasattr(module, "attached"):
            module.attached = None  # type: ignore[assignment]
    scale_norms_(model, transforms)
    merge_blocks_(model, transforms)
