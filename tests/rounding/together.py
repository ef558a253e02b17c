"""One process and two round the same model, twice: anew, and going on with what they have kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.program import run_python

_PROGRAM = """
import sys
from pathlib import Path
import torch
from fptquant.files import KeptFiles
from fptquant.quantizers.autoround import AutoRoundOptions
from fptquant.rounding.round_autoround import round_autoround_
from fptquant.rounding.round_gptq import round_gptq_
from fptquant.rounding.token_weights import find_token_weights
from tests.distributed.forks import together
from tests.rounding.test_round_gptq import FULL, WINDOWS, prepared
def work(rank, count):
    for resume in (False, True):
        model = prepared("LlamaForCausalLM", **FULL)
        kept = KeptFiles(Path(sys.argv[1]) / f"{count}-{rank}", seconds=0)  # a disk of its own; the first process writes
        report = CALL
        torch.save((FACTS, model.state_dict()), f"{sys.argv[1]}/{count}-{rank}-{resume}.pt")
for count in (1, 2):
    together(count, lambda rank: work(rank, count))
"""


def round_together(folder: Path, *, call: str, facts: str) -> list[Any]:
    """The facts of one process, then of two, anew and going on; all weights are alike, and only the main process has kept blocks.

    Args:
        call: rounds ``model`` on ``WINDOWS`` with ``kept`` and ``resume``, and gives a report.
        facts: an expression of ``report``.
    """
    run_python(_PROGRAM.replace("CALL", call).replace("FACTS", facts), folder)
    names = ("1-0-False", "2-0-False", "2-1-False", "2-0-True", "2-1-True")
    found = [torch.load(folder / f"{name}.pt", weights_only=True) for name in names]
    assert [len(list((folder / name).glob("block-*"))) for name in ("2-0", "2-1")] == [2, 0]
    (_, alone), (_, shared), *_ = found
    for _, state in found[1:]:
        assert all(torch.allclose(state[name], value, rtol=0, atol=1e-9) for name, value in alone.items())
        assert all(torch.equal(state[name], value) for name, value in shared.items())
    return [facts for facts, _ in found]
