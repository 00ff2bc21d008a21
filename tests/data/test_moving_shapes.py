"""Moving shapes: scenes follow from a seed, splits do not meet, nothing overlaps, pixels are what the formulas say."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from video2lora.data.moving_shapes import (
    COLOURS,
    HELD_OUT_PAIRS,
    MOTIONS,
    NUM_SLOTS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneBatch,
    contact_sheet,
    draw,
    frame_times,
    make_scene,
    sample_times,
)
from video2lora.data.moving_shapes.scenes import (
    BACKGROUNDS,
    MAX_EVENTS,
    MAX_EXTENT,
    MAX_FLASHING,
    MIN_LIFE,
    REACH,
    slots_at,
    split_of,
)
from video2lora.video import load_video


def test_a_scene_depends_on_its_arguments_alone():
    scenes = {(split, i): make_scene(i, split, seed=2) for split in SPLITS for i in range(30)}
    keys = list(scenes)
    random.Random(0).shuffle(keys)
    random.seed(1)
    for split, i in keys:
        assert make_scene(i, split, seed=2) == scenes[split, i]
        assert make_scene(i, split, seed=3) != scenes[split, i]
    assert len({scene.id for scene in scenes.values()}) == len(scenes)


def test_scenes_keep_the_rules_of_the_card():
    counts, motions, sizes = set(), set(), set()
    for i in range(3000):
        scene = make_scene(i, SPLITS[i % 4])
        objects = scene.objects
        counts.add(len(objects))
        assert len({o.name for o in objects}) == len({o.quadrant for o in objects}) == len(objects)
        assert list(objects) == sorted(objects, key=lambda o: (o.appears, o.quadrant))
        assert len(scene.events) <= MAX_EVENTS and sum(bool(o.flashes) for o in objects) <= MAX_FLASHING
        assert len({event.slot for event in scene.events}) == len(scene.events)
        assert all(0 < event.slot < NUM_SLOTS and event.time == event.slot / 12 for event in scene.events)
        for o in objects:
            motions.add(o.motion)
            sizes.add(o.size)
            assert (o.size is None) == (o.motion in ("growing", "shrinking"))
            assert o.disappears - o.appears >= MIN_LIFE
            assert not o.flashes or o.appears == 0 or o.disappears == NUM_SLOTS
            assert all(o.appears < slot < o.disappears - 1 for slot in o.flashes)
            assert all(b - a > 1 for a, b in zip(o.flashes, o.flashes[1:], strict=False))
            # the way can be told: see the watcher of test_moving_shapes_language.py
            assert sum(map(o.visible_in, range(NUM_SLOTS))) >= 3
    assert counts == {1, 2, 3, 4} and motions == set(MOTIONS) and sizes == {*SIZES, None}
    assert all(len(make_scene(i, max_objects=2).objects) <= 2 for i in range(200))


def test_no_description_is_in_two_splits_and_held_out_pairs_are_in_one():
    signatures = {split: {make_scene(i, split, seed=9).signature for i in range(800)} for split in SPLITS}
    for split in SPLITS:
        assert all(not signatures[split] & signatures[other] for other in SPLITS if other != split)
        assert split == "combinations" or {split_of(signature) for signature in signatures[split]} == {split}
    for i in range(800):
        for split in SPLITS:
            pairs = {(o.colour, o.shape) for o in make_scene(i, split, seed=9).objects}
            assert bool(pairs & HELD_OUT_PAIRS) == (split == "combinations")
    assert {colour for colour, _ in HELD_OUT_PAIRS} < set(COLOURS)
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES)


def test_wrong_arguments_are_refused():
    for arguments in ((0, "dev"), (-1, "train")):
        with pytest.raises(ValueError, match="expected"):
            make_scene(*arguments)
    with pytest.raises(ValueError, match="objects"):
        make_scene(0, max_objects=5)
    with pytest.raises(ValueError, match="size=16"):
        draw([make_scene(0)], size=16)
    for times in ([1.0], [], [-0.1], [[0.5]]):
        with pytest.raises(ValueError, match="times"):
            draw([make_scene(0)], times)


def test_objects_never_leave_their_quadrant_at_any_time():
    scenes = [make_scene(i, SPLITS[i % 4], seed=4) for i in range(800)]
    batch = SceneBatch.from_scenes(scenes)
    times = np.linspace(0, 1, 121)[:-1]
    x, y, radius = batch.paths(times)
    alive = (NUM_SLOTS * times >= batch.motion[:, :1]) & (NUM_SLOTS * times < batch.motion[:, 1:2])
    centre_x, centre_y = 0.25 + 0.5 * (batch.quadrant % 2), 0.25 + 0.5 * (batch.quadrant // 2)
    for centre, at in ((centre_x, x), (centre_y, y)):
        assert (np.abs(at - centre[:, None]) + MAX_EXTENT * radius)[alive].max() <= REACH + 1e-12
    assert REACH + 0.5 / 32 < 0.25  # the soft edge too, at the smallest size


@pytest.mark.parametrize("size", [32, 33, 64])
def test_pixels_of_an_object_are_those_it_has_alone(size):
    for i in range(40):
        scene = make_scene(i, seed=6)
        together = draw([scene], size=size)[0].int()
        ground = draw([_with(scene, ())], size=size)[0].int()
        alone = [draw([_with(scene, (item,))], size=size)[0].int() for item in scene.objects]
        changed = torch.stack([(picture != ground).any(dim=-1) for picture in alone])
        assert changed.sum(dim=0).max() <= 1  # no pixel belongs to two objects
        assert torch.equal(together, ground + sum(picture - ground for picture in alone))


@pytest.mark.parametrize("size", [40, 45])
def test_drawing_agrees_with_a_slow_reference(size):
    times = frame_times(5)
    kinds = set()
    for i in range(14):
        scene = make_scene(i, SPLITS[i % 4], seed=8)
        kinds |= {o.shape for o in scene.objects}
        ours = draw([scene], times, size=size)[0].numpy().astype(int)
        assert np.abs(ours - _reference(scene, times, size)).max() <= 1
    assert kinds == set(SHAPES)


def test_pixels_do_not_depend_on_the_batch_or_on_the_other_times(monkeypatch):
    scenes = [make_scene(i) for i in range(12)]
    times = frame_times(24)
    whole = draw(scenes, times)
    assert whole.shape == (12, 24, 64, 64, 3) and whole.dtype == torch.uint8
    for i in (0, 5, 11):
        assert torch.equal(draw(scenes[i : i + 1], times[7:9])[0], whole[i, 7:9])
    for pixels in (1, 5 * 64 * 64, 50 * 64 * 64):  # chunks of one frame, of some frames, of some scenes
        monkeypatch.setattr("video2lora.data.moving_shapes.drawing._CHUNK", {"cpu": pixels})
        assert torch.equal(draw(scenes, times), whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_pixels():
    scenes = [make_scene(i) for i in range(64)]
    for size in (33, 64, 256):
        ours, theirs = draw(scenes, size=size), draw(scenes, size=size, device="cuda").cpu()
        assert (ours.int() - theirs.int()).abs().max() <= 1


def test_a_larger_picture_is_the_same_picture():
    scenes = [make_scene(i) for i in range(10)]
    small = draw(scenes, size=64).float()
    for factor in (2, 8):
        large = draw(scenes, [0.3], size=64 * factor).float()
        shrunk = large.reshape(10, 1, 64, factor, 64, factor, 3).mean(dim=(3, 5))
        difference = (shrunk - draw(scenes, [0.3]).float()).abs()
        assert difference.mean() < 0.2 and difference.max() < 90  # edges are sharper by then
    assert small.max() > 200


def test_areas_are_those_of_circles_of_the_radius_whatever_the_shape():
    seen = set()
    for i in range(60):
        scene = make_scene(i, max_objects=1)
        item = scene.objects[0]
        middle = (item.appears + 0.5) / NUM_SLOTS
        ground = draw([_with(scene, ())], [middle], size=512).float()
        step = (torch.tensor(COLOURS[item.colour]) - ground).abs().sum(dim=-1)
        cover = (draw([scene], [middle], size=512).float() - ground).abs().sum(dim=-1) / step
        _, _, radius = SceneBatch.from_scenes([scene]).paths(np.array([middle]))
        assert cover.sum().item() == pytest.approx(math.pi * (512 * radius[0, 0]) ** 2, rel=0.02)
        seen.add(item.shape)
    assert seen == set(SHAPES)


def test_sampling_is_that_of_the_video_room_and_twelve_frames_see_every_slot():
    for clip in (12, 24, 60, 96, 360, 1020):
        video = np.zeros((clip, 8, 8, 3), dtype=np.uint8)
        for num_frames in (1, 2, 4, 12, 16):
            taken = load_video(video, num_frames=num_frames).timestamps
            assert np.allclose(sample_times(num_frames, clip), (np.array(taken) + 0.5) / clip)
        assert slots_at(sample_times(12, clip)).tolist() == list(range(12))
    for clip in range(12, 1025):
        assert set(slots_at(frame_times(clip)).tolist()) == set(range(12))
    with pytest.raises(ValueError, match="at least one"):
        frame_times(0)


def test_a_contact_sheet_has_a_row_a_scene():
    sheet = contact_sheet([make_scene(0), make_scene(1)], frame_times(3), size=32)
    assert sheet.shape == (2 * 34 + 2, 3 * 34 + 2, 3) and sheet.dtype == np.uint8
    assert np.array_equal(sheet[36:68, 2:34], draw([make_scene(1)], frame_times(3), size=32)[0, 0].numpy())


def _with(scene: Scene, objects: tuple) -> Scene:
    return Scene(scene.id, scene.split, scene.seed, scene.index, objects, scene.background, scene.gradient)


def _reference(scene: Scene, times: np.ndarray, size: int) -> np.ndarray:
    """One pixel after the other, shapes from their corners, blended in float64."""
    frames = np.zeros((len(times), size, size, 3))
    for t, time in enumerate(times):
        for row in range(size):
            for column in range(size):
                u, v = (column + 0.5) / size - 0.5, (row + 0.5) / size - 0.5
                pixel = np.array(BACKGROUNDS[scene.background]) + scene.gradient[0] * u + scene.gradient[1] * v
                for item in scene.objects:
                    if not item.visible_in(int(12 * time)):
                        continue
                    life = (12 * time - item.appears) / (item.disappears - item.appears)
                    turn = 2 * math.pi * (item.phase + item.spin * life)
                    x = item.x + item.dx * (life - 0.5) + item.orbit * math.cos(turn)
                    y = item.y + item.dy * (life - 0.5) + item.orbit * math.sin(turn)
                    radius = item.radius_start * (1 - life) + item.radius_end * life
                    away = _distance(item.shape, column + 0.5 - size * x, row + 0.5 - size * y, size * radius)
                    cover = min(max(0.5 - away, 0), 1)
                    pixel = (1 - cover) * pixel + cover * np.array(COLOURS[item.colour])
                frames[t, row, column] = pixel
    return np.rint(frames).astype(int)


def _distance(shape: str, x: float, y: float, radius: float) -> float:
    if shape == "circle":
        return math.hypot(x, y) - radius
    area = math.pi * radius**2
    if shape == "square":
        return max(abs(x), abs(y)) - math.sqrt(area) / 2
    if shape == "cross":  # area = 4 (2 l w - w w) with w = 0.3 l
        long = math.sqrt(area / 2.04)
        return min(max(abs(x) - long, abs(y) - 0.3 * long), max(abs(x) - 0.3 * long, abs(y) - long))
    if shape == "triangle":
        side = math.sqrt(4 * area / math.sqrt(3))
        height = side * math.sqrt(3) / 2
        corners = [(0.0, -2 * height / 3), (side / 2, height / 3), (-side / 2, height / 3)]
        return max(_beyond(corners[i], corners[(i + 1) % 3], x, y) for i in range(3))
    # a star of tips R and inner corners 0.42 R: ten triangles of R * 0.42 R * sin(36 degrees) / 2
    tip = math.sqrt(area / (5 * 0.42 * math.sin(math.pi / 5)))
    angle = math.atan2(x, -y) % (2 * math.pi / 5)
    angle = min(angle, 2 * math.pi / 5 - angle)
    away = math.hypot(x, y)
    corner = (0.42 * tip * math.sin(math.pi / 5), -0.42 * tip * math.cos(math.pi / 5))
    return _beyond((0.0, -tip), corner, away * math.sin(angle), -away * math.cos(angle))


def _beyond(start: tuple[float, float], end: tuple[float, float], x: float, y: float) -> float:
    """How far a point is from a line, to the left of its direction (y points down)."""
    along = end[0] - start[0], end[1] - start[1]
    return (along[1] * (x - start[0]) - along[0] * (y - start[1])) / math.hypot(*along)
