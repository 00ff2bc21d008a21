"""Records of a run: what is written is read again, and what is no run, unfinished, foreign or damaged says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from video2lora.evaluation.records import (
    RECORD_FIELDS,
    EvaluationError,
    EvaluationRun,
    make_records,
    read_run,
    with_scores,
    write_records,
)

SETTINGS: dict[str, Any] = {
    "format_version": 1,
    "conditions": [{"name": "video", "settings": {}}, {"name": "adapter", "settings": {}}],
    "baseline": "video",
    "margins": {"token_f1": 0.05},
    "metrics": ["token_f1"],
}


def _row(condition: str, sample: str, question: str, **other: Any) -> dict[str, Any]:
    row = {"condition": condition, "sample_id": sample, "question_id": question, "task": "t", "prompt": "Ünï 字?"}
    answer = {"answer": "x", "num_tokens": 2, "ended": True, "context_tokens": 5, "visual_tokens": 0, "num_frames": 8}
    times = {"prepare_seconds": 0.5, "answer_seconds": 0.25}
    row |= {"video_id": sample, "question": None, "references": ["a", "b"]}
    return row | answer | times | other


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two videos, the second of which cannot be read, and three questions; the third has no score."""
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS))
    asked = [("s1", "q1", "t"), ("s1", "q2", "u"), ("s1", "q3", "t")]
    rows = [_row(name, s, q, task=t) for s, q, t in asked for name in ("video", "adapter")]
    bad = {"sample_id": "s2", "video_id": "s2", "question_id": "q4", "task": "t", "prompt": "?", "references": []}
    bad["error"] = "s2.mp4: no"
    rows += [{"condition": name, **bad} for name in ("video", "adapter")]
    records = with_scores(make_records(rows), "token_f1", [0.5, 0.25, 1.0, 0.0, None, math.nan, None, None])
    write_records(tmp_path, records)
    return tmp_path


def test_some_columns_are_read_alone(folder: Path) -> None:
    whole = read_run(folder)
    run = read_run(folder, ["token_f1", "task", "condition", "references"])
    assert run.records.column_names == ["condition", "task", "references", "token_f1"]
    assert run.records.equals(whole.records.select(run.records.column_names))
    assert run.metrics == ["token_f1"]
    assert run.scores("token_f1", "video", "t") == whole.scores("token_f1", "video", "t") == [0.5, None, None]
    assert read_run(folder, ["condition", "bleu"]).metrics == []


def test_what_is_written_is_read_again(folder: Path) -> None:
    run = read_run(folder)
    assert run.records.column_names == [*RECORD_FIELDS, "token_f1"] and run.settings == SETTINGS
    assert run.records.schema.field("token_f1").type == pa.float64()
    row = run.records.to_pylist()[0]
    assert row["prompt"] == "Ünï 字?" and row["references"] == ["a", "b"] and row["question"] is None
    before = (folder / "records.parquet").read_bytes()
    write_records(folder, run.records)
    assert (folder / "records.parquet").read_bytes() == before


def test_a_run_tells_its_parts(folder: Path) -> None:
    run = read_run(folder)
    assert (run.conditions, run.metrics, run.tasks) == (["video", "adapter"], ["token_f1"], ["t", "u"])
    assert run.num_samples == 2 and run.errors == {"s2": "s2.mp4: no"}
    assert run.unscored("token_f1") == 2 and run.unscored("rouge_l") == 6
    assert run.scores("token_f1", "adapter") == [0.25, 0.0, None, None]
    assert run.scores("token_f1", "video", "u") == [1.0]
    assert run.paired_scores("token_f1", "adapter", "video") == ([0.25, 0.0], [0.5, 1.0], ["s1", "s1"])
    assert run.paired_scores("token_f1", "adapter", "video", "t") == ([0.25], [0.5], ["s1"])


def test_a_column_is_replaced_where_it_is(folder: Path) -> None:
    records = with_scores(read_run(folder).records, "judge", [0.0] * 8)
    again = with_scores(records, "token_f1", [1.0] * 8)
    assert again.column_names == [*RECORD_FIELDS, "token_f1", "judge"]
    assert again["token_f1"].to_pylist() == [1.0] * 8
    with pytest.raises(EvaluationError, match="'answer'"):
        with_scores(records, "answer", [1.0] * 8)


def test_what_is_no_run(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(EvaluationError, match="no folder of an evaluation"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(EvaluationError, match="no folder of an evaluation"):
        read_run(folder / "run.json")


def test_an_unfinished_run(folder: Path) -> None:
    (folder / "records.parquet").unlink()
    with pytest.raises(EvaluationError, match="not finished. Start it again"):
        read_run(folder)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (json.dumps(SETTINGS | {"format_version": 2}), "format_version 2, this version .* reads 1"),
        ("{}", "format_version None"),
        ("[]", "format_version None"),
        ('{"format_version": 1', "run.json is damaged"),
        ("\0\0", "run.json is damaged"),
    ],
)
def test_another_format_or_damaged_settings(text: str, named: str, folder: Path) -> None:
    (folder / "run.json").write_text(text)
    with pytest.raises(EvaluationError, match=named):
        read_run(folder)


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_cut_file(kept: int, folder: Path) -> None:
    data = (folder / "records.parquet").read_bytes()
    (folder / "records.parquet").write_bytes(data[:kept])
    with pytest.raises(EvaluationError, match="records.parquet is damaged or cut short.*nothing is answered again"):
        read_run(folder)


def test_columns_of_somebody_else(folder: Path) -> None:
    pq.write_table(pa.table({"condition": [1]}), folder / "records.parquet")
    with pytest.raises(EvaluationError, match="column condition should be string, but is int64"):
        read_run(folder)
    pq.write_table(pa.table({"condition": ["video"]}), folder / "records.parquet")
    with pytest.raises(EvaluationError, match="column sample_id should be string, but is missing"):
        read_run(folder)


def test_a_table_in_use_survives_another_version_of_the_file(folder: Path) -> None:
    run: EvaluationRun = read_run(folder)
    before = run.records.to_pylist()
    write_records(folder, make_records([_row("video", "s", "q")]))
    assert run.records.to_pylist() == before
