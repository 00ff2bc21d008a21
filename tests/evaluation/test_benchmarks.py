"""Benchmarks: tiny copies in each repository's form, the draw, grouping, spans, regions, and what every error says."""

from __future__ import annotations

import json
import random
import shutil
import zipfile
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from video2lora.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    BenchmarkError,
    describe_benchmarks,
    load_benchmark,
    unpack,
)
from video2lora.testing import tiny_clip
from video2lora.video import load_video

PAPER = {
    "activitynet_captions",
    "activitynet_qa",
    "carebench",
    "nextqa",
    "plm_rcap",
    "plm_rdcap",
    "plm_sgqa",
    "vdc",
    "vidcapbench",
}


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path)


def write_json(path: Path, rows: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows), encoding="utf-8")


@pytest.fixture
def videos(tmp_path: Path, clip: Path) -> Callable[..., None]:
    """Copies the clip below the folder under names."""

    def put(*names: str) -> None:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(clip, path)

    return put


def by_id(benchmark: Benchmark) -> dict[str, Any]:
    return {question.id: question for sample in benchmark for question in sample.questions}


# Each repository's form


def test_activitynet_qa(tmp_path: Path, videos: Callable[..., None]) -> None:
    rows = [
        {"video_name": "abc-1", "question": "what is it", "question_id": "abc-1_0", "answer": "dog", "type": "5"},
        {"video_name": "abc-1", "question": "is it big?", "question_id": "abc-1_10", "answer": "no", "type": "3"},
        {"video_name": "abc-1", "question": "how many", "question_id": "abc-1_2", "answer": "2", "type": "7"},
        {"video_name": "xyz", "question": "where", "question_id": "xyz_0", "answer": "park", "type": "6"},
    ]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    videos("all_test/v_abc-1.mp4", "all_test/v_xyz.mkv")
    benchmark = load_benchmark("activitynet_qa", data_dir=tmp_path)
    assert (len(benchmark), benchmark.num_questions, benchmark.missing) == (2, 4, ())
    sample = next(sample for sample in benchmark if sample.id == "abc-1")
    assert [question.id for question in sample.questions] == ["abc-1_0", "abc-1_2", "abc-1_10"]
    first = sample.questions[0]
    assert first.prompt == "what is it?\nAnswer only the question, in one sentence."
    assert (first.question, first.references, first.task) == ("what is it?", ("dog",), "5")
    assert by_id(benchmark)["abc-1_10"].question == "is it big?"
    assert load_video(sample.video).size == (64, 48)
    assert load_benchmark("activitynet_qa", data_dir=tmp_path, tasks=["6"]).tasks == ("6",)
    with pytest.raises(BenchmarkError, match=r"no question has the task '9'; there are \['3', '5', '6', '7'\]"):
        load_benchmark("activitynet_qa", data_dir=tmp_path, tasks=["9"])


def test_nextqa_counts_both_answers_as_right(tmp_path: Path, videos: Callable[..., None]) -> None:
    shared = {"question": "why", "answer": "to eat", "qid": 1}
    rows = [
        {"video": 4010069381, **shared, "type": "CW", "additional_ref_answer": None},
        {"video": 88, **shared, "type": "TN", "additional_ref_answer": "eating"},
    ]
    write_parquet(tmp_path / "OE" / "test-00000-of-00001.parquet", rows)
    videos("NExTVideo/0001/4010069381.mp4", "NExTVideo/0002/88.mp4")
    questions = by_id(load_benchmark("nextqa", data_dir=tmp_path))
    assert {id: question.references for id, question in questions.items()} == {
        "4010069381-1": ("to eat",),
        "88-1": ("to eat", "eating"),
    }


def test_plm_sgqa_from_jsonl(tmp_path: Path, videos: Callable[..., None]) -> None:
    rows = [{"uid": "a", "video": "v1.mp4", "question": "What?", "answer": "A cup.", "domain": "kitchen"}]
    write_json(tmp_path / "sgqa" / "plm_sgqa_test.jsonl", rows)
    videos("videos/sgqa/v1.mp4")
    assert by_id(load_benchmark("plm_sgqa", data_dir=tmp_path))["a"].task == "kitchen"


