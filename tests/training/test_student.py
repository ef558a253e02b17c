"""Student and teacher share one model: the same function without quantizers, and gradients that reach everything trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.config.quantization import QuantizationConfig
from fptquant.config.training import TrainingConfig
from fptquant.data.windows import own_position
from fptquant.models.instrument import instrument, iter_quantizers, load_ranges_, quantizers_off, range_tensors, set_modes
from fptquant.models.prefix import compute_prefix_, prefix_off, shift_keys
from fptquant.models.quantized_linear import QuantizedLinear
from fptquant.stages.set_ranges import set_activation_ranges_, set_weight_ranges_
from fptquant.training.transform_student import TransformStudent, attach_transforms_
from fptquant.transforms import TransformOptions
from tests.models.prepare import setting
from tests.models.tiny import ARCHITECTURES, token_ids
from tests.stages.transformed import fused_model, random_transforms
from tests.training.learning import share_of_divergence

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")
EVERYTHING = {
    architecture: TransformOptions(
        query_key_rotation=architecture != "Qwen3ForCausalLM",
        value_mixing="hadamard",
        up_scaling=True,
        down_hadamard=True,
        out_hadamard=True,
        residual_scaling="input",
    )
    for architecture in ARCHITECTURES
}
PRODUCTS = TransformOptions(
    norm_scaling=True,
    value_mixing="hadamard",
    up_scaling=True,
    kronecker="random_orthogonal",
    query_key_mixing="random_orthogonal",
)
STATIC = setting(4, weight_bits=4)
DYNAMIC = setting(4, dynamic=True, weight_bits=4)


def settings(rotation: float | None = None, **options: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"lr": {"residual_rotation": rotation}, **options})


def make(
    architecture: str = "LlamaForCausalLM",
    quantization: QuantizationConfig = STATIC,
    training: TrainingConfig | None = None,
    dtype: torch.dtype = torch.float64,
    spread: bool = True,
    options: TransformOptions | None = None,
    loud: float = 1.0,
) -> TransformStudent:
    """A student on a tiny random model, its ranges set; its transforms random, or at their start; a channel as loud as this."""
    model = loud_model(architecture, dtype, loud).requires_grad_(False)
    options = options or EVERYTHING[architecture]
    transforms = random_transforms(model, options)
    if not spread:
        for parameter in transforms.parameters():
            parameter.data.zero_()
    instrument(
        model,
        quantization,
        residual_scaling=options.residual_scaling,
        down_hadamard=options.down_hadamard,
        out_hadamard=options.out_hadamard,
        transforms=transforms,
    )
    attach_transforms_(model, transforms)
    if isinstance(quantization.prefix, list):
        compute_prefix_(model, quantization.prefix)
    set_weight_ranges_(model)
    set_activation_ranges_(model, token_ids(4, 24, seed=7))
    return TransformStudent(model, transforms, training or settings())


def loud_model(architecture: str, dtype: torch.dtype, factor: float) -> PreTrainedModel:
    """Its embeddings have one channel that many times as large."""
    model = fused_model(architecture, "hidden-36", dtype=dtype)
    model.get_input_embeddings().weight.data[:, 5] *= factor
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_stand_at_places_of_their_own(architecture: str) -> None:
    tokens, student = token_ids(3, 12), make(architecture)
    places = [own_position(window, 100) for window in tokens]
    assert len(set(places)) > 1
    assert all(0 <= place <= 88 for place in places)
    assert places == [own_position(window.clone(), 100) for window in tokens]
    assert [own_position(window, length) for window, length in zip(tokens, (None, 12, 5), strict=True)] == [0, 0, 0]
    seen: list[Tensor] = []
    for name, quantizer in iter_quantizers(student.model):
        if name == "layers.0.k_cache":
            quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad(), quantizers_off(student.model):
        hidden = student._student_hidden(tokens)
        student.positions = 100
        moved = student._student_hidden(tokens)
    torch.testing.assert_close(moved, hidden, rtol=1e-4, atol=1e-4)  # angles of RoPE are float32
    expected = torch.stack([shift_keys(x, student.view.get("rotary").inv_freq, p) for x, p in zip(seen[0], places, strict=True)])
    torch.testing.assert_close(seen[1], expected, rtol=1e-4, atol=1e-4)
    assert (seen[1] - seen[0]).abs().max() > 0.1


@torch.no_grad()
def logits(student: TransformStudent) -> Tensor:
    return student.view.lm_head(student._student_hidden(token_ids())).double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_transforms_merged_in_every_pass_keep_the_function(architecture: str, dtype: torch.dtype, bound: float) -> None:
    student = make(architecture, training=settings(rotation=0.1), dtype=dtype)
    assert student.rotation is not None
    student.rotation.randomize_(torch.Generator().manual_seed(1))
    set_modes(student.model, "off")
    plain = fused_model(architecture, "hidden-36", dtype=dtype)
    with torch.no_grad():
        expected = plain(token_ids()).logits.double()
        teacher = student.view.lm_head(student._teacher_hidden(token_ids())).double()
    size = expected.abs().max()
    assert (logits(student) - expected).abs().max() < bound * size
    assert (teacher - expected).abs().max() < bound * size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("prefix", [None, [3, 4]], ids=["plain", "prefix"])
def test_products_and_scales_of_norms_are_trained_and_finished(architecture: str, prefix: list[int] | None) -> None:
    student = make(architecture, setting(4, weight_bits=4, prefix=prefix), options=PRODUCTS)
    plain = fused_model(architecture, "hidden-36", dtype=torch.float64)
    with torch.no_grad():
        expected = plain(token_ids()).logits
        teacher = student.view.lm_head(student._teacher_hidden(token_ids()))
    assert (teacher - expected).abs().max() < 1e-12 * expected.abs().max()
    student(token_ids()).backward()
    groups = {name: dict(group) for name, group in student.parameter_groups().items()}
    expected_counts = {
        "kronecker": 2 * (2 + 2 + 1 + 2),
        "query_key_mixing": 2,
        "norm_scaling": 4,
        "value_mixing": 2,
        "up_scaling": 2,
    }
    assert {name: len(groups[name]) for name in expected_counts} == expected_counts
    assert min(float(p.grad.abs().max()) for name in expected_counts for p in groups[name].values()) > 1e-9
    before = logits(student)
    student.finish_()
    with torch.no_grad():
        after = student.model(token_ids()).logits
        assert (after - before).abs().max() < 1e-9 * before.abs().max()
        set_modes(student.model, "off")
        with prefix_off(student.model):
            exact = student.model(token_ids()).logits
    assert (exact - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_teacher_reads_a_window_once_and_its_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    student, ids = make(), token_ids(3, 24)
    passes: list[int] = []
    student.view.decoder.register_forward_hook(lambda *_: passes.append(1))
    first = [student._teacher_hidden(window[None]) for window in ids]
    again = [student._teacher_hidden(window[None]) for window in ids]
    assert len(passes) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    monkeypatch.setattr("fptquant.training.student.REMEMBERED_BYTES", 0)
    assert all(torch.equal(student._teacher_hidden(window[None]), hidden) for window, hidden in zip(ids, first, strict=True))
    assert len(passes) == 6
    bounded = make()
    monkeypatch.setattr("fptquant.training.student.REMEMBERED_BYTES", 2 * first[0].nbytes)
    for window in ids:
        bounded._teacher_hidden(window[None])
    assert sum(hidden.nbytes for hidden in bounded._remembered.values()) == 2 * first[0].nbytes
    bounded.finish_()
    assert not bounded._remembered


@pytest.mark.parametrize("objective", ["jsd", "forward_kl", "reverse_kl", "cross_entropy", "hidden_mse"])
def test_without_quantizers_no_transform_changes_the_loss(objective: str) -> None:
    student = make(training=settings(rotation=0.1, objective=objective))
    student(token_ids()).backward()
    groups = student.parameter_groups()
    with_quantizers = {name: max(float(p.grad.abs().max()) for _, p in group) for name, group in groups.items()}
    assert min(with_quantizers.values()) > 1e-9
    student.zero_grad()
    set_modes(student.model, "off")
    loss = student(token_ids())
    loss.backward()
    transforms = [p for name, group in groups.items() if not name.endswith("range") for _, p in group]
    # the two sides of a transform cancel; each gradient was rounded to the parameters' float32 before
    assert max(float(p.grad.abs().max()) for p in transforms) < 2e-8
    assert (float(loss.detach()) > 1) == (objective == "cross_entropy")


@pytest.mark.parametrize("quantization", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_training_lowers_the_loss(quantization: QuantizationConfig) -> None:
    student = make(quantization=quantization, dtype=torch.float32, spread=False)
    assert share_of_divergence(student) < 0.85


@pytest.mark.parametrize("objective", ["jsd", "cross_entropy"])
def test_learned_rotations_alone_spread_a_loud_channel(objective: str) -> None:
    """SpinQuant's part: T_r and an orthogonal T_v learn, nothing else; both stay rotations, and the function stays."""
    rates = {"residual_rotation": 0.01, "value_mixing": 0.01, "activation_range": None, "kv_cache_range": None}
    training = TrainingConfig.model_validate({"objective": objective, "lr": rates})
    rotations = TransformOptions(value_mixing="hadamard", value_constraint="orthogonal")
    student = make(quantization=setting(4, dynamic=True), training=training, spread=False, options=rotations, loud=30)
    assert student.rotation is not None
    groups = {name: [p for _, p in group] for name, group in student.parameter_groups().items()}
    assert {name for name, group in groups.items() if group} == {"residual_rotation", "value_mixing"}
    tokens, optimizer = token_ids(4, 24, seed=3), torch.optim.Adam([p for group in groups.values() for p in group], lr=0.02)
    before = float(student.divergence(tokens))
    for _ in range(40):
        optimizer.zero_grad()
        student(tokens).backward()
        optimizer.step()
    assert float(student.divergence(tokens)) < 0.7 * before
    turned = student.rotation.matrix()
    assert turned[:, 5].abs().max() < 0.7  # the channel is spread; it began as itself
    identity = torch.eye(len(turned), dtype=turned.dtype)
    assert (turned @ turned.mT - identity).abs().max() < 1e-12
    set_modes(student.model, "off")
    with torch.no_grad():
        expected = loud_model("LlamaForCausalLM", torch.float64, 30)(token_ids()).logits
    assert (logits(student) - expected).abs().max() < 1e-11 * expected.abs().max()


