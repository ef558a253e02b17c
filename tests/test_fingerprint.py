"""Digests that change with every value that matters."""

from __future__ import annotations

import torch

from fptquant.config.differences import differences
from fptquant.fingerprint import machine, tensors_digest, weights_digest


def test_digests_see_values_shapes_and_dtypes() -> None:
    tokens = torch.arange(12).view(3, 4)
    changed = tokens.clone()
    changed[2, 3] += 1
    variants = [tokens, changed, tokens.view(4, 3), tokens.to(torch.int32), tokens.T.contiguous()]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)
    assert tensors_digest(tokens, changed) != tensors_digest(changed, tokens)
    assert tensors_digest(tokens.T) == tensors_digest(tokens.T.contiguous())


def test_another_model_is_another_digest() -> None:
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    reference = weights_digest([("a", weight)])
    assert weights_digest([("a", weight.clone())]) == reference
    assert weights_digest([("b", weight)]) != reference
    assert weights_digest([("a", weight * 1.01)]) != reference
    assert weights_digest([("a", weight.view(200, 300))]) != reference


def test_the_machine_names_what_decides_bits() -> None:
    here = machine(torch.device("cpu"), 1)
    assert differences(here, {**here, "threads": here["threads"] + 1, "processes": 2}) == [
        f"threads: {here['threads']}, now {here['threads'] + 1}", "processes: 1, now 2",
    ]  # fmt: skip
    assert here["torch"] == torch.__version__
