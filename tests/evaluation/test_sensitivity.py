"""One kind of site quantized alone is a model that was configured so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fptquant.evaluation.evaluate import Evaluation, evaluate_windows
from fptquant.evaluation.sensitivity import EVERYTHING, NOTHING, quantizer_groups, scan_sensitivity
from fptquant.evaluation.teacher import TeacherCache
from fptquant.models.adapter import LINEAR_NAMES
from fptquant.models.instrument import iter_quantizers
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import tiny_model, token_ids

WINDOWS = token_ids(2, 24, seed=5)
SITES = ["attn_in", "k_cache", "v_cache", "o_in", "mlp_in", "down_in"]


@pytest.fixture(scope="module")
def reference() -> TeacherCache:
    return TeacherCache.from_model(tiny_model("LlamaForCausalLM"), WINDOWS, text_name="random")


def numbers(evaluation: Evaluation) -> tuple[Any, ...]:
    return evaluation.perplexity, evaluation.jsd, evaluation.top1_agreement, evaluation.tokens


def test_nothing_is_full_precision_and_everything_the_calibrated_model(reference: TeacherCache) -> None:
    model = quantized_model("LlamaForCausalLM", setting(4, weight_bits=4))
    modes = {name: quantizer.mode for name, quantizer in iter_quantizers(model)}
    scan = {each.site: each.evaluation for each in scan_sensitivity(model, WINDOWS, reference=reference)}
    weights = [f"{name}.weight" for name in LINEAR_NAMES]
    assert list(scan) == [NOTHING, EVERYTHING, "all weights", "all activations", "KV cache", *SITES, *weights]
    assert scan[NOTHING].jsd == pytest.approx(0, abs=1e-9)
    assert scan[NOTHING].top1_agreement == 1
    plain = evaluate_windows(tiny_model("LlamaForCausalLM"), WINDOWS, text_name="random", reference=reference)
    assert scan[NOTHING].perplexity == pytest.approx(plain.perplexity, rel=1e-7)
    whole = evaluate_windows(model, WINDOWS, text_name="random", reference=reference)
    assert numbers(scan[EVERYTHING]) == numbers(whole)
    assert all(0 < (found.jsd or 0) < (whole.jsd or 0) for site, found in scan.items() if site not in (NOTHING, EVERYTHING))
    assert {name: quantizer.mode for name, quantizer in iter_quantizers(model)} == modes


@pytest.mark.parametrize(("site", "configured"), [
    ("attn_in", setting(16, overrides={"attn_in": {"bits": 4}})),
    ("v_cache", setting(16, overrides={"v_cache": {"bits": 4}})),
    ("down_in", setting(16, overrides={"down_in": {"bits": 4}})),
    ("all weights", setting(16, weight_bits=4)),
])  # fmt: skip
def test_a_site_alone_is_a_model_configured_so(reference: TeacherCache, site: str, configured: Any) -> None:
    model = quantized_model("LlamaForCausalLM", setting(4, weight_bits=4))
    scan = {each.site: each.evaluation for each in scan_sensitivity(model, WINDOWS, reference=reference)}
    alone = quantized_model("LlamaForCausalLM", configured)
    expected = evaluate_windows(alone, WINDOWS, text_name="random", reference=reference)
    assert numbers(scan[site]) == numbers(expected)
    assert (expected.jsd or 0) > 1e-6


def test_one_layer_alone(reference: TeacherCache) -> None:
    model = quantized_model("LlamaForCausalLM", setting(3))
    seen: list[tuple[int, int]] = []
    scan = scan_sensitivity(
        model, WINDOWS, reference=reference, per_layer=True, progress=lambda done, total, _: seen.append((done, total))
    )
    found = {(each.site, each.layer): each.evaluation for each in scan}
    assert list(found)[-12:] == [(site, layer) for site in SITES for layer in (0, 1)]
    assert seen[-1] == (len(scan), len(scan))
    for name, quantizer in iter_quantizers(model):
        quantizer.mode = "on" if name == "layers.1.o_in" else "off"
    expected = evaluate_windows(model, WINDOWS, text_name="random", reference=reference)
    assert numbers(found["o_in", 1]) == numbers(expected)
    assert found["o_in", 0].jsd != found["o_in", 1].jsd


def test_sites_that_exist_once_have_no_layer() -> None:
    groups = quantizer_groups(quantized_model("LlamaForCausalLM", setting(8, sites="all")), per_layer=True)
    assert len(groups["final_norm_out", None]) == 1
    assert ("final_norm_out", 0) not in groups
    assert len(groups["residual_mlp", None]) == 2


def test_a_model_without_quantizers_has_nothing_to_scan(reference: TeacherCache) -> None:
    groups = quantizer_groups(quantized_model("LlamaForCausalLM", setting(16)))
    assert {key: len(group) for key, group in groups.items()} == {(NOTHING, None): 0, (EVERYTHING, None): 0}
    assert torch.equal(reference.tokens, WINDOWS)
