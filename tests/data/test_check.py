"""The check before training: what is wrong, in which row, and how many; and it never stops at one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Value, Video

from video2lora.data import DatasetError, check_rows, load_rows


@pytest.fixture
def broken(clip: Path, tmp_path: Path) -> tuple[Path, list[tuple[int, str, str, str]]]:
    """A JSONL file with about one of everything, and the problems in it: row, id, field, kind."""
    (tmp_path / "good.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "text.mp4").write_text("this is not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    good = {"video": "good.mp4", "prompt": "What?", "response": "A square."}
    lines: list[tuple[Any, list[tuple[str, str]]]] = [
        ({"id": "fine", **good}, []),
        ({"id": "no-video", "prompt": "x"}, [("video", "missing_field")]),
        ({"id": "no-prompt", "video": "good.mp4"}, [("prompt", "missing_field")]),
        (
            {"id": "empty", **good, "prompt": " ", "response": ""},
            [("prompt", "empty_prompt"), ("response", "empty_response")],
        ),
        ({"id": "typed", **good, "response": 4}, [("response", "wrong_type")]),
        ({"id": "absent", **good, "video": "absent.mp4"}, [("video", "missing_file")]),
        ({"id": "absent-2", **good, "video": "absent.mp4"}, [("video", "missing_file")]),
        ({"id": "text", **good, "video": "text.mp4"}, [("video", "unreadable_video")]),
        ({"id": "nothing", **good, "video": "empty.mp4"}, [("video", "unreadable_video")]),
        ({"id": "backwards", **good, "start": 1.5, "end": 1.0}, [("start", "bad_span")]),
        ({"id": "negative", **good, "start": -1}, [("start", "bad_span")]),
        ({"id": "outside", **good, "start": 2.0}, [("start", "span_outside_video")]),
        ({"id": "beyond", **good, "end": 4}, [("end", "end_after_video")]),
        ({"id": "rounded", **good, "end": 2.4}, []),
        ({"id": "fine", **good}, [("id", "duplicate_id")]),
        ({"id": "marked", **good, "prompt": "See <video> and tell."}, [("prompt", "placeholder")]),
        (
            {"id": "chat", "video": "good.mp4", "messages": [{"role": "assistant", "content": "x"}]},
            [("messages[0]", "bad_conversation")],
        ),
        (
            {"id": "many", "video": "good.mp4", "queries": [{"prompt": "a"}, {"prompt": ""}]},
            [("prompt[1]", "empty_prompt")],
        ),
        ([1, 2], [("", "wrong_type")]),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in lines) + "\n{not json\n")
    names = [row["id"] if isinstance(row, dict) else "" for row, _ in lines]
    expected = [(i, names[i], field, kind) for i, (_, found) in enumerate(lines) for field, kind in found]
    return path, [*expected, (len(lines), "", "", "unreadable_row")]


def test_a_broken_dataset_is_told_row_by_row(broken: tuple[Path, list[tuple[int, str, str, str]]]) -> None:
    path, expected = broken
    report = check_rows(path)
    found = [(problem.row, problem.id, problem.field, problem.kind) for problem in report.problems]
    assert found == expected
    assert report.num_rows == 20 and report.num_videos == 4 and not report.ok
    assert report.counts["missing_file"] == 2 and report.counts["bad_span"] == 2
    assert sum(report.counts.values()) == len(expected)
    assert report.problems[-1].where == "rows.jsonl:21"
    levels = {problem.kind: problem.level for problem in report.problems}
    assert {kind for kind, level in levels.items() if level == "warning"} == {"end_after_video", "placeholder"}


def test_the_summary_names_kinds_rows_and_counts(broken: tuple[Path, Any], tmp_path: Path) -> None:
    report = check_rows(broken[0])
    text = str(report)
    assert text.startswith(
        "20 rows, 16 prompts (3 without a response), 4 videos (opened): 17 errors in 16 rows, 2 warnings."
    )
    for kind, count in report.counts.items():
        assert any(line.split()[:2] == [kind, str(count)] for line in text.splitlines()), kind
    assert "row 5 (id absent, rows.jsonl:6): there is no file" in text
    with pytest.raises(DatasetError, match="missing_file") as error:
        report.raise_for_errors()
    assert str(report) in str(error.value)
    report.to_json(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["counts"] == report.counts and not stored["ok"]
    assert stored["problems"][0]["id"] == "no-video" and len(stored["problems"]) == len(report.problems)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        report.to_json(tmp_path / "report.json")
    report.to_json(tmp_path / "report.json", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*report*")) == ["report.json"]


def test_examples_of_a_kind_are_limited_but_counted() -> None:
    report = check_rows([{"id": str(i), "video": "absent.mp4", "prompt": "x"} for i in range(50)])
    assert report.counts == {"missing_file": 50}
    assert "... and 47 more" in str(report) and len(str(report).splitlines()) == 5


def test_a_sound_dataset_is_ok_and_each_video_is_opened_once(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import video2lora.video

    opened: list[Any] = []
    probe = video2lora.video.probe_video

    def counted(video: Any) -> Any:
        opened.append(video)
        return probe(video)

    monkeypatch.setattr(video2lora.video, "probe_video", counted)
    rows = [{"id": str(i), "video": str(clip), "start": i / 8, "prompt": "What?"} for i in range(12)]
    for source in (rows, load_rows(rows), load_rows(rows).to_iterable_dataset()):
        opened.clear()
        report = check_rows(source)
        assert report.ok and not report.problems and report.num_rows == 12
        assert (report.num_videos, report.num_missing_responses) == (1, 12)
        assert opened == [str(clip)]
        report.raise_for_errors()
    data = {"path": "a.mp4", "bytes": clip.read_bytes()}
    features = Features({"video": Video(), "prompt": Value("string")})
    stored = Dataset.from_list([{"video": data, "prompt": str(i)} for i in range(4)], features=features)
    opened.clear()
    assert check_rows(stored).ok and len(opened) == 1
    opened.clear()
    assert check_rows(rows, decode="none").ok and not opened


def test_full_decoding_finds_damage_that_probing_does_not(clip: Path, tmp_path: Path) -> None:
    data = bytearray(clip.read_bytes())
    begin = data.index(b"mdat") + 4
    middle = begin + (len(data) - begin) // 3
    data[middle : middle + 200] = b"\xff" * 200
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    rows = [{"id": "a", "video": str(damaged), "prompt": "x"}, {"id": "b", "video": str(clip), "prompt": "x"}]
    assert check_rows(rows).counts == {}
    report = check_rows(rows, decode="full")
    assert set(report.counts) & {"damaged_video", "unreadable_video"} and {p.id for p in report.problems} == {"a"}


def test_a_limit_stops_reading_and_nonsense_is_refused() -> None:
    def generate():
        yield from ({"id": str(i), "video": "absent.mp4", "prompt": "x"} for i in range(3))
        raise AssertionError("read too far")

    from datasets import IterableDataset

    assert check_rows(IterableDataset.from_generator(generate), limit=3).counts == {"missing_file": 3}
    with pytest.raises(ValueError, match="decode='all'"):
        check_rows([], decode="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_workers=0"):
        check_rows([], num_workers=0)


def test_no_progress_bar_where_stderr_is_a_file(clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    check_rows([{"video": str(clip), "prompt": "x"}])
    assert capfd.readouterr().err == ""
