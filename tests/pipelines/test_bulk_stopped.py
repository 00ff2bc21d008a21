"""internalize_many: a folder of adapters that is the same whatever stops, splits or repeats the run."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from video2lora.data import DatasetError
from video2lora.pipelines.bulk import internalize_many

from .bulk_runs import OPTIONS, counts_of, files_of, index_of, run_process


@pytest.mark.parametrize("saves", [0, 3])
def test_killed_and_started_again_equals_a_run_never_stopped(
    pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path, saves: int
) -> None:
    killed = run_process(model_dir, clips, tmp_path, saves=saves)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "index.jsonl").exists()
    journal = tmp_path / "journal" / "1-of-1-00000.jsonl"
    units = journal.read_bytes().splitlines()
    assert len(units) == saves // 2 and len([p for p in tmp_path.iterdir() if "-" in p.name]) == saves
    with journal.open("ab") as file:
        file.write(b'[{"video": "half a li')  # killed while it wrote a line
    leftover = tmp_path / ".clip-0123456789abcdef.tmp-0123456789ab"  # or an adapter
    leftover.mkdir()
    (leftover / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / ".index.jsonl.4829.part").write_bytes(b"half")  # or the index
    summary = internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert counts_of(summary) == (7 - saves // 2 * 2, 0, saves // 2 * 2, 0)
    assert files_of(tmp_path) == files_of(whole)
    assert not leftover.exists()


def test_two_processes_equal_one(model_dir: Path, clips: Path, whole: Path, tmp_path: Path) -> None:
    done = run_process(model_dir, clips, tmp_path / "out", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 videos: 7 made, 0 already there, 0 skipped") == 2  # the same in both
    assert files_of(tmp_path / "out") == files_of(whole)


def test_one_of_two_processes_is_killed(pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path) -> None:
    assert run_process(model_dir, clips, tmp_path / "out", saves=2, processes=2).returncode != 0
    made = counts_of(internalize_many(pipe, clips, tmp_path / "out", **OPTIONS))[0]  # with one process
    assert made >= 3
    assert files_of(tmp_path / "out") == files_of(whole)


def test_an_error_in_the_main_process_ends_all(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run_process(model_dir, tmp_path / "empty", tmp_path / "out", processes=2)
    assert done.returncode != 0 and "holds no videos" in done.stderr
    assert not (tmp_path / "out").exists()


def test_shards_together_equal_one_run(pipe: Any, clips: Path, whole: Path, tmp_path: Path) -> None:
    summaries = [internalize_many(pipe, clips, tmp_path, shard=(part, 3), **OPTIONS) for part in (2, 3, 1)]
    assert [summary.num_videos for summary in summaries] == [2, 2, 3]
    assert files_of(tmp_path) == files_of(whole)
    assert counts_of(internalize_many(pipe, clips, tmp_path, **OPTIONS)) == (0, 0, 7, 0)


def test_a_second_run_does_nothing(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, read: list[str], made: list[int]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if "journal" not in str(path)}
    assert counts_of(internalize_many(pipe, clips, tmp_path / "out", **OPTIONS)) == (0, 0, 7, 0)
    assert (read, made) == ([], [])
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_runs_at_once_are_refused(pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pipe.forward

    def nested(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(pipe, "forward", forward)
        half = tmp_path / ".clip-0123456789abcdef.tmp-0123456789ab"  # what the first is writing just now
        half.mkdir()
        settings = (tmp_path / "internalize.json").read_bytes()
        for change in ({}, {"num_frames": 2, "overwrite": True}):
            with pytest.raises(DatasetError, match="another run is writing"):
                internalize_many(pipe, clips, tmp_path, **OPTIONS, **change)
        assert half.is_dir() and (tmp_path / "internalize.json").read_bytes() == settings
        internalize_many(pipe, [clips / "c.mp4"], tmp_path, shard=(1, 2), **OPTIONS)  # a launch beside it
        assert half.is_dir()
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe, "forward", nested)
    summary = internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert summary.num_made + summary.num_found == 7 and len(index_of(tmp_path)) == 7