def test_what_dynamic_quantizers_clip_is_trained_and_kept() -> None:
    student = make(quantization=DYNAMIC)
    groups = student.parameter_groups()
    dynamic = {name: q for name, q in iter_quantizers(student.model) if q.dynamic}
    assert len(groups["activation_range"]) + len(groups["kv_cache_range"]) == len(dynamic) > 0
    before = logits(student)
    assert all(torch.equal(quantizer.clip, torch.ones(())) for quantizer in dynamic.values() if quantizer.clip is not None)
    student(token_ids()).backward()
    assert all(float(p.grad.abs()) > 1e-9 for _, p in groups["activation_range"])
    with torch.no_grad():
        for _, parameter in groups["activation_range"]:
            parameter.fill_(-0.5)
    changed = logits(student)
    assert (changed - before).abs().max() > 1e-3 * before.abs().max()
    student.finish_()
    saved = range_tensors(student.model)
    clips = {name for name in saved if name.endswith(".clip")}
    assert clips == {f"{name}.clip" for name in dynamic}
    with torch.no_grad():
        assert (student.model(token_ids()).logits - changed).abs().median() < 1e-9 * changed.abs().max()
        for quantizer in dynamic.values():
            quantizer.clip = None
        assert (student.model(token_ids()).logits - changed).abs().max() > 1e-3 * before.abs().max()
        load_ranges_(student.model, saved, "saved")
        assert (student.model(token_ids()).logits - changed).abs().median() < 1e-9 * changed.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finish_leaves_a_calibrated_model_that_does_the_same(architecture: str) -> None:
    student = make(architecture, training=settings(rotation=0.1))
    with torch.no_grad():
        for group in student.parameter_groups().values():
            for _, parameter in group:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    expected = logits(student)
    model = student.model
    keys = set(model.state_dict())
    student.finish_()
    with torch.no_grad():
        actual = model(token_ids()).logits.double()
    # a value in the middle between two steps may go either way: nearly all logits agree
    assert (actual - expected).abs().median() < 1e-10 * expected.abs().max()
    assert set(model.state_dict()) == keys
    assert all(module.merging is None for module in model.modules() if isinstance(module, QuantizedLinear))
    assert not any(value.requires_grad for value in model.state_dict(keep_vars=True).values())
    for _, quantizer in iter_quantizers(model):
        assert quantizer.zero_point is None or torch.equal(quantizer.zero_point, quantizer.zero_point.round())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_prefix_is_transformed_with_the_model(architecture: str) -> None:
    student = make(architecture, setting(4, weight_bits=4, prefix=[5, 9]))
    set_modes(student.model, "off")
    plain = fused_model(architecture, "hidden-36", dtype=torch.float64)
    ids = token_ids()
    with torch.no_grad():
        expected = plain(ids).logits
        teacher = student.view.lm_head(student._teacher_hidden(ids))
        prefixed = plain(torch.cat([torch.tensor([[5, 9]]).expand(len(ids), 2), ids], dim=1)).logits[:, 2:]
    # RoPE's angles are float32 in the library, hence 1e-6 where positions differ
    torch.testing.assert_close(teacher, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(logits(student), prefixed, rtol=0, atol=1e-5)
    assert (prefixed - expected).abs().max() > 1e-2
    student.finish_()
    with torch.no_grad():
        torch.testing.assert_close(student.model(ids).logits, prefixed, rtol=0, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for enable in (False, True):
        student = make(training=settings(activation_checkpointing=enable))
        student(token_ids()).backward()
        gradients.append([p.grad for group in student.parameter_groups().values() for _, p in group])
    for plain, replayed in zip(*gradients, strict=True):
        assert plain is not None
        assert replayed is not None
        torch.testing.assert_close(plain, replayed, rtol=1e-10, atol=1e-14)


def test_only_what_has_a_learning_rate_is_trained() -> None:
    rates = {"query_key_rotation": None, "weight_range": None, "kv_cache_range": None}
    student = make(training=TrainingConfig.model_validate({"lr": rates}))
    assert list(student.parameter_groups()) == ["activation_range", "value_mixing", "up_scaling"]
    student(token_ids()).backward()
    named = {name for group in student.parameter_groups().values() for name, _ in group}
    assert len(named) == len(list(student.parameters()))
    assert student.transforms.block(0).query_key_rotation.angle.grad is None


def test_state_restores_every_parameter() -> None:
    student = make()
    state, expected = student.trainable_state(), logits(student)
    for group in student.parameter_groups().values():
        for _, parameter in group:
            parameter.data.add_(0.1)
    assert not torch.equal(logits(student), expected)
    student.load_trainable_state_(state)
    assert torch.equal(logits(student), expected)


def test_the_source_of_nan_is_named() -> None:
    student = make()
    assert student.nonfinite_source(token_ids()) is None
    groups = dict(student.parameter_groups()["activation_range"])
    groups["layers.1.down_in.log_scale"].data.fill_(torch.nan)
    assert student.nonfinite_source(token_ids()) == "the range of layers.1.down_in"
    groups["layers.1.down_in.log_scale"].data.fill_(0.0)
    student.transforms.block(0).value_mixing.log_mixing.data[0, 0, 0] = torch.nan  # type: ignore[union-attr]
    source = student.nonfinite_source(token_ids())
    assert source is not None
    assert "layers.0.self_attn.v_proj" in source


def test_the_source_of_nan_is_looked_for_where_the_windows_stand() -> None:
    """A key can overflow at one position and not at another."""
    student, seen = make(), []
    student.positions = 100
    student.view.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    windows = token_ids(2, 12)
    student.nonfinite_source(windows)
    assert [int(positions[0, 0]) for positions in seen] == [own_position(window, 100) for window in windows]


def test_autocast_stays_close() -> None:
    wide = make(dtype=torch.float32)
    narrow = make(dtype=torch.float32, training=settings(autocast="bfloat16"))
    losses = [float(student(token_ids()).detach()) for student in (wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
