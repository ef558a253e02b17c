"""Modules whose doctests need a package that is not installed; their tests say so where they are skipped."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["fptquant/evaluation/lm_eval_model.py"]
