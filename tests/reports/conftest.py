"""Shared by the tests of tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptquant.reports import experiment
from tests.tiny_folder import save_tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the cells take longer than everything else; one test looks at them."""
    monkeypatch.setattr(experiment, "_plot", lambda *arguments: None)
