"""Pixels rounded to the base's dtype by the collator train what pixels rounded by the model train."""

from __future__ import annotations

import pytest
import torch

from video2lora.data import load_rows
from video2lora.modeling import Video2LoraProcessor
from video2lora.testing import save_tiny_vlm
from video2lora.trainer import Video2LoraCollator

from .runs import make_model, make_trainer
from .test_packed_frames import step


@pytest.mark.parametrize("family", ["smolvlm", "idefics3", "qwen2_5_vl"])
def test_rounded_pixels_train_the_same(family, tmp_path, rows, broken):
    model = make_model(save_tiny_vlm(family, tmp_path / "base"))
    model.vlm.bfloat16()
    processor = Video2LoraProcessor.from_config(model.config)
    bad = [{"id": "bad", "video": broken, "conversations": [{"prompt": "p", "response": "r"}]}]
    for chosen in (rows[:3], bad):
        parsed = list(load_rows(chosen))
        settings = {"online_teacher": True, "num_frames_range": (2, 6)}
        rounded = Video2LoraCollator(processor, pixel_dtype=torch.bfloat16, **settings)(parsed)
        plain = Video2LoraCollator(processor, **settings)(parsed)
        for name in ("video_inputs", "teacher_inputs"):
            halved = {key for key in plain[name] if rounded[name][key].dtype != plain[name][key].dtype}
            assert halved == {next(key for key in plain[name] if key.startswith("pixel_values"))}
            assert all(rounded[name][key].dtype == torch.bfloat16 for key in halved)
            assert all(torch.equal(rounded[name][key], plain[name][key].to(rounded[name][key])) for key in plain[name])
        ours, theirs = step(model, rounded), step(model, plain)
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_the_trainer_knows_the_bases_dtype(tiny_vlm_dir, rows, tmp_path):
    model = make_model(tiny_vlm_dir)
    model.vlm.bfloat16()
    trainer = make_trainer(tiny_vlm_dir, tmp_path, rows, model=model, eval_rows=rows[:2])
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert next(iter(loader))["video_inputs"]["pixel_values"].dtype == torch.bfloat16
    trainer = make_trainer(tiny_vlm_dir, tmp_path, rows)
    assert next(iter(trainer.get_train_dataloader()))["video_inputs"]["pixel_values"].dtype == torch.float32