def test_vidcapbench_puts_the_questions_of_both_files_together(tmp_path: Path, videos: Callable[..., None]) -> None:
    def pairs(*words: str) -> list[dict[str, str]]:
        return [{"question": f"{word}?", "answer": word, "sub_category": "color"} for word in words]

    ae = [
        {"video_dir": "videos/1.mp4", "QA_pairs": pairs("red", "blue")},
        {"video_dir": "videos/2.mp4", "QA_pairs": []},
    ]
    he = [{"video_dir": "videos/1.mp4", "QA_pairs": json.dumps(pairs("green"))}]
    write_json(tmp_path / "VidCapBench-AE_QA.jsonl", ae)
    write_json(tmp_path / "VidCapBench-HE_QA.jsonl", he)
    videos("videos/1.mp4")
    benchmark = load_benchmark("vidcapbench", data_dir=tmp_path)
    assert len(benchmark) == 1 and benchmark.tasks == ("color",)
    assert {question.references[0] for question in benchmark[0].questions} == {"red", "blue", "green"}


def test_vdc_asks_every_style_about_the_same_videos(tmp_path: Path, videos: Callable[..., None]) -> None:
    styles = BENCHMARKS["vdc"].tasks
    rows = [
        {"video_id": f"v{i}", "video_name": f"v{i}.mp4", **{f"{style}_caption": f"{style} {i}" for style in styles}}
        for i in range(6)
    ]
    write_json(tmp_path / "VDC_captions" / "VDC_1k.jsonl", rows)
    videos(*(f"Test_Videos/v{i}.MP4" for i in range(6)))
    benchmark = load_benchmark("vdc", data_dir=tmp_path, num_samples=4)
    assert len(benchmark) == 4
    for sample in benchmark:
        assert tuple(question.task for question in sample.questions) == styles
        assert sample.questions[2].references == (f"camera {sample.id[1]}",)
        assert sample.questions[2].prompt == BENCHMARKS["vdc"].prompts["camera"]
    short = load_benchmark("vdc", data_dir=tmp_path, num_samples=4, tasks=["short"])
    assert [sample.id for sample in short] == [sample.id for sample in benchmark]
    assert short.num_questions == 4


def test_carebench_writes_lists_out(tmp_path: Path, videos: Callable[..., None]) -> None:
    row = {
        "video": "a.mp4",
        "caption": "All.",
        "events": [{"event": "runs"}, {"event": "falls"}],
        "objects": ["man", "dog"],
        "spatial_caption": "A man.",
        "temporal_caption": "He runs.",
    }
    write_json(tmp_path / "json" / "metadata.json", [row, {**row, "video": "b.mp4", "objects": []}])
    videos("videos/a.mp4", "videos/b.mp4")
    benchmark = load_benchmark("carebench", data_dir=tmp_path)
    questions = by_id(benchmark)
    assert questions["a.mp4-events"].references == ("runs; falls",)
    assert questions["a.mp4-objects"].references == ("man; dog",)
    assert benchmark.num_questions == 9 and benchmark.skipped == {"question without a reference": 1}


def test_activitynet_captions_as_paragraphs_and_as_events(tmp_path: Path, videos: Callable[..., None]) -> None:
    rows = {
        "v_a": {"duration": 2.0, "timestamps": [[0, 1.2], [1.0, 2.0]], "sentences": [" He runs. ", "He falls."]},
        "v_b": {"duration": 2.0, "timestamps": [[0.5, 0.5], [0.25, 1.0]], "sentences": ["Nothing.", "A dog."]},
    }
    write_json(tmp_path / "raw_data" / "val_1.json", rows)
    videos("Activity_Videos/v_a.mp4", "Activity_Videos/v_b.mp4")
    whole = load_benchmark("activitynet_captions", data_dir=tmp_path)
    assert whole.tasks == ("paragraph",) and len(whole) == 2
    assert by_id(whole)["v_a"].references == ("He runs. He falls.",)
    assert all(sample.start is None and sample.end is None for sample in whole)
    events = load_benchmark("activitynet_captions", data_dir=tmp_path, tasks=["event"])
    assert sorted((sample.id, sample.start, sample.end) for sample in events) == [
        ("v_a@0.000-1.200", 0.0, 1.2),
        ("v_a@1.000-2.000", 1.0, 2.0),
        ("v_b@0.250-1.000", 0.25, 1.0),
    ]
    assert events.skipped == {"event without length": 1}
    sample = events[0]
    assert load_video(sample.video, start=sample.start, end=sample.end).start == sample.start


