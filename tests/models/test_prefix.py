"""A prefix acts as if its tokens preceded every text, with nothing of it in what the caller gives or gets."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fptquant.errors import UserError
from fptquant.models.attention import _causal_behind_prefix
from fptquant.models.instrument import get_context, instrument, iter_quantizers, set_modes
from fptquant.models.norm import widen_norms_
from fptquant.models.prefix import Prefix, compute_prefix_, model_prefixes, prefix_length, prefix_off, put_prefix_first, shift_keys
from tests.models.prepare import set_ranges, setting
from tests.models.tiny import ARCHITECTURES, SLIDING, given, tiny_model, token_ids

PREFIX = [17, 5, 90]
BOUNDS = {torch.bfloat16: 0.05, torch.float32: 5e-6, torch.float64: 1e-12}
"""Largest relative error of the logits: some tens of roundings of each dtype."""

everywhere = pytest.mark.parametrize("architecture", ARCHITECTURES)


class ExactRotary(nn.Module):
    """RoPE in float64: the library's own computes angles in float32, whatever the model's dtype."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.inv_freq = rotary.inv_freq.double()
        self.attention_scaling = rotary.attention_scaling

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        return (angle.cos() * self.attention_scaling).to(x.dtype), (angle.sin() * self.attention_scaling).to(x.dtype)


def plain_model(architecture: str, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    model = tiny_model(architecture, dtype=dtype, **options)
    widen_norms_(model)
    model.model.rotary_emb = ExactRotary(model.model.rotary_emb)
    return model


def with_prefix(model: PreTrainedModel, ids: list[int] = PREFIX, **options: Any) -> PreTrainedModel:
    """A copy that is prepared, quantizers off, with a prefix."""
    model = copy.deepcopy(model)
    transforms = {name: options.pop(name) for name in ("residual_scaling",) if name in options}
    instrument(model, setting(prefix=ids, **options), **transforms)
    compute_prefix_(model, ids)
    return model


def logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(ids, **inputs).logits
    return result


def behind_prefix(model: PreTrainedModel, ids: Tensor, prefix: list[int] = PREFIX) -> Tensor:
    """Logits of the plain model that reads the prefix itself."""
    before = torch.tensor([prefix]).expand(len(ids), -1)
    return logits(model, torch.cat([before, ids], dim=1))[:, len(prefix) :]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


@everywhere
@pytest.mark.parametrize("sites", ["linears_kv", "all"])
def test_equals_reading_the_prefix_and_more_exactly_in_wider_dtypes(architecture: str, sites: str) -> None:
    ids, errors = token_ids(2, 12), []
    for dtype, bound in BOUNDS.items():
        plain = plain_model(architecture, dtype)
        model = with_prefix(plain, sites=sites, residual_scaling="input" if sites == "all" else None)
        expected = behind_prefix(plain, ids)
        errors.append(relative(logits(model, ids), expected))
        assert errors[-1] < bound
        assert relative(logits(plain, ids), expected) > 0.1  # the prefix matters
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]


@everywhere
@pytest.mark.parametrize("length", [1, 2, 7])
def test_prefixes_of_other_lengths_and_texts_of_one_token(architecture: str, length: int) -> None:
    plain, prefix = plain_model(architecture), list(range(3, 3 + length))
    model = with_prefix(plain, prefix)
    assert prefix_length(model) == length
    for ids in (token_ids(2, 12), token_ids(3, 1)):
        assert relative(logits(model, ids), behind_prefix(plain, ids, prefix)) < BOUNDS[torch.float64]


@pytest.mark.parametrize("architecture", SLIDING)
def test_a_sliding_window_leaves_the_prefix_in_sight(architecture: str) -> None:
    plain = plain_model(architecture, **SLIDING[architecture])
    model = with_prefix(plain)
    short = token_ids(2, 2)  # with the prefix as long as the window: nothing is out of sight yet
    assert relative(logits(model, short), behind_prefix(plain, short)) < BOUNDS[torch.float64]
    long = token_ids(1, 30)
    other = with_prefix(plain, [4, 8, 15])
    last_of_one_layer = logits(model, long)[:, -1] - logits(other, long)[:, -1]
    assert last_of_one_layer.abs().max() > 1e-3
    assert relative(logits(model, long), behind_prefix(plain, long)) > 1e-3
    with pytest.raises(UserError, match="prefix of 6 tokens is longer than the model's sliding window of 5"):
        with_prefix(plain, [1, 2, 3, 4, 5, 6])


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_kinds_of_rope_whose_frequencies_are_fixed(kind: str) -> None:
    plain = plain_model("LlamaForCausalLM", rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]})
    assert relative(logits(with_prefix(plain), token_ids()), behind_prefix(plain, token_ids())) < BOUNDS[torch.float64]


