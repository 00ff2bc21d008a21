"""Two runs compared: paired by the questions' ids, and refused where that makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from video2lora.evaluation.comparison import compare_runs
from video2lora.evaluation.records import EvaluationError, write_records
from video2lora.evaluation.statistics import compare

from .report_runs import table_after, write_run

RESAMPLES = 200


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """B's adapter is better than A's by about 0.1; it saw twice as many frames."""
    folder = tmp_path_factory.mktemp("pair")
    a = write_run(folder / "a", unreadable=(4,))
    better = {"video": 0.6, "adapter": 0.66, "no_adapter": 0.2, "kv_cache": 0.6}
    b = write_run(folder / "b", seed=1, means=better, unreadable=(9,), sampling__num_frames=24)
    return a, b


def by_question(run: Path, condition: str = "adapter") -> dict[str, dict[str, Any]]:
    rows = pq.read_table(run / "records.parquet").to_pylist()
    return {row["question_id"]: row for row in rows if row["condition"] == condition}


def test_scores_are_paired_by_question(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    ours, theirs = by_question(b), by_question(a)
    both = [q for q in theirs if ours[q]["token_f1"] is not None and theirs[q]["token_f1"] is not None]
    found = compare_runs(a, b, metric="token_f1", resamples=RESAMPLES)
    assert found.comparison.n == len(both) == 114 and found.comparison.num_left_out == 6
    expected = compare(
        [ours[q]["token_f1"] for q in both],
        [theirs[q]["token_f1"] for q in both],
        margin=0.05,
        clusters=[theirs[q]["sample_id"] for q in both],
        num_resamples=RESAMPLES,
    )
    assert found.comparison.effect == pytest.approx(
        np.mean([ours[q]["token_f1"] - theirs[q]["token_f1"] for q in both])
    )
    assert found.comparison.interval == expected.interval
    assert found.effects[0].claims == ["superior"] and [e.task for e in found.effects] == [None, "colour", "count"]
    assert set(found.effects[1].holm) == {"equivalent", "non-inferior", "superior"}

    # rows in another order are the same questions
    shuffled = write_run(tmp_path / "shuffled", sampling__num_frames=24)
    table = pq.read_table(b / "records.parquet")
    write_records(shuffled, table.take(pa.array(range(len(table) - 1, -1, -1))))
    again = compare_runs(a, shuffled, metric="token_f1", resamples=RESAMPLES)
    assert [e.comparison for e in again.effects] == [e.comparison for e in found.effects]


def test_a_run_is_equivalent_to_itself(pair: tuple[Path, Path]) -> None:
    found = compare_runs(pair[0], pair[0], metric="token_f1", condition="kv_cache", resamples=RESAMPLES)
    assert found.comparison.effect == 0 and found.comparison.equivalent and not found.differences


def test_markdown_has_the_numbers_and_what_differs(pair: tuple[Path, Path]) -> None:
    found = compare_runs(*pair, metric="token_f1", resamples=RESAMPLES)
    text = found.to_markdown()
    table = table_after(text, "## adapter in token_f1")
    assert table[0]["effect"] == f"{found.comparison.effect:+.3f}" and table[0]["verdict"] == "superior"
    assert table[0]["A"] == f"{found.comparison.baseline_mean:.3f}"
    assert found.differences == {"sampling.num_frames": (12, 24)}
    assert "- sampling.num_frames: 12 in A, 24 in B" in text


def test_the_margin_is_the_declared_one_or_that_given(pair: tuple[Path, Path]) -> None:
    assert compare_runs(*pair, metric="token_f1", resamples=RESAMPLES).effects[0].margin == 0.05
    assert compare_runs(*pair, metric="token_f1", margin=0.3, resamples=RESAMPLES).effects[0].margin == 0.3
    bare = compare_runs(*pair, metric="exact_match", resamples=RESAMPLES)
    assert bare.effects[0].claims == [] and "no margin declared" in bare.to_markdown()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark__name": "other"}, "benchmark is 'made_up' and 'other'"),
        ({"benchmark__version": 2}, "benchmark version is 1 and 2"),
        ({"benchmark__split": "validation"}, "benchmark split is 'test' and 'validation'"),
        ({"benchmark__digest": "0" * 64}, "rows differ, 120 questions about 40 videos in 12 frames and 6 questions "),
    ],
)
def test_other_questions_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = write_run(tmp_path / "other", num_samples=2, **changes)
    with pytest.raises(EvaluationError, match=f"/a and .*/other do not compare: their {message}"):
        compare_runs(pair[0], other, metric="token_f1")


def test_what_a_run_does_not_have_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no condition 'caption'"):
        compare_runs(*pair, metric="token_f1", condition="caption")
    with pytest.raises(EvaluationError, match="no metric 'rouge_l'"):
        compare_runs(*pair, metric="rouge_l")
    fewer = write_run(tmp_path / "fewer", num_samples=39)
    with pytest.raises(EvaluationError, match="only one has 'q117'"):
        compare_runs(pair[0], fewer, metric="token_f1")


def test_grades_of_two_judges_do_not_compare(tmp_path: Path) -> None:
    def grade(row: dict[str, Any]) -> None:
        row["scores"]["judge"] = 0.5

    a, b = (write_run(tmp_path / name, num_samples=3, change=grade, judge={"model": f"judge-{name}"}) for name in "ab")
    with pytest.raises(EvaluationError, match="judge-a.*judge-b"):
        compare_runs(a, b, metric="judge")
    assert compare_runs(a, a, metric="judge", resamples=RESAMPLES).comparison.effect == 0
