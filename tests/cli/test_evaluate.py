"""`video2lora evaluate`: in process, stopped, and launched as two processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from video2lora.cli import evaluate as command
from video2lora.evaluation.judge import Judge
from video2lora.evaluation.records import TIMES, read_run
from video2lora.evaluation.report_document import without_times
from video2lora.testing import tiny_clip

from ..evaluation.judge_server import Server, server
from ..processes import COMMAND, run_code

__all__ = ["server"]

SLOW = """
import time
from _video2lora_cli import main
from video2lora.evaluation.journal import RunFolder
append = RunFolder.append
RunFolder.append = lambda *arguments: (append(*arguments), time.sleep(1))
main()
"""
SETTINGS = ("--num-frames", 4, "--max-new-tokens", 6, "--batch-size", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven questions of two tasks about five spans of three clips, one of which cannot be read."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, name in enumerate("ab"):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    (folder / "bad.mp4").write_bytes(b"no video")
    videos = [("a", 0.0), ("a", 0.0), ("b", 0.0), ("bad", 0.0), ("b", 1.0), ("b", 1.0), ("a", 1.0)]
    rows = [
        {"id": f"r{i}", "video": f"{name}.mp4", "start": start, "prompt": f"Question {i}?", "response": "red",
         "task": "colour" if i % 2 else "motion"}
        for i, (name, start) in enumerate(videos)
    ]  # fmt: skip
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_list_tells_size_and_access(run: Callable[..., Any]) -> None:
    done = run("evaluate", "--list")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["name", "questions", "videos"]
    for name in ("vidcapbench", "moving_shapes", "activitynet_qa"):
        assert any(name in line.replace("-", "_") for line in lines), done.stdout
    assert "GB" in done.stdout
    rows = json.loads(run("evaluate", "--list", "--json").stdout)
    assert {"name", "size", "access", "license"} <= set(rows[0])


def test_what_has_to_be_fetched_is_told_and_nothing_is(
    run: Callable[..., Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.evaluation import benchmarks

    monkeypatch.setattr(benchmarks, "download", lambda *_, **__: pytest.fail("nobody asked for it"))
    names = [row["name"] for row in json.loads(run("evaluate", "--list", "--json").stdout) if "GB" in row["size"]]
    done = run("evaluate", model_dir, "-b", names[0], *SETTINGS, "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and "has to be fetched first" in done.stderr
    assert "GB" in done.stderr and "Licence" in done.stderr and "--download" in done.stderr
    assert not (tmp_path / "run").exists()
    done = run("evaluate", model_dir, "-b", names[0], *SETTINGS, "-o", tmp_path / "run", "--data-dir", tmp_path)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and "has no annotations" in done.stderr
    assert any(line.startswith("  - videos: ") for line in done.stderr.splitlines())


def test_a_run_without_its_baseline_says_so(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    done = run(*arguments, "--conditions", "no_adapter")
    assert done.exit_code == 0, done.stderr
    assert "no verdicts: the baseline, video, is none of the conditions" in done.stdout


def test_verdicts_that_show_nothing_of_the_video_are_told(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    done = run(
        *arguments, "--metrics", "exact_match,unended", "--margin", "exact_match=0.5", "--margin", "unended=0.5"
    )
    assert done.exit_code == 0, done.stderr
    remark = "exact_match: no_adapter and other_adapter saw nothing of the video"  # no answer of noise is "red"
    assert done.stdout.count("saw nothing of the video") == 1 and remark in done.stdout
    assert "saw nothing of the video" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_download_is_done_when_told(
    run: Callable[..., Any], model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.evaluation import benchmarks

    fetched: list[Any] = []
    monkeypatch.setattr(benchmarks, "download", lambda name, folder, **_: fetched.append((name, folder)))
    done = run("evaluate", model_dir, "-b", "plm_sgqa", "--data-dir", tmp_path, "--download", "-o", tmp_path / "run")
    assert fetched == [("plm_sgqa", tmp_path)]
    assert done.exit_code == 2 and "annotations" in done.stderr  # nothing came


def test_two_processes_equal_one(run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "--json"]
    one = run(*arguments, "-o", tmp_path / "one")
    assert one.exit_code == 0, one.stderr
    document = json.loads(one.stdout)
    assert [row["condition"] for row in document["scores"]][::3] == command.CONDITIONS.split(",")
    assert [row["task"] for row in document["scores"]][2] == "all"
    assert len(document["errors"]) == 1 and document["unscored"] == {}
    assert {verdict["condition"] for verdict in document["verdicts"]} == {"adapter", "no_adapter", "other_adapter"}
    assert all(verdict["margin"] == 0.05 and verdict["n"] == 6 for verdict in document["verdicts"])
    two = run_code(COMMAND, *arguments, "-o", tmp_path / "two", processes=2)
    assert two.returncode == 0, two.stderr
    assert len(list((tmp_path / "two" / "answers").glob("part-*.jsonl"))) == 2
    records = [read_run(tmp_path / name).records.drop_columns(TIMES) for name in ("one", "two")]
    assert records[0].equals(records[1])
    assert json.loads(two.stdout)["scores"] == document["scores"]


def test_killed_and_started_again_the_report_is_the_same(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5]
    arguments += ["--conditions", "video,adapter"]
    assert run(*arguments, "-o", tmp_path / "whole").exit_code == 0
    part = tmp_path / "killed" / "answers" / "part-00000.jsonl"
    command = [sys.executable, "-c", SLOW, *arguments, "-o", tmp_path / "killed"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed" / "records.parquet").exists()
    assert run(*arguments, "-o", tmp_path / "killed").exit_code == 0
    whole, killed = (_report(tmp_path / name) for name in ("whole", "killed"))
    assert whole == killed and "report.md" in whole and "report.html" in whole


def _report(folder: Path) -> dict[str, str | bytes]:
    """All files of the report but a plot of times, without the section of times and the date."""
    date = read_run(folder).settings["environment"]["date"]
    files: dict[str, str | bytes] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix in (".md", ".html"):
            files[name] = without_times(path.read_text(encoding="utf-8")).replace(date, "DATE")
        elif path.suffix in (".png", ".jpg") and path.name != "amortisation.png":
            files[name] = path.read_bytes()
    return files


def test_a_table_and_verdicts_tell_what_came_out(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    arguments += ["--conditions", "video,adapter", "--metrics", "token_f1,unended", "--margin", "token_f1=0.2"]
    arguments += ["--margin", "unended=0.1", "--alpha", 0.05]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["condition", "task", "questions", "token_f1", "unended"]
    tasks = [tuple(line.split()[:3]) for line in lines[1:7]]
    numbers = {("colour", "3"), ("motion", "4"), ("all", "7")}
    assert set(tasks) == {(name, *pair) for name in ("video", "adapter") for pair in numbers}
    assert "token_f1: adapter - video = " in done.stdout and "(90 %), margin 0.2: " in done.stdout
    assert "unended: adapter - video = " in done.stdout
    assert "1 of 5, such as that of " in done.stdout and "bad.mp4" in done.stdout
    settings = read_run(tmp_path / "run").settings
    assert settings["margins"] == {"token_f1": 0.2, "unended": 0.1} and settings["alpha"] == 0.05
    assert settings["sampling"]["num_frames"] == 4
    again = run(*arguments)
    assert again.exit_code == 0 and again.stdout == done.stdout


def test_without_the_extra_there_are_scores(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scipy", "scipy.stats", "scipy.special", "matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    done = run(*arguments, "--conditions", "video,adapter")
    assert done.exit_code == 0, done.stderr
    assert "there are no verdicts" in done.stderr and "there is no report" in done.stderr
    assert "video2lora[evaluation]" in done.stderr and "adapter" in done.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-new-tokens", 7], "decoding.max_new_tokens=6, but 7"),
        (["--num-frames", 5], "sampling.num_frames=4, but 5"),
        (["--num-samples", 2], "holds an evaluation of 7 questions about 5 videos in 4 frames, and "),
        (["--margin", "token_f1=0.1"], "margins.token_f1=0.05, but 0.1"),
        (["--dtype", "bfloat16"], "model.dtype='float32', but 'bfloat16'"),
    ],
)
def test_a_run_that_was_declared_otherwise_is_refused(
    options: list[Any], named: str, run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    arguments += ["--conditions", "no_adapter"]
    assert run(*arguments).exit_code == 0
    done = run(*arguments, *options)
    assert done.exit_code == 2
    assert named in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--conditions", "video,adaptor"], "'adaptor'"),
        (["--metrics", "f1"], "'f1'"),
        (["--metrics", "judge"], "--judge MODEL"),
        (["--margin", "token_f1"], "--margin token_f1"),
        (["--margin", "rouge_l=0.1"], "'rouge_l'"),
        (["--num-samples", "some"], "--num-samples some"),
        (["--alpha", 0.7], "alpha"),
        (["--max-bad-fraction", 0.1], "bad.mp4"),
        (["--download"], "--download"),
        (["-b", "vidcapbnch"], "vidcapbench"),
        (["-b", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--margin", "token_f1=5"], "from 0 to 1"),
        (["--judge", "some/model"], "VIDEO2LORA_JUDGE_API_KEY"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "--judge MODEL"),
        (["-o", __file__], "is a file"),
    ],
)
def test_errors_are_one_line(
    options: list[Any],
    named: str,
    run: Callable[..., Any],
    model_dir: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv(command.JUDGE_KEY, raising=False)
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "-o", tmp_path / "run"]
    done = run(*arguments, *options)
    assert done.exit_code == 2, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert named in line
    assert not (tmp_path / "run" / "records.parquet").exists()


@pytest.mark.parametrize("missing", ["CHECKPOINT", "--benchmark", "--output"])
def test_what_is_missing_is_named(
    missing: str, run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path
) -> None:
    given = {"CHECKPOINT": [model_dir], "--benchmark": ["-b", rows_file], "--output": ["-o", tmp_path / "run"]}
    done = run("evaluate", *(part for name, parts in given.items() if name != missing for part in parts))
    assert done.exit_code == 2 and f"{missing} is missing" in done.stderr


def test_a_judge_that_cannot_be_reached_loses_no_answer(
    run: Callable[..., Any], model_dir: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = Judge.__init__

    def impatient(self: Judge, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs, retries=0, timeout=5, cache_dir=tmp_path / "cache")

    monkeypatch.setattr(Judge, "__init__", impatient)
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    arguments += ["--conditions", "video,adapter", "--judge", "grader", "--judge-url", "http://127.0.0.1:9/v1"]
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "judge grader" in done.stderr and "7 calls" in done.stderr
    assert "no score in judge" in done.stdout and "the same command tries again" in done.stdout
    evaluated = read_run(tmp_path / "run")
    assert evaluated.unscored("token_f1") == 0
    assert evaluated.settings["judge"]["model"] == "grader" and evaluated.settings["margins"]["judge"] == 0.15
    monkeypatch.setattr(Judge, "score", lambda self, predictions, *_: [0.5] * len(predictions))
    again = run(*arguments)
    assert again.exit_code == 0 and "no score in judge" not in again.stdout
    assert read_run(tmp_path / "run").scores("judge", "video").count(0.5) == 6


def test_replies_that_cannot_be_read_are_asked_for_again_and_by_the_next_start(
    run: Callable[..., Any],
    model_dir: Path,
    rows_file: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("video2lora.evaluation.judge.cached_assets_path", lambda *_, **__: tmp_path / "cache")
    arguments = ["evaluate", model_dir, "-b", rows_file, *SETTINGS, "--max-bad-fraction", 0.5, "-o", tmp_path / "run"]
    arguments += ["--conditions", "video,no_adapter", "--judge", "grader", "--judge-url", server.url]
    server.respond = lambda data, number: "I would say four."
    done = run(*arguments)
    assert done.exit_code == 0, done.stderr
    assert "no score in judge" in done.stdout and "the same command tries again" in done.stdout
    asked = {answer: server.answers.count(answer) for answer in server.answers}
    assert len(asked) > 1 and all(count % 3 == 0 for count in asked.values())  # three times for each question
    told = [request["messages"][-1]["content"] for request in server.requests]
    assert sum("last reply could not be used" in text for text in told) == len(told) * 2 // 3

    left = len(server.requests)
    server.respond = lambda data, number: "Four again." if (number - left) % 2 == 0 else 4
    create = Judge.__init__
    monkeypatch.setattr(Judge, "__init__", lambda self, *a, **k: create(self, *a, **k, max_concurrency=1))
    again = run(*arguments)
    assert again.exit_code == 0 and "no score in judge" not in again.stdout
    assert len(server.requests) - left == left * 2 // 3  # two for each, the second of which is read
    scores = read_run(tmp_path / "run").scores("judge", "video")
    assert scores.count(0.8) == 6 and scores.count(None) == 1  # the video that cannot be read
    left = len(server.requests)
    assert run(*arguments).exit_code == 0 and len(server.requests) == left  # nothing is paid for twice
