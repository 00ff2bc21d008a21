"""Samples are prepared once, in order, in any number of threads, and equal to what the processor makes one by one."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from video2lora.evaluation import prepare as prepare_module
from video2lora.evaluation.conditions import CONDITIONS, PreparedSample, prepare_samples
from video2lora.evaluation.prepare import encode_turns
from video2lora.evaluation.samples import Sample
from video2lora.modeling import Video2LoraProcessor
from video2lora.testing import tiny_clip
from video2lora.video import VideoError, load_video

from .conditions_setup import DECODING, FAMILIES, ask, facts, make_samples, prepare, setup_of


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    return make_samples(tmp_path_factory.mktemp("videos"))


def conditions_of(setup, *names, **options):
    return [CONDITIONS[name](setup.model, setup.processor, **options) for name in names]


def assert_same_inputs(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and torch.equal(ours[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_are_those_of_the_processor_with_the_pixels_processed_once(family, samples, monkeypatch):
    setup, prompts = setup_of(family), ["What?", "Ünïcode — 字? " * 20, "What?", " leading space"]
    vlm_processor = setup.processor.vlm_processor
    part = vlm_processor.image_processor if family == "idefics3" else vlm_processor.video_processor
    calls: list[type] = []
    original = type(part).__call__
    monkeypatch.setattr(
        type(part),
        "__call__",
        lambda self, *args, **kwargs: calls.append(type(self)) or original(self, *args, **kwargs),
    )
    for sample in samples:
        frames = setup.processor.load_video(sample.video, start=sample.start, end=sample.end)
        calls.clear()
        internalization, turns = encode_turns(setup.processor, frames, prompts)
        assert calls == [type(part)]
        assert_same_inputs(internalization, setup.processor.encode_video(frames))
        assert list(turns) == list(dict.fromkeys(prompts))
        for prompt, turn in turns.items():
            assert_same_inputs(turn, setup.processor.encode_video(frames, prompt, add_generation_prompt=True))
            pixels = [name for name in turn if name.startswith("pixel_")]
            assert pixels and all(turn[name] is internalization[name] for name in pixels)
    assert (vlm_processor.image_processor if family == "idefics3" else vlm_processor.video_processor) is part


@pytest.mark.parametrize("num_workers", [0, 3])
def test_samples_come_in_order_with_what_the_conditions_need(samples, num_workers):
    setup = setup_of("smolvlm")
    conditions = conditions_of(setup, "video", "other_adapter", "caption")
    prepared = list(prepare_samples(samples, setup.processor, conditions, num_workers))
    assert [item.sample for item in prepared] == samples
    assert [item.partner.sample.id for item in prepared] == ["s2", "s2", "s3", "s0"]
    for item in prepared:
        frames = setup.processor.load_video(item.sample.video, start=item.sample.start, end=item.sample.end)
        assert np.array_equal(item.frames.frames, frames.frames) and item.frames.timestamps == frames.timestamps
        assert_same_inputs(item.internalization, setup.processor.encode_video(frames))
        assert list(item.turns) == [*item.prompts, conditions[2].prompt]
    [alone] = prepare_samples(samples, setup.processor, conditions_of(setup, "adapter"), num_workers, indices=[2])
    assert (alone.sample.id, alone.partner, dict(alone.turns)) == ("s2", None, {})
    [same] = prepare_samples(samples, setup.processor, conditions, num_workers, indices=[2])
    assert same.partner.sample.id == "s3"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_video_is_decoded_once_for_itself_and_its_neighbour(tmp_path, num_workers, monkeypatch):
    setup = setup_of("smolvlm")
    samples = [
        Sample(f"s{n}", str(tiny_clip(tmp_path / f"{n}.mp4", seconds=1, seed=n)), ask(f"s{n}", "What?"))
        for n in range(8)
    ]
    opened: Counter = Counter()
    reader = prepare_module.VideoReader
    monkeypatch.setattr(
        prepare_module, "VideoReader", lambda video, **options: opened.update([video]) or reader(video, **options)
    )
    prepared = list(prepare_samples(samples, setup.processor, conditions_of(setup, "other_adapter"), num_workers))
    assert [item.partner.sample.id for item in prepared] == [f"s{(n + 1) % 8}" for n in range(8)]
    # the last one's partner is the first, which is long gone
    assert sorted(opened.values()) == [1] * 7 + [2]


def test_threads_have_processors_of_their_own(samples, monkeypatch):
    setup, users = setup_of("smolvlm"), {}
    encode_video = Video2LoraProcessor.encode_video

    def noting(self, *args, **kwargs):
        users.setdefault(id(self), set()).add(threading.get_ident())
        return encode_video(self, *args, **kwargs)

    monkeypatch.setattr(Video2LoraProcessor, "encode_video", noting)
    list(prepare_samples(samples * 3, setup.processor, conditions_of(setup, "video", "other_adapter"), 3))
    assert id(setup.processor) not in users
    assert all(len(threads) == 1 for threads in users.values())


def test_a_broken_video_is_an_error_and_nobodys_partner(samples, tmp_path):
    setup = setup_of("smolvlm")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    sample = Sample("broken", broken, ask("broken", "What?"))
    several = [samples[0], sample, samples[3]]
    conditions = conditions_of(setup, "other_adapter")
    first, error, last = prepare_samples(several, setup.processor, conditions, 2)
    assert isinstance(error, VideoError) and "broken.mp4" in str(error)
    assert (first.partner.sample.id, last.partner.sample.id) == ("s3", "s0")
    gone, error = prepare_samples(several[:2], setup.processor, conditions, 2)
    assert isinstance(error, VideoError)
    assert isinstance(gone, VideoError) and "s0 can be read, but no other video" in str(gone)
    prepared, _ = prepare_samples(several[:2], setup.processor, conditions_of(setup, "adapter"), 2)
    assert isinstance(prepared, PreparedSample)


def test_the_same_bytes_elsewhere_are_no_other_video(samples, tmp_path):
    setup = setup_of("smolvlm")
    copied = tmp_path / "copied.mp4"
    copied.write_bytes(open(samples[0].video, "rb").read())
    several = [samples[0], replace(samples[0], id="copy", video=str(copied)), samples[3]]
    conditions = conditions_of(setup, "other_adapter")
    assert [item.partner.sample.id for item in prepare(setup, several, *conditions)] == ["s3", "s3", "s0"]
    with pytest.raises(ValueError, match="every sample is about the video of s0"):
        list(prepare_samples(several[:2], setup.processor, conditions, 0))
    with pytest.raises(ValueError, match="every sample is about the video of s0"):
        list(prepare_samples(samples[:2], setup.processor, conditions, 2))


def test_a_copy_that_was_drawn_into_is_no_other_video(samples, tmp_path):
    setup, drawn = setup_of("smolvlm"), tmp_path / "drawn.mp4"
    tiny_clip(drawn, seed=99)  # other bytes in another place, but the same video by what the benchmark says
    marked = Sample("marked", str(drawn), ask("marked", "What?"), video_id="v")
    several = [replace(samples[0], video_id="v"), marked, replace(samples[3], video_id="w")]
    conditions = conditions_of(setup, "other_adapter")
    assert [item.partner.sample.id for item in prepare(setup, several, *conditions)] == ["s3", "s3", "s0"]
    with pytest.raises(ValueError, match="every sample is about the video of s0"):
        list(prepare_samples(several[:2], setup.processor, conditions, 0))


def test_segments_are_equal_parts_of_the_span_with_frames_of_their_own(samples):
    setup = setup_of("smolvlm")
    conditions = conditions_of(setup, "adapter", segments=2) + conditions_of(setup, "adapter", segments=4)
    several = prepare(setup, samples[:3], *conditions, num_frames=2)
    for item, span in zip(several, [(0.0, 4.0), (1.0, 3.0), (0.0, 3.0)], strict=True):
        assert list(item.segments) == [2, 4]
        for count, parts in item.segments.items():
            edges = np.linspace(*span, count + 1)
            assert [(part.frames.start, part.frames.end) for part in parts] == list(
                zip(edges, edges[1:], strict=False)
            )
            for part in parts:
                expected = load_video(
                    item.sample.video, num_frames=2, start=part.frames.start, end=part.frames.end, longest_edge=64
                )
                assert np.array_equal(part.frames.frames, expected.frames)
                assert_same_inputs(part.internalization, setup.processor.encode_video(expected))


def test_frames_sampled_already_are_taken_as_they_are(samples):
    setup = setup_of("smolvlm")
    frames = setup.processor.load_video(samples[0].video)
    sample = replace(samples[0], video=frames)
    conditions = conditions_of(setup, "adapter")
    [item] = prepare(setup, [sample], *conditions)
    assert item.frames is frames
    [expected] = prepare(setup, samples[:1], *conditions)
    assert facts(conditions[0].answer([item], DECODING)) == facts(conditions[0].answer([expected], DECODING))
    with pytest.raises(ValueError, match="s0: its frames are sampled already"):
        prepare(setup, [sample], *conditions_of(setup, "adapter", segments=2))


def test_sampling_is_the_processors_unless_something_else_is_asked_for(samples):
    setup = setup_of("smolvlm")
    conditions = conditions_of(setup, "adapter")
    [usual] = prepare(setup, samples[:1], *conditions)
    assert usual.frames.frames.shape == (4, 48, 64, 3)
    [other] = prepare(setup, samples[:1], *conditions, fps=2.0, longest_edge=32)
    assert other.frames.frames.shape == (8, 24, 32, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_in_a_prompt_is_refused(samples, family):
    setup = setup_of(family)
    mark = "<|video_pad|>" if family == "qwen2_5_vl" else "<image>"
    for text in (mark, "<video>"):
        sample = replace(samples[0], questions=ask("s0", f"What is {text}?"))
        with pytest.raises(ValueError, match="s0 has .* in a prompt"):
            list(prepare_samples([sample], setup.processor, conditions_of(setup, "adapter"), 0))
