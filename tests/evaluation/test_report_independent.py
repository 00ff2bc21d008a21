"""The tables of a report against the same numbers by pandas and scipy, from records.parquet alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from video2lora.evaluation.report import write_report

from .report_runs import table_after, write_run

RESAMPLES = 2000


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("independent") / "run", num_samples=30, unreadable=(3,))
    write_report(folder, resamples=RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def table(run_dir: Path) -> pd.DataFrame:
    """A row for each question that was answered, a column of token-F1 for each condition."""
    records = pd.read_parquet(run_dir / "records.parquet")
    scores = records[records.error.isna()].pivot(
        index=["sample_id", "question_id", "task"], columns="condition", values="token_f1"
    )
    return scores.reset_index()


def _interval(table: pd.DataFrame, column: str) -> tuple[float, float]:
    """BCa 95 % interval of the mean of a column, by videos, from another seed than the report's."""
    videos = table.groupby("sample_id")[column].agg(["sum", "count"])
    bounds = stats.bootstrap(
        (videos["sum"].to_numpy(), videos["count"].to_numpy()),
        lambda total, count, axis=-1: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="BCa",
        random_state=np.random.default_rng(7),
    ).confidence_interval
    return float(bounds.low), float(bounds.high)


def test_means_intervals_and_verdicts(run_dir: Path, table: pd.DataFrame) -> None:
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    margin = json.loads((run_dir / "run.json").read_text())["margins"]["token_f1"]
    rows = [row for row in table_after(text, "## In short") if row["metric"] == "token_f1"]
    assert [row["condition"] for row in rows] == ["video", "adapter", "no_adapter", "kv_cache"]
    seen = set()
    for row in rows:
        name = row["condition"]
        low, high = _interval(table, name)
        mean, *bounds = (float(part.strip("[],")) for part in row["mean"].split())
        assert mean == pytest.approx(table[name].mean(), abs=5e-4)
        assert bounds == pytest.approx([low, high], abs=0.004)  # two draws of resamples
        if name == "video":
            continue
        low, high = _interval(table.assign(effect=table[name] - table["video"]), "effect")
        assert float(row["effect"]) == pytest.approx(table[name].mean() - table["video"].mean(), abs=5e-4)
        bounds = [float(part) for part in row["interval"].strip("[]").split(",")]
        assert bounds == pytest.approx([low, high], abs=0.004)
        assert min(abs(bound - edge) for bound in (low, high) for edge in (-margin, 0, margin)) > 0.004  # clear cases
        shown = "superior" if low > 0 else "equivalent" if -margin < low and high < margin else ""
        assert row["verdict"].split(" (")[0] == (shown or ("non-inferior" if low > -margin else "none"))
        assert float(row["kept"].split("%")[0]) == pytest.approx(
            100 * table[name].mean() / table["video"].mean(), abs=0.05
        )
        seen.add(row["verdict"].split(" (")[0])
    assert len(seen) > 1
