"""The whole way in every family of bases: clips, pipeline, files, and then PEFT on a fresh base."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor, VideoAdapter, VideoToLoraPipeline
from video2lora.testing import save_tiny_vlm, tiny_clip

FAMILIES = ("smolvlm", "idefics3", "qwen2_5_vl")
SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 5}


class Family(NamedTuple):
    """A pipeline of one family, the directory of its base, and the adapters of two clips of different lengths."""

    name: str
    base: Path
    pipe: VideoToLoraPipeline
    clips: list[str]
    adapters: list[VideoAdapter]

    def fresh_base(self) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(self.base)

    def question(self) -> dict[str, Tensor]:
        return dict(self.pipe.processor(text=["What happens?"]))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_tiny_vlm(request.param, folder / "base")
    model = Video2LoraModel.from_vlm(base, **SIZES)
    generator = torch.Generator().manual_seed(0)
    for scaler in model.hypernetwork.scaler_B.values():  # zero in a fresh one, whose adapters change nothing
        torch.nn.init.normal_(scaler, generator=generator)
    model.save_pretrained(folder / "model")
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / "model")
    pipe = pipeline("video-to-lora", model=str(folder / "model"), device="cpu")
    clips = [
        str(tiny_clip(folder / "long.mp4", seconds=3, seed=1)),
        str(tiny_clip(folder / "short.mp4", seconds=1, fps=3, seed=2)),
    ]
    return Family(request.param, base, pipe, clips, pipe(clips, batch_size=2))


@pytest.mark.parametrize("load", ["PeftModel", "AutoPeftModel", "load_adapter"])
def test_through_peft_a_fresh_base_answers_as_the_model_in_memory(family, tmp_path, load):
    question = family.question()
    for number, adapter in enumerate(family.adapters):
        directory = str(adapter.save_pretrained(tmp_path / str(number)))
        if load == "PeftModel":
            model = PeftModel.from_pretrained(family.fresh_base(), directory)
        elif load == "AutoPeftModel":
            model = AutoPeftModel.from_pretrained(directory)
        else:
            model = family.fresh_base()
            model.load_adapter(directory)
        with torch.no_grad():
            in_memory = family.pipe.model(**question, adapters=adapter).logits
            base = family.pipe.model(**question).logits
            through_peft = model.eval()(**question).logits
        torch.testing.assert_close(through_peft, in_memory, atol=1e-5, rtol=0)
        assert (in_memory - base).abs().max() > 1e-2
        generated = model.generate(**question, max_new_tokens=4, do_sample=False)
        expected = family.pipe.model.generate(**question, adapters=adapter, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, expected)


def test_together_is_what_each_gets_alone(family):
    assert len({adapter.segments[0].num_visual_tokens for adapter in family.adapters}) == 2
    for clip, together in zip(family.clips, family.adapters, strict=True):
        alone = family.pipe(clip)
        assert alone.segments == together.segments
        for kind in ("lora_A", "lora_B"):
            torch.testing.assert_close(
                getattr(together.weights, kind), getattr(alone.weights, kind), atol=2e-6, rtol=0
            )


@pytest.mark.parametrize("bundle_base", [False, True], ids=["light", "bundled"])
def test_a_saved_pipeline_writes_the_same_adapter(family, tmp_path, bundle_base):
    family.pipe.save_pretrained(tmp_path / "saved", bundle_base=bundle_base)
    again = pipeline("video-to-lora", model=str(tmp_path / "saved"), device="cpu")
    assert again(family.clips[0]).content_hash == family.pipe(family.clips[0]).content_hash


def test_one_adapter_of_chunks(family, tmp_path):
    chunked = family.pipe(family.clips[0], chunk_seconds=1.5)
    assert [(s.start, s.end) for s in chunked.segments] == [(0.0, 1.5), (1.5, 3.0)]
    question = family.question()
    model = PeftModel.from_pretrained(family.fresh_base(), chunked.save_pretrained(tmp_path / "lora"))
    with torch.no_grad():
        in_memory = family.pipe.model(**question, adapters=chunked).logits
        torch.testing.assert_close(model(**question).logits, in_memory, atol=1e-5, rtol=0)
