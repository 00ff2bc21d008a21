"""The trained small VLM of the recipe: what it answers with a clip in its context, an H.264 file too."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from video2lora import Video2LoraProcessor
from video2lora.data import load_rows
from video2lora.data.moving_shapes import MovingShapes, write_moving_shapes

VLM = Path(__file__).parents[1] / "examples" / "moving_shapes" / "vlm"
CLIPS = 64  # of the split that stage 1 validates on


@pytest.fixture(scope="module")
def vlm():
    return AutoModelForImageTextToText.from_pretrained(VLM, dtype=torch.float32).eval()


def test_it_answers_new_clips(recipe_module, vlm):
    """Every token of the right answer is the likeliest: then greedy generation gives it."""
    train_vlm = recipe_module("train_vlm")
    tokenizer = AutoProcessor.from_pretrained(VLM).tokenizer
    trainer = train_vlm.VlmTrainer(vlm, steps=1, learning_rate=0.0)
    found = train_vlm.validate(trainer, tokenizer, CLIPS, torch.device("cpu"))
    vlm.requires_grad_(False).eval()
    told = found.pop("caption as text")
    assert told["accuracy"] > 0.8 and told["n"] == CLIPS
    assert len(found) == 11
    for task, row in found.items():
        assert row["accuracy"] >= 0.95, task


def test_it_answers_from_a_file_as_any_model_would(vlm, tmp_path):
    """From H.264, through the processor in its ordinary form, greedily."""
    processor = Video2LoraProcessor(AutoProcessor.from_pretrained(VLM), num_frames=12, longest_edge=64)
    right, asked = 0, 0
    for row in load_rows(write_moving_shapes(tmp_path, "combinations", 4, seed=7)):
        frames = processor.load_video(row["video"], num_frames=12)
        for query in row["queries"]:
            inputs = processor.encode_video(frames, query["prompt"], add_generation_prompt=True)
            output = vlm.generate(**inputs, max_new_tokens=96, do_sample=False)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right, asked = right + (answer.strip() == query["response"]), asked + 1
    assert asked >= 40 and right / asked > 0.9


def test_its_folder_is_as_transformers_writes_it():
    names = {path.name for path in VLM.iterdir()}
    assert names == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "validation.jsonl",
    }
    text = b"".join(path.read_bytes() for path in VLM.iterdir() if path.suffix in (".json", ".jsonl", ".jinja"))
    assert not re.search(rb'"/[a-z]+/', text)


def test_stage_2s_validation_is_greedy_generation(recipe_module, monkeypatch, tmp_path):
    """With a new hypernetwork, whose adapters change nothing: what the VLM guesses from the question alone."""
    train_hypernetwork, batches = recipe_module("train_hypernetwork"), recipe_module("batches")
    monkeypatch.setattr(sys, "argv", ["train_hypernetwork.py", str(VLM), "-o", str(tmp_path)])
    model, processor = train_hypernetwork.build(train_hypernetwork.parse())
    found = train_hypernetwork.validate(model, processor, batches.Form(6, 24, segments=3), 6)
    right: dict[str, list[bool]] = {}
    for row in MovingShapes("validation", 6):
        inputs = processor(text=[query["prompt"] for query in row["queries"]])
        output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for query, answer in zip(row["queries"], answers, strict=True):
            right.setdefault(query["task"], []).append(answer.strip() == query["response"])
    assert found == {task: round(sum(values) / len(values), 4) for task, values in sorted(right.items())}
    assert 0 < sum(found.values()) < len(found) == 11
