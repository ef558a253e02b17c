"""The pipeline: what it changes, what it leaves alone, that it repeats itself, and that a saved model is the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.models.instrument import iter_quantizers, set_modes
from tests.models.tiny import tiny_model, token_ids
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


def quiet(done: int, total: int, description: str) -> None:
    """No bars in tests."""


def config(*overrides: str, architecture: str = "LlamaForCausalLM") -> Config:
    refused = ["transforms.query_key_rotation=false"] if architecture == "Qwen3ForCausalLM" else []
    small = ["calibration.windows=2", "calibration.window=48", "local.value_steps=5"]
    return fq.load_config("fptquant-local", *small, *refused, *overrides)


def model_of(architecture: str = "LlamaForCausalLM", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model(architecture, dtype=dtype, vocab_size=VOCABULARY, tie_word_embeddings=architecture == "LlamaForCausalLM")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transforms_alone_change_nothing_and_the_argument_stays_as_it_was(architecture: str) -> None:
    model, tokens = model_of(architecture), token_ids(2, 40)
    before, state = model(tokens).logits, {name: value.clone() for name, value in model.state_dict().items()}
    chosen = config("transforms.residual_scaling=true", architecture=architecture)
    result = fq.calibrate(model, tiny_tokenizer(), chosen, progress=quiet)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    quantized = result.model(tokens).logits
    set_modes(result.model, "off")
    exact = result.model(tokens).logits
    scale = before.abs().max()
    assert (exact - before).abs().max() < 2e-5 * scale  # float32 merging and another order of sums
    assert (quantized - before).abs().max() > 1e-3 * scale  # 4-bit weights are not nothing


@pytest.mark.parametrize("setting", ["w4a16", "w4a8kv8-static", "w4a4kv4-static", "w4a4kv4-dynamic", "w3a8kv4-static-g16"])
def test_every_setting_runs_and_repeats_bit_for_bit(setting: str) -> None:
    tokens, chosen = token_ids(1, 30), config(f"quantization={setting}")
    logits = [fq.calibrate(model_of(), tiny_tokenizer(), chosen, progress=quiet).model(tokens).logits for _ in range(2)]
    assert logits[0].isfinite().all()
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("sites", ["linears_kv", "linears_kv_bmm", "all_except_residual", "all"])
def test_every_site_gets_a_range(sites: str) -> None:
    result = fq.calibrate(model_of(), tiny_tokenizer(), config(f"quantization.sites={sites}"), progress=quiet)
    assert all(quantizer.has_range and quantizer.mode == "on" for _, quantizer in iter_quantizers(result.model))
    assert result.model(token_ids()).logits.isfinite().all()


def test_more_bits_come_closer_to_full_precision() -> None:
    model, tokens = model_of(), token_ids(2, 40)
    errors = []
    for bits in (2, 4, 8):
        chosen = config("quantization=w8a8kv8-static", f"quantization.weight.bits={bits}")
        quantized = fq.calibrate(model, tiny_tokenizer(), chosen, progress=quiet).model(tokens).logits
        errors.append((quantized - model(tokens).logits).norm().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_generate_is_the_same_with_and_without_a_cache() -> None:
    result = fq.calibrate(model_of(dtype=torch.float64), tiny_tokenizer(), config("dtype=float64"), progress=quiet)
    prompt = token_ids(1, 10)
    texts = [result.model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(texts[0], texts[1])


PRODUCTS = [
    "transforms.kronecker=true",
    "transforms.query_key_mixing=true",
    "transforms.down_hadamard=false",
    "block_training={steps: 2, windows: 4, window: 32}",
]
ROTATIONS = ["transforms.block_rotation={block_size: 16, steps: 4}", "transforms.down_hadamard=false"]
ONLINE = {"products": PRODUCTS, "rotations": ROTATIONS}
SYMBOLS = {"products": {"P_a", "P_ug", "P_o", "P_d", "P_h"}, "rotations": {"D_a", "D_ug", "D_o", "D_d"}}
SAVED = [(architecture, "") for architecture in ARCHITECTURES] + [("LlamaForCausalLM", online) for online in ONLINE]


@pytest.mark.parametrize(("architecture", "online"), SAVED, ids=[*ARCHITECTURES, *ONLINE])
def test_a_saved_model_is_the_same_model_in_another_process(architecture: str, online: str, tmp_path: Path) -> None:
    given = ["quantization.full_precision_tokens=1", "transforms.residual_scaling=true", *ONLINE.get(online, [])]
    chosen = config(*given, architecture=architecture)
    result = fq.calibrate(model_of(architecture), tiny_tokenizer(), chosen, progress=quiet)
    result.save(tmp_path / "out")
    tokens = token_ids(1, 30)
    torch.save((tokens, result.model(tokens).logits), tmp_path / "expected.pt")
    program = (
        "import sys, torch, fptquant as fq\n"
        "torch.set_num_threads(1)\n"
        "model, tokenizer = fq.load_calibrated(sys.argv[1] + '/out')\n"
        "tokens, logits = torch.load(sys.argv[1] + '/expected.pt')\n"
        "assert torch.equal(model(tokens).logits, logits), (model(tokens).logits - logits).abs().max()\n"
        "assert tokenizer.decode(tokenizer('same text')['input_ids']) == 'same text'\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "transformed" / "config.json").exists()  # it is no plain model
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = {"T_r", "T_v", "T_u", "S_n"} | SYMBOLS.get(online, {"T_d"})
    assert {entry["symbol"] for entry in stored["transforms"]} >= expected
    assert 1 <= stored["largest_condition_numbers"]["T_v"] < 1000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mergeable_transforms_save_a_plain_checkpoint(architecture: str, tmp_path: Path) -> None:
    model, tokens = model_of(architecture), token_ids(1, 30)
    result = fq.calibrate(
        model,
        tiny_tokenizer(),
        config("transforms.down_hadamard=false", "transforms.residual_scaling=false", architecture=architecture),
        progress=quiet,
    )
    assert result.fully_mergeable
    result.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert type(plain) is type(model)
    expected = model(tokens).logits
    assert (plain(tokens).logits - expected).abs().max() < 2e-5 * expected.abs().max()
    loaded, _ = fq.load_calibrated(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, result.model(tokens).logits)


def test_saving_refuses_to_overwrite_and_loading_names_what_is_broken(tmp_path: Path) -> None:
    result = fq.calibrate(model_of(), tiny_tokenizer(), config(), progress=quiet)
    out = result.save(tmp_path / "out")
    with pytest.raises(fq.UserError, match="holds another run"):
        result.save(out)
    result.save(out, overwrite=True)
    (tmp_path / "run").mkdir()
    result.save(tmp_path / "run" / "model")
    assert fq.load_calibrated(tmp_path / "run")[0].config.hidden_size == fq.load_calibrated(out)[0].config.hidden_size
    (out / "quantizers.safetensors").write_bytes(b"short")
    with pytest.raises(fq.UserError, match=r"quantizers\.safetensors is missing or damaged"):
        fq.load_calibrated(out)
    with pytest.raises(fq.UserError, match="holds no calibrated model"):
        fq.load_calibrated(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["calibration.window=4096"], "4,096"),
        (["calibration.window=126", "quantization.prefix=[1,2,3,4]"], r"calibration\.window = 126 and a prefix of up to 4 tokens"),
        (["calibration.windows=100000", "calibration.window=100"], "10,000,000|100,000"),
        (
            ["calibration.context=4096", "quantization=w4a4kv4-dynamic"],
            r"calibration\.context = 4,096 is longer than the model's context",
        ),
        (["transforms.down_hadamard.block_size=7"], "7"),
        (["quantization=w4a16-g7"], "group_size = 7 does not divide the 64 inputs of q_proj"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(overrides: list[str], message: str) -> None:
    calls: list[str] = []
    with pytest.raises(fq.UserError, match=message):
        fq.calibrate(model_of(), tiny_tokenizer(), config(*overrides), progress=lambda done, total, text: calls.append(text))
    assert not calls


@pytest.mark.parametrize("in_place", [False, True])
def test_models_that_cannot_be_calibrated_are_refused_as_they_are(in_place: bool) -> None:
    calls: list[str] = []

    def refuse(model: PreTrainedModel, message: str, *overrides: str) -> None:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(fq.UserError, match=message):
            fq.calibrate(
                model,
                tiny_tokenizer(),
                config(*overrides),
                in_place=in_place,
                progress=lambda done, total, text: calls.append(text),
            )
        assert not calls
        assert all(torch.equal(value.nan_to_num(), state[name].nan_to_num()) for name, value in model.state_dict().items())

    refuse(model_of(), "group_size = 7", "quantization=w4a16-g7")
    stretched = tiny_model("LlamaForCausalLM", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refuse(
        stretched,
        r"spread windows .* RoPE of type dynamic.*set calibration\.context=null",
        "calibration.context=96",
        "quantization.prefix=null",
    )
    broken = model_of()
    broken.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    refuse(broken, r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 values that are NaN or infinite")
    calibrated = fq.calibrate(model_of(), tiny_tokenizer(), config("quantization=w4a16"), progress=quiet).model
    refuse(calibrated, "prepared for quantization already")


def test_query_key_rotation_is_refused_on_qwen3() -> None:
    with pytest.raises(fq.UserError, match="T_k"):
        fq.calibrate(model_of("Qwen3ForCausalLM"), tiny_tokenizer(), config(), progress=quiet)
