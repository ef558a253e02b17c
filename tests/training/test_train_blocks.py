"""Training block by block: every block learns from its own output, and the model that comes of it is an ordinary calibrated one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import fptquant as fq
from fptquant.config.schema import Config
from fptquant.config.training import BlockLearningRates, BlockTrainingConfig
from fptquant.data.training import TrainingData
from fptquant.data.windows import own_position
from fptquant.files import KeptFiles
from fptquant.models.adapter import model_sizes
from fptquant.models.architectures import view_model
from fptquant.models.context import placed
from fptquant.models.instrument import instrument, instrument_for, iter_quantizers, kept_modes, range_tensors, set_modes
from fptquant.models.norm import widen_norms_
from fptquant.models.prefix import compute_prefix_, prefix_off
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.models.saving import CalibrationResult
from fptquant.quantizers.sites import kind_of
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.merge_transforms import rotate_residual_
from fptquant.stages.progress import quiet
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.training.checkpoint import Checkpoint, save_checkpoint
from fptquant.training.train_blocks import FOLDER, KEPT, train_blocks_
from fptquant.training.transform_student import attach_transforms_, merge_attached_
from fptquant.transforms import ModelTransforms, TransformOptions, build_transforms
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, tiny_model, token_ids
from tests.stages.transformed import fused_model, random_transforms
from tests.tiny_tokenizer import VOCABULARY, tiny_tokenizer

WINDOWS, HELD_OUT = token_ids(6, 24, seed=5), token_ids(2, 24, seed=6)
DATA = TrainingData(WINDOWS, HELD_OUT, "random tokens", "digest", 1.0, 0)


def attached(architecture: str, *, prefix: bool = False, spread: bool = False, bits: int = 4) -> tuple[Any, ModelTransforms]:
    """A tiny random model with attached transforms, at their start or random, whose ranges are set and on."""
    model = fused_model(architecture, "hidden-36", dtype=torch.float64).requires_grad_(False)
    options = TransformOptions(
        query_key_rotation=architecture != "Qwen3ForCausalLM", value_mixing="hadamard", up_scaling=True, down_hadamard=True,
        residual_scaling="input",
    )  # fmt: skip
    transforms = random_transforms(model, options)
    for parameter in () if spread else transforms.parameters():
        parameter.data.zero_()
    instrument(model, setting(bits, weight_bits=4, prefix=[3, 4] if prefix else None), residual_scaling="input", down_hadamard=True)
    return ready(model, transforms, [3, 4] if prefix else None), transforms


def ready(model: PreTrainedModel, transforms: ModelTransforms, prefix: list[int] | None) -> PreTrainedModel:
    """An instrumented model with its transforms attached, a prefix, and ranges that are set and on."""
    attach_transforms_(model, transforms)
    if prefix is not None:
        compute_prefix_(model, prefix)
    set_weight_ranges_(model)
    set_activation_ranges_(model, WINDOWS)
    return model


RECIPES = {
    "flatquant-static": ("flatquant", "quantization=w4a4kv4-static", "quantization.prefix=null"),
    "flatquant-dynamic": ("flatquant", "quantization=w4a4kv4-dynamic", "quantization.prefix=null"),
    "omniquant-static": ("omniquant", "quantization=w4a4kv4-static", "quantization.prefix=null"),
    "omniquant-dynamic": ("omniquant", "quantization=w4a4kv4-dynamic", "quantization.prefix=null"),
    "prefixquant": ("prefixquant", "quantization=w4a4kv4-static", "quantization.prefix=[3, 4]"),
}
LEARN = {
    "flatquant": {"kronecker", "query_key_mixing", "value_mixing", "norm_scaling", "up_scaling", "weight_range",
                  "activation_range", "kv_cache_range"},
    "omniquant": {"norm_scaling", "value_mixing", "query_key_rotation", "weight_range"},
    "prefixquant": {"weight", "weight_range", "activation_range", "kv_cache_range"},
}  # fmt: skip
"""What is trained, by the recipes' descriptions."""


def settings_of(config: Config, **options: Any) -> BlockTrainingConfig:
    """A recipe's block training, short enough for `DATA`."""
    assert config.block_training is not None
    short = {"steps": 24, "batch": 3, "evaluate_every": 8}
    return BlockTrainingConfig.model_validate(config.block_training.model_dump() | short | options)


