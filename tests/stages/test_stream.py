"""Streamed calibration: the same bits as in memory, in the memory of one block, and no block lost to a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import fptquant as fq
from fptquant.cli import app
from fptquant.config.schema import Config
from fptquant.models.instrument import iter_quantizers
from fptquant.stages import find_prefix
from fptquant.stages.stream import calibrate_streamed
from tests.memory import NO_RESERVE, measurable
from tests.models.tiny import ARCHITECTURES, SLIDING, tiny_model, token_ids
from tests.program import run_python
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer


def quiet(done: int, total: int, description: str) -> None:
    """No bars in tests."""


def config(*overrides: str, architecture: str = "LlamaForCausalLM") -> Config:
    refused = ["transforms.query_key_rotation=false"] if architecture == "Qwen3ForCausalLM" else []
    small = ["calibration.windows=2", "calibration.window=48", "local.value_steps=5"]
    return fq.load_config("fptquant-local", *small, *refused, *overrides, several=True)  # some choose another method


def save_model(folder: Path, architecture: str = "LlamaForCausalLM", *, shard: str = "5GB", **options: object) -> Path:
    tiny_model(architecture, vocab_size=VOCABULARY, **options).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def in_memory(folder: Path, chosen: Config, out: Path) -> PreTrainedModel:
    model, tokenizer = fq.load_model(folder, dtype=getattr(torch, chosen.dtype))
    result = fq.calibrate(model, tokenizer, chosen, in_place=True, progress=quiet)
    result.save(out)
    return result.model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder; one that head and embedding share goes by the embedding's name, whichever was written."""
    found = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    if "lm_head.weight" in found and "model.embed_tokens.weight" not in found:
        found["model.embed_tokens.weight"] = found.pop("lm_head.weight")
    return found


def assert_equal_folders(expected: Path, found: Path) -> None:
    """Equal bits in weights, ranges and transforms, and the same files but for the number of shards."""
    for part in (".", "merged", "transformed"):
        assert (expected / part).is_dir() == (found / part).is_dir(), part
        a, b = tensors(expected / part), tensors(found / part)
        assert a.keys() == b.keys(), part
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name
        kept = [
            {path.name for path in folder.joinpath(part).glob("*") if "safetensors" not in path.name}
            for folder in (expected, found)
        ]
        assert kept[0] == kept[1]
        for name in kept[0] & {"config.json", "model_config.json", "generation_config.json", "config.yaml"}:
            assert (expected / part / name).read_text() == (found / part / name).read_text(), name


