"""Reports over several runs: one benchmark with other frames, several benchmarks side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from video2lora.evaluation.records import EvaluationError
from video2lora.evaluation.report_document import without_times
from video2lora.evaluation.report_sweep import write_summary_report, write_sweep_report
from video2lora.evaluation.statistics import compare, holm

from .report_runs import files_of, table_after, write_run

RESAMPLES = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of 4, 8 and 16 frames, not in this order."""
    folder = tmp_path_factory.mktemp("sweep")
    return [
        write_run(folder / f"frames-{n}", seed=n, sampling__num_frames=n, means={"video": 0.4, "adapter": n / 20})
        for n in (16, 4, 8)
    ]


def scores(run: Path, condition: str, task: str | None = None, metric: str = "token_f1") -> list[float]:
    rows = pq.read_table(run / "records.parquet").to_pylist()
    return [row[metric] for row in rows if row["condition"] == condition and task in (None, row["task"])]


def test_a_sweep_has_the_scores_of_each_run_in_order(runs: list[Path], tmp_path: Path) -> None:
    files = write_sweep_report(runs, tmp_path / "sweep", resamples=RESAMPLES)
    names = {str(path.relative_to(tmp_path / "sweep")) for path in files}
    assert {"report.md", "report.html", "plots/heat_token_f1.png", "plots/curves_token_f1.png"} <= names
    assert all(path.is_file() for path in files)
    text = (tmp_path / "sweep" / "report.md").read_text()
    table = table_after(text, "## Scores: token_f1")
    by_frames = dict(zip((16, 4, 8), runs, strict=True))
    expected = [(task, n) for task in ("all questions", "colour", "count") for n in (4, 8, 16)]
    assert [(row["task"], row["run"]) for row in table] == [(t, f"{n} frames, 384 px") for t, n in expected]
    for row, (task, frames) in zip(table, expected, strict=True):
        own = scores(by_frames[frames], "adapter", None if task == "all questions" else task)
        assert row["adapter"].split()[0] == f"{np.mean(own):.3f}"
    effects = table_after(text, "## Scores: token_f1", 1)
    effect = next(r for r in effects if (r["run"], r["condition"]) == ("16 frames, 384 px", "adapter"))
    gain = np.subtract(scores(by_frames[16], "adapter"), scores(by_frames[16], "video")).mean()
    assert effect["effect"] == f"{gain:+.3f}" and effect["verdict"] == "superior"


def test_the_order_of_runs_and_their_times_do_not_matter(runs: list[Path], tmp_path: Path) -> None:
    write_sweep_report(runs, tmp_path / "a", resamples=RESAMPLES)
    write_sweep_report(sorted(runs), tmp_path / "b", resamples=RESAMPLES)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert "## Times" not in without_times((tmp_path / "a" / "report.md").read_text())


def test_frames_and_sizes_give_a_map_of_effects(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"{n}-{edge}",
            num_samples=10,
            conditions=("video", "adapter"),
            sampling__num_frames=n,
            sampling__longest_edge=edge,
        )
        for n in (8, 12)
        for edge in (224, 512)
    ]
    files = write_sweep_report(runs, tmp_path / "sweep", resamples=RESAMPLES)
    assert tmp_path / "sweep" / "plots" / "effect_token_f1_adapter.png" in files
    assert "224 px" in (tmp_path / "sweep" / "report.md").read_text()
    # one number of frames: sizes are on the axis
    write_sweep_report(runs[:2], tmp_path / "sizes", resamples=RESAMPLES)
    assert "against longest edge of frames (px)" in (tmp_path / "sizes" / "report.md").read_text()


def test_what_makes_no_sweep_is_refused_by_name(runs: list[Path], tmp_path: Path) -> None:
    first = runs[0]
    with pytest.raises(EvaluationError, match="two runs or more, got 1"):
        write_sweep_report([first], tmp_path / "sweep")
    same = write_run(tmp_path / "same", num_samples=2, sampling__num_frames=16)
    with pytest.raises(EvaluationError, match="frames-16 and .*same have the same frames"):
        write_sweep_report([first, same], tmp_path / "sweep")
    rows = write_run(tmp_path / "rows", num_samples=2, benchmark__digest="0" * 64)
    with pytest.raises(EvaluationError, match="frames-16 and .*rows do not compare: their rows differ, 120 "):
        write_sweep_report([first, rows], tmp_path / "sweep")
    shapes = [
        write_run(
            tmp_path / f"shapes-{n}",
            num_samples=n,
            benchmark__name="moving_shapes",
            benchmark__digest=str(n) * 64,
            sampling__num_frames=n,
        )
        for n in (4, 8)
    ]
    told = "12 questions about 4 videos in 4 frames and 24 questions about 8 videos in 8 frames"
    with pytest.raises(EvaluationError, match=f"{told} .the moving-shapes benchmark leaves out .* --num-samples"):
        write_sweep_report(shapes, tmp_path / "sweep")
    model = write_run(tmp_path / "model", num_samples=2, model__hypernetwork_sha256="0" * 64)
    with pytest.raises(EvaluationError, match=r"frames-16 and .*model are of different models"):
        write_sweep_report([first, model], tmp_path / "sweep")
    for number, (changes, what) in enumerate(
        (
            ({"decoding__max_new_tokens": 8}, "decoding is"),
            ({"alpha": 0.05}, "alpha is 0.025 and 0.05"),
            ({"margins": {"token_f1": 0.2}}, "margins is"),
            ({"baseline": "adapter"}, "baseline is 'video' and 'adapter'"),
        )
    ):
        other = write_run(tmp_path / f"other-{number}", num_samples=2, sampling__num_frames=3, **changes)
        with pytest.raises(EvaluationError, match=f"differ in more than their frames: {what}"):
            write_sweep_report([first, other], tmp_path / "sweep")

    def grade(row: dict[str, Any]) -> None:
        row["scores"]["judge"] = 0.5

    graded = [
        write_run(tmp_path / name, num_samples=2, sampling__num_frames=n, change=grade, judge={"model": name})
        for n, name in enumerate("ab", 1)
    ]
    with pytest.raises(EvaluationError, match="graded by different judges"):
        write_sweep_report(graded, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_summary_corrects_over_benchmarks(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / f"run-{number}",
            seed=number,
            num_samples=60,
            conditions=("video", "adapter"),
            means={"video": 0.5, "adapter": 0.5},
            benchmark__title=f"Benchmark {number}",
            benchmark__digest=str(number) * 64,
        )
        for number in range(3)
    ]
    write_summary_report(runs, tmp_path / "summary", resamples=RESAMPLES)
    table = table_after((tmp_path / "summary" / "report.md").read_text(), "## Scores: token_f1")
    assert [row["adapter on"] for row in table] == ["Benchmark 0", "Benchmark 1", "Benchmark 2"]
    p = {}
    for run in runs:
        videos = [f"video-{i // 3}" for i in range(180)]
        found = compare(
            scores(run, "adapter"), scores(run, "video"), margin=0.05, clusters=videos, num_resamples=RESAMPLES
        )
        p[run.name] = found.p_equivalence
    for row, result in zip(table, holm(p).values(), strict=True):
        shown = row["p equivalent / non-inferior / superior (after Holm)"].split(" / ")[0]
        assert shown == ("<0.001" if result.adjusted < 0.001 else f"{result.adjusted:.3f}")
        assert ("equivalent" in row["after Holm"]) == result.rejected


def test_a_summary_takes_each_benchmark_once(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="frames-16 and .*frames-4 ask the same questions"):
        write_summary_report(runs, tmp_path / "summary")