def loud_model(config: Config) -> PreTrainedModel:
    """A tiny random model with grouped heads, and two loud channels in each norm's output, prepared as the recipe says."""
    model = tiny_model("LlamaForCausalLM", dtype=torch.float64, attention_bias=True, mlp_bias=True).requires_grad_(False)
    widen_norms_(model)
    for block in view_model(model).blocks:
        for norm in (block.input_norm, block.post_norm):
            norm.weight.data[[5, 40]] *= 4  # type: ignore[index]
    if config.norm_gains == "fused":
        fuse_norms_(model)
    return model


def of_recipe(name: str, *overrides: str) -> tuple[Any, ModelTransforms, Config]:
    """A model at the beginning of the recipe's block training."""
    config = fq.load_config(*RECIPES[name], *overrides)
    model = loud_model(config)
    transforms = build_transforms(model_sizes(view_model(model)), TransformOptions.of(config.transforms), seed=3)
    if transforms.residual_rotation is not None:
        rotate_residual_(model, transforms.residual_rotation)
    instrument_for(model, config, transforms)
    prefix = config.quantization.prefix
    return ready(model, transforms, prefix if isinstance(prefix, list) else None), transforms, config


def outputs(model: Any, windows: Tensor, positions: int | None = None) -> list[Tensor]:
    """The true residual behind every block, in a pass of the whole model; each window at its own one of the positions."""
    found: list[Tensor] = []

    def catch(module: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        scale = view.decoder.context.running_scale
        found.append(hidden if scale is None else hidden * scale)

    view = view_model(model)
    hooks = [layer.register_forward_hook(catch) for layer in view.layers]
    with torch.no_grad():
        model(windows, **placed(windows, [own_position(window, positions) for window in windows]))
    for hook in hooks:
        hook.remove()
    return found


def exact_outputs(model: Any, windows: Tensor = HELD_OUT, positions: int | None = None) -> list[Tensor]:
    """Those of the model as it is, without its quantizers."""
    with kept_modes(model):
        set_modes(model, "off")
        return outputs(model, windows, positions)


def error(
    model: Any, windows: Tensor, *, relative: bool = True, exact: list[Tensor] | None = None, positions: int | None = None
) -> list[float]:
    """Of each block's output by passes of the whole model: the mean squared error of a token, in proportion to its size or not.

    It is that from the model without quantizers, unless ``exact`` is given.
    """
    quantized = outputs(model, windows, positions)
    exact = exact_outputs(model, windows, positions) if exact is None else exact
    errors = [(y - t).square().mean(-1) for y, t in zip(quantized, exact, strict=True)]
    sizes = [t.square().mean(-1) if relative else torch.ones(()) for t in exact]
    return [float((found / size).mean()) for found, size in zip(errors, sizes, strict=True)]


@pytest.mark.parametrize("positions", [None, 100], ids=["", "positions"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_reported_of_blocks_are_errors_of_the_whole_model(architecture: str, prefix: bool, positions: int | None) -> None:
    """Learning rates so small that nothing moves: then the streams are those of the model as it was."""
    model, transforms = attached(architecture, prefix=prefix, spread=True)
    expected = error(model, HELD_OUT, positions=positions)
    if positions is not None:  # quantized keys depend on them
        assert expected != pytest.approx(error(model, HELD_OUT), rel=1e-3)
    rates = dict.fromkeys(("query_key_rotation", "value_mixing", "up_scaling"), 1e-30)
    rates |= dict.fromkeys(("weight_range", "activation_range", "kv_cache_range"), 1e-30)
    settings = BlockTrainingConfig.model_validate({"steps": 1, "batch": 2, "lr": rates})
    report = train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={}, positions=positions)
    assert [block["initial"] for block in report["blocks"]] == pytest.approx(expected, rel=1e-9)
    assert report["tokens"] == WINDOWS.numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_block_comes_closer_and_the_merged_model_does_the_same(architecture: str) -> None:
    model, transforms = attached(architecture)
    before = error(model, HELD_OUT)
    groups = ["weight_range", "activation_range", "kv_cache_range", "query_key_rotation", "value_mixing", "up_scaling"]
    settings = BlockTrainingConfig.model_validate(
        {"steps": 40, "batch": 3, "evaluate_every": 10, "lr": dict.fromkeys(groups, 0.01)}
    )
    report = train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={})
    after = error(model, HELD_OUT)
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))
    assert [block["best"] for block in report["blocks"]] == pytest.approx(after, rel=1e-6)
    assert set(groups) - set(report["parameters"]) == ({"query_key_rotation"} if architecture == "Qwen3ForCausalLM" else set())
    assert not any(parameter.requires_grad for parameter in transforms.parameters())
    assert all(quantizer.scale is None or not quantizer.scale.requires_grad for _, quantizer in iter_quantizers(model))
    check_merging(model, transforms, fused_model(architecture, "hidden-36", dtype=torch.float64))


