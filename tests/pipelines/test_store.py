"""pipeline(..., store=): a video is internalized once, and found again only if nothing that decides it has changed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from transformers import pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor, VideoAdapterStore, VideoError, load_video
from video2lora.testing import save_tiny_vlm, tiny_clip

SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 3}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [str(tiny_clip(folder / f"{seed}.mp4", seconds=2, seed=seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_vlm("smolvlm", tmp_path_factory.mktemp("base") / "tiny")


def make_pipe(base):
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(base, dtype=torch.float32, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    processor = Video2LoraProcessor.from_config(model.config)
    return pipeline("video-to-lora", model=model, processor=processor, device="cpu")


@pytest.fixture
def pipe(base):
    return make_pipe(base)


@pytest.fixture
def made(pipe, monkeypatch):
    """How many videos the model has read."""
    counts = []
    generate = pipe.model.generate_segments

    def counting(**inputs):
        counts.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(pipe.model, "generate_segments", counting)
    return counts


@pytest.fixture
def store(tmp_path):
    return VideoAdapterStore(tmp_path / "store")


def test_a_video_is_internalized_once(pipe, made, store, clips, tmp_path):
    plain = pipe(clips[0])
    made.clear()
    first, second = pipe(clips[0], store=store), pipe(clips[0], store=store)
    assert made == [1]
    assert first.content_hash == second.content_hash == plain.content_hash
    assert second.provenance == first.provenance or second.segments == first.segments
    copied = shutil.copy(clips[0], tmp_path / "another-name.mp4")  # the bytes count, not the name
    renamed, again = pipe([copied, clips[0]], store=store)
    assert renamed.content_hash == again.content_hash == plain.content_hash
    assert made == [1]
    assert renamed.select(source="another-name.mp4").segments == renamed.segments  # which is the one asked for
    assert again.segments == plain.segments


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lists_and_generators_keep_their_order(pipe, made, store, clips, num_workers):
    expected = [adapter.content_hash for adapter in pipe(clips)]
    made.clear()
    pipe(clips[1], store=store)
    rows = [clips[0], clips[1], clips[2], clips[0], clips[1]]
    order = [expected[i] for i in (0, 1, 2, 0, 1)]
    adapters = pipe(rows, store=store, batch_size=2, num_workers=num_workers)
    assert [adapter.content_hash for adapter in adapters] == order
    assert sum(made) == 3 and len(store) == 3
    lazy = pipe((row for row in rows), store=store)
    assert [adapter.content_hash for adapter in lazy] == order
    assert sum(made) == 3


def test_whatever_decides_the_adapter_is_in_the_key(pipe, made, store, clips, base, tmp_path):
    def misses(video=clips[0], pipe=pipe, **options):
        before = len(store)
        pipe(video, store=store, **options)
        return len(store) - before

    assert misses() == 1
    assert misses(num_frames=3) == 0  # the default
    for options in ({"num_frames": 2}, {"fps": 1.0}, {"start": 0.5}, {"end": 1.5}, {"longest_edge": 16}):
        assert misses(**options) == 1, options
        assert misses(**options) == 0, options
    assert misses(chunk_seconds=1) == 1 and misses(chunk_seconds=1) == 0
    assert misses({"video": clips[0], "start": 0.5}) == 0  # a row's own span
    frames = load_video(clips[0], num_frames=3)
    assert misses(frames) == 1 and misses(frames) == 0
    assert misses(np.zeros((3, 8, 8, 3), dtype=np.uint8)) == 1
    assert misses(np.zeros((3, 4, 16, 3), dtype=np.uint8)) == 1  # the same bytes, other pictures
    assert misses(chunk_seconds=1, max_rank=11) == 1 and misses(chunk_seconds=1, max_rank=11) == 0
    pipe.processor.internalization_prompt = "Watch this."
    assert misses() == 1
    pipe.processor.prompt_timestamps = "file"
    assert misses() == 1
    pipe.processor.vlm_processor.video_processor.image_mean = [0.4, 0.5, 0.5]
    assert misses() == 1
    with torch.no_grad():
        next(pipe.model.hypernetwork.parameters()).add_(0.1)
    assert misses() == 1
    other = make_pipe(save_tiny_vlm("smolvlm", tmp_path / "tiny", seed=1))  # same sizes, other weights
    assert misses(pipe=other) == 1


def test_the_base_computes_in_a_dtype_and_that_is_in_the_key(base, clips):
    keys = set()
    for dtype in (torch.float32, torch.bfloat16):
        model = Video2LoraModel.from_vlm(base, dtype=dtype, **SIZES)
        model.config.base_model_revision = "0" * 40  # pinned: its weights are not hashed
        model.checkpoint_commit = "0" * 40
        processor = Video2LoraProcessor.from_config(model.config)
        pipe = pipeline("video-to-lora", model=model, processor=processor, device="cpu")
        keys.add(pipe.store_key(clips[0]))
    assert len(keys) == 2


def test_the_pipelines_own_options_count_as_if_they_were_asked_for(pipe, made, store, clips):
    own = pipeline("video-to-lora", model=pipe.model, processor=pipe.processor, device="cpu", num_frames=2)
    assert own.store_key(clips[0]) == pipe.store_key(clips[0], num_frames=2) != pipe.store_key(clips[0])
    assert own.store_key(clips[0], fps=2.0) == pipe.store_key(clips[0], fps=2.0)  # instead of, not besides
    assert own(clips[0], fps=2.0).content_hash == pipe(clips[0], fps=2.0).content_hash
    own(clips[0], store=store)
    made.clear()
    assert pipe(clips[0], num_frames=2, store=store).segments[0].num_frames == 2 and made == []


def test_a_dataset_that_can_only_be_indexed(pipe, store, clips):
    class Indexed(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {0: clips[0], 1: clips[1]}[index]

    plain = [adapter.content_hash for adapter in pipe(Indexed())]
    assert [adapter.content_hash for adapter in pipe(Indexed(), store=store)] == plain
    with pytest.raises(TypeError, match="expected a video"):
        pipe(5, store=store)


def test_a_file_written_to_after_it_was_hashed_is_not_stored_under_the_old_key(pipe, store, clips, tmp_path):
    path = tmp_path / "growing.mp4"
    shutil.copy(clips[0], path)
    key, get = pipe.store_key(str(path)), store.get

    def replacing(asked):
        shutil.copy(clips[1], path)
        return get(asked)

    store.get = replacing
    adapter = pipe(str(path), store=store)
    assert adapter.content_hash == pipe(clips[1]).content_hash
    assert key not in store and len(store) == 0


def test_a_bad_video_is_an_error_as_ever_and_what_came_before_it_is_kept(pipe, store, clips, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match="bad.mp4"):
        pipe([clips[0], str(tmp_path / "bad.mp4")], store=store)
    assert len(store) == 1
