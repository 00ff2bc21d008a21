"""pipeline.stream: an adapter that grows with its video, and equals what the finished file's chunks become."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from transformers import pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor, VideoError, load_video
from video2lora.testing import tiny_clip

SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 3}


@pytest.fixture(scope="module")
def pipe(tiny_vlm_dir):
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(tiny_vlm_dir, dtype=torch.float32, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    processor = Video2LoraProcessor.from_config(model.config)
    return pipeline("video-to-lora", model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """An ordinary MP4 of 5 s, and the same packets as MPEG-TS."""
    import av

    folder = tmp_path_factory.mktemp("live")
    tiny_clip(folder / "clip.mp4", seconds=5, seed=1)
    with av.open(str(folder / "clip.mp4")) as source, av.open(str(folder / "clip.ts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return folder


def same(first, second, atol=0.0) -> bool:
    pairs = [
        (a, b[name])
        for a_of, b in ((first.weights.lora_A, second.weights.lora_A), (first.weights.lora_B, second.weights.lora_B))
        for name, a in a_of.items()
    ]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


def error_between(first, second) -> float:
    """Relative Frobenius norm of the difference of two adapters' changes."""
    lost = total = 0.0
    for module in first.targets.module_names:
        for layer in first.targets.layer_indices:
            a, b = first.delta_weight(module, layer), second.delta_weight(module, layer)
            lost, total = lost + (a - b).square().sum().item(), total + b.square().sum().item()
    return (lost / total) ** 0.5


def test_it_equals_the_chunks_of_the_finished_file(pipe, clip):
    grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0))
    assert [len(adapter.segments) for adapter in grown] == [1, 2, 3, 4, 5]
    finished = pipe(str(clip / "clip.ts"), chunk_seconds=1.0)
    assert same(grown[-1], finished)
    for live, file in zip(grown[-1].segments, finished.segments, strict=True):
        assert (live.start, live.end, live.timestamps, live.ranks) == (
            file.start,
            file.end,
            file.timestamps,
            file.ranks,
        )
        assert (live.source, live.prompt, live.num_visual_tokens) == (file.source, file.prompt, file.num_visual_tokens)
        assert live.sha256 is None and file.sha256 is not None  # the whole file's is not known while it is written
    for count, adapter in enumerate(grown, 1):
        assert same(adapter, finished.select(end=float(count)))


@pytest.mark.parametrize("rule", ["span", "file"])
def test_a_prompt_of_times_in_the_file_can_only_name_the_length_so_far(pipe, clip, monkeypatch, rule):
    prompts, prepare = [], pipe._prepare

    def noting(frames):
        content = prepare(frames)
        prompts.append(pipe.processor.decode(content["inputs"][0]["input_ids"][0]))
        return content

    monkeypatch.setattr(pipe, "_prepare", noting)
    monkeypatch.setattr(pipe.processor, "prompt_timestamps", rule)
    grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0))
    finished = pipe(str(clip / "clip.ts"), chunk_seconds=1.0)
    live, file = prompts[:5], prompts[5:]
    lengths = [f"0:00:0{second} [H:MM:SS] video" for second in ((1, 1, 1, 1, 1) if rule == "span" else range(1, 6))]
    assert [length in prompt for prompt, length in zip(live, lengths, strict=True)] == [True] * 5
    assert (live == file) == (rule == "span") and live[-1] == file[-1]
    assert [p.replace(length, lengths[-1]) for p, length in zip(live, lengths, strict=True)] == file
    assert same(grown[-1], finished) == (rule == "span")


def test_frames_from_an_iterator_are_those_of_the_file(pipe, clip):
    frames = load_video(clip / "clip.ts")
    options = {"chunk_seconds": 2.0, "fps": 2.0}
    paired = list(pipe.stream(zip(frames.timestamps, frames.frames, strict=True), **options))
    rated = list(pipe.stream(iter(frames.frames), frame_rate=8.0, **options))
    file = list(pipe.stream(clip / "clip.ts", timeout=0, **options))
    assert [len(adapters) for adapters in (paired, rated, file)] == [3, 3, 3]
    assert file[-1].segments[-1].end - file[-1].segments[-1].start == pytest.approx(1.0)  # a shorter one at the end
    for adapters in (paired, rated):
        assert all(same(a, b, atol=1e-6) for a, b in zip(adapters, file, strict=True))


def test_a_window_of_segments_slides(pipe, clip):
    finished = pipe(str(clip / "clip.ts"), chunk_seconds=1.0)
    for room in (1, 2, 3):
        grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0, max_segments=room))
        assert [len(adapter.segments) for adapter in grown] == [min(n, room) for n in (1, 2, 3, 4, 5)]
        for count, adapter in enumerate(grown, 1):
            assert same(adapter, finished.select(start=max(count - room, 0), end=count))
            assert adapter.segments[-1].end == count
    newest = adapter.select(start=adapter.segments[-1].start)
    assert same(newest, finished.select(start=4.0))


