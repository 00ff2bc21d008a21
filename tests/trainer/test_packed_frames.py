"""Frames of a batch one behind the other train what frames padded to the longest video train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset

from video2lora.data import load_rows
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor
from video2lora.testing import save_tiny_vlm
from video2lora.trainer import Video2LoraCollator

from .runs import DrawnSquares, losses, make_model, make_trainer, weights

pad = Video2LoraProcessor.pad


def pad_frames(self: Video2LoraProcessor, items: Any, left: bool = False, pack_frames: bool = False) -> Any:
    """Every video padded to the longest, as whoever does not ask for packed frames gets it."""
    return pad(self, items, left)


class Padding(Video2LoraProcessor):
    pad = pad_frames


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def base(request, tiny_vlm_dir, tmp_path_factory) -> Path:
    if request.param == "smolvlm":
        return tiny_vlm_dir
    return save_tiny_vlm("idefics3", tmp_path_factory.mktemp("idefics3") / "base")


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model takes of a batch."""
    names = ("input_ids", "attention_mask", "labels", "turns", "video_inputs", "teacher_inputs")
    names += ("queries_per_video", "segments_per_adapter")
    return {name: batch[name] for name in names if name in batch}


def step(model: Video2LoraModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything that a step of training makes of a batch."""
    model.zero_grad()
    output = model(**inputs_of(batch))
    found = {"query_losses": output.query_losses, "label_logits": output.label_logits}
    found |= {f"A {name}": value for name, value in output.lora.lora_A.items()}
    found |= {f"B {name}": value for name, value in output.lora.lora_B.items()}
    if output.teacher_logits is not None:
        found["teacher_logits"] = output.teacher_logits
    output.loss.backward()
    assert any(p.grad.abs().max() > 0 for p in model.hypernetwork.parameters())
    found |= {f"gradient {name}": p.grad.clone() for name, p in model.hypernetwork.named_parameters()}
    return {name: value.detach() for name, value in found.items()}


def both(model: Video2LoraModel, rows: list, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch of these rows, packed and padded."""
    processor = Video2LoraProcessor.from_config(model.config)
    padding = Padding(processor.vlm_processor, num_frames=processor.num_frames)
    return Video2LoraCollator(processor, **settings)(rows), Video2LoraCollator(padding, **settings)(rows)


@pytest.mark.parametrize(
    "settings, chosen",
    [
        ({"num_frames_range": (1, 7), "seed": 1}, slice(5)),
        ({"composition_probability": 0.5, "max_segments": 3, "num_frames_range": (1, 7), "seed": 3}, slice(5)),
        ({"online_teacher": True, "num_frames_range": (1, 7), "seed": 2, "composition_probability": 0.5}, slice(3)),
        ({}, slice(5)),
        ({"num_frames_range": (1, 7), "online_teacher": True}, slice(1, 2)),
        ({"online_teacher": True}, None),
    ],
    ids=["frames", "segments", "teacher", "equal", "one video", "dummy"],
)
def test_a_packed_batch_trains_what_a_padded_one_trains(settings, chosen, base, rows, broken):
    bad = {"id": "bad", "video": broken, "conversations": [{"prompt": "p", "response": "r"}]}
    parsed = list(load_rows([bad] if chosen is None else rows[chosen]))
    model = make_model(base)
    packed, padded = both(model, parsed, **settings)
    for name in ("video_inputs", "teacher_inputs") if "teacher_inputs" in packed else ("video_inputs",):
        ours, theirs = packed[name], padded[name]
        count = len(theirs["input_ids"])
        real = theirs["pixel_values"].flatten(2).ne(0).any(2)
        assert real.shape[0] == count and ours["pixel_values"].shape[:2] == (1, int(real.sum()))
        assert all(torch.equal(ours[key][0], theirs[key][real]) for key in ours if key.startswith("pixel_"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if not key.startswith("pixel_"))
        if "num_frames_range" in settings and len(parsed) > 1:
            assert not real.all(), "videos of the same length prove nothing"
    if settings.get("composition_probability"):
        assert len(set(packed["segments_per_adapter"])) > 1
    ours, theirs = step(model, packed), step(model, padded)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@torch.no_grad()
def test_frames_of_another_size_are_padded_in_height_and_width_alone(base, rows):
    """Tiles of a base whose processor gives each video pixels of its own size."""
    model = make_model(base)
    processor = Video2LoraProcessor.from_config(model.config)
    items = [processor.encode_video(processor.load_video(rows[0]["video"], num_frames=n)) for n in (2, 3)]
    small = copy.copy(items[1])
    for name in ("pixel_values", "pixel_attention_mask"):
        small[name] = items[1][name][..., :24, :16]
    together = processor.pad([items[0], small], pack_frames=True)
    assert together["pixel_values"].shape == (1, 5, 3, 32, 32)
    assert together["pixel_attention_mask"].shape == (1, 5, 32, 32)
    assert torch.equal(together["pixel_values"][0, 2:, :, :24, :16], small["pixel_values"][0])
    assert torch.equal(together["pixel_attention_mask"][0, 2:, :24, :16], small["pixel_attention_mask"][0])
    for name in ("pixel_values", "pixel_attention_mask"):
        whole = together[name][0, 2:].clone()
        whole[..., :24, :16] = 0
        assert not whole.any()
    padded = processor.pad([items[0], small])
    for ours, theirs in zip(model.internalize(**together), model.internalize(**padded), strict=True):
        assert all(torch.equal(ours.lora_A[name], theirs.lora_A[name]) for name in ours.lora_A)


def test_the_base_itself_reads_packed_frames(base, rows):
    """As its own `forward` merges them; so packed inputs are its own too."""
    model = make_model(base)
    processor = Video2LoraProcessor.from_config(model.config)
    items = [processor.encode_video(processor.load_video(rows[0]["video"], num_frames=n)) for n in (1, 4, 2)]
    with torch.no_grad():
        packed, padded = (model.vlm(**processor.pad(items, pack_frames=pack)).logits for pack in (True, False))
    assert torch.equal(packed, padded)


def test_other_bases_are_padded_as_ever(qwen_dir, rows):
    model = make_model(qwen_dir)
    packed, padded = both(model, list(load_rows(rows[:3])), num_frames_range=(1, 7), seed=1)
    assert packed["video_inputs"].keys() == padded["video_inputs"].keys()
    assert all(
        torch.equal(packed["video_inputs"][name], padded["video_inputs"][name]) for name in padded["video_inputs"]
    )


@pytest.mark.parametrize("kind", ["rows", "stream", "drawn"])
def test_a_run_trains_and_evaluates_as_with_padded_frames(kind, tiny_vlm_dir, rows, tmp_path, monkeypatch):
    """Through Trainer and accelerate: nothing on the way cuts or joins batches along their first dimension."""
    settings: dict[str, Any] = {"num_frames_range": [1, 7], "composition_probability": 0.5, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "max_queries_per_video": 2}
    found, videos = [], []
    internalize = Video2LoraModel.internalize

    def noting(self: Video2LoraModel, *args: Any, **inputs: Any) -> Any:
        videos.append((len(inputs["pixel_values"]), len(inputs["input_ids"])))
        return internalize(self, *args, **inputs)

    monkeypatch.setattr(Video2LoraModel, "internalize", noting)
    for packed in (True, False):
        if not packed:
            monkeypatch.setattr(Video2LoraProcessor, "pad", pad_frames)
        data: Any = rows if kind == "rows" else DrawnSquares()
        if kind == "stream":
            data = IterableDataset.from_generator(lambda: iter(rows))
        videos.clear()
        trainer = make_trainer(tiny_vlm_dir, tmp_path / str(packed), data, eval_rows=rows[:7], **settings)
        trainer.train()
        found.append((losses(trainer), trainer.evaluate()["eval_loss"], weights(trainer.model)))
        assert len(videos) == 3 + 3 and all(pixels == (1 if packed else prompts) for pixels, prompts in videos)
        assert max(prompts for _, prompts in videos) > 3
    (ours, evaluated, trained), (theirs, expected, as_trained) = found
    assert len(ours) == 3 and ours == theirs and evaluated == expected
    assert all(torch.equal(trained[name], as_trained[name]) for name in trained)
