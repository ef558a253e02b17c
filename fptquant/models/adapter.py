"""A typed map of the names that an architecture gives to the parts of a decoder, and handles on those parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fptquant.transforms.order import ModelSizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a block, in the order in which data flows through them."""


@dataclass(frozen=True)
class Adapter:
    """Where the parts of a decoder-only model with RMSNorm, RoPE and a gated MLP are found.

    Paths of the model start at the model with its head; paths of a block start at its decoder layer.
    """

    architecture: str
    """Class name in ``config.architectures``."""
    biases: frozenset[str]
    """Linears that may have a bias in this architecture."""
    has_qk_norm: bool = False
    """RMSNorms of queries and keys sit between the projections and RoPE."""

    decoder: str = "model"
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    rotary: str = "model.rotary_emb"

    attention: str = "self_attn"
    mlp: str = "mlp"
    input_norm: str = "input_layernorm"
    post_norm: str = "post_attention_layernorm"
    q_proj: str = "self_attn.q_proj"
    k_proj: str = "self_attn.k_proj"
    v_proj: str = "self_attn.v_proj"
    o_proj: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    gate_proj: str = "mlp.gate_proj"
    up_proj: str = "mlp.up_proj"
    down_proj: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"

    def view(self, model: PreTrainedModel) -> ModelView:
        """Typed handles on the parts of ``model``."""
        return ModelView(model, self)


class BlockView:
    """Typed handles on one decoder layer; every access looks the module up anew, so replaced modules are seen."""

    def __init__(self, layer: nn.Module, adapter: Adapter, index: int) -> None:
        self.layer = layer
        self.adapter = adapter
        self.index = index

    def get(self, name: str) -> nn.Module:
        """The module that the adapter knows as ``name``, for example ``"q_proj"`` or ``"post_norm"``."""
        return self.layer.get_submodule(getattr(self.adapter, name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts ``module`` in the place of the one the adapter knows as ``name``."""
        self.layer.set_submodule(getattr(self.adapter, name), module, strict=True)

    def linear(self, name: str) -> nn.Linear:
        """One of ``LINEAR_NAMES``."""
        return cast(nn.Linear, self.get(name))

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """The seven linears with their names, in the order of ``LINEAR_NAMES``."""
        return ((name, self.linear(name)) for name in LINEAR_NAMES)

    @property
    def q_proj(self) -> nn.Linear:
        return self.linear("q_proj")

    @property
    def k_proj(self) -> nn.Linear:
        return self.linear("k_proj")

    @property
    def v_proj(self) -> nn.Linear:
        return self.linear("v_proj")

    @property
    def o_proj(self) -> nn.Linear:
        return self.linear("o_proj")

    @property
    def gate_proj(self) -> nn.Linear:
        return self.linear("gate_proj")

    @property
    def up_proj(self) -> nn.Linear:
        return self.linear("up_proj")

    @property
    def down_proj(self) -> nn.Linear:
        return self.linear("down_proj")

    @property
    def attention(self) -> nn.Module:
        return self.get("attention")

    @property
    def mlp(self) -> nn.Module:
        return self.get("mlp")

    @property
    def input_norm(self) -> nn.Module:
        """RMSNorm before attention: ``weight`` [hidden_size], ``variance_epsilon``."""
        return self.get("input_norm")

    @property
    def post_norm(self) -> nn.Module:
        """RMSNorm before the MLP: ``weight`` [hidden_size], ``variance_epsilon``."""
        return self.get("post_norm")

    @property
    def q_norm(self) -> nn.Module | None:
        """RMSNorm of each query head (``weight`` [head_dim]), or None."""
        return self.get("q_norm") if self.adapter.has_qk_norm else None

    @property
    def k_norm(self) -> nn.Module | None:
        """RMSNorm of each key head (``weight`` [head_dim]), or None."""
        return self.get("k_norm") if self.adapter.has_qk_norm else None


class ModelView:
    """Typed handles on the parts of a causal language model, and its sizes."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        self.model = model
        self.adapter = adapter

    def get(self, name: str) -> nn.Module:
        """The module that the adapter knows as ``name``, for example ``"final_norm"``."""
        return self.model.get_submodule(getattr(self.adapter, name))

    def replace(self, name: str, module: nn.Module) -> None:
        """Puts ``module`` in the place of the one the adapter knows as ``name``."""
        self.model.set_submodule(getattr(self.adapter, name), module, strict=True)

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return self.get("decoder")

    @property
    def embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.get("embedding"))

    @property
    def final_norm(self) -> nn.Module:
        """Last RMSNorm: ``weight`` [hidden_size], ``variance_epsilon``."""
        return self.get("final_norm")

    @property
    def lm_head(self) -> nn.Linear:
        return cast(nn.Linear, self.get("lm_head"))

    @property
    def layers(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.get("layers"))

    @property
    def blocks(self) -> list[BlockView]:
        """One view for each decoder layer."""
        return [BlockView(layer, self.adapter, index) for index, layer in enumerate(self.layers)]

    @property
    def tied(self) -> bool:
        """Whether ``lm_head`` and the embedding share one parameter."""
        return self.lm_head.weight is self.embedding.weight

    @cached_property
    def _config(self) -> Any:
        return self.model.config

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self._config.hidden_size)

    @property
    def intermediate_size(self) -> int:
        return int(self._config.intermediate_size)

    @property
    def num_heads(self) -> int:
        return int(self._config.num_attention_heads)

    @property
    def num_kv_heads(self) -> int:
        return int(self._config.num_key_value_heads or self.num_heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self._config, "head_dim", None) or self.hidden_size // self.num_heads)

    @property
    def group(self) -> int:
        """Query heads per key and value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def norm_eps(self) -> float:
        return float(self._config.rms_norm_eps)


def model_sizes(view: ModelView) -> ModelSizes:
    """The sizes that `fptquant.transforms.build_transforms` asks for."""
    return ModelSizes(
        num_layers=view.num_layers,
        hidden_size=view.hidden_size,
        intermediate_size=view.intermediate_size,
        num_heads=view.num_heads,
        num_kv_heads=view.num_kv_heads,
        head_dim=view.head_dim,
        norm_eps=view.norm_eps,
        has_qk_norm=view.adapter.has_qk_norm,
    )