def test_a_rank_budget_is_shared_as_if_all_had_been_there_at_once(pipe, clip):
    finished = pipe(str(clip / "clip.ts"), chunk_seconds=1.0)
    at_once, error = finished.truncate(14, keep_segments=True)
    grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0, max_rank=14))
    assert [adapter.rank for adapter in grown] == [8, 12, 14, 14, 14]
    assert [s.ranks for s in grown[-1].segments] == [s.ranks for s in at_once.segments]
    assert error_between(grown[-1], at_once) < 1e-5 < error
    assert error_between(grown[-1], finished) == pytest.approx(error, rel=1e-4)
    in_chunks = pipe(str(clip / "clip.mp4"), chunk_seconds=1.0, max_rank=14)
    assert error_between(in_chunks, at_once) < 1e-5


def test_a_rank_budget_lets_the_oldest_go_where_there_is_none_left_for_them(pipe, clip):
    grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0, max_rank=7))
    assert [len(adapter.segments) for adapter in grown] == [1, 2, 3, 3, 3]
    assert grown[-1].rank == 7 and [s.start for s in grown[-1].segments] == [2.0, 3.0, 4.0]
    assert len(grown[-1].provenance.truncations) <= 4  # an endless stream does not collect them
    with pytest.raises(VideoError, match="5 chunks, but max_rank=7 has room for 3"):
        pipe(str(clip / "clip.mp4"), chunk_seconds=1.0, max_rank=7)


def test_what_came_before_a_failure_is_there(pipe):
    def camera():
        for number in range(25):
            yield number / 10, np.full((24, 32, 3), 10 * number, np.uint8)
        raise RuntimeError("the camera is gone")

    adapters = []
    with pytest.raises(RuntimeError, match="camera is gone"):
        for adapter in pipe.stream(camera(), chunk_seconds=1.0):
            adapters.append(adapter)
    assert [(s.start, s.num_frames) for s in adapters[-1].segments] == [(0.0, 3), (1.0, 3), (2.0, 3)]


def test_leaving_the_loop_ends_everything(pipe, clip):
    before = threading.active_count()
    for adapter in pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=None):
        if len(adapter.segments) == 4:
            break
    del adapter
    assert threading.active_count() <= before + 1  # tqdm's or the like, but none that waits for the file


def test_the_next_chunk_is_read_while_the_model_works_but_no_more(pipe):
    given = []

    def camera():
        for number in range(60):
            given.append(number)
            yield number / 10, np.zeros((24, 32, 3), np.uint8)

    stream = pipe.stream(camera(), chunk_seconds=1.0)
    next(stream)
    next(stream)
    stream.close()
    assert given[-1] <= 40


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "chunk_seconds"),
        ({"chunk_seconds": 0.0}, VideoError, "chunk_seconds"),
        ({"chunk_seconds": 1.0, "num_frames": 2, "fps": 1.0}, VideoError, "both"),
        ({"chunk_seconds": 1.0, "max_segments": 0}, ValueError, "max_segments"),
        ({"chunk_seconds": 1.0, "max_rank": 4}, ValueError, "leaves no rank"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(pipe, options, error, message):
    with pytest.raises(error, match=message):
        pipe.stream(iter([]), **options)


def test_a_rank_budget_is_for_chunks(pipe, clip):
    with pytest.raises(ValueError, match="chunk_seconds"):
        pipe(str(clip / "clip.mp4"), max_rank=10)


def test_the_pipelines_own_options_are_those_of_a_stream(pipe, clip):
    own = {"num_frames": 2, "chunk_seconds": 1.0, "max_rank": 9}
    piped = pipeline("video-to-lora", model=pipe.model, processor=pipe.processor, device="cpu", **own)
    given = list(pipe.stream(clip / "clip.ts", timeout=0, **own))
    assert all(same(a, b) for a, b in zip(piped.stream(clip / "clip.ts", timeout=0), given, strict=True))
    assert [adapter.rank for adapter in given] == [8, 9, 9, 9, 9]
    by_rate = list(piped.stream(clip / "clip.ts", timeout=0, fps=3.0))
    assert [segment.num_frames for segment in by_rate[-1].segments] == [3] * 5


def test_frames_are_shrunk_as_the_model_wants_them(pipe, clip, monkeypatch):
    monkeypatch.setattr(pipe.processor, "longest_edge", 24)
    sizes, prepare = set(), pipe._prepare
    monkeypatch.setattr(pipe, "_prepare", lambda frames: sizes.add(max(frames.frames.shape[1:3])) or prepare(frames))
    grown = list(pipe.stream(clip / "clip.ts", chunk_seconds=1.0, timeout=0))
    finished = pipe(str(clip / "clip.ts"), chunk_seconds=1.0)
    assert sizes == {24} and same(grown[-1], finished)
