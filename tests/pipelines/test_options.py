"""What a call of the pipeline asks for: numbers of any type are one request, nonsense is refused before it is read."""

from __future__ import annotations

import copy
import io
import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video2lora import VideoAdapterStore, VideoError, load_video
from video2lora.pipelines.bulk import internalize_many
from video2lora.pipelines.bulk_folder import BulkFolder

from ..video.clips import write_clip
from .bulk_runs import counts_of, index_of

NAN, INF = float("nan"), float("inf")


def test_numbers_of_any_type_are_one_request(pipe: Any, clips: Path) -> None:
    clip = str(clips / "d.mp4")
    seconds, counts = {"start": 0, "end": 1, "chunk_seconds": 1}, {"num_frames": 2, "longest_edge": 32, "max_rank": 9}
    keys = set()
    for real in (int, float, np.int64, np.float32, np.float64, Fraction):
        for count in (int, np.int64, torch.tensor):
            asked = {name: real(value) for name, value in seconds.items()}
            asked |= {name: count(value) for name, value in counts.items()}
            keys.add(pipe.store_key(clip, **asked))
    assert len(keys) == 1
    assert pipe.store_key({"video": clip, "start": 0, "end": 1}, num_frames=2) == pipe.store_key(
        {"video": clip, "start": 0.0}, end=np.float32(1), num_frames=2
    )
    assert pipe.store_key(clip, fps=2) == pipe.store_key(clip, fps=2.0)


def test_the_usual_spelling_is_what_stands_in_a_key(pipe: Any) -> None:
    """Seconds and rates as float, the rest as int: as the command line and the documentation write them, so that keys
    of earlier versions hold."""
    asked = {"num_frames": 2, "start": 1, "end": 3, "longest_edge": 32, "chunk_seconds": 1, "max_rank": 9}
    written = '{"chunk_seconds": 1.0, "end": 3.0, "longest_edge": 32, "max_rank": 9, "num_frames": 2, "start": 1.0}'
    assert json.dumps(pipe.recipe(asked)["sampling"], sort_keys=True) == written
    assert json.dumps(pipe.recipe({"fps": 2})["sampling"], sort_keys=True) == '{"fps": 2.0, "longest_edge": 64}'


def test_a_folder_goes_on_whatever_types_its_numbers_had(
    pipe: Any, clips: Path, tmp_path: Path, made: list[int]
) -> None:
    videos = [str(clips / "c.mp4"), str(clips / "d.mp4")]
    internalize_many(pipe, videos, tmp_path, start=0, num_frames=np.int64(2))
    assert counts_of(internalize_many(pipe, videos, tmp_path, start=0.0, num_frames=2)) == (0, 0, 2, 0)
    # a folder of an earlier version, which wrote the integer
    state, journal = tmp_path / "internalize.json", tmp_path / "journal" / "1-of-1-00000.jsonl"
    old = json.loads(state.read_text())
    assert old["settings"]["sampling"]["start"] == 0.0
    new_digest = BulkFolder(tmp_path, old["settings"]).digest
    old["settings"]["sampling"]["start"] = 0
    old_digest = BulkFolder(tmp_path, old["settings"]).digest
    assert old_digest != new_digest
    state.write_text(json.dumps(old)), journal.write_text(journal.read_text().replace(new_digest, old_digest))
    before = index_of(tmp_path)
    assert counts_of(internalize_many(pipe, videos, tmp_path, start=0, num_frames=2)) == (0, 0, 2, 0)
    assert index_of(tmp_path) == before and made == [1, 1]


SAMPLING = [
    ({"chunk_seconds": NAN}, "chunk_seconds=nan"),
    ({"chunk_seconds": INF}, "chunk_seconds=inf"),
    ({"chunk_seconds": -1.0}, "chunk_seconds=-1.0"),
    ({"chunk_seconds": "3"}, "chunk_seconds='3'"),
    ({"chunk_seconds": 1.0, "start": "1"}, "start='1'"),
    ({"chunk_seconds": 1.0, "max_rank": NAN}, "max_rank must be an integer of at least 1, got nan"),
    ({"chunk_seconds": 1.0, "max_rank": 10.5}, "got 10.5"),
    ({"chunk_seconds": 1.0, "max_rank": "16"}, "got '16'"),
    ({"chunk_seconds": 1.0, "max_rank": 4}, "leaves no rank"),
    ({"max_rank": 12}, "pass chunk_seconds="),
    ({"longest_edge": 0}, "longest_edge=0"),
    ({"num_frames": 2.5}, "num_frames=2.5"),
]
WORK = [
    ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ({"batch_size": -1}, "got -1"),
    ({"batch_size": 1.5}, "got 1.5"),
    ({"num_workers": -1}, "num_workers must be an integer of at least 0, got -1"),
]


