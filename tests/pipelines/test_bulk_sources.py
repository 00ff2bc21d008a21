"""internalize_many: the sources of videos: rows, datasets, lists of anything, links."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from video2lora import VideoAdapter, VideoError
from video2lora.data import DatasetError
from video2lora.pipelines.bulk import BulkVideos, internalize_many, plan_units

from .bulk_runs import OPTIONS, counts_of, index_of, lines_of


def test_rows_of_a_jsonl_file_relative_to_it_with_spans(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clips, tmp_path / "data")
    rows: list[Any] = [
        {"id": "r0", "video": "b/long.mp4", "start": 0.5, "end": 1.5, "prompt": "What moves?"},
        {"id": "r1", "video": "b/long.mp4", "start": 0.5, "end": 1.5, "prompt": "And where?"},
        {"id": "r2", "video": "b/long.mp4"},
        {"video_path": "c.mp4", "metadata": {"start_time": "00:00:00.500"}, "queries": "not asked"},
        {"id": "r4", "video": "b/long.mp4", "start": 50},
        {"prompt": "of no video"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n"
    (tmp_path / "data" / "rows.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        summary = internalize_many(pipe, "data/rows.jsonl", tmp_path / "out", **OPTIONS)
        assert (summary.num_videos, summary.num_skipped) == (6, 3)
    data = tmp_path / "data"
    lines = index_of(tmp_path / "out")
    spans = [(line["video"], line["start"], line["end"], line.get("ids")) for line in lines]
    assert spans == [
        (str(data / "b" / "long.mp4"), 0.5, 1.5, ["r0", "r1"]),
        (str(data / "b" / "long.mp4"), None, None, ["r2"]),
        (str(data / "c.mp4"), 0.5, None, None),
    ]
    assert len({line["adapter"] for line in lines}) == 3
    assert VideoAdapter.from_pretrained(tmp_path / "out" / lines[0]["adapter"]).segments[0].start == 0.5
    late, without, broken = lines_of(tmp_path / "out" / "skipped.jsonl")
    assert late["ids"] == ["r4"] and "start=50" in late["error"]
    assert without["row"] == "rows.jsonl:6" and "no video" in without["error"]
    assert broken["row"] == "rows.jsonl:7" and "not JSON" in broken["error"]


def test_a_dataset_with_its_videos_inside(
    pipe: Any, clips: Path, tmp_path: Path, made: list[int], read: list[str]
) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"path": f"{name}.mp4", "bytes": (clips / f"{name}.mp4").read_bytes()}

    dataset = Dataset.from_dict(
        {"id": ["x", "y", "z"], "video": [row("c"), row("d"), row("c")], "start": [None, 0.25, None]}
    )
    out = tmp_path / "out"
    assert counts_of(internalize_many(pipe, dataset, out, **OPTIONS))[3] == 0
    lines = index_of(out)
    assert [(line["video"], line["row"], line["ids"]) for line in lines] == [
        ("c.mp4", "rows[0]", ["x"]), ("d.mp4", "rows[1]", ["y"]), ("c.mp4", "rows[2]", ["z"])
    ]  # fmt: skip
    assert lines[0]["adapter"] == lines[2]["adapter"] != lines[1]["adapter"]
    assert lines[0]["key"] == pipe.store_key(str(clips / "c.mp4"))
    made.clear(), read.clear()
    assert counts_of(internalize_many(pipe, dataset, out, **OPTIONS)) == (0, 0, 3, 0)
    assert read == []
    assert counts_of(internalize_many(pipe, dataset.select([1, 0]), out, **OPTIONS)) == (0, 0, 2, 0)
    assert made == []  # the bytes are the same
    dataset.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    assert counts_of(internalize_many(pipe, tmp_path / "parquet", out, **OPTIONS)) == (0, 0, 3, 0)
    assert made == []


def test_lists_of_anything(pipe: Any, clips: Path, tmp_path: Path) -> None:
    data = (clips / "e.mp4").read_bytes()
    videos = [clips / "a", str(clips / "c.mp4"), {"video": str(clips / "d.mp4"), "end": 0.5}, data]
    videos += [{"path": "named.mp4", "bytes": (clips / "f.mp4").read_bytes()}, f"file://{clips / 'b' / 'clip.mp4'}"]
    summary = internalize_many(pipe, videos, tmp_path, **OPTIONS)
    assert counts_of(summary) == (6, 0, 0, 0)
    assert [line["video"] and Path(line["video"]).name for line in index_of(tmp_path)] == [
        "clip.mp4", "c.mp4", "d.mp4", "<bytes>", "named.mp4", "clip.mp4"
    ]  # fmt: skip
    assert counts_of(internalize_many(pipe, iter(videos), tmp_path, **OPTIONS)) == (0, 0, 6, 0)


def test_sources_that_are_none(pipe: Any, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        internalize_many(pipe, tmp_path / "rows.jsonl", tmp_path / "out")
    with pytest.raises(DatasetError, match="streaming"):
        rows = Dataset.from_dict({"video": [str(clips / "c.mp4")]}).to_iterable_dataset()
        internalize_many(pipe, rows, tmp_path / "out")
    with pytest.raises(DatasetError, match="no video or video_path"):
        internalize_many(pipe, Dataset.from_dict({"film": ["a"]}), tmp_path / "out")
    for wrong in (3, [torch.zeros(2, 8, 8, 3)]):
        with pytest.raises(TypeError):
            internalize_many(pipe, wrong, tmp_path / "out")
    for options in (
        {"shard": (0, 2)},
        {"batch_size": -1},
        {"num_workers": -1},
        {"max_bad_fraction": 2.0},
        {"max_rank": 9},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            internalize_many(pipe, clips, tmp_path / "out", **options)  # type: ignore[arg-type]
    for sampling in ({"num_frames": 0}, {"fps": 1.0, "num_frames": 2}, {"chunk_seconds": 0.0}):
        with pytest.raises(VideoError):
            internalize_many(pipe, clips, tmp_path / "out", **sampling)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_once(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(clips / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "UPPER.MP4").symlink_to(clips / "c.mp4")
    names = [Path(item.video or "").relative_to(tmp_path) for item in BulkVideos(tmp_path).items()]
    assert names == [Path("UPPER.MP4"), Path("linked/clip.mp4"), Path("linked/long.mp4")]


def test_units_depend_on_the_list_alone(clips: Path) -> None:
    items = BulkVideos(clips).items()
    assert [[item.name for item in unit] for unit in plan_units(items, 3)] == [
        [item.name for item in items[:3]], [item.name for item in items[3:6]], [items[6].name]
    ]  # fmt: skip
