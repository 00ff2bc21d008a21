"""The moving-shapes recipe: every stage runs and goes on where it stopped; batches are what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

RECIPE = Path(__file__).parents[1] / "examples" / "moving_shapes"
NAMES = ["batches", "small_vlm", "train_vlm", "train_hypernetwork", "export"]


@pytest.fixture(scope="module")
def modules(recipe_module):
    return [recipe_module(name) for name in NAMES]


@pytest.fixture(scope="module")
def tokenizer(modules):
    from video2lora.data.moving_shapes import vocabulary_texts

    return modules[1].build_tokenizer(vocabulary_texts())


@pytest.fixture(scope="module")
def trainer(modules, tokenizer):
    small_vlm, train_vlm = modules[1:3]
    return train_vlm.VlmTrainer(small_vlm.build_vlm(tokenizer), steps=10, learning_rate=1e-3)


def test_a_turn_in_a_batch_is_the_turn_alone(modules, tokenizer, trainer):
    """Many questions behind one clip, each as if it were the only one, through the model's ordinary forward."""
    from video2lora.data.moving_shapes import draw, sample_times

    batches = modules[0]
    batch = batches.ShapesBatches(tokenizer, tokens=900, varied=False)[0]
    with torch.no_grad():
        logits, labels = trainer.label_logits(batch, torch.device("cpu"))
    form, model = batch["form"], trainer.model.eval()
    frames = draw(batch["scenes"], sample_times(form.num_frames, form.seconds))
    counts, checked = (labels != -100).sum(1).tolist(), 0
    for clip, rows in enumerate(logits.split(counts)):
        pixels = (frames[clip].permute(0, 3, 1, 2).float() / 127.5 - 1)[None]
        for segment in batch["segments"][clip].unique().tolist():
            if segment == 0:
                continue
            here = batch["segments"][clip] == segment
            prefix = batch["prefix"] if segment > 0 else batch["prefix"][:0]
            ids = torch.cat([prefix, batch["tokens"][clip][here]])[None]
            seen = {"pixel_values": pixels} if segment > 0 else {}
            with torch.no_grad():
                alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits[0]
            answer = batch["labels"][clip][here] != -100
            expected = alone[-len(answer) - 1 : -1][answer] if segment > 0 else alone[:-1][answer[1:]]
            mine = rows[(here & (batch["labels"][clip] != -100))[batch["labels"][clip] != -100]]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked >= 6


def test_prompts_are_what_the_ordinary_processor_renders(modules, tokenizer):
    from video2lora.modeling import Video2LoraProcessor

    batches, small_vlm = modules[:2]
    data = batches.ShapesBatches(tokenizer)
    question = "is it the red circle or the blue star that appears first?"
    for form in (batches.Form(), batches.Form(5, 36), batches.Form(4, 24, 128)):
        assert data.prefixes.render(form, question) == data.prefixes(form) + data._ids(question + batches.TURN)
    processor = Video2LoraProcessor(small_vlm.build_processor(tokenizer))
    ids, labels = processor.encode_turn("where is it?", "top left")
    prompt, answer = data._ids("<|im_start|>User: where is it?" + batches.TURN), data._answer("top left")
    assert ids == prompt + answer and labels == [-100] * len(prompt) + answer


def test_a_batch_follows_from_its_number(modules, tokenizer):
    batches = modules[0]
    first, again = (batches.ShapesBatches(tokenizer, tokens=2000)[7] for _ in range(2))
    assert torch.equal(first["tokens"], again["tokens"]) and first["form"] == again["form"]
    assert not torch.equal(first["tokens"], batches.ShapesBatches(tokenizer, tokens=2000, seed=1)[7]["tokens"])


