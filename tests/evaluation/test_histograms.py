"""Histograms against numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fptquant.evaluation import histograms
from fptquant.evaluation.histograms import EDGES, ActivationHistograms, count_magnitudes, weight_histograms
from fptquant.evaluation.places import PLACES, look_at_windows
from fptquant.models.adapter import LINEAR_NAMES
from tests.models.prepare import quantized_model, setting
from tests.models.tiny import tiny_model, token_ids


def with_numpy(x: torch.Tensor) -> list[int]:
    """numpy counts infinity into a last bin that ends there."""
    counts, _ = np.histogram(np.abs(x.detach().numpy()).ravel(), bins=EDGES.numpy())
    return counts.tolist()


def test_counts_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "_CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 333, generator=generator) * 10 ** (8 * torch.randn(50, 333, generator=generator))
    special = torch.tensor([0.0, -0.0, 1e-45, 3e38, torch.inf, -torch.inf])
    x = torch.cat([x.flatten(), special, EDGES, -EDGES])
    counts = count_magnitudes(x)
    assert counts.tolist() == with_numpy(x)
    assert int(counts.sum()) == x.numel()
    assert (counts > 0).sum() > 190  # it is spread over nearly all of the 194 bins


def test_narrow_dtypes_and_no_values() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert count_magnitudes(x).tolist() == with_numpy(x.float())
    assert int(count_magnitudes(torch.empty(0, 4)).sum()) == 0


def test_activations_of_all_layers_and_windows() -> None:
    model, windows = tiny_model("LlamaForCausalLM"), token_ids(3, 20)
    seen: dict[str, list[torch.Tensor]] = {}
    found = ActivationHistograms()
    look_at_windows(model, windows, found.note, lambda window, place, layer, x: seen.setdefault(place, []).append(x.clone()))
    assert list(found.histograms) == list(PLACES)
    for place, counts in found.histograms.items():
        assert len(seen[place]) == 2 * len(windows)
        assert counts.tolist() == with_numpy(torch.cat([x.flatten() for x in seen[place]])), place


def test_weights_before_quantization() -> None:
    model = quantized_model("Qwen2ForCausalLM", setting(16, weight_bits=2))
    found = weight_histograms(model)
    assert list(found) == list(LINEAR_NAMES)
    weights = [layer.mlp.up_proj.weight.flatten() for layer in tiny_model("Qwen2ForCausalLM").model.layers]
    assert found["up_proj"].tolist() == with_numpy(torch.cat(weights))
