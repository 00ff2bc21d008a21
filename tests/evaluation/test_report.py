"""Reports of a run: numbers are those of the records, data is only data, the same records give the same bytes."""

from __future__ import annotations

import base64
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from video2lora.evaluation.paper import PRINTED_RESULTS
from video2lora.evaluation.records import EvaluationError, read_run
from video2lora.evaluation.report import write_report
from video2lora.evaluation.report_document import without_times
from video2lora.evaluation.report_numbers import RunNumbers
from video2lora.evaluation.samples import Sample
from video2lora.evaluation.scoring import remarks, verdicts
from video2lora.evaluation.statistics import compare, holm, interval_verdicts
from video2lora.testing import tiny_clip

from .report_runs import CONDITIONS, files_of, table_after, write_run

RESAMPLES = 200
NASTY = '<script>alert("x")</script> | a *pipe* & `code` [link](http://x) $y$\n# second | line\n<!-- times -->'

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 questions in two tasks, with two videos that could not be read and a report."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run", unreadable=(3, 7))
    write_report(folder, resamples=RESAMPLES)
    return folder


@pytest.fixture(scope="module")
def rows(run_dir: Path) -> Rows:
    return pq.read_table(run_dir / "records.parquet").to_pylist()


class Page(HTMLParser):
    """Elements of a page, and the text in table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "td":
            self.cells.append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.cells[-1] += data


def known(rows: Rows, condition: str, metric: str, task: str | None = None) -> list[float]:
    chosen = (row for row in rows if row["condition"] == condition and task in (None, row["task"]))
    return [row[metric] for row in chosen if row[metric] is not None]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["token_f1", "exact_match"])
def test_means_and_intervals_are_those_of_the_records(run_dir: Path, rows: Rows, metric: str) -> None:
    table = table_after((run_dir / "report.md").read_text(), f"## Scores: {metric}")
    assert [row["task"] for row in table] == ["all questions", "colour", "count"]
    for line, task in zip(table, (None, "colour", "count"), strict=True):
        asked = [row for row in rows if row["condition"] == "video" and task in (None, row["task"])]
        assert line["questions (videos)"] == f"{len(asked)} ({len({row['sample_id'] for row in asked})})"
        for condition in CONDITIONS:
            scores = known(rows, condition, metric, task)
            shown, low, high = line[condition].replace("[", "").replace("]", "").replace(",", "").split()
            assert shown == f"{math.fsum(scores) / len(scores):.3f}"
            assert float(low) <= float(shown) <= float(high)
            error = np.std(scores) / math.sqrt(len(scores))  # questions of a video are alike: wider, but not much
            assert 2.5 * error < float(high) - float(low) + 0.001 < 9 * error + 0.002


def test_effects_verdicts_and_holm_are_those_of_the_records(run_dir: Path, rows: Rows) -> None:
    text = (run_dir / "report.md").read_text()
    table = table_after(text, "### token_f1 against video")
    assert [(row["condition"], row["task"]) for row in table[:3]] == [
        ("adapter", "all questions"),
        ("adapter", "colour"),
        ("adapter", "count"),
    ]
    found = {}
    for line in table:
        task = None if line["task"] == "all questions" else line["task"]
        pairs = zip(
            *([row for row in rows if row["condition"] == c and task in (None, row["task"])]
              for c in (line["condition"], "video")), strict=True)  # fmt: skip
        both = [(a, b) for a, b in pairs if a["token_f1"] is not None]
        assert all(a["question_id"] == b["question_id"] for a, b in both)
        ours, theirs = [a["token_f1"] for a, _ in both], [b["token_f1"] for _, b in both]
        videos = [a["sample_id"] for a, _ in both]
        assert line["pairs (videos)"] == f"{len(both)} ({len(set(videos))})"
        assert line["effect"] == f"{np.mean(np.subtract(ours, theirs)):+.3f}"
        assert line["kept"].split()[0] == f"{np.mean(ours) / np.mean(theirs):.1%}"
        expected = compare(ours, theirs, margin=0.05, clusters=videos, num_resamples=RESAMPLES)
        low, high = expected.interval
        assert line["interval"] == f"[{low:+.3f}, {high:+.3f}]"
        verdicts = interval_verdicts(expected.interval, 0.05)
        for name, shown in zip(("equivalent", "superior"), (verdicts.equivalent, verdicts.superior), strict=True):
            assert (name in line["verdict"]) == shown
        weaker = verdicts.non_inferior and not (verdicts.equivalent or verdicts.superior)
        assert ("non-inferior" in line["verdict"]) == weaker
        assert ("worse" in line["verdict"]) == (high < 0)
        found[line["condition"], task] = (line, expected)
    for condition in CONDITIONS[1:]:
        family = {task: found[condition, task][1].p_non_inferiority for task in ("colour", "count")}
        for task, result in holm(family, 0.025).items():
            line = found[condition, task][0]
            shown = line["p equivalent / non-inferior / superior (of tasks after Holm)"].split(" / ")[1]
            assert shown == ("<0.001" if result.adjusted < 0.001 else f"{result.adjusted:.3f}")
            assert (line["after Holm"] != "none") == result.rejected
        assert found[condition, None][0]["after Holm"] == "–"


def test_without_a_margin_there_is_no_verdict(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text()
    assert "verdict" not in table_after(text, "### exact_match against video")[0]
    declared = {row["metric"]: row["margin declared"] for row in table_after(text, "## What was run", 2)}
    assert declared["token_f1"] == "0.05" and declared["exact_match"] == "none"


def test_degeneration_and_context_are_those_of_the_records(run_dir: Path, rows: Rows) -> None:
    text = (run_dir / "report.md").read_text()
    for line in table_after(text, "## Degeneration"):
        answered = [row for row in rows if row["condition"] == line["condition"] and row["error"] is None]
        assert line["answers"] == str(len(answered)) == "114"
        assert line["repetition"].split()[0] == f"{np.mean([row['repetition'] for row in answered]):.3f}"
        assert line["cut off at the limit"] == f"{np.mean([not row['ended'] for row in answered]):.1%}"
    tokens = sorted(row["context_tokens"] for row in rows if row["condition"] == "video" and row["error"] is None)
    first = table_after(text, "## Context")[0]
    assert first["context tokens"] == f"{tokens[57]:,} ({tokens[0]:,} to {tokens[-1]:,})"
    assert first["frames of the video used"] == "12"


def test_times_and_break_even(run_dir: Path, rows: Rows) -> None:
    text = (run_dir / "report.md").read_text()
    medians = {}
    for line in table_after(text, "## Times"):
        answered = [row for row in rows if row["condition"] == line["condition"] and row["error"] is None]
        once = {row["sample_id"]: row["prepare_seconds"] for row in answered}
        each = [row["answer_seconds"] for row in answered]
        quartiles = np.percentile(each, [50, 25, 75])
        assert line["answer, a question"] == "{:.3g} [{:.3g}, {:.3g}]".format(*quartiles)
        medians[line["condition"]] = (np.median(list(once.values())), np.median(each))
    for line in table_after(text, "## Times", 1):
        own = medians[line["condition"]]
        for rival in {"video", "kv_cache"} - {line["condition"]}:
            theirs = medians[rival]
            first = next((n for n in range(1, 999) if own[0] + n * own[1] < theirs[0] + n * theirs[1]), None)
            assert line[f"against {rival}"] == ("never" if first is None else str(first))


def test_errors_are_told_and_count_in_no_mean(run_dir: Path) -> None:
    text = (run_dir / "report.md").read_text()
    assert "2 of 40 videos could not be read; 6 questions" in text
    assert [row["sample"] for row in table_after(text, "## Errors")] == ["video-3", "video-7"]


def test_grades_that_failed_are_counted(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        failed = row["condition"] == "adapter" and row["question_id"] in ("q1", "q2", "q9")
        row["scores"]["judge"] = None if failed or row["scores"]["token_f1"] is None else 0.4

    folder = write_run(tmp_path / "run", num_samples=30, unreadable=(0,), change=change)
    write_report(folder, resamples=RESAMPLES)
    table = table_after((folder / "report.md").read_text(), "## Errors", 1)
    shown = {row["condition"]: row["without a score"] for row in table if row["metric"] == "judge"}
    assert shown == {"video": "0 of 87", "adapter": "1 of 87", "no_adapter": "0 of 87", "kv_cache": "0 of 87"}


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", benchmark__name="vdc")
    files = write_report(folder, resamples=RESAMPLES)
    ours, printed = table_after((folder / "report.md").read_text(), "## Against the paper")[::-1]
    expected = next(r for r in PRINTED_RESULTS if (r.table, r.benchmark, r.size) == ("1b", "VDC", "500M"))
    assert (printed["video"], printed["adapter"]) == (f"{expected.baseline:.3f}", f"{expected.candidate:.3f}")
    assert printed["verdict"] == "equivalent (worse)" and ours["from"] == "this run"
    rows = pq.read_table(folder / "records.parquet").to_pylist()
    assert ours["adapter"] == f"{np.mean(known(rows, 'adapter', 'token_f1')):.3f}"
    assert folder / "paper_verdicts.md" in files
    assert "checked" in (folder / "paper_verdicts.md").read_text()

    other = write_run(tmp_path / "other", benchmark__name="vdc", base__id="somebody/other-model")
    write_report(other, resamples=RESAMPLES)
    assert "is neither" in (other / "report.md").read_text()


# --- data is only data -----------------------------------------------------------------------------------------------


def test_answers_are_text_in_both_forms(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        row["task"] = "täsk | <b>$x_1$</b>" if row["task"] == "count" else row["task"]
        if row["question_id"] == "q5":
            row["references"] = ["日本語 | <i>", "שלום 👩‍👩‍👧"]
            row["prompt"] = "Why <b>?\nAnd | why?"
            row["answer"] = NASTY if row["condition"] == "adapter" else "plain"
            row["scores"]["token_f1"] = float(row["condition"] == "adapter")

    folder = write_run(tmp_path / "run", change=change)
    write_report(folder, resamples=RESAMPLES)
    markdown, html = ((folder / name).read_text(encoding="utf-8") for name in ("report.md", "report.html"))

    page = Page(html)
    assert "script" not in [tag for tag, _ in page.elements]
    assert NASTY in page.cells
    assert "日本語 | <i>" in page.text and "שלום 👩‍👩‍👧" in page.text and "Why <b>?\nAnd | why?" in page.text
    assert "täsk | <b>$x_1$</b>" in page.cells

    case = next(row for row in table_after(markdown, "### Best, 1 of 3: q5") if row["condition"] == "adapter")
    assert case["answer"] == NASTY and case["score"] == "1.000"
    assert "<script" not in markdown.replace("\\<", "")
    assert [row["task"] for row in table_after(markdown, "## Scores: token_f1")][2] == "täsk | <b>$x_1$</b>"
    assert markdown.count("<!-- times -->") == 1  # the answer that holds it is escaped
    assert "## Times" not in without_times(markdown) and "## Samples" in without_times(markdown)
    assert "Times" not in Page(without_times(html)).text.split("Samples")[1]


def test_html_needs_nothing_beside_it(run_dir: Path) -> None:
    page = Page((run_dir / "report.html").read_text())
    sources = [str(attributes["src"]) for tag, attributes in page.elements if "src" in attributes]
    assert len(sources) == len(list((run_dir / "plots").glob("*.png"))) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    embedded = {base64.b64decode(source.partition(",")[2]) for source in sources}
    assert embedded == {path.read_bytes() for path in (run_dir / "plots").glob("*.png")}
    assert "link" not in [tag for tag, _ in page.elements]


def test_paths_of_this_machine_are_not_told(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        if row.get("error"):
            row["error"] = "a.mp4: no such file: /data/somebody/videos/a.mp4. See https://example.com/b/c."

    folder = write_run(tmp_path / "run", unreadable=(1,), change=change)
    write_report(folder, resamples=RESAMPLES)
    text = (folder / "report.md").read_text() + (folder / "report.html").read_text()
    assert "somebody/" not in text.replace("somebody/made-up", "")
    assert "no such file: a.mp4" in text and "https://example.com/b/c" in text


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_same_records_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    before = files_of(run_dir)
    again = write_run(tmp_path / "elsewhere", unreadable=(3, 7))
    write_report(again, resamples=RESAMPLES)
    assert files_of(again) == before
    write_report(again, resamples=RESAMPLES)
    assert files_of(again) == before
    for name, content in before.items():
        if name.endswith(".png"):
            assert not any(chunk in content for chunk in (b"tEXt", b"iTXt", b"tIME"))


def test_runs_that_differ_in_times_differ_there_alone(run_dir: Path, tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", unreadable=(3, 7), slower=3, environment__date="2026-02-02T00:00:00+00:00")
    write_report(slow, resamples=RESAMPLES)
    first, second = files_of(run_dir), files_of(slow)
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {
        "plots/amortisation.png",
        "report.html",
        "report.md",
    }
    for name in ("report.md", "report.html"):
        assert without_times(first[name].decode()) == without_times(second[name].decode())


# --- frames ----------------------------------------------------------------------------------------------------------


def test_frames_of_the_videos_stand_beside_the_answers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=6, per_sample=2)
    numbers = RunNumbers(write_report_and_read(folder), RESAMPLES)
    assert numbers.main_metric == "token_f1"
    assert "it was not said where the video is" in (folder / "report.md").read_text()

    samples = []
    for number in range(6):
        path = tmp_path / f"clip-{number}.mp4"
        if number == 2:
            path.write_bytes(b"no video")
        elif number != 4:
            tiny_clip(path, seed=number)
        samples.append(Sample(f"video-{number}", str(path), (), start=0.5, end=1.5))
    write_report(folder, samples=samples, resamples=RESAMPLES)
    markdown, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert markdown.count("Frames are not shown: clip-4.mp4") >= 1 and str(tmp_path) not in markdown
    sheets = sorted((folder / "frames").glob("*.jpg"))
    assert 1 <= len(sheets) <= 4 and markdown.count("![frames of the video](frames/") >= len(sheets)
    for sheet in sheets:
        assert base64.b64encode(sheet.read_bytes()).decode() in html
        with Image.open(sheet) as picture:
            columns, rows = 6, 2  # eight frames in that second; twelve of them, each as often as it is shown
            assert picture.width == columns * 64 + (columns - 1) * 4
            assert picture.height == rows * (48 + 14) + 4

    # what was drawn stays, though the videos are gone
    for sample in samples:
        Path(sample.video).unlink(missing_ok=True)
    write_report(folder, resamples=RESAMPLES)
    assert (folder / "report.md").read_text().count("![frames") == markdown.count("![frames")


def write_report_and_read(folder: Path) -> Any:
    from video2lora.evaluation.records import read_run

    write_report(folder, resamples=RESAMPLES)
    return read_run(folder)


# --- what is missing -------------------------------------------------------------------------------------------------


def test_a_condition_without_any_score(tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> None:
        if row["condition"] == "adapter":
            row["scores"] = dict.fromkeys(row["scores"])

    folder = write_run(tmp_path / "run", num_samples=10, change=change)
    write_report(folder, resamples=RESAMPLES)
    text = (folder / "report.md").read_text()
    short = {row["condition"]: row for row in table_after(text, "## In short")}
    assert short["adapter"]["mean"] == short["adapter"]["effect"] == "–"
    assert short["adapter"]["verdict"] == "too few videos" and short["kv_cache"]["effect"] != "–"
    assert "No question has scores to choose samples by." in text
    assert "nan" not in text.lower()


def test_nothing_could_be_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=5, unreadable=range(5))
    write_report(folder, resamples=RESAMPLES)
    text = (folder / "report.md").read_text()
    assert "5 of 5 videos could not be read" in text
    assert not (folder / "plots" / "amortisation.png").exists()
    assert "amortisation" not in text


def test_a_run_without_the_baseline(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", conditions=("adapter", "no_adapter"), tasks=("only",), benchmark__tasks=[])
    write_report(folder, resamples=RESAMPLES)
    text = (folder / "report.md").read_text()
    assert "The baseline, video, was not run" in text and "against video" not in text
    assert [row["task"] for row in table_after(text, "## Scores: token_f1")] == ["all questions"]
    assert not list((folder / "plots").glob("effects_*"))


def test_plots_of_metrics_that_are_no_more_are_removed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_samples=6)
    (folder / "plots").mkdir()
    (folder / "plots" / "heat_old.png").write_bytes(b"old")
    (folder / "plots" / "mine.png").write_bytes(b"mine")
    write_report(folder, resamples=RESAMPLES)
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "heat_token_f1.png",
        "effects_token_f1.png",
        "heat_exact_match.png",
        "effects_exact_match.png",
        "amortisation.png",
        "mine.png",
    }


def test_no_finished_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"run\.json"):
        write_report(tmp_path)
    folder = write_run(tmp_path / "run", num_samples=2)
    (folder / "records.parquet").unlink()
    with pytest.raises(EvaluationError, match="not finished"):
        write_report(folder)
    assert not (folder / "report.md").exists()


@pytest.mark.parametrize(
    ("score", "remarked"), [(0.2, False), (0.6, True), (0.9, True)], ids=["loses", "as good", "better than the video"]
)
def test_metrics_that_need_no_video_are_remarked(score: float, remarked: bool, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", means={"video": 0.6, "adapter": 0.6, "no_adapter": score}, margins={"token_f1": 0.15}
    )
    (comparison,) = (found.comparison for found in verdicts(read_run(run)) if found.condition == "no_adapter")
    assert comparison.non_inferior == remarked and comparison.equivalent == (score == 0.6)
    said = remarks(verdicts(read_run(run)))
    assert [text.startswith("token_f1: no_adapter saw nothing") for text in said] == [True] * remarked
