"""Moving shapes, stage 2's data: what the library's own collator and processor make, down to the last bit."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import MovingShapes, vocabulary_texts
from video2lora.trainer import Video2LoraTrainer
from video2lora.trainer.collator import Video2LoraCollator

RECIPE = Path(__file__).parents[1] / "examples" / "moving_shapes"
NAMES = ["small_vlm", "clips", "train_hypernetwork"]
LENGTHS = [12, 24, 48, 96]
DRAWN: dict[str, Any] = {
    "composition_probability": 0.5,
    "max_segments": 8,
    "num_frames_range": [6, 48],
    "pack_queries": True,
}


@pytest.fixture(scope="module")
def recipe(recipe_module):
    return {name: recipe_module(name) for name in NAMES}


@pytest.fixture(scope="module")
def processor(recipe):
    tokenizer = recipe["small_vlm"].build_tokenizer(vocabulary_texts())
    ordinary = recipe["small_vlm"].build_processor(tokenizer)
    return Video2LoraProcessor(ordinary, num_frames=12, longest_edge=64, prompt_timestamps="file")


@pytest.fixture(scope="module")
def rows(recipe):
    clips = recipe["train_hypernetwork"].VariedClips(10**6, LENGTHS, queries_per_video=4)
    return [clips[i] for i in range(48)]


@pytest.fixture(scope="module")
def vlm(recipe, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    recipe["small_vlm"].build_vlm(processor.tokenizer).save_pretrained(folder)
    processor.vlm_processor.save_pretrained(folder)
    return folder


def compare(mine: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype) -> None:
    mine, theirs = dict(mine), dict(theirs)
    frames = mine.pop("frames")
    videos, expected = dict(mine.pop("video_inputs")), dict(theirs.pop("video_inputs"))
    assert expected.pop("pixel_attention_mask").all()  # of ones alone, so it may be left out
    videos["pixel_values"] = frames.pixel_values(torch.device("cpu"), dtype)
    for given, wanted in ((mine, theirs), (videos, expected)):
        assert list(given) == list(wanted)
        for name, value in wanted.items():
            if isinstance(value, torch.Tensor):
                assert given[name].dtype == value.dtype and torch.equal(given[name], value), name
            else:
                assert given[name] == value, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batches_are_those_of_the_librarys_collator(recipe, processor, rows, dtype):
    for epoch, options in enumerate((DRAWN, DRAWN, DRAWN | {"pack_queries": False}, {"max_queries_per_video": 2})):
        mine = recipe["clips"].SceneCollator(processor, seed=3, **options)
        theirs = Video2LoraCollator(processor, seed=3, pixel_dtype=dtype, **options)
        mine.set_epoch(epoch)
        theirs.set_epoch(epoch)
        batch = mine(rows[epoch * 12 : epoch * 12 + 12])
        compare(batch, theirs(rows[epoch * 12 : epoch * 12 + 12]), dtype)
        if "composition_probability" in options:
            assert len(set(batch["segments_per_adapter"])) > 2


def test_every_way_to_cut_a_clip_has_the_ordinary_prompt(recipe, processor):
    """Prompts alone, of many more frames and times than a batch has."""
    clips = recipe["clips"]
    prompts, shapes = (
        clips.Prompts(processor),
        {length: MovingShapes("train", 1, num_frames=length) for length in LENGTHS},
    )
    for length, shape in shapes.items():
        pixels = shape[0]["video"][:, ::8, ::8]  # only their number counts
        for count in (1, 2, 3, 7, 8):
            for num_frames in (6, 11, 12, 31, 48):
                for part in {0, count // 2, count - 1}:
                    start, end = length * part / count, length * (part + 1) / count
                    frames = processor.load_video(pixels, num_frames=num_frames, start=start, end=end)
                    sampled = clips.sample(length, num_frames, start, end)
                    assert sampled.indices == frames.timestamps
                    if num_frames in (6, 31):
                        ids = prompts(sampled.indices, length)
                        assert torch.equal(ids, processor.encode_video(frames)["input_ids"])


def test_rows_that_are_drawn_later_are_the_benchmarks(recipe, processor, rows):
    for index in (0, 5, 11):
        wanted = MovingShapes("train", 10**6, num_frames=LENGTHS[index % 4], queries_per_video=4)[index]
        assert {**rows[index], "video": None} == {**wanted, "video": None}
        assert (rows[index]["video"].__array__() == wanted["video"]).all()


def test_a_workers_copy_makes_the_same_batch_and_is_told_the_epoch(recipe, processor, rows):
    collator = recipe["clips"].SceneCollator(processor, **DRAWN)
    first = collator(rows[:6])
    copied = pickle.loads(pickle.dumps(collator))(rows[:6])
    assert torch.equal(first["video_inputs"]["input_ids"], copied["video_inputs"]["input_ids"])
    loader = torch.utils.data.DataLoader(rows[:6], batch_size=6, collate_fn=collator, num_workers=1)
    collator.set_epoch(1)
    (sent,) = loader
    compare(sent, _ordinary(processor, rows[:6], epoch=1), torch.float32)
    assert sent["segments_per_adapter"] != first["segments_per_adapter"]


def _ordinary(processor: Video2LoraProcessor, rows: list[Any], epoch: int) -> dict[str, Any]:
    collator = Video2LoraCollator(processor, **DRAWN)
    collator.set_epoch(epoch)
    return collator(rows)


def test_prompts_refuse_times_that_count_from_a_segments_start(recipe, processor):
    relative = Video2LoraProcessor(processor.vlm_processor, longest_edge=64, prompt_timestamps="span")
    with pytest.raises(ValueError, match="prompt_timestamps='span'"):
        recipe["clips"].SceneCollator(relative)


def make_trainer(recipe: dict[str, Any], vlm: Path, kind: Any, output: Path, *arguments: str, **more: Any) -> Any:
    module = recipe["train_hypernetwork"]
    given, sys.argv = sys.argv, ["train_hypernetwork.py", str(vlm), "-o", str(output), *arguments]
    try:
        options = module.parse()
    finally:
        sys.argv = given
    model, processor = module.build(options)
    made = module.arguments(options)
    made.set_evaluate("no")
    return kind(model, made, processing_class=processor, **more)


def test_a_training_step_is_the_librarys(recipe, vlm, tmp_path, rows):
    """To the last bit, so that leaving the mask of the pixels out changes nothing either."""
    small = ("--batch-size", "2", "--workers", "0", "--steps", "2", "--composition", "0.5")
    weights: list[dict[str, Any]] = []
    losses = []
    for kind in (recipe["clips"].SceneTrainer, Video2LoraTrainer):
        trainer = make_trainer(recipe, vlm, kind, tmp_path / kind.__name__, *small, train_dataset=_Rows(rows[:4]))
        trainer.train()
        model: Video2LoraModel = trainer.model
        weights.append(model.hypernetwork.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def test_the_online_teacher_and_evaluation_have_the_ordinary_batches(recipe, vlm, tmp_path, rows):
    kind, small = recipe["clips"].SceneTrainer, ("--batch-size", "2", "--workers", "0", "--steps", "2")
    data = {"train_dataset": _Rows(rows[:2]), "eval_dataset": _Rows(rows[:2])}
    taught = make_trainer(recipe, vlm, kind, tmp_path, *small, "--kl", "1", **data)
    (batch,) = taught.get_train_dataloader()
    assert "teacher_inputs" in batch and "frames" not in batch and "pixel_values" in batch["video_inputs"]
    trainer = make_trainer(recipe, vlm, kind, tmp_path, *small, **data)
    (batch,) = trainer.get_train_dataloader()
    assert "frames" in batch and "pixel_values" not in batch["video_inputs"]
    (batch,) = trainer.get_eval_dataloader()
    assert "frames" not in batch and "pixel_values" in batch["video_inputs"]
