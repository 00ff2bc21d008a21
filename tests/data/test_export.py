"""Exporting FineVideo: whatever it is stopped by, the folder ends up as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from tests.data.finevideo_rows import metadata, rows

from video2lora.data import DatasetError, ExportSummary, check_rows, export, export_finevideo, load_rows

from ..processes import run_code

NUM_VIDEOS = 12


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "export.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def source_rows() -> list[dict[str, Any]]:
    found = rows(NUM_VIDEOS)
    found.insert(3, {"mp4": b"again", "json": metadata("clip_0001")})
    found.insert(5, {"mp4": None, "json": metadata("no_video")})
    found.insert(7, {"mp4": b"x", "json": None})
    return found


class Interrupted(BaseException):
    pass


def run(folder: Path, stop_after: int | None = None, **options: Any) -> ExportSummary:
    def generate():
        for i, row in enumerate(source_rows()):
            if i == stop_after:
                raise Interrupted
            yield row

    return export_finevideo(folder, source=IterableDataset.from_generator(generate), spans_per_video=3, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], ExportSummary]:
    """An export that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    summary = run(folder)
    return contents(folder), summary


def same(one: ExportSummary, other: ExportSummary) -> bool:
    names = ("num_rows", "num_videos", "num_read", "statistics", "finished")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def test_the_folder_holds_videos_and_a_manifest_for_the_teacher(
    whole: tuple[dict[str, bytes], ExportSummary], tmp_path: Path
) -> None:
    files, summary = whole
    assert {name: data for name, data in files.items() if name != "manifest.jsonl"} == {
        f"videos/clip_{i:04d}.mp4": b"video %d" % i for i in range(NUM_VIDEOS)
    }
    lines = [json.loads(line) for line in files["manifest.jsonl"].splitlines()]
    assert len(lines) == summary.num_rows == sum(summary.statistics.spans.values())
    assert len({line["id"] for line in lines}) == len(lines) and all("response" not in line for line in lines)
    assert (summary.num_videos, summary.num_read, summary.finished) == (NUM_VIDEOS, NUM_VIDEOS + 3, True)
    skipped = {"duplicate_video": 1, "row_without_video": 1, "video_without_metadata": 1}
    assert skipped.items() <= summary.statistics.skipped.items()
    text = str(summary)
    assert f"{NUM_VIDEOS} videos, {len(lines)} rows" in text and "1 duplicate_video" in text
    loaded = load_rows(summary.manifest)
    assert loaded.num_rows == len(lines) and all(row["queries"][0]["response"] is None for row in loaded)
    assert check_rows(summary.manifest, decode="none").ok


@pytest.mark.parametrize("state_every", [1, 4, 25])
@pytest.mark.parametrize("stop_after", [0, 1, 4, 9, 14])
def test_a_stopped_export_goes_on_to_the_same_folder(
    state_every: int,
    stop_after: int,
    whole: tuple[dict[str, bytes], ExportSummary],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "_STATE_EVERY", state_every)
    with pytest.raises(Interrupted):
        run(tmp_path, stop_after)
    # What a kill can leave besides: half a video, half a state, half a line.
    (tmp_path / "videos" / ".clip_0009.mp4.77.part").write_bytes(b"vid")
    (tmp_path / ".export.json.77.part").write_bytes(b"{")
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b'{"id": "clip_0009-0", "video": "vid')
    summary = run(tmp_path)
    assert contents(tmp_path) == whole[0]
    assert same(summary, whole[1])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()}
    assert same(run(tmp_path), whole[1]), "an export that is done stays as it is"
    assert contents(tmp_path) == whole[0]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "videos").iterdir()} == before