def test_plm_spans_are_seconds_and_subjects_of_one_span_share_it(tmp_path: Path, videos: Callable[..., None]) -> None:
    shared = {"video": "sav_000001.mp4", "total_frames": 12}
    rows = [
        {"uid": 1, **shared, "masklet_id": 0, "caption": "A man runs.", "start_frame": 0, "end_frame": 5},
        {"uid": 2, **shared, "masklet_id": 1, "caption": "A dog.", "start_frame": 0, "end_frame": 5},
        {"uid": 3, **shared, "masklet_id": 1, "caption": "It sleeps.", "start_frame": 6, "end_frame": 11},
    ]
    write_parquet(tmp_path / "rcap" / "plm_rcap_test.parquet", rows)
    videos("videos_fps_6/sav_000001.mp4")
    benchmark = load_benchmark("plm_rcap", data_dir=tmp_path)
    found = {(sample.start, sample.end): [question.id for question in sample.questions] for sample in benchmark}
    assert found == {(0.0, 1.0): ["1", "2"], (1.0, 2.0): ["3"]}

    dense = [
        {"start_frame": 0, "end_frame": 5, "caption": "Out of frame."},
        {"start_frame": 6, "end_frame": 11, "caption": "He jumps."},
    ]
    rows = [{"uid": 7, **shared, "masklet_id": 0, "dense_captions": dense}]
    write_parquet(tmp_path / "rdcap" / "plm_rdcap_test.parquet", rows)
    (sample,) = load_benchmark("plm_rdcap", data_dir=tmp_path)
    assert (sample.start, sample.end, sample.questions[0].id) == (1.0, 2.0, "7-1")


def test_plm_marks_the_subject_by_a_red_rectangle(tmp_path: Path) -> None:
    tiny_clip(tmp_path / "sav_1.mp4", fps=6, size=(96, 64))
    row = {"uid": 1, "video": "sav_1.mp4", "masklet_id": 3, "caption": "x", "start_frame": 3, "end_frame": 8}
    write_parquet(tmp_path / "rcap" / "plm_rcap_test.parquet", [row])
    with pytest.raises(BenchmarkError, match="metadata/metadata_test.jsonl, which is not below"):
        load_benchmark("plm_rcap", data_dir=tmp_path, tasks=["marked"])
    boxes = {"3": [20, 10, 60, 40], "4": None, "5": []}
    write_json(tmp_path / "metadata" / "metadata_test.jsonl", [{"video": "sav_1.mp4", "masklet_id": 3, "bbox": boxes}])
    both = load_benchmark("plm_rcap", data_dir=tmp_path, tasks=["plain", "marked"])
    plain, marked = sorted(both, key=lambda sample: len(sample.id))
    assert "red rectangle" in marked.questions[0].prompt and "red" not in plain.questions[0].prompt
    assert (marked.start, marked.end) == (plain.start, plain.end) == (0.5, 1.5)
    before, after = (load_video(sample.video).frames.astype(int) for sample in (plain, marked))
    assert load_video(marked.video).timestamps == load_video(plain.video).timestamps
    assert (after[3, 11, 22:58, 0] > 180).all() and (after[3, 11, 22:58, 1:] < 70).all()
    others = [index for index in range(12) if index != 3]
    assert np.abs(after[others] - before[others]).max() < 24
    again = load_benchmark("plm_rcap", data_dir=tmp_path, tasks=["plain", "marked"])
    assert plain.video_id == marked.video_id == "sav_1.mp4" and plain.same_video(marked)
    assert again.digest == both.digest  # our own clips are not taken for the benchmark's


