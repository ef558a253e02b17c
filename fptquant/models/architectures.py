"""The architectures that have an adapter, and models seen through theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fptquant.errors import UserError
from fptquant.models.adapter import Adapter, ModelView
from fptquant.models.llama import LLAMA
from fptquant.models.mistral import MISTRAL
from fptquant.models.qwen2 import QWEN2
from fptquant.models.qwen3 import QWEN3

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTERS: dict[str, Adapter] = {adapter.architecture: adapter for adapter in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def supported_architectures() -> list[str]:
    """Class names of the architectures that have an adapter.

    >>> supported_architectures()
    ['LlamaForCausalLM', 'MistralForCausalLM', 'Qwen2ForCausalLM', 'Qwen3ForCausalLM']
    """
    return sorted(_ADAPTERS)


def adapter_for(architecture: str) -> Adapter:
    """The adapter of an architecture by its class name.

    Raises:
        UserError: names the architecture and the supported ones.

    >>> adapter_for("Qwen3ForCausalLM").has_qk_norm
    True
    """
    adapter = _ADAPTERS.get(architecture)
    if adapter is None:
        supported = ", ".join(supported_architectures())
        raise UserError(f"architecture {architecture} is not supported; supported architectures: {supported}")
    return adapter


def get_adapter(model: PreTrainedModel) -> Adapter:
    """The adapter of a model, found by the name of its class.

    Raises:
        UserError: names the architecture and the supported ones.
    """
    return adapter_for(type(model).__name__)


def view_model(model: PreTrainedModel) -> ModelView:
    """Typed handles on the parts of ``model``: ``view_model(model).blocks[0].q_proj``.

    Raises:
        UserError: if the architecture has no adapter.
    """
    return get_adapter(model).view(model)
