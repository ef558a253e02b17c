"""Puts quantizers, online transforms and S_n into a model of the library's own classes, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from fptquant.errors import UserError
from fptquant.models.adapter import LINEAR_NAMES, BlockView, ModelView
from fptquant.models.architectures import view_model
from fptquant.models.attention import ATTENTION_NAME
from fptquant.models.cache import quantize_cache
from fptquant.models.context import ForwardContext, begin_pass, end_pass
from fptquant.models.decoder_layer import DecoderLayer, ScaledRMSNorm
from fptquant.models.linear_input import transform_and_quantize
from fptquant.models.prefix import Prefix, check_prefix_model
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.quantizers.grid import PerGroup
from fptquant.quantizers.quantizer import Mode, Quantizer
from fptquant.quantizers.sites import (
    CACHE_POINTS,
    INPUT_POINT,
    OUTPUT_POINT,
    RESIDUAL_POINTS,
    Kind,
    QuantizerSpec,
    kind_of,
    point_specs,
    weight_spec,
)
from fptquant.transforms import (
    BlockTransforms,
    DownHadamard,
    ModelTransforms,
    OutHadamard,
    QueryKeyHadamard,
    Transform,
    TransformOptions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fptquant.config.quantization import QuantizationConfig
    from fptquant.config.schema import Config

NORM_POINT = {"input_norm": "attn_in", "post_norm": "mlp_in"}
"""The point at the output of each norm of a block."""

ATTENTION_ATTRIBUTE = {
    "q": "query_quantizer",
    "softmax_out": "softmax_quantizer",
    "k_cache": "key_quantizer",
    "v_cache": "value_quantizer",
}
"""Points inside attention, and the name of their quantizer there."""


def instrument(
    model: PreTrainedModel,
    quantization: QuantizationConfig,
    *,
    residual_scaling: Literal["input", "output"] | None = None,
    down_hadamard: bool = False,
    down_hadamard_block: int | None = None,
    out_hadamard: bool = False,
    query_key_hadamard: bool = False,
    transforms: ModelTransforms | None = None,
) -> dict[str, Quantizer]:
    """Prepares a model for simulated quantization; returns its new quantizers by name, all in mode ``off``.

    Linears become `QuantizedLinear`, outputs of norms, embedding and activation function are quantized by hooks, keys
    and values on their way into the cache, queries and softmax outputs in the attention function, which also knows the
    prefix (`fptquant.models.prefix.compute_prefix_` fills it). Decoder layers are
    replaced only for S_n or a quantized residual. Parameters stay where they are: the keys of the state dict are those
    of the plain model, plus the ranges.

    Args:
        residual_scaling: where S_n divides by the running scale, or None without S_n.
        down_hadamard: transform the input of ``down_proj`` online (its weight must hold the inverse already).
        down_hadamard_block: block size of that transform; None for the whole ``intermediate_size``.
        out_hadamard: mix the heads of the input of ``o_proj`` online (its weight must hold the inverse already).
        query_key_hadamard: transform queries and keys after RoPE.
        transforms: whose Kronecker products and rotations of blocks act on the inputs of linears (the weights must hold the inverse
            already), and P_h on queries and keys.

    Errors: UserError for an unsupported architecture, a model that was prepared before, an impossible block or group
        size, an unknown site; nothing has been changed then.
    """
    check_instrument(model, quantization)
    view = view_model(model)
    mixing = DownHadamard(view.intermediate_size, down_hadamard_block) if down_hadamard else None
    across = OutHadamard(view.num_heads, view.head_dim) if out_hadamard else None
    specs, weight = point_specs(quantization, view.head_dim), weight_spec(quantization)
    context = ForwardContext()
    of_heads = (QueryKeyHadamard(view.head_dim),) if query_key_hadamard else ()
    if residual_scaling is not None:  # first: hooks of quantizers belong on the norms that stay
        _scale_norms(view, context)
    for block in view.blocks:
        _instrument_linears(block, specs, weight, context)
        used = BlockTransforms() if transforms is None else transforms.block(block.index)
        block.attention.online = (*of_heads, *_there(used.query_key_mixing))  # type: ignore[assignment]
        _instrument_attention(block, specs, context, prefix=quantization.prefix is not None)
        _transform_inputs(block, used)
        _instrument_outputs(block, specs, used, context)
        o_proj, down_proj = block.o_proj, block.down_proj
        assert isinstance(o_proj, QuantizedLinear)
        assert isinstance(down_proj, QuantizedLinear)
        o_proj.scaled = down_proj.scaled = residual_scaling
        o_proj.online += _there(across)
        down_proj.online += _there(mixing)
    if residual_scaling is not None or RESIDUAL_POINTS & specs.keys():
        _replace_layers(view, specs, context)
    for name, part in (("embedding_out", view.embedding), ("final_norm_out", view.final_norm)):
        _change_output(part, _build(specs, name, ""), context)
    if {"q", "softmax_out"} & specs.keys() or quantization.prefix is not None or view.blocks[0].attention.online:
        model.set_attn_implementation(ATTENTION_NAME)
        context.attention = ATTENTION_NAME
    decoder = view.decoder
    decoder.context = context  # type: ignore[assignment]
    decoder.register_forward_pre_hook(begin_pass, with_kwargs=True)
    decoder.register_forward_hook(end_pass, with_kwargs=True, always_call=True)
    return dict(iter_quantizers(model))


def instrument_for(model: PreTrainedModel, config: Config, transforms: ModelTransforms) -> None:
    """Puts a config's quantizers, online transforms and S_n into a model whose transforms are merged.

    Args:
        transforms: those of the config; Kronecker products and the like act as they are at each pass.
    """
    options = TransformOptions.of(config.transforms)
    instrument(
        model,
        config.quantization,
        residual_scaling=options.residual_scaling,
        down_hadamard=options.down_hadamard,
        down_hadamard_block=options.down_hadamard_block,
        out_hadamard=options.out_hadamard,
        query_key_hadamard=options.query_key_hadamard,
        transforms=transforms,
    )


def check_instrument(model: PreTrainedModel, quantization: QuantizationConfig) -> None:
    """Finds what `instrument` would refuse, before any work is done.

    Raises:
        UserError: as `instrument`.
    """
    view = view_model(model)
    if hasattr(view.decoder, "context"):
        raise UserError("this model is prepared for quantization already; load it anew for another setting")
    _check_groups(view, point_specs(quantization, view.head_dim))
    if quantization.prefix is not None:
        check_prefix_model(model)
    weight = weight_spec(quantization)
    if weight is not None and isinstance(weight.granularity, PerGroup):
        size = weight.granularity.group_size
        for name, linear in view.blocks[0].linears():
            if linear.in_features % size:
                raise UserError(
                    f"quantization.weight.group_size = {size} does not divide the {linear.in_features} inputs of {name}; "
                    f"choose a common divisor of {sorted({part.in_features for _, part in view.blocks[0].linears()})}"
                )


def _check_groups(view: ModelView, specs: dict[str, QuantizerSpec]) -> None:
    for point, spec in specs.items():
        channels = _channels(view, point)
        if spec.group_size is not None and channels % spec.group_size:
            raise UserError(
                f"quantization: group_size = {spec.group_size} does not divide the {channels} channels of {point}; "
                f"set a divisor as quantization.overrides.{point}.group_size"
            )


def _channels(view: ModelView, point: str) -> int:
    """Size of the last axis at a point."""
    if point in ("gate_out", "up_out", "silu_out", "down_in"):
        return view.intermediate_size
    if point in ("q", *CACHE_POINTS):
        return view.head_dim
    heads = {"q_out": view.num_heads, "o_in": view.num_heads, "k_out": view.num_kv_heads, "v_out": view.num_kv_heads}
    return heads[point] * view.head_dim if point in heads else view.hidden_size


def _build(specs: dict[str, QuantizerSpec], point: str, prefix: str) -> Quantizer | None:
    return specs[point].build(prefix + point) if point in specs else None


def _prefix(block: BlockView) -> str:
    return f"layers.{block.index}."


def _instrument_linears(
    block: BlockView, specs: dict[str, QuantizerSpec], weight: QuantizerSpec | None, context: ForwardContext
) -> None:
    prefix = _prefix(block)
    for name in LINEAR_NAMES:
        linear = QuantizedLinear(block.linear(name), context)
        if name in ("o_proj", "down_proj"):  # inputs of the others are outputs of norms, quantized there once
            linear.input_quantizer = _build(specs, INPUT_POINT[name], prefix)
        if weight is not None:
            linear.weight_quantizer = weight.build(f"{prefix}{name}.weight")
        linear.output_quantizer = _build(specs, OUTPUT_POINT[name], prefix)
        block.replace(name, linear)


def _instrument_attention(block: BlockView, specs: dict[str, QuantizerSpec], context: ForwardContext, *, prefix: bool) -> None:
    attention = block.attention
    attention.context = context  # type: ignore[assignment]
    attention.prefix = Prefix() if prefix else None  # type: ignore[assignment]
    for point, attribute in ATTENTION_ATTRIBUTE.items():
        setattr(attention, attribute, _build(specs, point, _prefix(block)))
    if CACHE_POINTS & specs.keys() or attention.online:
        attention.register_forward_pre_hook(quantize_cache, with_kwargs=True)


def _change_output(
    module: nn.Module,
    quantizer: Quantizer | None,
    context: ForwardContext,
    online: tuple[Transform, ...] = (),
    *,
    always: bool = False,
) -> None:
    """Lets a module's output be transformed and quantized; ``attached`` are transforms that are not merged yet (T_n).

    Args:
        always: though there is nothing to do yet.
    """
    if quantizer is None and not online and not always:
        return
    module.context = context  # type: ignore[assignment]
    module.output_quantizer = quantizer  # type: ignore[assignment]
    module.online, module.attached = online, None  # type: ignore[assignment]
    module.register_forward_hook(_output_hook)


def _output_hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Nothing is transformed where the linears that read it do without transforms in this pass."""
    online, attached, quantizer, context = module.online, module.attached, module.output_quantizer, module.context
    assert isinstance(online, tuple)
    assert isinstance(attached, tuple | None)
    assert isinstance(quantizer, Quantizer | None)
    assert isinstance(context, ForwardContext)
    left_out = attached is not None and context.full_precision
    return transform_and_quantize(output, () if left_out else (*(attached or ()), *online), quantizer, context)