def test_tiles_are_the_processors(modules, tokenizer):
    import numpy as np

    from video2lora.modeling import Video2LoraProcessor

    small_vlm, train_vlm = modules[1:3]
    picture = np.random.default_rng(0).integers(0, 256, (1, 128, 128, 3), dtype=np.uint8)
    processor = Video2LoraProcessor(small_vlm.build_processor(tokenizer, 128))
    theirs = processor.encode_video(processor.load_video(picture, longest_edge=128), image_splitting=True)
    ours = train_vlm.tiles(torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(ours[:4], theirs["pixel_values"][0, :4], rtol=0, atol=1e-6)  # the last is shrunk


def test_two_processes_take_the_step_of_both_batches(modules, tokenizer, tmp_path, monkeypatch):
    small_vlm, train_vlm = modules[1:3]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    command += [str(RECIPE / "train_vlm.py"), "-o", str(tmp_path), "--validation", "0", "--workers", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--steps", "2", "--tokens", "900"], check=True, env=environment, capture_output=True)
    data, device = modules[0].ShapesBatches(tokenizer, tokens=900), torch.device("cpu")
    alone = train_vlm.VlmTrainer(small_vlm.build_vlm(tokenizer), steps=2, learning_rate=5e-4, world=2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda _: alone.loss(data[alone.batches + 1], device).backward()
    )
    for _ in range(2):
        alone.train_step(data[alone.batches], device)
    together = load_file(tmp_path / "state.safetensors")
    assert together["step"] == 2 and together["batches"] == 4
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(together[f"model.{name}"], value, rtol=0, atol=2e-6)


def test_compiled_layers_take_the_same_step_in_every_form(modules, tokenizer):
    small_vlm, train_vlm = modules[1:3]
    data, device = modules[0].ShapesBatches(tokenizer, tokens=900), torch.device("cpu")
    eager, compiled = (
        train_vlm.VlmTrainer(small_vlm.build_vlm(tokenizer), 10, 1e-3, backend=backend) for backend in (None, "eager")
    )
    for trainer in (eager, compiled):  # a layer of each kind tells it all
        inner = trainer.model.model
        inner.text_model.layers, inner.vision_model.encoder.layers = (
            inner.text_model.layers[:1],
            inner.vision_model.encoder.layers[:1],
        )
    batches = [
        next(data[i] for i in range(0, 100, 2) if (data[i]["form"].num_frames == 12) is usual)
        for usual in (True, False)
    ]
    for batch in batches:
        torch.testing.assert_close(compiled.train_step(batch, device), eager.train_step(batch, device))
        torch.testing.assert_close(compiled.norm, eager.norm)


def test_every_stage_runs_and_goes_on(modules, tmp_path, monkeypatch):
    def stage(name: str, *arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        modules[NAMES.index(name)].main()

    vlm, hypernetwork = tmp_path / "vlm", tmp_path / "hypernetwork"
    monkeypatch.setattr(modules[NAMES.index("batches")], "VALIDATION_CLIPS", 8)
    second = modules[NAMES.index("train_hypernetwork")]
    forms = ("12 frames", "8 segments")
    monkeypatch.setattr(second, "VALIDATED", {name: second.VALIDATED[name] for name in forms})
    small = ("--steps", 2, "--tokens", 900, "--workers", 0)
    stage("train_vlm", "-o", vlm, "--minutes", 0, "--validation", 0, *small)  # stops after the first step
    assert load_file(vlm / "state.safetensors")["step"] == 1
    stage("train_vlm", "-o", vlm, "--validation", 1, *small)
    (validated,) = [json.loads(line) for line in (vlm / "validation.jsonl").read_text().splitlines()]
    assert validated["step"] == 2 and validated["exact_match"]["caption"]["n"] == 8
    small = ("--batch-size", 2, "--workers", 0, "--queries", 2, "--validation", 2)
    stage("train_hypernetwork", vlm, "-o", hypernetwork, "--steps", 2, "--minutes", 0, *small)
    assert (hypernetwork / "checkpoint-1").exists() and not (hypernetwork / "model.safetensors").exists()
    stage("train_hypernetwork", vlm, "-o", hypernetwork, "--steps", 2, *small)
    steps = [json.loads(line) for line in (hypernetwork / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [1, 2] and set(steps[1]["exact_match"]) == {*forms}
    assert set(steps[1]["exact_match"]["8 segments"]) >= {"caption", "existence", "motion"}
    further = ("--start-from", hypernetwork, "--steps", 1, "--learning-rate", 0, "--plain", 0, "--validation", 0)
    stage("train_hypernetwork", vlm, "-o", tmp_path / "further", *small, *further)
    assert not (tmp_path / "further" / "validation.jsonl").exists()
    assert "began with | the weights of `hypernetwork` |" in (tmp_path / "further" / "README.md").read_text()
    assert modules[NAMES.index("train_hypernetwork")].history(tmp_path / "further") == [
        {"steps": 2, "clips": 2},
        {"steps": 1, "clips": 2},
    ]
    before, after = (load_file(folder / "model.safetensors") for folder in (hypernetwork, tmp_path / "further"))
    assert len(before) == len(after) > 50 and all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(SystemExit, match="is finished"):
        stage("train_hypernetwork", vlm, "-o", hypernetwork, "--steps", 2, *small)
    stage("export", hypernetwork, "-o", tmp_path / "checkpoint")
    files = [file for file in (tmp_path / "checkpoint").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 30e6
    assert str(tmp_path) not in (tmp_path / "checkpoint" / "config.json").read_text()