@torch.no_grad()
def check_merging(model: Any, transforms: ModelTransforms, plain: PreTrainedModel | None) -> None:
    """Merges trained transforms: logits are those before, and without quantizers and a prefix those of a plain one."""
    attached_logits = model(HELD_OUT).logits
    merge_attached_(model, transforms)
    merged_logits = model(HELD_OUT).logits
    set_modes(model, "off")
    with prefix_off(model):
        unquantized = model(HELD_OUT).logits
    # a value in the middle between two steps may go either way
    agree = (attached_logits - merged_logits).abs() < 1e-9 * unquantized.abs().max()
    assert float(agree.double().mean()) > 0.9
    if plain is None:
        return
    exact = plain(HELD_OUT).logits
    assert (unquantized - exact).abs().max() < 1e-5 * exact.abs().max()  # parameters are float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_may_be_in_full_precision_meanwhile(architecture: str) -> None:
    """Then the errors are those of activations and cache alone."""
    model, transforms = attached(architecture)
    with kept_modes(model):
        set_modes(model, "off", "weight")
        before = error(model, HELD_OUT)
    groups = ["activation_range", "kv_cache_range", "query_key_rotation", "value_mixing", "up_scaling"]
    settings = BlockTrainingConfig.model_validate(
        {"steps": 40, "batch": 3, "evaluate_every": 10, "weights": "full_precision", "lr": dict.fromkeys(groups, 0.01)}
    )
    report = train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={})
    assert report["blocks"][0]["initial"] == pytest.approx(before[0], rel=1e-9)
    assert "weight_range" not in report["parameters"]
    after = error(model, HELD_OUT)
    assert all(new < 0.95 * old for new, old in zip(after, before, strict=True))
    assert [block["best"] for block in report["blocks"]] == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_every_block_of_a_recipe_comes_closer_and_the_merged_model_does_the_same(name: str) -> None:
    model, transforms, config = of_recipe(name)
    exact = exact_outputs(model)
    before = error(model, HELD_OUT, relative=False)
    report = train_blocks_(model, transforms, settings_of(config), DATA, seed=0, belongs_to={})
    after = error(model, HELD_OUT, relative=False, exact=exact)
    assert all(new < 0.97 * old for new, old in zip(after, before, strict=True))
    assert [block["best"] for block in report["blocks"]] == pytest.approx(after, rel=1e-6)
    assert set(report["parameters"]) == LEARN[config.name]
    check_merging(model, transforms, None if "weight" in report["parameters"] else loud_model(config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_may_be_trained_and_bring_blocks_closer_to_what_they_gave_before(architecture: str) -> None:
    """With all other rates null: nothing else can have done it. Biases, norms and what belongs to no block stay."""
    model, transforms = attached(architecture)
    before, exact, others = error(model, HELD_OUT), exact_outputs(model), frozen(model)
    rates = dict.fromkeys(BlockLearningRates.model_fields) | {"weight": 0.001}
    settings = BlockTrainingConfig.model_validate({"steps": 40, "batch": 4, "evaluate_every": 10, "lr": rates})
    data = TrainingData(token_ids(32, 24, seed=9), HELD_OUT, "random tokens", "digest", 1.0, 0)
    report = train_blocks_(model, transforms, settings, data, seed=0, belongs_to={})
    after = error(model, HELD_OUT, exact=exact)
    assert all(new < 0.97 * old for new, old in zip(after, before, strict=True))
    assert [block["best"] for block in report["blocks"]] == pytest.approx(after, rel=1e-6)
    assert set(report["parameters"]) == {"weight"}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, others[name]) for name, tensor in frozen(model).items())


def frozen(model: Any) -> dict[str, Tensor]:
    """Everything but the weights of linears."""
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name not in linears}


WHOLE = ("quantization.activation.range.clip_ratio=1", "quantization.kv_cache.range.clip_ratio=1")


