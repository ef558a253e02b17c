"""SmolLM2-135M, if it is in the cache folder: a real model keeps its logits under all mergeable transforms."""

from __future__ import annotations

import pytest
import torch

from fptquant.models.architectures import view_model
from fptquant.models.loading import load_model
from fptquant.models.smollm2 import SMOLLM2_NAME, cache_folder
from fptquant.stages.fuse_norms import fuse_norms_
from fptquant.stages.merge_transforms import merge_transforms_
from fptquant.stages.untie import untie_
from fptquant.transforms import TransformOptions
from tests.stages.transformed import random_transforms, relative_error

TEXT = "Weights may turn, scale and mix, as long as what the model says stays the same. Numbers: 1, 2, 3."


@pytest.mark.slow
@pytest.mark.skipif(not (cache_folder() / SMOLLM2_NAME).is_dir(), reason="SmolLM2 is not in the cache folder: run `make demo` once")
def test_random_transforms_keep_the_logits_of_a_real_model_in_float32() -> None:
    model, tokenizer = load_model(SMOLLM2_NAME)
    tokens = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(tokens).logits
        untie_(model)
        fuse_norms_(model)
        options = TransformOptions(
            query_key_rotation=True, value_mixing="hadamard", up_scaling=True, residual_rotation="random_hadamard"
        )
        merge_transforms_(model, random_transforms(model, options))
        after = model(tokens).logits
    # Thirty layers, and a first token whose residual is 10,000 times the median: its roundings are everyone's.
    assert relative_error(after, before) < 2e-3
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    assert not view_model(model).tied
