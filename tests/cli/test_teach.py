"""`video2lora teach`: in process, and launched as two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from video2lora.data import load_rows
from video2lora.testing import tiny_clip
from video2lora.trainer.teacher import TeacherLogits

from ..processes import COMMAND, run_code

HELP = """
import sys
from _video2lora_cli import main
sys.argv = ["video2lora", "teach", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
heavy = {"torch", "transformers", "accelerate", "datasets", "av", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
SETTINGS = ("--num-frames", 4, "--longest-edge", 64, "--max-new-tokens", 6, "--batch-size", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine rows about two clips, the fourth with a file that is no video."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, name in enumerate("ab"):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    (folder / "bad.mp4").write_bytes(b"no video")
    videos = ["a.mp4", "b.mp4", "a.mp4", "bad.mp4", "b.mp4", "b.mp4", "a.mp4", "a.mp4", "b.mp4"]
    rows = [{"id": f"r{i}", "video": video, "prompt": f"Question {i * i}?"} for i, video in enumerate(videos)]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--top-k" in done.stdout


def test_two_processes_equal_one(run: Callable[..., Any], base_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    arguments = ["teach", rows_file, "--base", base_dir, *SETTINGS, "--top-k", 3, "--max-bad-fraction", 0.2, "--json"]
    one = run(*arguments, "-o", tmp_path / "one")
    assert one.exit_code == 0, one.stderr
    document = json.loads(one.stdout)
    assert (document["num_rows"], document["num_generated"], document["num_skipped"]) == (8, 8, 1)
    assert load_rows(document["manifest"])["id"] == [f"r{i}" for i in range(9) if i != 3]
    assert len(TeacherLogits(tmp_path / "one")) == 8

    two = run_code(COMMAND, *arguments, "-o", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["num_skipped"] == 1
    assert _files(tmp_path / "two") == _files(tmp_path / "one")


def test_too_many_bad_videos_end_both_processes(base_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    """The process that meets none must not wait for the other for ever."""
    done = run_code(COMMAND, "teach", rows_file, "--base", base_dir, *SETTINGS, "-o", tmp_path / "o", processes=2)
    assert done.returncode != 0
    assert "error: 1 of 9 videos cannot be read" in done.stderr and "bad.mp4" in done.stderr
    assert not (tmp_path / "o" / "manifest.jsonl").exists()


def test_a_table_tells_what_was_done(run: Callable[..., Any], base_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    done = run("teach", rows_file, "--base", base_dir, *SETTINGS, "--limit", 2, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "responses generated" in done.stdout and str(tmp_path / "out" / "manifest.jsonl") in done.stdout
    assert load_rows(tmp_path / "out" / "manifest.jsonl")["id"] == ["r0", "r1"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-new-tokens", 7], "max_new_tokens=6, but 7"),
        (["--limit", 1], "num_rows=2, but 1"),
        (["--dtype", "bfloat16"], "dtype='float32', but 'bfloat16'"),
        (["--top-k", 100000], "--top-k 100000"),
        (["--batch-size", 0], "batch-size"),
        (["--base", "./nowhere"], "./nowhere"),
    ],
)
def test_errors_are_one_line(
    options: list[Any], named: str, run: Callable[..., Any], base_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["teach", rows_file, "--base", base_dir, *SETTINGS, "--limit", 2, "-o", tmp_path / "out"]
    if named.startswith(("max", "num", "dtype")):
        assert run(*arguments).exit_code == 0
    done = run(*arguments, *options)
    assert done.exit_code == 2
    assert named in done.stderr


def test_rows_that_are_not_there(run: Callable[..., Any], base_dir: Path, tmp_path: Path) -> None:
    done = run("teach", tmp_path / "rows.jsonl", "--base", base_dir, *SETTINGS, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and "rows.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_base_inside_a_checkpoint_or_named_by_it_answers_as_the_base(
    run: Callable[..., Any], model_dir: Path, bundled_dir: Path, base_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    responses = []
    for base in (base_dir, model_dir, bundled_dir):
        out = tmp_path / base.name
        done = run("teach", rows_file, "--base", base, *SETTINGS, "--limit", 2, "-o", out)
        assert done.exit_code == 0, done.stderr
        responses.append([row["response"] for row in load_rows(out / "manifest.jsonl")["queries"][0]])
    assert responses[0] == responses[1] == responses[2]