def test_a_cut_between_the_lines_of_one_video_loses_and_repeats_nothing(
    whole: tuple[dict[str, bytes], ExportSummary], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, 9)
    manifest = tmp_path / "manifest.jsonl"
    lines = manifest.read_bytes().splitlines(keepends=True)
    last = [line for line in lines if json.loads(line)["video"] == json.loads(lines[-1])["video"]]
    assert len(last) > 1
    manifest.write_bytes(b"".join(lines)[: -len(last[-1]) // 2])
    summary = run(tmp_path)
    assert contents(tmp_path) == whole[0] and same(summary, whole[1])


KILLED = """
import os, signal, sys
from datasets import Dataset
from tests.data.test_export import source_rows
from video2lora.data import export, export_finevideo

def export_until_killed(count, name):
    left, real = count, getattr(os, name)
    def dying(*args):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(os, name, dying)
    export._STATE_EVERY = 2
    export_finevideo(sys.argv[1], source=Dataset.from_list(source_rows()), spans_per_video=3)

for count, name in ((4, "replace"), (6, "fsync"), (7, "replace"), (1, "fsync")):
    if not (pid := os.fork()):
        export_until_killed(count, name)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, (count, name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_kill_9_at_the_worst_moments(whole: tuple[dict[str, bytes], ExportSummary], tmp_path: Path) -> None:
    run_code(KILLED, tmp_path).check_returncode()
    assert list(tmp_path.rglob("*.part")), "a kill before the rename leaves the temporary file"
    summary = export_finevideo(tmp_path, source=Dataset.from_list(source_rows()), spans_per_video=3)
    assert contents(tmp_path) == whole[0] and same(summary, whole[1])


def test_resuming_a_stream_does_not_read_finished_shards_again(tmp_path: Path) -> None:
    files = [str(tmp_path / f"train-{i}.parquet") for i in range(4)]
    for i, file in enumerate(files):
        Dataset.from_list(rows(12)[3 * i : 3 * i + 3]).to_parquet(file)

    def stream() -> IterableDataset:
        return load_dataset("parquet", data_files=files, split="train", streaming=True)

    once = export_finevideo(tmp_path / "once", source=stream())
    first = export_finevideo(tmp_path / "twice", source=stream(), limit=11)
    assert (first.num_videos, first.num_read, first.finished) == (11, 11, False)
    assert same(export_finevideo(tmp_path / "twice", source=stream(), limit=11), first)
    os.truncate(files[1], 100)  # it would fail, were it read (`datasets` goes back two shards at most)
    second = export_finevideo(tmp_path / "twice", source=stream())
    assert contents(tmp_path / "twice") == contents(tmp_path / "once") and same(second, once)


def test_a_place_that_another_version_of_datasets_noted_is_not_trusted(
    whole: tuple[dict[str, bytes], ExportSummary], tmp_path: Path
) -> None:
    run(tmp_path, limit=5)
    state = json.loads((tmp_path / "export.json").read_text())
    state["datasets_version"], state["source_state"] = "0", {"of another": "form"}
    (tmp_path / "export.json").write_text(json.dumps(state))
    assert same(run(tmp_path), whole[1])
    assert contents(tmp_path) == whole[0]


def test_videos_that_somebody_removed_are_written_again(
    whole: tuple[dict[str, bytes], ExportSummary], tmp_path: Path
) -> None:
    run(tmp_path)
    (tmp_path / "videos" / "clip_0002.mp4").unlink()
    assert same(run(tmp_path), whole[1])
    assert contents(tmp_path) == whole[0]


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "ours", limit=2)
    before = contents(tmp_path / "ours")
    with pytest.raises(DatasetError, match=r"seed=42, but 7 was asked for"):
        run(tmp_path / "ours", seed=7)
    assert contents(tmp_path / "ours") == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DatasetError, match="no export.json"):
        run(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "manifest.jsonl").read_text() == '{"id": "x"}\n'
    with pytest.raises(DatasetError, match=r"no column \['json'\]"):
        export_finevideo(tmp_path / "columns", source=Dataset.from_list([{"mp4": b"x"}]))
    with pytest.raises(DatasetError, match="gated: accept its terms"):
        export_finevideo(tmp_path / "offline")
    with pytest.raises(DatasetError, match="source is list"):
        export_finevideo(tmp_path / "list", source=[{"mp4": b"x"}])


def test_no_progress_bar_where_stderr_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert capfd.readouterr().err == ""