def test_what_dynamic_quantizers_clip_is_learned_and_brings_blocks_closer() -> None:
    """With all other rates null, from ranges that clip nothing: nothing else can have done it."""
    model, transforms, config = of_recipe("flatquant-dynamic", *WHOLE)
    before = error(model, HELD_OUT, relative=False)
    rates = dict.fromkeys(LEARN["flatquant"]) | {"activation_range": 0.02, "kv_cache_range": 0.02}
    report = train_blocks_(model, transforms, settings_of(config, lr=rates), DATA, seed=0, belongs_to={})
    after = error(model, HELD_OUT, relative=False)
    assert all(new < 0.97 * old for new, old in zip(after, before, strict=True))
    assert set(report["parameters"]) == {"activation_range", "kv_cache_range"}
    clips = [quantizer.clip for _, quantizer in iter_quantizers(model) if quantizer.dynamic]
    assert len(clips) == 12
    assert all(clip is not None and abs(float(clip) - 1) > 1e-3 for clip in clips)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_killed_goes_on_with_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(**options: Any) -> dict[str, Tensor]:
        model, transforms, config = of_recipe(name)
        settings = settings_of(config, steps=2, evaluate_every=1, checkpoint_seconds=0.0)
        train_blocks_(model, transforms, settings, DATA, seed=0, belongs_to={}, **options)
        return range_tensors(model) | transforms.state_dict() | {"logits": model(HELD_OUT).logits}

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if path.parent.name == "1" and saved.position.step == 1:
            raise KeyboardInterrupt

    expected = train()
    monkeypatch.setattr("fptquant.training.train_blocks.KeptFiles", lambda folder: KeptFiles(folder, 0.0))
    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(folder=tmp_path)
    found = train(folder=tmp_path, resume=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


SHORT = (
    "quantization=w4a8kv8-static", "quantization.prefix=null", "calibration.windows=2", "calibration.window=32",
    "evaluation.window=32",
    "block_training={steps: 4, batch: 2, windows: 4, window: 32, text: topics, held_out_windows: 1, evaluate_every: 2}",
)  # fmt: skip
MORE = (
    "training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}",
    "rounding={method: gptq, text: topics, windows: 2, window: 32}",
    "range_training={steps: 2, window: 32, text: topics, held_out_windows: 1, evaluate_every: 1}",
)
FULL_PRECISION = "block_training.weights=full_precision"
DYNAMIC = ("quantization=w4a4kv4-dynamic",)


def calibrate(*overrides: str, recipe: str = "fptquant-local", **options: Any) -> CalibrationResult:
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCABULARY)
    config = fq.load_config(recipe, *SHORT, *overrides)
    return fq.calibrate(model, tiny_tokenizer(), config, progress=quiet, **options)


def test_it_is_a_stage_of_the_pipeline() -> None:
    result = calibrate()
    assert all(linear.merging is None for linear in result.model.modules() if isinstance(linear, QuantizedLinear))
    assert result.metrics["stages"]["block training"] > 0
    local = calibrate("block_training=null")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(result.model.state_dict()[name], local.model.state_dict()[name])


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
@pytest.mark.parametrize("then", ["nothing", "quantized", "full_precision"])
def test_after_weights_in_full_precision_their_ranges_are_those_of_what_is_merged(then: str) -> None:
    """Set before a training that quantizes them, otherwise at the end, from the stored weights."""
    training = "training=null" if then == "nothing" else MORE[0].replace("{", f"{{weights: {then}, ")
    rate = ["training.lr.weight_range=1e-30"] if then == "quantized" else []
    result = calibrate(FULL_PRECISION, training, *rate)
    found = {name: tensor.clone() for name, tensor in range_tensors(result.model).items()}
    set_weight_ranges_(result.model)
    for name, tensor in range_tensors(result.model).items():
        tolerance = {} if then != "quantized" else {"rtol": 0.2}  # transforms moved on
        torch.testing.assert_close(found[name], tensor, **({"rtol": 0, "atol": 0} | tolerance))
    assert all(quantizer.mode == "on" for _, quantizer in iter_quantizers(result.model))