@pytest.mark.parametrize("options, message", SAMPLING + WORK)
def test_nonsense_is_refused_before_anything_is_read(
    pipe: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    missing = str(tmp_path / "missing.mp4")
    for videos in (missing, [missing], iter([missing])):
        with pytest.raises(ValueError, match=message):
            pipe(videos, **options)
    with pytest.raises(ValueError, match=message):
        internalize_many(pipe, [missing], tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options, message",
    [case for case in SAMPLING if not {"start"} & case[0].keys()]
    + [
        ({"chunk_seconds": 1.0, "max_segments": 1.5}, "max_segments must be an integer of at least 1, got 1.5"),
        ({"chunk_seconds": 1.0, "frame_rate": "5"}, "frame_rate='5'"),
        ({"chunk_seconds": 1.0, "timeout": NAN}, "timeout=nan"),
    ],
)
def test_a_stream_refuses_the_same(pipe: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.stream(iter([]), **options)


def test_the_name_of_a_store_is_not_the_store(pipe: Any, clips: Path, tmp_path: Path) -> None:
    for internalize in (pipe, lambda video, store: internalize_many(pipe, [video], tmp_path / "out", store=store)):
        with pytest.raises(TypeError, match=r"VideoAdapterStore, got 'adapters': pass store=VideoAdapterStore\("):
            internalize(str(clips / "c.mp4"), store="adapters")


@pytest.mark.parametrize("seconds", [86400, 3e7, 1e300])
def test_a_chunk_longer_than_the_video_is_all_of_it(pipe: Any, clips: Path, tmp_path: Path, seconds: float) -> None:
    one_frame = write_clip(tmp_path / "one.mp4", 1)
    for clip in (str(clips / "d.mp4"), str(one_frame), str(write_clip(tmp_path / "one.h264", 1))):
        chunked, whole = pipe(clip, chunk_seconds=seconds), pipe(clip)
        assert chunked.segments == whole.segments and chunked.content_hash == whole.content_hash


def test_frames_that_are_sampled_already_are_not_sampled_again(pipe: Any, clips: Path, tmp_path: Path) -> None:
    clip = str(clips / "d.mp4")
    frames, store = load_video(clip, num_frames=3), VideoAdapterStore(tmp_path)
    for options in (
        {"start": 1, "end": 3},
        {"num_frames": 2},
        {"fps": 1.0},
        {"longest_edge": 8},
        {"chunk_seconds": 1},
    ):
        named = "d.mp4: these frames are sampled already, so " + ", ".join(options)
        for videos in (frames, [clip, frames], {"video": frames}):
            with pytest.raises(VideoError, match=named):
                pipe(videos, **options)
        with pytest.raises(VideoError, match=named):
            list(pipe(iter([frames]), **options))
        with pytest.raises(VideoError, match=named):
            pipe.store_key(frames, **options)
    with pytest.raises(VideoError, match="so end cannot be applied"):
        pipe({"video": frames, "end": 1.0}, store=store)
    plain = pipe(frames, num_frames=None, chunk_seconds=None).content_hash
    assert len(store) == 0 and pipe(frames, store=store).content_hash == plain == pipe(clip).content_hash


def test_defaults_of_the_pipeline_are_not_asked_of_frames_that_are_sampled(pipe: Any, clips: Path) -> None:
    own = copy.copy(pipe)
    own._preprocess_params = {"num_frames": 2, "chunk_seconds": 0.5}
    frames = load_video(clips / "d.mp4", num_frames=3)
    assert own(frames).content_hash == pipe(frames).content_hash


def test_pictures_one_by_one_are_no_videos(pipe: Any, clips: Path) -> None:
    frames = load_video(clips / "d.mp4", num_frames=3).frames
    with pytest.raises(VideoError, match=r"generator is taken for one of videos.*list\(frames\).*\.stream\(frames\)"):
        next(pipe(frame for frame in frames))
    assert pipe(list(frames)).segments[0].num_frames == 3


def test_a_view_of_bytes_is_a_file(pipe: Any, clips: Path) -> None:
    data = (clips / "d.mp4").read_bytes()
    assert pipe(memoryview(data)).content_hash == pipe(io.BytesIO(data)).content_hash


def test_an_empty_name_is_shown(pipe: Any) -> None:
    with pytest.raises(VideoError, match="no such file: ''"):
        pipe("")


def test_a_copy_and_what_another_process_gets_make_the_same_adapter(pipe: Any, clips: Path) -> None:
    clip = str(clips / "d.mp4")
    expected = pipe(clip).content_hash
    for again in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert again(clip).content_hash == expected
        assert again([clip, clip], num_workers=2)[1].content_hash == expected