def test_a_rope_that_depends_on_the_length_is_refused() -> None:
    model = tiny_model("LlamaForCausalLM", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UserError, match="RoPE of type dynamic"):
        instrument(model, setting(prefix=PREFIX))
    assert not any(hasattr(layer.self_attn, "prefix") for layer in model.model.layers)


@everywhere
@pytest.mark.parametrize("name", ["dynamic", "dynamic_config", "static"])
def test_every_cache_gives_the_logits_of_one_pass(architecture: str, name: str) -> None:
    plain, ids = plain_model(architecture), token_ids(2, 14)
    model = with_prefix(plain)
    cache: Any = {
        "dynamic": DynamicCache(),
        "dynamic_config": DynamicCache(config=model.config),
        "static": StaticCache(model.config, 20),
    }[name]
    parts = [logits(model, ids[:, :6], **given(cache)), logits(model, ids[:, 6:9], **given(cache))]
    parts += [logits(model, ids[:, t : t + 1], **given(cache)) for t in range(9, 14)]
    assert relative(torch.cat(parts, dim=1), behind_prefix(plain, ids)) < BOUNDS[torch.float64]
    assert cache.get_seq_length() == 14  # the caller's cache knows nothing of the prefix


@everywhere
def test_left_padding(architecture: str) -> None:
    plain, ids = plain_model(architecture), token_ids(1, 6)
    model = with_prefix(plain)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1), token_ids(1, 9, seed=5)])
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(model, padded, attention_mask=mask, position_ids=positions)
    assert relative(found[:1, 3:], behind_prefix(plain, ids)) < BOUNDS[torch.float64]
    assert relative(found[1:], behind_prefix(plain, padded[1:])) < BOUNDS[torch.float64]


@everywhere
@pytest.mark.parametrize("bits", [5, 16])
def test_generation_with_and_without_a_cache(architecture: str, bits: int) -> None:
    plain, ids = plain_model(architecture), token_ids(3, 7)
    model = with_prefix(plain, bits=bits, sites="all")
    if bits < 16:
        set_ranges(model, token_ids(4, 24, seed=7))

    def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
        result: Tensor = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
        return result

    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, **given(StaticCache(model.config, 15))), expected)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], dim=1)
    assert torch.equal(generate(model, padded, attention_mask=(padded != 0).long())[:, 2:], expected)
    if bits == 16:
        longer = torch.cat([torch.tensor([PREFIX]).expand(3, -1), ids], dim=1)
        assert torch.equal(generate(plain, longer)[:, len(PREFIX) :], expected)


@everywhere
def test_quantizers_do_not_see_it(architecture: str) -> None:
    plain, ids = tiny_model(architecture), token_ids(2, 9)
    model = with_prefix(plain, bits=3, sites="all")
    seen: dict[str, tuple[int, ...]] = {}
    for name, quantizer in iter_quantizers(model):
        quantizer.register_forward_hook(lambda module, args, output, name=name: seen.update({name: tuple(args[0].shape)}))
    set_ranges(model, ids)
    assert seen["layers.1.k_cache"] == seen["layers.1.v_cache"] == (2, 2, 9, 16)
    assert seen["layers.1.softmax_out"] == (2, 4, 9, 9)
    assert seen["layers.1.attn_in"] == (2, 9, 64)
    before = [(prefix.key, prefix.value) for prefix in model_prefixes(model)]
    logits(model, ids)
    assert all(
        prefix.key is key and prefix.value is value for prefix, (key, value) in zip(model_prefixes(model), before, strict=True)
    )


@everywhere
def test_kept_tokens_are_those_of_the_text(architecture: str) -> None:
    plain, ids = tiny_model(architecture), token_ids(2, 9)
    model = with_prefix(plain, bits=3, sites="all", full_precision_tokens=2)
    set_ranges(model, ids)
    found, expected = logits(model, ids), behind_prefix(plain, ids)
    torch.testing.assert_close(found[:, :2], expected[:, :2], rtol=1e-4, atol=1e-4)
    assert (found[:, 2:] - expected[:, 2:]).abs().mean() > 1e-2


@everywhere
def test_gradients_reach_parameters_and_the_prefix(architecture: str) -> None:
    model = with_prefix(tiny_model(architecture), bits=8, sites="all")
    set_ranges(model, token_ids())
    model.requires_grad_(True)
    factor = torch.ones((), requires_grad=True)
    for prefix in model_prefixes(model):  # as transforms that are trained will do
        prefix.register_forward_hook(lambda module, args, output: (output[0] * factor, output[1] * factor))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert factor.grad is not None
    assert factor.grad.abs() > 1e-4


