"""`video2lora report`: reports of finished runs, one by one and together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.report_runs import write_run

from video2lora.testing import tiny_clip

QUICK = ("--resamples", 200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of 12 and 24 frames."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / f"r{n}", num_samples=12, seed=n, sampling__num_frames=n) for n in (12, 24)]


def test_each_run_gets_its_report(run: Callable[..., Any], runs: list[Path]) -> None:
    done = run("report", *runs, *QUICK)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.splitlines() == [str(r / name) for r in runs for name in ("report.md", "report.html")]
    first = (runs[0] / "report.md").read_bytes()
    done = run("report", runs[0], *QUICK, "--json")
    assert (runs[0] / "report.md").read_bytes() == first
    assert str(runs[0] / "report.html") in json.loads(done.stdout)[str(runs[0])]


def test_frames_come_from_the_data_dir(run: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number in range(3):
        tiny_clip(data / f"{number}.mp4", seed=number)
        rows.append({"id": f"video-{number}", "video": f"{number}.mp4", "prompt": "What?", "response": "A square."})
    (data / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = write_run(
        tmp_path / "run", num_samples=3, benchmark__name="mine", benchmark__split="", benchmark__tasks=[""]
    )
    done = run("report", folder, *QUICK, "--data-dir", data)
    assert done.exit_code == 0, done.stderr
    assert len(list((folder / "frames").glob("*.jpg"))) == 3
    assert "Frames are not shown" not in (folder / "report.md").read_text()


def test_two_runs_are_compared(run: Callable[..., Any], runs: list[Path]) -> None:
    done = run("report", *runs, "--compare", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("## adapter in token_f1: B against A\n") and "12 in A, 24 in B" in done.stdout
    found = json.loads(run("report", *runs, "--compare", "--metric", "exact_match", "--json", *QUICK).stdout)
    assert found["metric"] == "exact_match" and found["effects"][0]["n"] == 36
    for effect in found["effects"]:  # no margin was declared, so nothing is claimed
        names = [name for name in effect if name in ("equivalent", "non_inferior", "superior") or name[:2] == "p_"]
        assert len(names) == 9 and all(effect[name] is None for name in [*names, "margin"])
    found = json.loads(run("report", *runs, "--compare", "--json", *QUICK).stdout)
    assert found["metric"] == "token_f1" and isinstance(found["effects"][0]["equivalent"], bool)
    assert found["differences"] == {"sampling.num_frames": [12, 24]}


def test_a_sweep_and_a_summary(run: Callable[..., Any], runs: list[Path], tmp_path: Path) -> None:
    done = run("report", *runs, "--sweep", tmp_path / "sweep", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "sweep" / "report.html").is_file()
    other = write_run(tmp_path / "other", num_samples=6, benchmark__digest="0" * 64)
    done = run("report", runs[0], other, "--summary", tmp_path / "summary", *QUICK)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "summary" / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "--compare takes two runs, got 1"),
        (["--compare", "--sweep", "x"], "take one"),
        (["--sweep", "x"], "two runs or more"),
        (["--data-dir", "nowhere"], "nowhere is no folder"),
    ],
)
def test_what_cannot_be_is_one_line(run: Callable[..., Any], runs: list[Path], arguments: list, message: str) -> None:
    done = run("report", runs[0], *arguments)
    assert done.exit_code == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_folders_that_are_no_runs(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("report", tmp_path)
    assert done.exit_code == 2 and "run.json" in done.stderr
    done = run("report", tmp_path, "--compare", "--margin", -1)
    assert done.exit_code == 2