def test_moving_shapes_are_made_on_the_spot() -> None:
    benchmark = load_benchmark("moving_shapes", num_samples=3)
    assert len(benchmark) == 3 and "caption" in benchmark.tasks
    assert load_video(benchmark[0].video, num_frames=12).frames.shape == (12, 64, 64, 3)
    assert benchmark.digest == load_benchmark("moving_shapes", num_samples=3).digest
    assert benchmark.digest != load_benchmark("moving_shapes", num_samples=3, seed=1).digest
    assert load_benchmark("moving_shapes", num_samples=3, tasks=["colour"]).tasks == ("colour",)
    assert len(load_benchmark("moving_shapes", num_samples=2, split="phrasings")) == 2
    with pytest.raises(BenchmarkError, match="has the splits .*not 'train'"):
        load_benchmark("moving_shapes", split="train")
    with pytest.raises(BenchmarkError, match="no end of clips"):
        load_benchmark("moving_shapes", num_samples="all")
    few, many = (load_benchmark("moving_shapes", num_samples=3, num_frames=number) for number in (4, 100))
    assert load_video(many[0].video, num_frames=100).frames.shape == (100, 64, 64, 3) and len(many[0].video) == 108
    assert load_video(few[0].video, num_frames=4).frames.shape == (4, 64, 64, 3)
    assert few.num_questions < benchmark.num_questions == many.num_questions  # four frames decide less
    from video2lora.data.moving_shapes import TASKS

    assert set(BENCHMARKS["moving_shapes"].tasks) == set(TASKS)


# The draw


@pytest.fixture
def qa_rows(videos: Callable[..., None]) -> list[dict[str, Any]]:
    videos(*(f"v{i}.mp4" for i in range(10)))
    return [
        {"uid": f"q{i}", "video": f"v{i % 10}.mp4", "question": f"What {i}?", "answer": str(i), "domain": "d"}
        for i in range(40)
    ]


