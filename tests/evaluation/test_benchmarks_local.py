"""A user's own JSONL as a benchmark: the training rows' forms, further answers, tasks, grouping and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from video2lora.data import DatasetError
from video2lora.evaluation.benchmarks import Benchmark, BenchmarkError, load_benchmark

ROWS: list[dict[str, Any]] = [
    {
        "video": "clips/a.mp4",
        "prompt": "What?",
        "response": "A dog.",
        "references": ["Dog", "A dog."],
        "task": "object",
    },
    {"video": "clips/b.mp4", "prompt": "Describe it.", "target_text": "A cat sleeps."},
    {
        "video": "clips/a.mp4",
        "task": "detail",
        "conversations": [
            {"prompt": "Colour? One word.", "response": "Red", "question": "Which colour?"},
            {"prompt": "Size?", "references": ["Small"], "task": "size"},
        ],
    },
    {"id": "span", "video": "clips/a.mp4", "start": 0.5, "end": 1.5, "prompt": "Then?", "response": "It falls."},
    {
        "video": "clips/b.mp4",
        "messages": [{"role": "user", "content": "<video>\nWhere?"}, {"role": "assistant", "content": "At home."}],
    },
]


@pytest.fixture
def folder(tmp_path: Path, clip: Path) -> Path:
    """A folder with `clips/a.mp4`, `clips/b.mp4`."""
    (tmp_path / "clips").mkdir()
    for name in "ab":
        shutil.copyfile(clip, tmp_path / "clips" / f"{name}.mp4")
    return tmp_path


def load(folder: Path, rows: Sequence[Any] = ROWS, **options: Any) -> Benchmark:
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_benchmark(path, **options)


def test_rows_of_one_video_and_span_become_one_sample(folder: Path) -> None:
    benchmark = load(folder)
    assert (benchmark.spec.name, benchmark.spec.schema, len(benchmark), benchmark.num_questions) == (
        "mine",
        "local",
        3,
        6,
    )
    found = {(Path(one.video).name, one.start, one.end): one for one in benchmark}
    a, b, span = found["a.mp4", None, None], found["b.mp4", None, None], found["a.mp4", 0.5, 1.5]
    assert a.video == str(folder / "clips" / "a.mp4")
    questions = {question.prompt: question for question in (*a.questions, *b.questions, *span.questions)}
    assert {prompt: (one.references, one.task, one.question) for prompt, one in questions.items()} == {
        "What?": (("A dog.", "Dog"), "object", None),
        "Colour? One word.": (("Red",), "detail", "Which colour?"),
        "Size?": (("Small",), "size", None),
        "Describe it.": (("A cat sleeps.",), "", None),
        "Where?": (("At home.",), "", None),
        "Then?": (("It falls.",), "", None),
    }
    assert span.questions[0].id == "span" and len({question.id for question in questions.values()}) == 6


def test_order_and_place_of_the_file_change_nothing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    benchmark = load(folder)
    assert load(folder, ROWS[::-1]).digest == benchmark.digest
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder / "clips", elsewhere / "clips")
    assert load(elsewhere).digest == benchmark.digest


def test_a_draw_takes_videos_with_all_their_questions(folder: Path) -> None:
    everything = load(folder)
    some = load(folder, num_samples=2)
    assert some.samples == everything.samples[:2]
    assert load(folder, ROWS[::-1], num_samples=2).digest == some.digest
    assert {load(folder, num_samples=1, seed=seed)[0].id for seed in range(12)} == {one.id for one in everything}


def test_tasks_and_splits(folder: Path) -> None:
    assert load(folder).tasks == ("", "detail", "object", "size")
    only = load(folder, tasks=["size", "object"])
    assert only.tasks == ("object", "size") and len(only) == 1
    with pytest.raises(BenchmarkError, match="no question has the task 'sise'"):
        load(folder, tasks=["sise"])
    rows = [{**row, "split": "test" if index else "train"} for index, row in enumerate(ROWS)]
    assert load(folder, rows, split="test").num_questions == 5
    with pytest.raises(DatasetError, match="no row has split='dev'"):
        load(folder, rows, split="dev")


def test_videos_start_from_the_file_or_from_data_dir(folder: Path) -> None:
    rows = [{"video": "a.mp4", "prompt": "?", "response": "!"}]
    with pytest.raises(BenchmarkError, match="none of the 1 videos drawn"):
        load(folder, rows)
    assert load(folder, rows, data_dir=folder / "clips").missing == ()
    with pytest.warns(UserWarning, match=r"1 of 2 videos .*no.mp4"):
        assert load(folder, [*ROWS[:1], {**ROWS[1], "video": "no.mp4"}]).missing == ("no.mp4",)
    assert load(folder, [{**rows[0], "video": "https://example.org/a.mp4"}, ROWS[0]]).missing == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"video": "a.mp4", "prompt": "?"}, "mine.jsonl:2: a prompt without a right answer"),
        ({"video": "a.mp4", "prompt": "?", "response": " "}, "mine.jsonl:2: a prompt without a right answer"),
        ({"video": "a.mp4", "prompt": "?", "references": "yes"}, "references is 'yes', expected a list of strings"),
        ({"video": "a.mp4", "prompt": "?", "references": [1]}, r"references is \[1\], expected a list of strings"),
        ({"video": "a.mp4", "prompt": "?", "response": "!", "task": 3}, "task is 3, expected a string"),
        ({**ROWS[2], "references": ["x"]}, "references of the row, which has 2 prompts"),
        ({"prompt": "?", "response": "!"}, "there is no video"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(folder: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load(folder, [ROWS[0], row])


def test_no_file_and_no_rows(folder: Path) -> None:
    with pytest.raises(BenchmarkError, match="there is no such file"):
        load_benchmark(folder / "no.jsonl")
    with pytest.raises(BenchmarkError, match="there are no rows"):
        load(folder, [])
    with pytest.raises(BenchmarkError, match="expected a list of at least one task"):
        load(folder, tasks="object")
