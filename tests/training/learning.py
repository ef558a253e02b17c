"""A short training of a student, without the loop of the product."""

from __future__ import annotations

import torch

from fptquant.training.student import EndToEndStudent
from tests.models.tiny import token_ids


def share_of_divergence(student: EndToEndStudent) -> float:
    """Trains for 40 steps; returns the divergence as a share of what it was."""
    parameters = [p for group in student.parameter_groups().values() for _, p in group]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0)
    ids = token_ids(4, 24, seed=3)
    before = float(student.divergence(ids))
    for _ in range(40):
        optimizer.zero_grad()
        student(ids).backward()
        optimizer.step()
    return float(student.divergence(ids)) / before
