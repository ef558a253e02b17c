"""Hooks that last as long as a block of code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn
from torch.utils.hooks import RemovableHandle

from fptquant.models.hooks import hooked


def test_no_hook_stays_when_registering_fails_in_the_middle() -> None:
    module = nn.Linear(2, 2)

    def handles() -> Iterator[RemovableHandle]:
        yield module.register_forward_hook(lambda *_: None)
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"), hooked(handles()):
        pass
    assert not module._forward_hooks
