"""Moving shapes as a dataset: rows that the collator takes, records for the evaluation, and real files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from video2lora.data import DatasetError, load_rows
from video2lora.data.moving_shapes import (
    COLOURS,
    TASKS,
    MovingShapes,
    SceneBatch,
    answerable,
    draw,
    frame_times,
    make_scene,
    sample_times,
    write_moving_shapes,
)
from video2lora.data.moving_shapes.files import _write_video
from video2lora.evaluation.samples import Question, Sample
from video2lora.modeling import Video2LoraProcessor
from video2lora.modeling.configuration import Video2LoraConfig
from video2lora.trainer import Video2LoraCollator
from video2lora.video import VideoReader

from .moving_shapes_watcher import answer, watch


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_moving_shapes(tmp_path_factory.mktemp("shapes") / "test", "test", 12, seed=5)


def test_rows_are_those_of_the_collator(tiny_vlm_dir):
    processor = Video2LoraProcessor.from_config(Video2LoraConfig(base_model_name_or_path=str(tiny_vlm_dir)))
    dataset = MovingShapes("train", 4, queries_per_video=3, num_frames=24)
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=Video2LoraCollator(processor))))
    assert batch["skipped"] == [] and batch["queries_per_video"] == [3] * 4
    assert batch["query_ids"] == [(row["id"], number) for row in dataset for number in range(3)]
    said = [processor.decode(labels[labels != -100]) for labels in batch["labels"]]
    wanted = [query["response"] for row in dataset for query in row["queries"]]
    assert [text.removesuffix("<end_of_utterance>").strip() for text in said] == wanted
    with VideoReader(dataset[2]["video"]) as reader:
        frames = reader.sample(num_frames=12)
    assert np.array_equal(frames.frames, draw([dataset.scene(2)], sample_times(12, 24))[0].numpy())
    assert frames.duration == 24


def test_rows_are_the_same_in_workers_and_in_any_order():
    dataset = MovingShapes("validation", 6, queries_per_video=2, seed=1)
    copy = pickle.loads(pickle.dumps(dataset))
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=lambda row: row))
    for i in (5, 0, 3):
        row, other = dataset[i], copy[i]
        assert np.array_equal(row.pop("video"), other.pop("video")) and row == other
        seen = loaded[i]
        seen.pop("video")
        assert seen == row
    assert dataset[-1]["id"] == dataset[5]["id"]
    with pytest.raises(IndexError):
        dataset[6]
    assert len(list(dataset)) == len(dataset) == 6
    batch = SceneBatch.from_scenes([make_scene(0)])
    assert torch.equal(draw(pickle.loads(pickle.dumps(batch))), draw(batch))


def test_a_dataset_says_which_choice_is_wrong():
    for arguments in ({"split": "dev"}, {"tasks": ["colours"]}, {"phrasings": "train"}, {"num_frames": 4}):
        with pytest.raises(ValueError, match="expected a sequence|at least 12"):
            MovingShapes(**arguments)


def test_records_are_samples_of_the_evaluation():
    dataset = MovingShapes("test", 5, phrasings=("held_out",))
    samples = []
    for record in dataset.records():
        questions = tuple(Question(**question) for question in record.pop("questions"))
        samples.append(Sample(**record, questions=questions))
    assert len({question.id for sample in samples for question in sample.questions}) > 5 * 8
    for sample, row in zip(samples, dataset, strict=True):
        assert sample.id == row["id"] and np.array_equal(sample.video, row["video"])
        assert [(q.prompt, q.references[0], q.task) for q in sample.questions] == [
            (q["prompt"], q["response"], q["task"]) for q in row["queries"]
        ]
    decided = list(dataset.records(num_frames=4))
    tasks = {question["task"] for record in decided for question in record["questions"]}
    assert {"colour", "shape", "count", "position", "existence"} <= tasks and "caption" not in tasks
    for index, record in enumerate(decided):
        scene = dataset.scene(index)
        kept = [query.prompt for query in dataset.queries(scene) if answerable(scene, query, 4)]
        assert [question["prompt"] for question in record["questions"]] == kept


def test_files_are_videos_whose_frames_show_what_the_rows_say(written):
    rows = list(load_rows(written))
    assert len(rows) == 12
    assert {query["task"] for index in range(12) for query in _queries(written, index)} == set(TASKS)
    for index, row in enumerate(rows):
        scene = make_scene(index, "test", seed=5)
        assert row["id"] == scene.id
        with VideoReader(row["video"]) as reader:
            assert reader.info.codec == "h264" and reader.duration == 12 and len(reader.times) == 96
            frames = reader.sample(num_frames=12).frames
        # Shapes from the drawing: in 64 pixels with colour at half the resolution this watcher cannot tell them.
        fine = draw([scene], sample_times(12, 96), size=256)[0].numpy()
        seen = watch(frames, fine)
        for line in row["queries"]:
            task = next(q["task"] for q in _queries(written, index) if q["prompt"] == line["prompt"])
            assert answer(seen, task, line["prompt"]) == line["response"]


def test_colours_survive_the_encoder_at_the_centre_of_every_object(written):
    for index, row in enumerate(load_rows(written)):
        scene = make_scene(index, "test", seed=5)
        with VideoReader(row["video"]) as reader:
            frames = reader.sample().frames
        x, y, _ = SceneBatch.from_scenes([scene]).paths(frame_times(96))
        for number, item in enumerate(scene.objects):
            for frame in range(96):
                if item.visible_in(frame // 8):
                    pixel = frames[frame, int(64 * y[number, frame]), int(64 * x[number, frame])].astype(int)
                    nearest = min(COLOURS, key=lambda name: np.abs(pixel - COLOURS[name]).sum())
                    assert nearest == item.colour, (scene.id, frame, pixel)


def test_a_stopped_run_goes_on_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    calls = []

    def stop_at_third(path, *arguments):
        calls.append(path.name)
        if len(calls) == 3:
            path.with_name(f".{path.name}.1.part").write_bytes(b"half")
            raise KeyboardInterrupt
        _write_video(path, *arguments)

    monkeypatch.setattr("video2lora.data.moving_shapes.files._write_video", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        write_moving_shapes(tmp_path / "a", "train", 4, fps=1)
    assert not (tmp_path / "a" / "rows.jsonl").exists()
    rows = write_moving_shapes(tmp_path / "a", "train", 4, fps=1)
    assert len(calls) == 3 + 2  # two were there
    whole = write_moving_shapes(tmp_path / "b", "train", 4, fps=1)
    assert rows.read_bytes() == whole.read_bytes()
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in "ab"]
    assert names[0] == names[1] and not [name for name in names[0] if name.endswith(".part")]
    for path in (tmp_path / "a" / "videos").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "videos" / path.name).read_bytes()


def test_a_directory_of_other_clips_is_not_mixed_with(tmp_path):
    write_moving_shapes(tmp_path / "a", "train", 1, fps=1)
    with pytest.raises(DatasetError, match="seed 0, not 1"):
        write_moving_shapes(tmp_path / "a", "train", 1, fps=1, seed=1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="empty directory"):
        write_moving_shapes(tmp_path / "b", "train", 1, fps=1)
    for arguments in ({"seconds": 10.0}, {"pixels": 63}, {"pixels": 32}, {"phrasings": ("x",)}):
        with pytest.raises(ValueError, match="expected"):
            write_moving_shapes(tmp_path / "c", "train", 1, **{"fps": 1} | arguments)


def _queries(path: Path, index: int) -> list[dict]:
    return json.loads(path.read_text().splitlines()[index])["queries"]