def compare(tmp_path: Path, source: Path, chosen: Config) -> None:
    expected = in_memory(source, chosen, tmp_path / "expected")
    out = calibrate_streamed(source, chosen, tmp_path / "found", progress=quiet)
    assert_equal_folders(tmp_path / "expected", out)
    model, tokenizer = fq.load_calibrated(out)
    tokens = token_ids(1, 40)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert tokenizer.decode(tokenizer("same text")["input_ids"]) == "same text"
    assert [name for name, _ in iter_quantizers(model)] == [name for name, _ in iter_quantizers(expected)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("setting", ["w4a4kv4-static", "w4a4kv4-dynamic"])
def test_streamed_calibration_gives_the_same_bits(architecture: str, setting: str, tmp_path: Path) -> None:
    source = save_model(
        tmp_path / "model", architecture, tie_word_embeddings=architecture == "LlamaForCausalLM", num_hidden_layers=3
    )
    chosen = config(
        f"quantization={setting}",
        "quantization.sites=all",
        "quantization.full_precision_tokens=1",
        "transforms.residual_scaling=true",
        architecture=architecture,
    )
    compare(tmp_path, source, chosen)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_search_for_a_prefix_finds_the_same(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_prefix, "MASSIVE", 1.0)
    monkeypatch.setattr(find_prefix, "MASSIVE_RATIO", 5.0)
    compare(tmp_path, save_model(tmp_path / "model"), config("quantization.prefix=auto", f"dtype={dtype}"))
    reports = [json.loads((tmp_path / name / "metrics.json").read_text())["prefix"] for name in ("expected", "found")]
    assert reports[0] == reports[1]
    assert reports[0]["ids"]


PLAIN = ("transforms.down_hadamard=false", "transforms.residual_scaling=false")
CENTERED = ("quantization.activation.centered=true", "quantization.kv_cache.centered=true")
BARE = tuple(f"transforms.{name}=false" for name in ("query_key_rotation", "value_mixing", "up_scaling", "residual_rotation"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(("quantization=w4a16",), id="no text is needed"),
        pytest.param(("quantization=w3a16-g16", "local.method=none"), id="groups"),
        pytest.param(("dtype=float64", "local.method=adamw", "local.steps=3"), id="float64"),
        pytest.param(("dtype=bfloat16", "transforms.residual_rotation.start=random_orthogonal"), id="bfloat16"),
        pytest.param((*BARE, *PLAIN, "norm_gains=kept", "local.method=none"), id="kept gains"),
        pytest.param(("quantization=w4a16", "quantization.overrides.final_norm_out.bits=8"), id="only the final norm"),
        pytest.param(("quantization.prefix=[7,3,7]", "transforms.query_key_hadamard=true"), id="T_h behind a prefix"),
        pytest.param(("quantization.prefix=some text", "transforms.residual_scaling=true"), id="prefix"),
        pytest.param(("quantization=w4a4kv4-dynamic", "quantization.prefix=[7,3,7]"), id="prefix without text"),
        pytest.param(("quantization.activation.range.method=min_max", "quantization.kv_cache.range.method=min_max"), id="min max"),
        pytest.param(CENTERED, id="centers"),
        pytest.param(("calibration.context=100", "quantization.full_precision_tokens=1", *CENTERED), id="spread windows"),
        pytest.param(("quantization=w4a4kv4-dynamic", *CENTERED), id="centers of dynamic ranges"),
    ],
)
def test_every_kind_of_config_is_streamed(overrides: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    compare(tmp_path, save_model(tmp_path / "model", tie_word_embeddings=tied, shard="100KB"), config(*overrides))


@pytest.mark.parametrize("architecture", SLIDING)
def test_each_block_has_the_mask_of_its_own_kind(architecture: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", architecture, num_hidden_layers=3, **SLIDING[architecture])
    compare(tmp_path, source, config(architecture=architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mergeable_transforms_stream_into_a_plain_checkpoint(architecture: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", architecture, tie_word_embeddings=True)
    out = calibrate_streamed(source, config(*PLAIN, architecture=architecture), tmp_path / "out", progress=quiet)
    plain = AutoModelForCausalLM.from_pretrained(out / "merged")
    expected = fq.load_model(source)[0](token_ids()).logits
    assert type(plain).__name__ == architecture
    assert not plain.config.tie_word_embeddings
    assert (plain(token_ids()).logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_an_interrupted_run_goes_on_after_its_last_block(tmp_path: Path) -> None:
    source, chosen = (
        save_model(tmp_path / "model", num_hidden_layers=3),
        config("transforms.residual_scaling=true", "quantization.prefix=[1]"),
    )
    expected = calibrate_streamed(source, chosen, tmp_path / "expected", progress=quiet)
    begun: list[int] = []

    def interrupt(done: int, total: int, description: str) -> None:
        begun.append(done)
        if done in (2, 4) and begun.count(done) == 1:
            raise KeyboardInterrupt

    for again in (False, True):
        with pytest.raises(KeyboardInterrupt):
            calibrate_streamed(source, chosen, tmp_path / "out", resume=again, progress=interrupt)
        assert not (tmp_path / "out").exists()
    calibrate_streamed(source, chosen, tmp_path / "out", resume=True, progress=interrupt)
    assert begun == [0, 1, 2, 2, 3, 4, 4, 5]
    assert_equal_folders(expected, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model", "out"]


def test_another_run_is_neither_gone_on_with_nor_lost(tmp_path: Path) -> None:
    source, begun = save_model(tmp_path / "model"), []

    def interrupt(done: int, total: int, description: str) -> None:
        begun.append(done)
        if done == 2 and begun.count(0) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_streamed(source, config("seed=1"), tmp_path / "out", progress=interrupt)
    with pytest.raises(fq.UserError, match="holds an unfinished run; go on with --resume, or start anew with --overwrite"):
        calibrate_streamed(source, config(), tmp_path / "out", progress=interrupt)
    with pytest.raises(fq.UserError, match=r"has another config \(seed: 1, now 0\)"):
        calibrate_streamed(source, config(), tmp_path / "out", resume=True, progress=interrupt)
    weights = source / "model.safetensors"
    os.utime(weights, (1, 1))
    with pytest.raises(fq.UserError, match=r"has another inputs \(files.model.safetensors: .*, now .* 1000000000\)"):
        calibrate_streamed(source, config("seed=1"), tmp_path / "out", resume=True, progress=interrupt)
    calibrate_streamed(source, config(), tmp_path / "out", overwrite=True, progress=interrupt)
    assert begun == [0, 1, 2, 0, 1, 2, 3, 4]
    assert_equal_folders(calibrate_streamed(source, config(), tmp_path / "expected", progress=quiet), tmp_path / "out")


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import fptquant as fq
from fptquant.stages.stream import calibrate_streamed
source, out, log, *overrides = sys.argv[1:]
config = fq.load_config("fptquant-local", *overrides)
def note(done, total, description):
    with open(log, "a") as file:
        print(done, file=file)
def work(out):
    begun = os.path.exists(out + ".partial/checkpoint/checkpoint.json")
    calibrate_streamed(source, config, out, overwrite=True, resume=begun, progress=note)
begin = time.perf_counter()
calibrate_streamed(source, config, out + "-expected", progress=lambda *_: None)
seconds, rng, killed = time.perf_counter() - begin, random.Random(0), 0
while killed < 6:
    child = os.fork()
    if child == 0:
        work(out)
        os._exit(0)
    time.sleep(seconds * rng.uniform(0.1, 0.7))
    os.kill(child, signal.SIGKILL)
    killed += 1
    _, status = os.waitpid(child, 0)
    note("killed" if os.WIFSIGNALED(status) else "whole", 0, "")
    if not os.WIFSIGNALED(status):
        break
work(out)
"""


def test_a_killed_run_loses_one_block_at_most(tmp_path: Path) -> None:
    """Killed at random moments of its way through six blocks; no part is begun that a part after it was begun before."""
    source, log = save_model(tmp_path / "model", num_hidden_layers=6), tmp_path / "log"
    small = ["calibration.windows=4", "calibration.window=96", "local.value_steps=5", "transforms.residual_scaling=true"]
    small += ["quantization.prefix=[1, 2]"]
    run_python(KILLED, source, tmp_path / "out", log, *small)
    lines = log.read_text().split()
    begun = [int(line) for line in lines if line.isdigit()]
    assert "killed" in lines
    assert begun == sorted(begun) or "whole" in lines
    assert_equal_folders(tmp_path / "out-expected", tmp_path / "out")


PEAK = """
import sys
import torch
torch.set_num_threads(1)
import fptquant as fq
from fptquant.memory import return_memory
from tests.memory import memory
config = fq.load_config("fptquant-local", *sys.argv[4:])
for number, model in enumerate(sys.argv[1:4]):  # the first imports and builds what is needed once
    return_memory()
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts anew
    before = memory("VmRSS")
    fq.calibrate_streamed(model, config, f"{model}-out{number}", progress=lambda *_: None)
    print(memory("VmHWM") - before)
"""


@measurable
def test_the_peak_of_memory_is_about_one_block_and_the_embedding(tmp_path: Path) -> None:
    """One block, six float64 copies of its largest weight to work with, and the embedding at most; more blocks need no more."""
    hidden, intermediate, vocabulary = 512, 4096, 16384
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": 8, "num_key_value_heads": 8}
    block, weight, embedding = 4 * (4 * hidden**2 + 3 * hidden * intermediate), 8 * hidden * intermediate, 4 * vocabulary * hidden
    folders = [save_model(tmp_path / "tiny")]
    for blocks in (3, 9):
        model = tiny_model("LlamaForCausalLM", vocab_size=vocabulary, num_hidden_layers=blocks, head_dim=64, **sizes)
        model.save_pretrained(folder := tmp_path / f"{blocks} blocks")
        tiny_tokenizer().save_pretrained(folder)
        folders.append(folder)
    small = ["quantization=w4a8kv8-static", "calibration.windows=2", "calibration.window=96", "local.value_steps=2"]
    _, few, many = (int(line) for line in run_python(PEAK, *folders, *small, environment=NO_RESERVE).split())
    assert many < block + 6 * weight + embedding
    assert many < few + block
    assert many < (9 * block + 2 * embedding) / 2  # what the model itself would need


def test_the_command_line_streams(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    small = ["calibration.windows=2", "calibration.window=48", "local.value_steps=5"]
    command = ["run", "fptquant-local", f"model={source}", "--stream", "--output", str(tmp_path / "out"), *small]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    in_memory(
        source, fq.load_config("fptquant-local", f"model={source}", f"output={tmp_path / 'out'}", *small), tmp_path / "expected"
    )
    assert_equal_folders(tmp_path / "expected", tmp_path / "out")
    refused = CliRunner().invoke(app, [*command[:-1], "--no-save"])
    assert refused.exit_code == 2
    assert "leave out --no-save" in refused.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["transforms.residual_rotation.learn=true"], "looks at all weights"),
        (["training={}"], "needs the whole model in memory"),
        (["rounding.method=gptq"], "gptq is not possible with streaming"),
        (["transforms.down_hadamard.block_size=7"], "7"),
        (["calibration.window=4096"], "4,096"),
    ],
)
def test_what_cannot_be_streamed_is_refused_before_any_work(overrides: list[str], message: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    with pytest.raises(fq.UserError, match=message):
        calibrate_streamed(source, config(*overrides), tmp_path / "out", progress=quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def damage(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    weights = load_file(folder / "model.safetensors")
    changed = change(weights.pop(name))
    save_file(weights if changed is None else {**weights, name: changed}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: None, "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda weight: weight[:5].clone(), r"has the shape \[5, 64\], but config.json needs \[96, 64\]"),
        (lambda weight: weight.index_fill(0, torch.tensor([3]), torch.nan), "holds 64 values that are NaN or infinite"),
    ],
)
def test_damaged_folders_are_named(change: Callable[[torch.Tensor], torch.Tensor | None], message: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")
    damage(source, "model.layers.1.mlp.up_proj.weight", change)
    with pytest.raises(fq.UserError, match=message):
        calibrate_streamed(source, config(), tmp_path / "out", progress=quiet)
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_used_although_the_config_says_tied(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tie_word_embeddings=False)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    compare(tmp_path, source, config())


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model")

    def again(done: int, total: int, description: str) -> None:
        with pytest.raises(fq.UserError, match="another process is writing"):
            calibrate_streamed(source, config(), tmp_path / "out", progress=quiet)

    calibrate_streamed(source, config(), tmp_path / "out", progress=again)
    with pytest.raises(fq.UserError, match="holds another run"):
        calibrate_streamed(source, config(), tmp_path / "out", progress=quiet)