@pytest.mark.parametrize("learned", [(), ("activation", "kv_cache"), ("kv_cache",), ("activation",)])
def test_static_ranges_that_do_not_learn_are_set_anew_for_what_the_blocks_have_learned(
    learned: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(model: PreTrainedModel, windows: Tensor, **options: Any) -> None:
        seen.append(windows)
        set_activation_ranges_(model, windows, **options)

    monkeypatch.setattr("fptquant.stages.calibrate.set_activation_ranges_", watched)
    rates = {kind: "0.01" if kind in learned else "null" for kind in ("activation", "kv_cache")}
    result = calibrate(*(f"block_training.lr.{kind}_range={rate}" for kind, rate in rates.items()))
    assert len(seen) == (1 if len(learned) == 2 else 2)
    found = {name: tensor.clone() for name, tensor in range_tensors(result.model).items()}
    set_activation_ranges_(result.model, seen[0], first_position=result.config.calibration.first_position)
    again = range_tensors(result.model)
    assert found.keys() == again.keys()
    changed = {kind_of(name.rpartition(".")[0]) for name in found if not torch.equal(found[name], again[name])}
    assert changed == set(learned)


@pytest.mark.filterwarnings("ignore:.*did not lower", "ignore:the held-out divergence")
@pytest.mark.parametrize(
    ("recipe", "more"),
    [("flatquant", DYNAMIC), ("fptquant-local", MORE), ("fptquant-local", (*MORE, FULL_PRECISION))],
    ids=["flatquant", "with-everything", "weights-in-full-precision"],
)
@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["kept", "lost"])
@pytest.mark.parametrize("last", [2, 4], ids=["in-a-block", "after-a-block"])
def test_a_run_that_is_killed_goes_on_with_the_same_bits(
    last: int, seconds: float, recipe: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(*more, recipe=recipe)

    def stop(path: Path, saved: Checkpoint) -> None:
        save_checkpoint(path, saved)
        if path.parent == tmp_path / FOLDER / "1" and saved.position.step == last:
            raise KeyboardInterrupt

    monkeypatch.setattr("fptquant.training.train_blocks.KeptFiles", lambda folder: KeptFiles(folder, seconds))
    with monkeypatch.context() as patched:
        patched.setattr("fptquant.training.train_end_to_end.save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            calibrate("block_training.checkpoint_seconds=0", *more, recipe=recipe, folder=tmp_path)
    assert (tmp_path / KEPT / "block-0.safetensors").is_file() == (seconds == 0)
    again = calibrate("block_training.checkpoint_seconds=0", *more, recipe=recipe, folder=tmp_path, resume=True)
    expected, found = (result.model.state_dict() for result in (whole, again))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    online, again_online = whole.transforms.state_dict(), again.transforms.state_dict()
    assert all(torch.equal(online[name], again_online[name]) for name in online)
    lines = [json.loads(line) for line in (tmp_path / FOLDER / "1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]


def test_nothing_is_trained_while_nothing_is_quantized() -> None:
    """With weights in full precision and 16 bits for the rest, a block gives what it is to give."""
    config = fq.load_config("prefixquant", FULL_PRECISION, "block_training.lr.weight_range=null")
    weights_alone = config.model_copy(update={"quantization": fq.load_config("rtn", "quantization=w4a16").quantization})
    assert config.trained_blocks is not None
    assert weights_alone.trained_blocks is None
    assert not weights_alone.attaches


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.residual_rotation: has no effect: T_r belongs to all blocks"):
        fq.load_config("fptquant-local", "block_training.lr.residual_rotation=0.1")
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.up_scaling: has no effect: transforms\.up_scaling is not used"):
        fq.load_config("rtn", "block_training.lr.up_scaling=0.1")
    with pytest.raises(
        fq.UserError, match=r"block_training\.lr\.weight_range: has no effect: block_training\.weights = full_precision"
    ):
        fq.load_config("fptquant-local", FULL_PRECISION, "block_training.lr.weight_range=0.1")
    with pytest.raises(
        fq.UserError, match=r"block_training\.steps: has no effect: nothing is quantized meanwhile, so block training"
    ):
        fq.load_config("fptquant-local", "quantization=w4a16", FULL_PRECISION, "block_training.steps=3")
    weight = "block_training.lr.weight=0.001"
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.weight: steps of such a size are lost in bfloat16 weights"):
        fq.load_config("fptquant-local", weight, "dtype=bfloat16")
    with pytest.raises(fq.UserError, match=r"block_training\.lr\.weight: the teacher of range_training is the model without quant"):
        fq.load_config("fptquant-local-gptq", weight, "range_training.steps=3")
    with pytest.raises(fq.UserError, match=r"training\.lr\.weight: "):
        fq.load_config("fptquant", "training.lr.weight=0.001")
    with pytest.raises(fq.UserError, match=r"block_training: has no effect: nothing is quantized"):
        fq.load_config("rtn", "quantization=w16a16", "block_training={}")
    with pytest.raises(fq.UserError, match=r"block_training\.window"):
        calibrate("block_training.window=100000")