@everywhere
def test_copies_state_dicts_and_dtypes(architecture: str) -> None:
    plain, ids = plain_model(architecture), token_ids()
    model = with_prefix(plain)
    expected = logits(model, ids)
    copied = copy.deepcopy(model)
    other = copy.deepcopy(plain)
    instrument(other, setting(prefix=PREFIX))
    other.load_state_dict(model.state_dict())
    for prefix in model_prefixes(model):
        prefix.key = prefix.value = None
    assert torch.equal(logits(copied, ids), expected)
    assert torch.equal(logits(other, ids), expected)
    narrow = copied.to(torch.bfloat16)
    assert all(prefix.key.dtype == prefix.value.dtype == torch.float64 for prefix in model_prefixes(narrow))
    assert logits(narrow, ids).dtype == torch.bfloat16
    assert relative(logits(narrow, ids), expected) < 0.1


def test_it_can_be_switched_off() -> None:
    plain, ids = plain_model("LlamaForCausalLM"), token_ids()
    model = with_prefix(plain)
    behind = logits(model, ids)
    with prefix_off(model):
        assert prefix_length(model) == 0
        assert relative(logits(model, ids), logits(plain, ids)) < BOUNDS[torch.float64]
    assert torch.equal(logits(model, ids), behind)
    assert get_context(model).index is None


def test_what_compute_prefix_refuses() -> None:
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(8))
    with pytest.raises(UserError, match="not prepared for a prefix"):
        compute_prefix_(model, PREFIX)
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(8, prefix=PREFIX))
    set_modes(model, "observe_range")
    with pytest.raises(UserError, match="switch the quantizers off"):
        compute_prefix_(model, PREFIX)


def test_shifted_keys_are_those_of_other_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, frequencies = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64), torch.tensor([1.0, 0.3, 0.1, 0.01])
    there = shift_keys(keys, frequencies, 7)
    torch.testing.assert_close(there.square().sum(-1), keys.square().sum(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(shift_keys(there, frequencies, -7), keys, rtol=1e-12, atol=1e-12)
    pair = torch.complex(keys[..., :4], keys[..., 4:]) * torch.polar(torch.ones(4), frequencies * 7).to(torch.complex128)
    torch.testing.assert_close(there, torch.cat([pair.real, pair.imag], -1), rtol=1e-6, atol=1e-6)


def test_masks_let_the_prefix_through() -> None:
    prefix = (torch.zeros(2, 3, 4), torch.ones(2, 3, 4))
    query, key = torch.zeros(2, 4, 2, 4), torch.full((2, 2, 5, 4), 2.0)
    boolean = torch.zeros(2, 1, 2, 5, dtype=torch.bool)
    keys, values, mask = put_prefix_first(prefix, query, key, key, boolean)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert values[1, 1, :, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert mask is not None
    assert mask[1, 0].int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 2
    additive = put_prefix_first(prefix, query, key, key, torch.full((2, 1, 2, 5), -9.0))[2]
    assert additive is not None
    assert additive[0, 0].tolist() == [[0, 0, 0, -9, -9, -9, -9, -9]] * 2
    keys, _, causal = put_prefix_first(prefix, query, key, key, None)  # an empty static cache has more keys than queries
    assert causal is not None
    assert keys.shape[2] == 5
    assert causal[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert put_prefix_first(prefix, query[:, :, :1], key, key, None)[2] is None


@pytest.mark.parametrize("keys", [7, 9], ids=["as many keys as queries", "an empty static cache has more"])
def test_causal_attention_behind_a_prefix_is_that_with_a_mask(keys: int) -> None:
    """Values and gradients, with grouped queries; the prefix learns, too."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    prefix, query = (draw(2, 3, 4), draw(2, 3, 4)), draw(2, 6, 7, 4)
    key, value, upstream = draw(2, 2, keys, 4), draw(2, 2, keys, 4), draw(2, 7, 6, 4).detach()
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 3  # type: ignore[assignment]
    library = partial(sdpa_attention_forward, module)
    leaves = (*prefix, query, key, value)
    found = _causal_behind_prefix(library, prefix, query, key, value)
    expected, _ = library(query, *put_prefix_first(prefix, query, key, value, None))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_behind_a_prefix_has_no_mask_unless_a_batch_has_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []

    def noted(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any) -> Any:
        masks.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, **rest)

    monkeypatch.setattr("fptquant.models.attention.sdpa_attention_forward", noted)
    model = tiny_model("LlamaForCausalLM")
    instrument(model, setting(8, prefix=PREFIX))
    compute_prefix_(model, PREFIX)
    masks.clear()
    tokens = token_ids()
    model(tokens)
    assert masks
    assert all(mask is None for mask in masks)
    masks.clear()
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    model(tokens, attention_mask=padded)
    assert all(mask is not None for mask in masks)


def test_an_empty_prefix_is_none() -> None:
    assert Prefix().length == 0
