"""FineVideo's spans: the recipe's mixture and prompts, the same in any order, and odd metadata counted, not fatal."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from datasets import Dataset, Features, IterableDataset, Value
from tests.data.finevideo_rows import metadata, rows, scene

from video2lora.data import DatasetError, SpanStatistics, finevideo_spans
from video2lora.data.finevideo import PROMPTS

CHI2_999_DF2 = 13.8  # 0.999 quantile, two degrees of freedom


def chi_square(counts: Counter[str], shares: dict[str, float]) -> float:
    total = sum(counts.values())
    return sum((counts[kind] - total * share) ** 2 / (total * share) for kind, share in shares.items())


@pytest.mark.parametrize("seed", [0, 42])
def test_kinds_prompts_and_places_follow_their_shares(seed: int) -> None:
    statistics = SpanStatistics()
    spans = list(finevideo_spans(rows(6000), seed=seed, statistics=statistics))
    assert len(spans) == statistics.num_videos == 6000 and not statistics.skipped and not statistics.fallbacks
    kinds = Counter(span["task_type"] for span in spans)
    assert kinds == statistics.spans
    assert chi_square(kinds, {"scene": 0.6, "adjacent": 0.3, "whole": 0.1}) < CHI2_999_DF2
    for kind, prompts in PROMPTS.items():
        used = Counter(span["prompt"] for span in spans if span["task_type"] == kind)
        assert set(used) == set(prompts)
        assert chi_square(used, {prompt: 1 / len(prompts) for prompt in prompts}) < 10.8
    starts = Counter(str(span["start"]) for span in spans if span["task_type"] == "scene")
    assert chi_square(starts, {f"{10.0 * i}": 0.2 for i in range(5)}) < 18.5
    lengths = Counter(str(span["end"] - span["start"]) for span in spans if span["task_type"] == "adjacent")
    assert chi_square(lengths, {"20.0": 0.5, "30.0": 0.5}) < 10.8
    assert all(span["start"] is span["end"] is None for span in spans if span["task_type"] == "whole")


def test_a_span_depends_on_seed_and_video_alone() -> None:
    source = rows(300)
    spans = list(finevideo_spans(source, seed=1, spans_per_video=3))
    backwards = list(finevideo_spans(source[::-1], seed=1, spans_per_video=3))
    key = lambda span: span["id"]  # noqa: E731
    assert sorted(spans, key=key) == sorted(backwards, key=key)
    dataset = Dataset.from_list([{"json": row["json"]} for row in source])
    shards = [finevideo_spans(dataset.shard(4, i), seed=1, spans_per_video=3) for i in range(4)]
    assert sorted((span for shard in shards for span in shard), key=key) == sorted(spans, key=key)
    assert len({span["id"] for span in spans}) == len(spans)
    other = list(finevideo_spans(source, seed=2, spans_per_video=3))
    assert [span["start"] for span in other] != [span["start"] for span in spans]


def test_known_draws_never_change() -> None:
    """Pinned: a manifest drawn today is drawn alike by every later version, on every machine."""
    names = ("id", "task_type", "start", "end", "prompt")
    assert [tuple(span[name] for name in names) for span in finevideo_spans(rows(4), seed=42)] == PINNED


PINNED = [
    ("clip_0000-0", "scene", 40.0, 50.0, "Write a short summary of this scene."),
    ("clip_0001-0", "scene", 30.0, 40.0, "Describe what is happening in this scene."),
    ("clip_0002-0", "scene", 0.0, 10.0, "Describe what is happening in this scene."),
    ("clip_0003-0", "adjacent", 10.0, 30.0, "Summarize this video segment."),
]


def test_invalid_scenes_are_skipped_counted_and_break_adjacency() -> None:
    row = metadata("odd", 0)
    row["duration_seconds"] = 100
    row["content_metadata"]["scenes"] = [
        scene(0, 10),
        {"timestamps": None},
        scene(20, 30),
        {"timestamps": {"start_timestamp": "00:00:61.000", "end_timestamp": "soon"}},
        scene(50, 40),
        scene(200, 210),
        {"timestamps": {"start_timestamp": "01:10", "end_timestamp": "01:20.5"}},
        scene(85, 140),
        "a scene",
    ]
    statistics = SpanStatistics()
    spans = list(finevideo_spans([{"json": row}], seed=0, spans_per_video=60, statistics=statistics))
    scenes = {(span["start"], span["end"]) for span in spans if span["task_type"] == "scene"}
    assert scenes == {(0, 10), (20, 30), (70, 80.5), (85, 101)}
    assert {(s["start"], s["end"]) for s in spans if s["task_type"] == "adjacent"} == {(70, 101)}
    reasons = {name: count for name, count in statistics.skipped.items() if name.startswith("scene")}
    assert reasons == {
        "scene_without_timestamps": 2,
        "scene_with_bad_timestamps": 1,
        "scene_without_length": 1,
        "scene_after_end_of_video": 1,
    }
    assert len(spans) + statistics.skipped["span_drawn_before"] == 60
    assert len({(s["start"], s["end"], s["prompt"]) for s in spans}) == len(spans)


def test_a_video_without_enough_scenes_gives_what_it_can() -> None:
    statistics = SpanStatistics()
    spans = list(finevideo_spans(rows(2000, num_scenes=1), seed=3, statistics=statistics))
    kinds = Counter(span["task_type"] for span in spans)
    assert len(spans) == 2000 and chi_square(kinds, {"scene": 6 / 7, "whole": 1 / 7}) < 10.8
    assert abs(statistics.fallbacks["adjacent"] - 600) < 80
    none = list(finevideo_spans(rows(10, num_scenes=0), seed=3))
    assert {span["task_type"] for span in none} == {"whole"}
    assert not list(finevideo_spans(rows(10, num_scenes=0), seed=3, mixture=(1, 0, 0), statistics=statistics))
    assert statistics.skipped["no_scene_in_video"] == 10


def test_metadata_may_be_text_missing_or_without_a_name() -> None:
    whole = metadata("abc")
    statistics = SpanStatistics()
    source: list[dict[str, object]] = [
        {"json": json.dumps(whole)},
        {"json": "{"},
        {"json": None},
        {"json": {**whole, "original_video_filename": None}},
    ]
    spans = list(finevideo_spans(source, seed=0, statistics=statistics))
    assert [span["video_id"] for span in spans] == ["abc", "abc"]
    assert statistics.skipped == {"video_without_metadata": 2}
    nameless = {"content_metadata": whole["content_metadata"]}
    (span,) = finevideo_spans([{"json": nameless}], seed=0)
    assert len(span["video_id"]) == 16
    (span,) = finevideo_spans([{"json": {**whole, "original_video_filename": "../../a b.mp4"}}], seed=0)
    assert span["video_id"] == "a_b"


def test_only_metadata_is_read_and_only_as_far_as_asked() -> None:
    def generate():
        yield from rows(2)
        raise AssertionError("read too far")

    features = Features({"mp4": Value("binary"), "json": Features(_schema())})
    spans = finevideo_spans(IterableDataset.from_generator(generate, features=features), seed=0)
    assert next(spans)["video_id"] == "clip_0000"


def _schema() -> dict[str, object]:
    return Dataset.from_list(rows(1)).features["json"]


@pytest.mark.parametrize("mixture", [(1, 1), (0, 0, 0), (-1, 1, 1), (float("nan"), 1, 1)])
def test_nonsense_is_refused(mixture: tuple[float, ...]) -> None:
    with pytest.raises(DatasetError, match="mixture"):
        list(finevideo_spans([], seed=0, mixture=mixture))
    with pytest.raises(DatasetError, match="spans_per_video=0"):
        list(finevideo_spans([], seed=0, spans_per_video=0))
