"""`video2lora internalize` over folders, rows and datasets: in process, and launched as two processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from video2lora import VideoAdapter
from video2lora.testing import tiny_clip

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, two of one name, and a file that is no video; read it, never write to it."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a", "b", "more/a", "more/c")):
        (folder / name).parent.mkdir(exist_ok=True)
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    (folder / "bad.mp4").write_bytes(b"no video")
    return folder


def _index(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "index.jsonl").read_text(encoding="utf-8").splitlines()]


def _files(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("journal")}


def test_a_folder_by_one_process_and_by_two(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    options = ["-m", model_dir, "--batch-size", 2, "--num-frames", 3, "--dtype", "bfloat16", "--layout", "text"]
    one = run("internalize", clips, *options, "-o", tmp_path / "one", "--json")
    assert one.exit_code == 0, one.stderr
    document = json.loads(one.stdout)
    assert (document["num_videos"], document["num_made"], document["num_skipped"]) == (5, 4, 1)
    assert (document["model"], document["index"]) == (str(model_dir), str(tmp_path / "one" / "index.jsonl"))
    assert document["num_bytes"] == sum(line["bytes"] for line in _index(tmp_path / "one"))
    for line in _index(tmp_path / "one"):
        stored = json.loads((tmp_path / "one" / line["adapter"] / "video2lora.json").read_text())
        assert (stored["layout"], stored["dtype"], line["num_frames"]) == ("text", "bfloat16", 3)

    # accelerate's own launcher starts one process only where there is no GPU, unless told otherwise
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launch, "-m", "video2lora", "internalize", clips, *options, "-o", tmp_path / "two"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run([*map(str, command), "--device", "cpu"], capture_output=True, text=True, env=env, timeout=120)
    assert two.returncode == 0, two.stderr
    assert "Internalizing" not in two.stderr  # no bar: it is no terminal
    assert two.stdout.count("videos/s") == 1 and "skipped" in two.stdout
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


def test_the_same_command_goes_on(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(clips, tmp_path / "clips"), tmp_path / "out"
    first = run("internalize", folder, "-m", model_dir, "-o", out, "--num-frames", 2)
    assert first.exit_code == 0, first.stderr
    assert f"1, see {out / 'skipped.jsonl'}" in first.stdout and str(out / "index.jsonl") in first.stdout
    (folder / "bad.mp4").unlink()
    tiny_clip(folder / "new.mp4", seed=9)
    again = run("internalize", folder, "-m", model_dir, "-o", out, "--num-frames", 2, "--json")
    document = json.loads(again.stdout)
    assert (document["num_made"], document["num_found"], document["num_skipped"]) == (1, 4, 0)
    other = run("internalize", folder, "-m", model_dir, "-o", out, "--num-frames", 3)
    assert other.exit_code == 2 and "sampling=" in other.stderr and len(other.stderr.splitlines()) == 1
    other = run("internalize", folder, "-m", model_dir, "-o", out, "--num-frames", 3, "--overwrite", "--json")
    assert json.loads(other.stdout)["num_made"] == 5
    assert len([path for path in out.iterdir() if (path / "video2lora.json").exists()]) == 5


def test_rows_and_datasets(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    rows = [{"id": f"r{i}", "video": "more/c.mp4", "start": i, "end": i + 1, "prompt": "What?"} for i in range(2)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("internalize", folder / "rows.jsonl", "-m", model_dir, "-o", tmp_path / "rows", "--num-frames", 2)
    assert done.exit_code == 0, done.stderr
    found = [(line["ids"], line["start"], line["video"]) for line in _index(tmp_path / "rows")]
    assert found == [(["r0"], 0, str(folder / "more" / "c.mp4")), (["r1"], 1, str(folder / "more" / "c.mp4"))]

    video = {"path": "inside.mp4", "bytes": (folder / "a.mp4").read_bytes()}
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        Dataset.from_dict({"video": [video]}).to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    options = ["-m", model_dir, "-o", tmp_path / "inside", "--num-frames", 2]
    unclear = run("internalize", tmp_path / "data", *options)
    assert unclear.exit_code == 2 and "split" in unclear.stderr
    done = run("internalize", tmp_path / "data", *options, "--split", "test")
    assert done.exit_code == 0, done.stderr
    (line,) = _index(tmp_path / "inside")
    assert line["video"] == "inside.mp4" and line["adapter"].startswith("inside-")


def test_copies_are_told_from_what_was_there(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(clips / "a.mp4", tmp_path / "in" / f"{name}.mp4")
    options = ["-m", model_dir, "-o", tmp_path / "out", "--num-frames", 2]
    first, again = (" ".join(run("internalize", tmp_path / "in", *options).stdout.split()) for _ in range(2))
    assert "made 1 already there 0 same bytes as another 2 skipped 0" in first
    assert "made 0 already there 3 skipped 0" in again
    assert len({line["adapter"] for line in _index(tmp_path / "out")}) == 1


def test_shards_and_a_store(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    options = ["-m", model_dir, "--num-frames", 2, "--store", tmp_path / "store", "--json"]
    for part in (1, 2):
        done = run("internalize", clips, *options, "-o", tmp_path / "out", "--shard", f"{part}/2")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["num_videos"] == 4 - part
    assert len(_index(tmp_path / "out")) == 4
    alone = run("internalize", clips / "b.mp4", *options, "-o", tmp_path / "b")  # one video, from the same store
    (line,) = [line for line in _index(tmp_path / "out") if line["video"] == str(clips / "b.mp4")]
    assert json.loads(alone.stdout)["adapters"][0]["content_hash"] == line["content_hash"]
    assert VideoAdapter.from_pretrained(tmp_path / "b").content_hash == line["content_hash"]


def test_files_by_name_are_a_bulk_run_if_bulk_options_say_so(
    run: Run, clips: Path, model_dir: Path, tmp_path: Path
) -> None:
    options = ["-m", model_dir, "-o", tmp_path / "out", "--num-frames", 2]
    files = [clips / "a.mp4", clips / "bad.mp4"]
    assert run("internalize", *files, *options).exit_code == 2 and not (tmp_path / "out").exists()
    done = run("internalize", *files, *options, "--max-bad-fraction", 0.5)
    assert done.exit_code == 0 and len(_index(tmp_path / "out")) == 1
    done = run("internalize", *files, *options, "--max-bad-fraction", 0.4)
    assert done.exit_code == 2 and "max_bad_fraction=0.4" in done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--shard", "0/2"], "--shard 0/2"),
        (["--shard", "half"], "--shard half"),
        (["--batch-size", 0], "--batch-size"),
        (["--num-frames", 0], "num_frames=0"),
        (["--num-frames", 2, "--fps", 1], "fps=1.0"),
        (["--chunk-seconds", 0], "chunk_seconds"),
        (["--chunk-seconds", "nan"], "chunk_seconds=nan"),
        (["--chunk-seconds", "inf"], "chunk_seconds=inf"),
        (["--chunk-seconds", 1, "--max-rank", 1], "leaves no rank"),
        (["--longest-edge", 0], "longest_edge=0"),
        (["--max-rank", 9], "--chunk-seconds"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_errors_are_one_line(
    options: list[Any], named: str, run: Run, clips: Path, model_dir: Path, tmp_path: Path
) -> None:
    done = run("internalize", clips, "-m", model_dir, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2 and named in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sources_and_outputs_that_are_none(run: Run, clips: Path, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for video, output, named in (
        (tmp_path / "empty", "out", "holds no videos"),
        (tmp_path / "gone.jsonl", "out", "gone.jsonl"),
        ("somebody/videos", "out", "somebody/videos"),
        (clips, "mine", "notes.txt"),
        (clips, "mine/notes.txt", "is a file"),
    ):
        done = run("internalize", video, "-m", model_dir, "-o", tmp_path / output)
        assert done.exit_code == 2 and named in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_damaged_and_bad_videos_are_told_in_one_line_each(
    run: Run, damaged: Path, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(damaged, tmp_path / "in")
    (tmp_path / "in" / "empty.mp4").write_bytes(b"")
    done = run("internalize", tmp_path / "in", "-m", model_dir, "-o", tmp_path / "out", "--num-frames", 50)
    assert done.exit_code == 0, done.stderr
    first, second = sorted(done.stderr.splitlines())
    assert first.startswith(f"warning: {tmp_path / 'in' / 'empty.mp4'} is skipped: ")
    assert first.count("empty.mp4") == 1
    (line,) = _index(tmp_path / "out")
    count = line["num_decode_errors"]
    assert count > 0
    assert second == f"warning: damaged.mp4: {count} packets or frames do not decode; the rest was used"
