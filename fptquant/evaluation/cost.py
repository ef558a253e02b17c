"""What a method adds to a model's work at run time: multiply-accumulates for every token, and scales found on the fly."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from fptquant.config.quantization import CACHE_SITES
from fptquant.config.schema import Config
from fptquant.models.architectures import view_model
from fptquant.ops.hadamard import hadamard_additions
from fptquant.quantizers.sites import CENTERED_POINTS
from fptquant.transforms.block_rotation import largest_divisor
from fptquant.transforms.kronecker import balanced
from fptquant.transforms.out_hadamard import mixed_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scales = Literal["none", "static", "dynamic"]


@dataclass(frozen=True)
class RuntimeCost:
    """The work for one token that full precision does not do."""

    added: dict[str, int]
    """Multiply-accumulates (an addition or a multiplication alone counts as one) by what asks for them; only what is in use."""
    linears: int
    """Multiply-accumulates of all linears, the head included: what ``added`` is compared with."""
    scales: Scales
    """Whether activations and cache are quantized with ranges set beforehand, with ranges found for every token, or not at all."""

    @property
    def share(self) -> float:
        """All that is added, in proportion to the linears."""
        return sum(self.added.values()) / self.linears

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "share": self.share}


def runtime_cost(model: PreTrainedModel, config: Config) -> RuntimeCost:
    """Counts what a config leaves to do at run time on a model of this size; transforms that merge cost nothing.

    T_d: a Hadamard transform of the down projection's input; T_o: one across the heads of the output projection's; T_h: one of
    every head of queries and keys; P_h: a matrix on each of these; P: Kronecker products on the inputs of linears; D: rotations
    of blocks of them; S_n: 1 / running_scale times the branch; centers: a subtraction from each channel (what is added again is in
    the biases of linears, and keys do without); learned biases: an addition to each output of a linear that has
    none; a prefix: products of queries with its keys, and of weights with its values.
    LLM.int8 adds none: its outlier channels are multiplied in full precision instead of in int8.
    Dynamic ranges are named, not counted: each asks for the extremes of a token, whose cost is waiting rather than arithmetic.

    Args:
        config: its prefix as token ids, as in ``CalibrationResult.config``.
    """
    view, transforms = view_model(model), config.transforms
    hidden, heads = view.hidden_size, view.num_heads * view.head_dim
    keys = view.num_kv_heads * view.head_dim
    added: dict[str, int] = {}
    if transforms.down_hadamard is not None:
        block = transforms.down_hadamard.block_size or view.intermediate_size
        added["T_d"] = view.intermediate_size * hadamard_additions(block)
    if transforms.out_hadamard is not None:
        added["T_o"] = heads * hadamard_additions(mixed_size(view.num_heads, view.head_dim))
    if transforms.query_key_hadamard is not None:
        added["T_h"] = (heads + keys) * hadamard_additions(view.head_dim)
    if transforms.query_key_mixing is not None:
        added["P_h"] = (heads + keys) * view.head_dim
    if transforms.kronecker is not None:
        added["P"] = sum(size * sum(balanced(size)) for size in (hidden, hidden, view.intermediate_size)) + heads * view.num_heads
    if transforms.block_rotation is not None:
        inputs = (hidden, hidden, heads, view.intermediate_size)
        added["D"] = sum(2 * size * largest_divisor(size, transforms.block_rotation.block_size) for size in inputs)
    if transforms.residual_scaling is not None:
        branches = heads + view.intermediate_size if transforms.residual_scaling.where == "input" else 2 * hidden
        added["S_n"] = branches
    if centered := _centered(config):
        sizes = {
            "attn_in": hidden,
            "o_in": heads,
            "mlp_in": hidden,
            "down_in": view.intermediate_size,
            "k_cache": keys,
            "v_cache": keys,
        }
        added["center"] = sum(sizes[site] for site in centered)
    ranges = config.trained_ranges
    if ranges is not None and ranges.lr.bias is not None:
        added["bias"] = sum(linear.out_features for _, linear in view.blocks[0].linears() if linear.bias is None)
    if isinstance(config.quantization.prefix, list):
        added["prefix"] = 2 * heads * len(config.quantization.prefix)
    block_linears = hidden * (2 * heads + 2 * keys + 3 * view.intermediate_size)
    return RuntimeCost(
        {name: count * view.num_layers for name, count in added.items()},
        block_linears * view.num_layers + hidden * int(model.config.vocab_size),
        _scales(config),
    )


def _centered(config: Config) -> frozenset[str]:
    quantization = config.quantization
    parts = {
        site: quantization.kv_cache if site in CACHE_SITES else quantization.activation for site in quantization.quantized_sites
    }
    return frozenset(site for site, part in parts.items() if part.centered) & CENTERED_POINTS


def _scales(config: Config) -> Scales:
    quantization = config.quantization
    parts = {quantization.kv_cache if site in CACHE_SITES else quantization.activation for site in quantization.quantized_sites}
    if not parts:
        return "none"
    return "dynamic" if any(part.dynamic for part in parts) else "static"