def _transform_inputs(block: BlockView, used: BlockTransforms) -> None:
    """What acts in front of single linears; what several read is transformed where it is written, on the norms' outputs."""
    of_linears = {"o_proj": (used.out_kronecker, used.out_rotation), "down_proj": (used.down_kronecker, used.down_rotation)}
    for name, transforms in of_linears.items():
        linear = block.linear(name)
        assert isinstance(linear, QuantizedLinear)
        linear.online = _there(*transforms)


def _there(*transforms: Transform | None) -> tuple[Transform, ...]:
    return tuple(transform for transform in transforms if transform is not None)


def _instrument_outputs(block: BlockView, specs: dict[str, QuantizerSpec], used: BlockTransforms, context: ForwardContext) -> None:
    of_norms = {
        "input_norm": (used.attn_in_scaling, used.attn_in_kronecker, used.attn_in_rotation),
        "post_norm": (used.mlp_in_scaling, used.mlp_in_kronecker, used.mlp_in_rotation),
    }
    for name, (scaling, *online) in of_norms.items():
        quantizer = _build(specs, NORM_POINT[name], _prefix(block))
        _change_output(block.get(name), quantizer, context, _there(*online), always=scaling is not None)
    _change_output(block.get("activation"), _build(specs, "silu_out", _prefix(block)), context)


