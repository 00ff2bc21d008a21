"""internalize_many: bad files are skipped and named, and where it cannot write nothing is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from video2lora import VideoError
from video2lora.adapters.errors import OutputExistsError
from video2lora.data import DatasetError
from video2lora.pipelines.bulk import internalize_many

from .bulk_runs import OPTIONS, counts_of, files_of, index_of, lines_of, run_process


def test_bad_files_are_skipped_named_and_tried_again(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, made: list[int]
) -> None:
    folder, out = shutil.copytree(clips, tmp_path / "clips"), tmp_path / "out"
    good = (folder / "d.mp4").read_bytes()
    (folder / "d.mp4").write_bytes(b"no video")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    for _ in range(2):
        summary = internalize_many(pipe, folder, out, **OPTIONS)
        assert summary.num_skipped == 3 and summary.num_videos == 9
        skipped = lines_of(out / "skipped.jsonl")
        assert [Path(line["video"]).name for line in skipped] == ["d.mp4", "empty.mp4", "gone.mp4"]
        assert all(Path(line["video"]).name in line["error"] for line in skipped)
        assert len(index_of(out)) == 6
    assert sum(made) == 6
    journal = (out / "journal" / "1-of-1-00000.jsonl").read_text()
    assert journal.count('"error"') == 3  # the same is not noted twice
    (folder / "d.mp4").write_bytes(good)
    (folder / "empty.mp4").unlink(), (folder / "gone.mp4").unlink()
    assert counts_of(internalize_many(pipe, folder, out, **OPTIONS)) == (1, 0, 6, 0)
    assert not (out / "skipped.jsonl").exists() and len(index_of(out)) == 7


def test_a_bad_row_is_named_once_and_a_missing_file_as_the_pipeline_does(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"video": "gone.mp4"}\n{"prompt": "of no video"}\n')
    internalize_many(pipe, tmp_path / "rows.jsonl", tmp_path / "out", **OPTIONS)
    gone = tmp_path / "gone.mp4"
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"{gone} is skipped: no such file: {gone}. Check the path.",
        "rows.jsonl:2 is skipped: there is no video.",
    ]
    with pytest.raises(VideoError) as told:
        pipe(str(gone))
    assert lines_of(tmp_path / "out" / "skipped.jsonl")[0]["error"] == str(told.value)


def test_too_many_bad_files_stop_the_run_if_wanted(pipe: Any, clips: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    for name in ("e", "a/clip"):
        (folder / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match=r"of 7 videos could not be read, more than max_bad_fraction=0.1"):
        internalize_many(pipe, folder, tmp_path / "out", max_bad_fraction=0.1, **OPTIONS)
    assert len(lines_of(tmp_path / "out" / "skipped.jsonl")) == 1  # it stopped at once
    assert [Path(line["video"]).name for line in index_of(tmp_path / "out")] == ["c.mp4", "d.mp4", "f.mp4"]
    assert internalize_many(pipe, folder, tmp_path / "out", max_bad_fraction=0.3, **OPTIONS).num_skipped == 2


def test_what_the_model_cannot_do_with_one_video_is_no_ones_elses_matter(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that yields no finite adapter, one too large for the memory, one that trips a library."""
    forward, preprocess = pipe.forward, pipe.preprocess

    def fails(inputs: Any, **kwargs: Any) -> Any:
        sources = {segment.source for segment in inputs["segments"]}
        if "d.mp4" in sources:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        outputs = forward(inputs, **kwargs)
        if "long.mp4" in sources:
            next(iter(outputs["generated"].lora_A.values()))[:] = float("nan")
        return outputs

    def trips(frames: Any, **kwargs: Any) -> Any:
        if frames.source == "f.mp4":
            raise KeyError("deep in a library")
        return preprocess(frames, **kwargs)

    monkeypatch.setattr(pipe, "forward", fails)
    monkeypatch.setattr(pipe, "preprocess", trips)
    assert counts_of(internalize_many(pipe, clips, tmp_path, **OPTIONS)) == (4, 0, 0, 3)
    errors = {Path(line["video"]).name: line["error"] for line in lines_of(tmp_path / "skipped.jsonl")}
    assert "NaN" in errors["long.mp4"] and "out of memory" in errors["d.mp4"] and "KeyError" in errors["f.mp4"]


def test_a_chunk_that_trips_a_library_is_no_ones_elses_matter(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pipe._prepare

    def trips(frames: Any) -> Any:
        if frames.source == "d.mp4" and frames.start > 0.5:
            raise KeyError("deep in a library")
        return prepare(frames)

    monkeypatch.setattr(pipe, "_prepare", trips)
    videos = [clips / f"{name}.mp4" for name in "cde"]
    assert counts_of(internalize_many(pipe, videos, tmp_path / "out", chunk_seconds=1.0, **OPTIONS)) == (2, 0, 0, 1)
    (skipped,) = lines_of(tmp_path / "out" / "skipped.jsonl")
    assert skipped["error"] == "KeyError: 'deep in a library'"

    def fails(inputs: Any, **kwargs: Any) -> Any:
        raise KeyError("a bug of the model's")

    monkeypatch.setattr(pipe, "forward", fails)
    with pytest.raises(KeyError, match="bug of the model"):
        internalize_many(pipe, videos, tmp_path / "bug", chunk_seconds=1.0, **OPTIONS)


def test_a_bug_or_ctrl_c_keeps_what_is_done(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = pipe.forward, iter([None, RuntimeError("a bug"), None, KeyboardInterrupt()])

    def fails(*args: Any, **kwargs: Any) -> Any:
        if error := next(calls):
            raise error
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "forward", fails)
        for expected, done in ((RuntimeError, 2), (KeyboardInterrupt, 4)):
            with pytest.raises(expected):
                internalize_many(pipe, clips, tmp_path, **OPTIONS)
            assert len(index_of(tmp_path)) == done
    internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert files_of(tmp_path) == files_of(whole)


# where it cannot write


def test_a_full_disk_stops_it_and_leaves_nothing_half_written(
    pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path
) -> None:
    done = run_process(model_dir, clips, tmp_path, limit=10_000)  # bytes a file may have; an adapter's has more
    assert done.returncode == 1
    assert "OSError" in done.stderr and "cannot be written" in done.stderr and "start again" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "journal"]
    internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert files_of(tmp_path) == files_of(whole)


def test_an_output_that_is_something_else_is_refused_and_left_alone(pipe: Any, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(DatasetError, match="is a file"):
        internalize_many(pipe, clips, tmp_path / "file")
    with pytest.raises(DatasetError, match="mine.txt"):
        internalize_many(pipe, clips, tmp_path / "folder")
    with pytest.raises(OSError):
        internalize_many(pipe, clips, tmp_path / "file" / "out")
    assert files_of(tmp_path) == before and len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that not even root may write to")
def test_an_unwritable_output(pipe: Any, clips: Path) -> None:
    with pytest.raises(OSError, match="/proc/out"):
        internalize_many(pipe, clips, "/proc/out")


def test_something_else_in_an_adapters_place_is_never_deleted(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    adapter = out / index_of(out)[0]["adapter"]
    (adapter / "video2lora.json").unlink()
    (adapter / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=adapter.name):
        internalize_many(pipe, clips, out, **OPTIONS)
    assert (adapter / "mine.txt").read_text() == "mine"
