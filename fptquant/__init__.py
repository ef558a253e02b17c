"""Function-preserving transforms for quantized language models: calibrate, evaluate, save.

>>> import fptquant as fq
>>> config = fq.load_config("fptquant-local", "quantization=w4a8kv8-static")
>>> config.quantization.label
'w4a8kv8-static'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fptquant.errors import UserError

if TYPE_CHECKING:
    from fptquant import ops
    from fptquant.config.loading import load_config
    from fptquant.config.tables import load_table
    from fptquant.diagnostics import diagnostics
    from fptquant.evaluation.evaluate import build_reference, evaluate
    from fptquant.evaluation.zero_shot import evaluate_zero_shot
    from fptquant.models.loading import load_model
    from fptquant.models.saving import CalibrationResult, load_calibrated
    from fptquant.reports.grid import make_table
    from fptquant.reports.report import write_report
    from fptquant.stages.calibrate import calibrate
    from fptquant.stages.stream import calibrate_streamed

__version__ = "0.1.0"

_HOMES = {
    "CalibrationResult": "fptquant.models.saving",
    "build_reference": "fptquant.evaluation.evaluate",
    "calibrate": "fptquant.stages.calibrate",
    "calibrate_streamed": "fptquant.stages.stream",
    "diagnostics": "fptquant.diagnostics",
    "evaluate": "fptquant.evaluation.evaluate",
    "evaluate_zero_shot": "fptquant.evaluation.zero_shot",
    "load_calibrated": "fptquant.models.saving",
    "load_config": "fptquant.config.loading",
    "load_model": "fptquant.models.loading",
    "load_table": "fptquant.config.tables",
    "make_table": "fptquant.reports.grid",
    "write_report": "fptquant.reports.report",
}
"""Where each public name lives; it is imported when it is first used, so that `import fptquant` stays quick."""

__all__ = [
    "CalibrationResult",
    "UserError",
    "__version__",
    "build_reference",
    "calibrate",
    "calibrate_streamed",
    "diagnostics",
    "evaluate",
    "evaluate_zero_shot",
    "load_calibrated",
    "load_config",
    "load_model",
    "load_table",
    "make_table",
    "ops",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fptquant.ops")
    if name not in _HOMES:
        raise AttributeError(f"module 'fptquant' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
