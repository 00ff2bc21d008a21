"""Evaluation: conditions that answer the same questions, benchmarks, metrics, statistics, efficiency and reports.

Importing it is cheap: what a name needs is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "BENCHMARKS": "benchmarks",
    "Benchmark": "benchmarks",
    "load_benchmark": "benchmarks",
    "compare_runs": "comparison",
    "CONDITIONS": "conditions",
    "Condition": "conditions",
    "Decoding": "conditions",
    "Sweep": "efficiency",
    "run_sweep": "efficiency",
    "Judge": "judge",
    "METRICS": "metrics",
    "score": "metrics",
    "EvaluationError": "records",
    "EvaluationRun": "records",
    "read_run": "records",
    "write_report": "report",
    "evaluate_model": "runner",
    "Answer": "samples",
    "Question": "samples",
    "Sample": "samples",
    "score_run": "scoring",
    "verdicts": "scoring",
    "compare": "statistics",
    "required_samples": "statistics",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