def load_sgqa(folder: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Benchmark:
    write_parquet(folder / "sgqa" / "plm_sgqa_test.parquet", rows)
    return load_benchmark("plm_sgqa", data_dir=folder, **options)


def test_the_draw_depends_on_the_seed_and_ids_alone(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    benchmark = load_sgqa(tmp_path, qa_rows, num_samples=12)
    assert (benchmark.num_questions, benchmark.num_available) == (12, 40)
    shuffled = qa_rows[:]
    random.Random(0).shuffle(shuffled)
    again = load_sgqa(tmp_path, shuffled, num_samples=12)
    assert again.samples == benchmark.samples and again.digest == benchmark.digest
    fewer, other = (load_sgqa(tmp_path, qa_rows, num_samples=n, seed=s) for n, s in ((5, 42), (12, 43)))
    assert set(by_id(fewer)) < set(by_id(benchmark)) != set(by_id(other))
    everything = load_sgqa(tmp_path, qa_rows, num_samples="all")
    assert everything.num_questions == 40 and len(everything) == 10
    more = load_sgqa(tmp_path, [*qa_rows, {**qa_rows[0], "uid": "new"}], num_samples=12)
    assert len(set(by_id(more)) ^ set(by_id(benchmark))) in (0, 2)  # at most the new one takes one's place
    assert by_id(benchmark).keys() == by_id(load_sgqa(tmp_path, qa_rows, num_samples=12)).keys()


def test_the_draw_is_this_one(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    """Results are kept for years; a change here would make them incomparable, and needs new versions."""
    ranked = sorted((f"q{i}" for i in range(40)), key=lambda id: sha256(f"42/plm_sgqa/{id}".encode()).hexdigest())
    assert list(by_id(load_sgqa(tmp_path, qa_rows, num_samples=3))) == ranked[:3] == ["q17", "q2", "q25"]


def test_ids_are_unique_whatever_the_rows_say(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    rows = [qa_rows[0], qa_rows[0], {**qa_rows[0], "answer": "another"}, qa_rows[1]]
    benchmark = load_sgqa(tmp_path, rows)
    ids = [question.id for sample in benchmark for question in sample.questions]
    assert len(ids) == len(set(ids)) == 3 and "q1" in ids
    assert benchmark.skipped == {"row that is there twice": 1}
    assert load_sgqa(tmp_path, rows[::-1]).digest == benchmark.digest


def test_rows_with_gaps_are_counted_and_not_asked(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    rows = [*qa_rows[:2], {**qa_rows[2], "video": None}, {**qa_rows[3], "answer": None}, {**qa_rows[4], "uid": None}]
    benchmark = load_sgqa(tmp_path, rows)
    assert benchmark.skipped == {"row without video": 1, "question without a reference": 1}
    assert benchmark.num_questions == 3 and load_sgqa(tmp_path, rows[::-1]).digest == benchmark.digest
    assert "Skipped: 1 row without video" in str(benchmark)


@pytest.mark.parametrize("number", [0, -1, True, 1.5, "most"])
def test_numbers_that_are_none(tmp_path: Path, qa_rows: list[dict[str, Any]], number: Any) -> None:
    with pytest.raises(BenchmarkError, match="expected a number of at least 1, or 'all'"):
        load_sgqa(tmp_path, qa_rows, num_samples=number)


# What is missing


def test_missing_videos_are_kept_counted_and_named(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    complete = load_sgqa(tmp_path, qa_rows)
    (tmp_path / "v3.mp4").unlink()
    with pytest.warns(UserWarning, match=r"1 of 10 videos drawn are not below .* \(v3.mp4\)"):
        benchmark = load_sgqa(tmp_path, qa_rows)
    assert benchmark.missing == ("v3.mp4",) and benchmark.digest == complete.digest
    assert "1 videos are missing: v3.mp4" in str(benchmark)
    assert not Path(next(sample.video for sample in benchmark if sample.id == "v3.mp4")).exists()


def test_without_any_video_it_says_what_to_do(tmp_path: Path, qa_rows: list[dict[str, Any]], clip: Path) -> None:
    for path in tmp_path.glob("*.mp4"):
        path.unlink()
    with pytest.raises(BenchmarkError, match=r"no video file below") as error:
        load_sgqa(tmp_path, qa_rows)
    message = str(error.value)
    for part in ("facebook/PLM-VideoBench", "videos/sgqa/*", "CC-BY-4.0", "download('plm_sgqa', "):
        assert part in message
    with zipfile.ZipFile(tmp_path / "videos_chunked_01.zip", "w") as archive:
        archive.write(clip, "deep/v0.mp4")
    with pytest.raises(BenchmarkError, match="There are archives: unpack them"):
        load_sgqa(tmp_path, qa_rows)
    unpack(tmp_path, tell=lambda line: None)
    with pytest.warns(UserWarning, match="9 of 10 videos"):
        assert len(load_sgqa(tmp_path, qa_rows).missing) == 9
    shutil.move(tmp_path / "videos" / "deep" / "v0.mp4", tmp_path / "other.mp4")
    with pytest.raises(BenchmarkError, match=r"none of the 10 videos drawn is below .*for example v0.mp4"):
        load_sgqa(tmp_path, qa_rows)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_a_missing_folder_or_file_is_said_with_all_that_is_needed(tmp_path: Path, name: str) -> None:
    spec = BENCHMARKS[name]
    for folder, reason in ((None, "give data_dir"), (tmp_path / "no", "does not exist"), (tmp_path, "no annotations")):
        with pytest.raises(BenchmarkError, match=reason) as error:
            load_benchmark(name, data_dir=folder)
        message = str(error.value)
        assert spec.license in message and f"download({name!r}" in message
        for one in spec.downloads:
            assert (one.repo or one.url or "") in message
    if spec.downloads[-1].bytes:
        assert "GB" in message


def test_other_columns_are_named_beside_those_expected(tmp_path: Path, videos: Callable[..., None]) -> None:
    videos("a.mp4")
    write_json(tmp_path / "json" / "metadata.json", [{"video": "a.mp4", "caption": "x", "when": "y"}])
    with pytest.raises(BenchmarkError) as error:
        load_benchmark("carebench", data_dir=tmp_path)
    for part in ("['caption', 'video', 'when']", "'events'", "not verified"):
        assert part in str(error.value)
    assert len(load_benchmark("carebench", data_dir=tmp_path, tasks=["caption"])) == 1


def test_broken_annotations_are_named(tmp_path: Path, videos: Callable[..., None]) -> None:
    videos("a.mp4")
    path = tmp_path / "VDC_1k.jsonl"
    for text, reason in (("{not json", "cannot be read"), ("[1]\n", "expected a table")):
        path.write_text(text)
        with pytest.raises(BenchmarkError, match=f"VDC_1k.jsonl: .*{reason}"):
            load_benchmark("vdc", data_dir=tmp_path)
    broken = tmp_path / "sgqa" / "plm_sgqa_test.parquet"
    broken.parent.mkdir()
    broken.write_bytes(b"PAR1 but not really")
    with pytest.raises(BenchmarkError, match="plm_sgqa_test.parquet: it cannot be read"):
        load_benchmark("plm_sgqa", data_dir=tmp_path)
    with pytest.raises(BenchmarkError, match="no question in plm_sgqa_test.parquet .1 question without a reference"):
        load_sgqa(tmp_path, [{"uid": "a", "video": "a.mp4", "question": "?", "answer": " "}])


def test_wrong_names_splits_and_tasks(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no benchmark 'activitynetqa'; did you mean 'activitynet_qa'"):
        load_benchmark("activitynetqa")
    with pytest.raises(BenchmarkError, match=r"has the splits \['test', 'val'\], not 'train'"):
        load_benchmark("plm_rcap", data_dir=tmp_path, split="train")
    with pytest.raises(BenchmarkError, match=r"no task 'long'; there are \['short', "):
        load_benchmark("vdc", data_dir=tmp_path, tasks=["long"])
    for tasks in ("short", []):
        with pytest.raises(BenchmarkError, match="expected a list of at least one task"):
            load_benchmark("vdc", data_dir=tmp_path, tasks=tasks)


# Finding files


def test_videos_are_found_with_any_folder_and_extension(tmp_path: Path, qa_rows: list[dict[str, Any]]) -> None:
    (tmp_path / "v3.mp4").rename(tmp_path / "v3.WEBM")
    nested = tmp_path / "videos_chunked_01" / "Test" / "v4.mp4"
    nested.parent.mkdir(parents=True)
    (tmp_path / "v4.mp4").rename(nested)
    hidden = tmp_path / ".cache" / "v4.mp4"
    hidden.parent.mkdir()
    shutil.copyfile(nested, hidden)
    found = {sample.id: sample.video for sample in load_sgqa(tmp_path, qa_rows)}
    assert found["v3.mp4"] == str(tmp_path / "v3.WEBM") and found["v4.mp4"] == str(nested)


def test_of_several_files_of_a_name_the_annotated_folder_decides(tmp_path: Path, videos: Callable[..., None]) -> None:
    videos("a/1.mp4", "b/1.mp4")
    rows = [{"video_dir": f"{folder}/1.mp4", "QA_pairs": [{"question": "?", "answer": folder}]} for folder in "ba"]
    write_json(tmp_path / "VidCapBench-AE_QA.jsonl", rows)
    benchmark = load_benchmark("vidcapbench", data_dir=tmp_path)
    assert {Path(one.video).parent.name: one.questions[0].references[0] for one in benchmark} == {"a": "a", "b": "b"}


# What is declared


def test_every_benchmark_of_the_paper_is_declared_completely() -> None:
    assert set(BENCHMARKS) == PAPER | {"moving_shapes"}
    digests = {spec.digest for spec in BENCHMARKS.values()}
    assert len(digests) == len(BENCHMARKS)
    for name, spec in BENCHMARKS.items():
        assert spec.name == name and spec.version >= 1 and spec.split in spec.splits
        assert set(spec.margins) <= set(spec.metrics) and spec.num_frames == 12
        assert spec.license and spec.columns_source
        assert all(spec.prompt(task) for task in (*spec.tasks, *spec.optional_tasks))
        json.dumps(spec.to_dict())
        if name in PAPER:
            assert spec.margins == {"token_f1": 0.05, "judge": 0.15}
            assert {"token_f1", "judge", "repetition"} <= set(spec.metrics)
            assert spec.num_samples == (100 if name == "vidcapbench" else 500) and spec.downloads
    assert BENCHMARKS["plm_rcap"].region and BENCHMARKS["plm_rdcap"].region


def test_the_table_names_size_and_access() -> None:
    rows = {row["name"]: row for row in describe_benchmarks()}
    assert rows["vdc"]["size"] == "about 80.2 GB" and rows["vdc"]["drawn"] == "500 videos"
    assert rows["moving_shapes"]["size"] == "nothing to download"
    assert "unknown size" in rows["vidcapbench"]["size"]
    assert all(len(set(row)) == 9 for row in rows.values())
