"""pipeline("video-to-lora"): every form of input, batches, chunks, saving and the Hub."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModel, AutoProcessor, pipeline

from video2lora import (
    Video2LoraModel,
    Video2LoraProcessor,
    VideoAdapter,
    VideoAdapterStore,
    VideoError,
    VideoToLoraPipeline,
    compose_adapters,
    load_video,
)
from video2lora.adapters import Segment
from video2lora.pipelines.video_to_lora import count_decode_errors
from video2lora.testing import tiny_clip
from video2lora.video import VideoReader

from .bulk_runs import damaged_clip

SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 5}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        str(tiny_clip(folder / "a.mp4", seconds=2, seed=1)),
        str(tiny_clip(folder / "b.mp4", seconds=3, fps=6, size=(48, 64), seed=2)),
        str(tiny_clip(folder / "c.mp4", seconds=1, fps=3, seed=3)),  # three frames
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tiny_vlm_dir) -> Path:
    """A saved model and processor whose adapters change something."""
    directory = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(tiny_vlm_dir, dtype=torch.float32, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(directory)
    Video2LoraProcessor.from_config(model.config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pipe(directory) -> VideoToLoraPipeline:
    return pipeline("video-to-lora", model=str(directory), device="cpu")


def same(first: VideoAdapter, second: VideoAdapter, atol: float = 0.0) -> bool:
    pairs = [
        (a, b)
        for mine, other in [
            (first.weights.lora_A, second.weights.lora_A),
            (first.weights.lora_B, second.weights.lora_B),
        ]
        for a, b in zip(mine.values(), other.values(), strict=True)
    ]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


def test_a_path_becomes_an_adapter_that_says_where_it_comes_from(pipe, clips, directory):
    adapter = pipe(clips[0])
    assert isinstance(adapter, VideoAdapter)
    assert (adapter.rank, adapter.static_rank) == (8, 4)
    (segment,) = adapter.segments
    assert (segment.source, segment.num_frames, segment.start, segment.end) == ("a.mp4", 5, 0.0, 2.0)
    assert segment.timestamps == (0.0, 0.375, 0.875, 1.375, 1.875)
    assert segment.num_visual_tokens == 20
    assert segment.prompt == pipe.processor.internalization_prompt
    assert adapter.provenance.hypernetwork_sha256
    assert adapter.provenance.base_model == pipe.model.config.base_model_name_or_path


def test_every_form_of_one_video_gives_the_same_adapter(pipe, clips):
    expected = pipe(clips[0])
    assert same(expected, pipe(Path(clips[0])))
    assert same(expected, pipe(Path(clips[0]).read_bytes()))
    assert same(expected, pipe(io.BytesIO(Path(clips[0]).read_bytes())))
    assert same(expected, pipe({"video": clips[0]}))
    assert same(expected, pipe({"video": {"path": clips[0], "bytes": None}}))
    frames = load_video(clips[0], num_frames=5)
    assert same(expected, pipe(frames))


def test_frames_in_memory_are_one_video(pipe, clips):
    array = load_video(clips[0], num_frames=4).frames
    expected = pipe(array)
    assert expected.segments[0].num_frames == 4
    assert same(expected, pipe(torch.from_numpy(array)))
    assert same(expected, pipe([Image.fromarray(frame) for frame in array]))
    assert same(expected, pipe(list(array)))
    assert len(pipe([array, array[:2]])) == 2


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_videos_of_different_lengths_give_together_what_each_gives_alone(pipe, clips, batch_size):
    alone = [pipe(clip) for clip in clips]
    assert len({adapter.segments[0].num_visual_tokens for adapter in alone}) > 1
    together = pipe(clips, batch_size=batch_size)
    assert all(same(a, b, atol=2e-6) for a, b in zip(alone, together, strict=True))
    assert [adapter.segments for adapter in alone] == [adapter.segments for adapter in together]
    assert not same(alone[0], alone[1], atol=1e-3)


def test_a_generator_is_read_as_its_result_is_read(pipe, clips):
    given = []

    def videos():
        for clip in clips:
            given.append(clip)
            yield clip

    adapters = pipe(videos())
    first = next(adapters)
    assert given == clips[:1]
    assert same(first, pipe(clips[0]))
    assert len(list(adapters)) == 2


def test_datasets(pipe, clips):
    class Rows(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"video": clips[index], "start": 0.5, "end": 1.0}

    from_torch = list(pipe(Rows(), batch_size=2, num_workers=1))
    datasets = pytest.importorskip("datasets")
    from_datasets = list(pipe(datasets.Dataset.from_list([Rows()[0], Rows()[1]])))
    for adapters in (from_torch, from_datasets):
        assert [(a.segments[0].start, a.segments[0].end) for a in adapters] == [(0.5, 1.0)] * 2


def test_span_and_rate(pipe, clips):
    (segment,) = pipe(clips[1], start=1.0, end=2.0, fps=2.0).segments
    assert segment.timestamps == (1.0, 1.5)
    (segment,) = pipe(clips[1], num_frames=2, longest_edge=16).segments
    assert segment.num_frames == 2


def test_chunks_are_what_their_spans_give_composed(pipe, clips):
    chunked = pipe(clips[1], chunk_seconds=1.0)
    parts = [pipe(clips[1], start=t, end=t + 1.0) for t in (0.0, 1.0, 2.0)]
    assert chunked.rank == 4 * 4
    assert [(s.start, s.end, s.ranks) for s in chunked.segments] == [
        (0.0, 1.0, (0, 4)),
        (1.0, 2.0, (4, 8)),
        (2.0, 3.0, (8, 12)),
    ]
    assert same(chunked, compose_adapters(parts), atol=2e-6)


def test_rounding_makes_no_chunk_more(pipe, clips):
    """2.1 / 0.3 is a little more than 7."""
    segments = pipe(clips[1], chunk_seconds=0.3, end=2.1).segments
    assert len(segments) == 7 and segments[-1].end == 2.1


def test_chunks_are_decoded_as_they_are_read(pipe, clips, monkeypatch):
    events = []
    sample, generate = VideoReader.sample, pipe.model.generate_segments
    monkeypatch.setattr(VideoReader, "sample", lambda *args, **kw: events.append("decode") or sample(*args, **kw))
    monkeypatch.setattr(pipe.model, "generate_segments", lambda **kw: events.append("read") or generate(**kw))
    adapter = pipe(clips[1], chunk_seconds=0.25, batch_size=2)
    assert len(adapter.segments) == 12
    assert events.count("read") == 6
    ahead = [events[:i].count("decode") - 2 * events[:i].count("read") for i in range(len(events) + 1)]
    assert max(ahead) <= 2 + 2  # a batch, and one or two being made meanwhile


def test_a_damaged_chunk_raises_where_it_is(pipe, clips, monkeypatch):
    sample = VideoReader.sample

    def fails_later(self, **kwargs):
        if kwargs["start"] >= 2:
            raise VideoError("cannot be read here")
        return sample(self, **kwargs)

    monkeypatch.setattr(VideoReader, "sample", fails_later)
    with pytest.raises(VideoError, match="cannot be read here"):
        pipe(clips[1], chunk_seconds=1.0)


def test_batches_of_chunked_videos(pipe, clips):
    together = pipe(clips, chunk_seconds=1.0, batch_size=2)
    for clip, adapter in zip(clips, together, strict=True):
        assert same(pipe(clip, chunk_seconds=1.0), adapter, atol=2e-6)


def test_through_peft_the_answers_are_those_in_memory(pipe, clips, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    adapter = pipe(clips[0])
    query = pipe.processor(text=["What happens?"])
    with torch.no_grad():
        in_memory = pipe.model(**query, adapters=adapter).logits
        base = pipe.model(**query).logits
        vlm = AutoModelForImageTextToText.from_pretrained(
            pipe.model.config.base_model_name_or_path, dtype=torch.float32
        )
        through_peft = PeftModel.from_pretrained(vlm, adapter.save_pretrained(tmp_path / "lora"))(**query).logits
    torch.testing.assert_close(through_peft, in_memory, atol=1e-5, rtol=0)
    assert (in_memory - base).abs().max() > 1e-2


@pytest.mark.parametrize("bundle_base", [False, True], ids=["light", "bundled"])
def test_saved_and_loaded_again_it_gives_the_same_without_remote_code(pipe, clips, tmp_path, bundle_base):
    pipe.save_pretrained(tmp_path / "saved", bundle_base=bundle_base)
    assert not list((tmp_path / "saved").rglob("*.py"))
    again = pipeline("video-to-lora", model=str(tmp_path / "saved"), device="cpu")
    assert same(pipe(clips[0]), again(clips[0]))


def test_only_the_model_was_saved(pipe, clips, tmp_path):
    pipe.model.save_pretrained(tmp_path / "saved")  # the processor is then the base's
    again = pipeline("video-to-lora", model=str(tmp_path / "saved"), device="cpu")
    assert same(pipe(clips[0]), again(clips[0]))


@pytest.mark.parametrize("bundle_base", [False, True], ids=["light", "bundled"])
def test_by_the_name_of_a_repository(pipe, clips, patched_hub, bundle_base):
    pipe.model.push_to_hub("owner/hypernetwork", bundle_base=bundle_base)
    pipe.processor.push_to_hub("owner/hypernetwork")
    commit = patched_hub.server.repos["owner/hypernetwork"].at("main").sha
    again = pipeline("video-to-lora", model="owner/hypernetwork", device="cpu")
    adapter = again(clips[0])
    assert same(pipe(clips[0]), adapter)
    assert adapter.provenance.hypernetwork == "owner/hypernetwork"
    assert adapter.provenance.hypernetwork_revision == commit
    assert isinstance(AutoModel.from_pretrained("owner/hypernetwork"), Video2LoraModel)
    assert isinstance(AutoProcessor.from_pretrained("owner/hypernetwork"), Video2LoraProcessor)
    old = pipeline("video-to-lora", model="owner/hypernetwork", revision=commit, device="cpu")
    assert same(adapter, old(clips[0]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": 1.5, "end": 1.0}, "start"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 4, "fps": 1.0}, "fps"),
        ({"chunk_seconds": 0.0}, "chunk_seconds"),
        ({"start": 100.0}, "100"),
    ],
)
def test_impossible_sampling_is_one_clear_error(pipe, clips, options, message):
    with pytest.raises(VideoError, match=message):
        pipe(clips[0], **options)


def test_unreadable_videos_are_one_clear_error(pipe, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "empty.mp4", "missing.mp4"):
        with pytest.raises(VideoError, match=name):
            pipe(str(tmp_path / name))


@pytest.mark.parametrize("nothing", [None, 3])
def test_what_is_no_video_is_refused_at_once(pipe, nothing):
    with pytest.raises(TypeError, match=type(nothing).__name__):
        pipe(nothing)


def test_a_base_is_not_taken_for_a_hypernetwork(tiny_vlm_dir):
    with pytest.raises(ValueError, match="SmolVLMForConditionalGeneration.*from_vlm"):
        pipeline("video-to-lora", model=str(tiny_vlm_dir), device="cpu")


def test_the_name_of_an_adapter_is_not_the_adapter(pipe):
    for adapters in ("clip-lora", ["clip-lora"]):
        with pytest.raises(TypeError, match="VideoAdapter.from_pretrained"):
            pipe.model.generate(**pipe.processor(text=["What?"]), adapters=adapters)


def test_unknown_arguments_are_refused(directory):
    with pytest.raises(TypeError, match="num_frame"):
        pipeline("video-to-lora", model=str(directory), device="cpu", num_frame=3)


def test_arguments_of_construction_are_defaults_of_calls(directory, clips):
    pipe = pipeline("video-to-lora", model=str(directory), device="cpu", num_frames=2)
    assert pipe(clips[0]).segments[0].num_frames == 2
    assert pipe(clips[0], num_frames=3).segments[0].num_frames == 3


def test_no_frames_in_memory(pipe):
    with pytest.raises(VideoError):
        pipe(np.zeros((0, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("given", [{}, {"device": "cpu"}, {"revision": "main"}])
def test_without_a_model_it_says_what_to_pass(given):
    with pytest.raises(ValueError, match="has no default model.*pass model=.*from_vlm"):
        pipeline("video-to-lora", **given)


@pytest.mark.parametrize("options", [{}, {"chunk_seconds": 0.5}, {"chunk_seconds": 0.5, "max_rank": 12}])
def test_a_damaged_video_is_told_in_the_log_once(pipe, clips, tmp_path, caplog, options):
    path = damaged_clip(tmp_path / "damaged.mp4")
    store = VideoAdapterStore(tmp_path / "store")
    for arguments in ({}, {"store": store}, {"store": store}):
        caplog.clear()
        first, _ = pipe([str(path), clips[0]], num_frames=20, **options, **arguments)
        (record,) = caplog.records
        count = count_decode_errors(first.segments)
        assert count > 0 and record.levelname == "WARNING"
        expected = f"damaged.mp4: {count} packets or frames do not decode; the rest was used"
        assert record.getMessage() == expected
    caplog.clear()
    pipe(str(path), num_frames=20, **options)
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_what_a_file_lacks_is_counted_once_though_every_chunk_tells_it():
    def count(*errors: int) -> int:
        return count_decode_errors([Segment(num_decode_errors=number) for number in errors])

    assert [count(), count(0), count(3), count(0, 2, 0, 1), count(9, 9, 9), count(9, 11, 9)] == [0, 0, 3, 3, 9, 11]