def _scale_norms(view: ModelView, context: ForwardContext) -> None:
    view.replace("final_norm", ScaledRMSNorm(view.final_norm, context))
    for block in view.blocks:
        for name in NORM_POINT:
            block.replace(name, ScaledRMSNorm(block.get(name), context))


def _replace_layers(view: ModelView, specs: dict[str, QuantizerSpec], context: ForwardContext) -> None:
    context.own_layers = True
    for block in view.blocks:
        layer = DecoderLayer(block, context)
        layer.attention_residual_quantizer = _build(specs, "residual_attn", _prefix(block))
        layer.mlp_residual_quantizer = _build(specs, "residual_mlp", _prefix(block))
        view.layers[block.index] = layer


def iter_quantizers(model: nn.Module, kind: Kind | None = None) -> Iterator[tuple[str, Quantizer]]:
    """The quantizers of a prepared model with their names, in the order of the modules.

    Names are ``layers.3.down_in`` for a point of a block, ``layers.3.down_proj.weight`` for a weight, ``embedding_out``
    and ``final_norm_out``.
    """
    for module in model.modules():
        if isinstance(module, Quantizer) and (kind is None or kind_of(module.name) == kind):
            yield module.name, module


def range_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Scale and zero point of every static quantizer of a model, or of a part of one, trained clips of dynamic ones, centers, and
    biases of linears with a quantized weight, by quantizer name.
    """
    return {
        f"{name}.{part}": value.detach().cpu().contiguous()
        for name, quantizer in iter_quantizers(model)
        for part in (*(("clip",) if quantizer.dynamic else ("scale", "zero_point")), "center", "bias")
        if (value := getattr(quantizer, part)) is not None
    }


def load_ranges_(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Gives every quantizer of a model what `range_tensors` gave of it.

    Args:
        source: the file that errors name.

    Raises:
        UserError: if a range is missing or left over.
    """
    left = dict(tensors)
    for name, quantizer in iter_quantizers(model):
        for part in ("clip",) if quantizer.dynamic else ("bias",) if kind_of(name) == "weight" else ():
            trained = left.pop(f"{name}.{part}", None)
            setattr(quantizer, part, None if trained is None else trained.to(model.device))
        for part in (*(() if quantizer.dynamic else ("scale", "zero_point")), *(("center",) if quantizer.centered else ())):
            if f"{name}.{part}" not in left:
                raise UserError(f"{source} lacks {name}.{part}: it does not belong to this config; calibrate and save again")
            setattr(quantizer, part, left.pop(f"{name}.{part}").to(model.device))
    if left:
        raise UserError(
            f"{source} has ranges that this config does not use, for example {next(iter(left))}; calibrate and save again"
        )


def set_modes(model: nn.Module, mode: Mode, kind: Kind | None = None) -> None:
    """Sets the mode of every quantizer, or of those of one kind."""
    for _, quantizer in iter_quantizers(model, kind):
        quantizer.mode = mode


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Modes may be changed meanwhile; at the end every quantizer has its own again."""
    modes = {quantizer: quantizer.mode for _, quantizer in iter_quantizers(model)}
    try:
        yield
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """The model computes without its quantizers meanwhile."""
    with kept_modes(model):
        set_modes(model, "off")
        yield


def quantized_linears(model: nn.Module) -> list[tuple[QuantizedLinear, Quantizer]]:
    """The linears of a model, or of a part of one, whose weights have a quantizer, each with that."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return [(linear, linear.weight_quantizer) for linear in linears if linear.weight_quantizer is not None]


def get_context(model: PreTrainedModel) -> ForwardContext:
    """The context that the modules of a prepared model share.

    Raises:
        UserError: if the model was not prepared by `instrument`.
    """
    context = getattr(view_model(model).decoder, "context", None)
    if not isinstance(context, ForwardContext):
        raise UserError("this model is not prepared for quantization; call instrument first")
    return context
