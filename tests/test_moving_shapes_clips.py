"""Moving shapes, stage 2's data: what the library's own collator and processor make, down to the last bit."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import MovingShapes, caption, vocabulary_texts
from video2lora.data.moving_shapes.dataset import SceneClip
from video2lora.trainer import Video2LoraTrainer
from video2lora.trainer.collator import Video2LoraCollator

RECIPE = Path(__file__).parents[1] / "examples" / "moving_shapes"
NAMES = ["small_vlm", "batches", "proof_runs", "clips", "train_hypernetwork"]
LENGTHS = [12, 24, 48, 96]


@pytest.fixture(scope="module")
def recipe(recipe_module):
    return {name: recipe_module(name) for name in NAMES}


@pytest.fixture(scope="module")
def processor(recipe):
    tokenizer = recipe["small_vlm"].build_tokenizer(vocabulary_texts())
    ordinary = recipe["small_vlm"].build_processor(tokenizer)
    return Video2LoraProcessor(ordinary, num_frames=12, longest_edge=64, prompt_timestamps="file")


def rows_of(recipe: Any, form: Any, number: int = 6) -> list[dict[str, Any]]:
    clips = recipe["clips"].SceneClips("train", 10**6, num_frames=form.seconds, queries_per_video=4)
    return [clips[i] | {"form": form} for i in range(number)]


@pytest.fixture(scope="module")
def vlm(recipe, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    recipe["small_vlm"].build_vlm(processor.tokenizer).save_pretrained(folder)
    processor.vlm_processor.save_pretrained(folder)
    return folder


class Cutting(Video2LoraCollator):
    """The library's collator, told into how many segments a row is cut; longer answers count for more."""

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = super().__call__(rows)
        lengths = [sum(label != -100 for label in labels) for _, labels in turns_of(dict(batch))]
        assert max(lengths) > 8
        return batch | {"query_weights": torch.tensor([max(1.0, number / 8) for number in lengths])}

    def _read(self, reader: Any, row: Any, draw: Any) -> Any:
        whole = reader.sample(num_frames=self.processor.num_frames)
        count = row["form"].segments
        return whole, [whole] if count == 1 else self._segments(reader, whole, count, self.processor.num_frames)


def ordinary(recipe: Any, processor: Any, form: Any, **options: Any) -> Video2LoraCollator:
    """The library's collator for a form."""
    return Cutting(recipe["proof_runs"].ShapesProcessor.of(processor, form.num_frames, form.longest_edge), **options)


def turns_of(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each query of a packed batch, in order, whatever rows they lie in."""
    found = []
    for ids, labels, turns in zip(batch.pop("input_ids"), batch.pop("labels"), batch["turns"], strict=True):
        numbers = range(1, int(turns.max()) + 1)
        found += [(ids[turns == number].tolist(), labels[turns == number].tolist()) for number in numbers]
    assert torch.equal(batch.pop("attention_mask"), (batch.pop("turns") > 0).long())
    return found


def compare(mine: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype) -> None:
    mine, theirs = dict(mine), dict(theirs)
    assert mine["turns"].shape[0] == mine["num_videos"] and mine["turns"].shape[1] % 32 == 0
    assert turns_of(mine) == turns_of(theirs)
    frames, edge = mine.pop("frames"), mine.pop("longest_edge")
    videos, expected = dict(mine.pop("video_inputs")), dict(theirs.pop("video_inputs"))
    assert expected.pop("pixel_attention_mask").all()  # of ones alone, so it may be left out
    videos["pixel_values"] = frames.pixel_values(torch.device("cpu"), dtype, edge)
    for given, wanted in ((mine, theirs), (videos, expected)):
        assert list(given) == list(wanted)
        for name, value in wanted.items():
            if not isinstance(value, torch.Tensor):
                assert given[name] == value, name
            elif name == "pixel_values" and edge not in (None, 64):  # resized in float32, not in whole levels
                assert given[name].shape == value.shape
                off = (given[name] - value).abs()
                assert off.mean() < 0.01 and off.max() < 0.3, (off.mean(), off.max())
            else:
                assert given[name].dtype == value.dtype and torch.equal(given[name], value), name


FORMS = [
    {},
    {"seconds": 48},
    {"seconds": 96, "num_frames": 4},
    {"seconds": 48, "num_frames": 31},
    {"seconds": 96, "segments": 8},
    {"seconds": 48, "num_frames": 6, "segments": 5},
    {"seconds": 48, "segments": 7},
    {"seconds": 24, "longest_edge": 32},
    {"longest_edge": 64},
    {"seconds": 48, "longest_edge": 128},
    {"num_frames": 2, "longest_edge": 256},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_batches_are_those_of_the_librarys_collator(recipe, processor, form):
    form = recipe["batches"].Form(**form)
    rows = rows_of(recipe, form)[: form.clips(6)]
    for dtype in (torch.bfloat16, torch.float32):
        theirs = ordinary(recipe, processor, form, pixel_dtype=dtype, pack_queries=True)
        arrays = [
            row | {"video": SceneClip(row["video"].scene, form.seconds, form.longest_edge or 64)} for row in rows
        ]
        batch = recipe["clips"].SceneCollator(processor)(rows_of(recipe, form))
        compare(batch, theirs(arrays), dtype)
        assert batch["segments_per_adapter"] == [form.segments] * len(rows)
        assert len({tuple(row.shape) for row in batch["video_inputs"]["attention_mask"]}) == 1


def test_a_batch_of_much_work_has_fewer_clips(recipe, processor):
    Form = recipe["batches"].Form
    assert Form().clips(512) == Form(36, 36).clips(512) == 512
    assert Form(96, 96).clips(512) == Form(12, 96, segments=8).clips(512) == 192
    assert Form(12, 48, segments=8).pictures == 48  # a segment has no more frames
    assert Form(longest_edge=256).pictures == 12 * 17 and Form(longest_edge=32).pictures == 12
    batch = recipe["clips"].SceneCollator(processor)(rows_of(recipe, Form(96, 96), 6))
    assert batch["num_videos"] == len(batch["segments_per_adapter"]) == 2 == len(batch["kept"])


def test_forms_come_in_blocks_and_follow_from_the_number(recipe, processor):
    make = recipe["clips"].FormedClips
    clips = make(4, plain=5, composition=0.3, seed=1, queries_per_video=2)
    forms = [clips[i]["form"] for i in range(400)]
    assert all(len({*forms[i : i + 4]}) == 1 for i in range(0, 400, 4))
    assert {*forms[:20]} == {recipe["batches"].Form()} and len({*forms[20:]}) > 20
    assert forms[200:] == [make(4, 5, 0.3, 1, queries_per_video=2)[i]["form"] for i in range(200, 400)]
    assert all(len(clips[i]["video"]) == clips[i]["form"].seconds for i in range(0, 400, 4))
    assert forms[200:] != [make(4, 5, 0.3, 2, queries_per_video=2)[i]["form"] for i in range(200, 400)]
    asked = recipe["train_hypernetwork"].ASKED
    twice = [query["task"] for query in make(1, tasks=asked)[0]["queries"]]
    assert set(twice) == {*asked} and twice.count("how_often") == 2
    easy = recipe["train_hypernetwork"].IN_TURN
    turns = make(2, tasks=asked, in_turn=easy)
    for index in range(12):
        tasks = {query["task"] for query in turns[index]["queries"]}
        assert tasks & {*easy} == {easy[index // 2 % 4]} and {"caption", "how_often"} <= tasks
    with pytest.raises(ValueError, match="without tasks"):
        make(2, in_turn=easy)
    several = [make(1, seed=2, composition=0.3)[i]["form"] for i in range(1000)]
    assert 0.25 < sum(form.segments > 1 for form in several) / 1000 < 0.35
    assert {form.segments for form in several} == {*range(1, 9)}
    assert all(form.num_frames <= form.seconds for form in several)
    assert all(form.seconds >= 48 for form in several if form.segments > 1)
    mixed = [make(1, seed=2, composition=1.0)[i] for i in range(2)]
    with pytest.raises(ValueError, match="2 forms"):
        recipe["clips"].SceneCollator(processor)(mixed)


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
                    form = recipe["batches"].Form(num_frames, length, segments=count)
                    sampled = clips.sample(form, start, end)
                    assert sampled == frames.timestamps
                    if num_frames in (6, 31):
                        ids = prompts(sampled, length)
                        assert torch.equal(ids, processor.encode_video(frames)["input_ids"])


def test_rows_that_are_drawn_later_are_the_benchmarks(recipe):
    clips, fuller = recipe["clips"].FormedClips(1, plain=6, seed=3, queries_per_video=4), []
    for index in (0, 5, *range(6, 30)):
        row = clips[index]
        length = row.pop("form").seconds
        shapes = MovingShapes("train", 10**6, num_frames=length, seed=3, queries_per_video=4)
        if index >= 6:  # of two scenes the one of which more is to be said
            number = max(2 * index, 2 * index + 1, key=lambda i: len(caption(shapes.scene(i))))
            fuller.append(number % 2)
        wanted = shapes[index if index < 6 else number]
        assert {**row, "video": None} == {**wanted, "video": None}
        assert (row["video"].__array__() == wanted["video"]).all()
    assert 0 < sum(fuller) < len(fuller)


def test_a_workers_copy_makes_the_same_batch(recipe, processor):
    form = recipe["batches"].Form(12, 48, segments=3)
    rows, collator = rows_of(recipe, form), recipe["clips"].SceneCollator(processor)
    copied = pickle.loads(pickle.dumps(collator))(rows)
    assert torch.equal(collator(rows)["video_inputs"]["input_ids"], copied["video_inputs"]["input_ids"])
    (sent,) = torch.utils.data.DataLoader(rows, batch_size=6, collate_fn=collator, num_workers=1)
    compare(sent, ordinary(recipe, processor, form, pack_queries=True)(rows), torch.float32)


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
    made.optim = "sgd"  # Adam's first steps have the size of the rate, whatever the gradient
    return kind(model, made, processing_class=processor, **more)


def test_a_training_step_is_the_librarys(recipe, vlm, tmp_path):
    """So leaving the mask of the pixels out changes nothing either; sums are made of other rows."""
    small = ("--batch-size", "2", "--workers", "0", "--steps", "2", "--learning-rate", "1")
    rows = rows_of(recipe, recipe["batches"].Form(12, 24, segments=3), 4)
    weights: list[dict[str, Any]] = []
    losses = []
    for kind in (recipe["clips"].SceneTrainer, Video2LoraTrainer):
        trainer = make_trainer(recipe, vlm, kind, tmp_path / kind.__name__, *small, train_dataset=_Rows(rows))
        if kind is Video2LoraTrainer:
            trainer.train_collator = trainer.data_collator = Cutting(trainer.processor, pack_queries=True)
        trainer.train()
        model: Video2LoraModel = trainer.model
        weights.append(model.hypernetwork.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 2
    fresh = make_trainer(recipe, vlm, Video2LoraTrainer, tmp_path, *small).model.hypernetwork.state_dict()
    assert (weights[0]["bias_B.down_proj"] - fresh["bias_B.down_proj"]).abs().max() > 1e-3
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6, msg=name)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def test_pictures_are_drawn_for_a_step(recipe, vlm, tmp_path):
    rows = rows_of(recipe, recipe["batches"].Form(2, longest_edge=128), 2)
    small = ("--batch-size", "2", "--workers", "0", "--steps", "1")
    trainer = make_trainer(recipe, vlm, recipe["clips"].SceneTrainer, tmp_path, *small, train_dataset=_Rows(rows))
    (batch,) = trainer.get_train_dataloader()
    assert trainer._prepare_inputs(batch)["video_inputs"]["pixel_values"].shape == (1, 2 * 2 * 5, 3, 64, 64)
    trainer.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_compute_the_same(recipe, processor, dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    plain, fused = (recipe["small_vlm"].build_vlm(processor.tokenizer).to(dtype).eval() for _ in range(2))
    fused.load_state_dict(plain.state_dict())
    held = {name: id(parameter) for name, parameter in fused.named_parameters()}
    recipe["small_vlm"].fuse_norms(fused)
    assert {name: id(parameter) for name, parameter in fused.named_parameters()} == held
    kinds = [type(module) for module in fused.modules()]
    assert LlamaRMSNorm not in kinds and kinds.count(recipe["small_vlm"].FusedNorm) == 13
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.get_decoder().norm(torch.ones(1, 256, dtype=dtype)).dtype == dtype
    ids, found = torch.randint(0, 600, (2, 40)), []
    for model in (plain, fused):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits.float()
        (gradient,) = torch.autograd.grad(logits.logsumexp(-1).sum(), embedded)
        found.append((logits.detach(), gradient.float()))
    for one, other in zip(*found, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert (one - other).abs().max() <= tolerance * one.abs().max()


def test_compiled_layers_give_the_same_gradients_for_every_shape(recipe, vlm, monkeypatch, tmp_path):
    module = recipe["train_hypernetwork"]
    monkeypatch.setattr(sys, "argv", ["train_hypernetwork.py", str(vlm), "-o", str(tmp_path)])
    model, processor = module.build(module.parse())
    for parameter in model.hypernetwork.parameters():  # an adapter that changes something
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    Form, batches = recipe["batches"].Form, []
    for form, number in ((Form(2), 3), (Form(3), 4), (Form(1, 24, segments=3), 2)):
        rows = [recipe["clips"].SceneClips("train", 99, num_frames=form.seconds)[i] for i in range(number)]
        batch = recipe["clips"].SceneCollator(processor).batch_of([row | {"form": form} for row in rows])
        pixels = batch["frames"].pixel_values(torch.device("cpu"), torch.float32)
        batches.append(batch | {"video_inputs": batch["video_inputs"] | {"pixel_values": pixels}})
    names = ("input_ids", "attention_mask", "labels", "turns", "queries_per_video", "segments_per_adapter")

    def gradients(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**{name: batch[name] for name in names}, video_inputs=batch["video_inputs"]).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.hypernetwork.named_parameters()}

    eager, graphs, made = [gradients(batch) for batch in batches], [], []
    # what compile_layers sets is put back
    with torch._dynamo.config.patch(recompile_limit=8), torch.fx.experimental._config.patch(use_duck_shape=True):
        recipe["small_vlm"].compile_layers(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        for batch, wanted in zip(batches, eager, strict=True):
            found = gradients(batch)
            made.append(len(graphs))
            for name, gradient in wanted.items():
                assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    assert 0 < made[0] <= 6 and made[1:] == made[:1] * 2  # one for each kind of layer and way, none for a size


def test_what_is_said_on_the_command_line_is_done(recipe, vlm, tmp_path, monkeypatch):
    module, given = recipe["train_hypernetwork"], []

    class Stop(Exception):
        pass

    def train(self, **_):
        given.append(self)
        raise Stop

    monkeypatch.setattr(module.SceneTrainer, "train", train)
    asked = ["--plain", "7", "--composition", "0.75", "--batch-size", "3", "--queries", "2", "--seed", "5"]
    for more in ([], ["--kl", "1"]):
        monkeypatch.setattr(sys, "argv", ["train_hypernetwork.py", str(vlm), "-o", str(tmp_path), *asked, *more])
        with pytest.raises(Stop):
            module.main()
    clips = given[0].train_dataset
    assert (clips.block, clips.plain, clips.composition, clips.seed) == (3, 7, 0.75, 5)
    assert (clips.tasks, clips.in_turn, clips.options) == (module.ASKED, module.IN_TURN, {"queries_per_video": 2})
    assert {*module.ASKED, *module.IN_TURN} == {*module.TRAINED_TASKS}
    assert given[0].args.composition_probability == 0 and given[1].args.composition_probability == 0.75


def test_validation_leaves_the_model_in_training_and_counts_every_clip(recipe, vlm, monkeypatch, tmp_path):
    module = recipe["train_hypernetwork"]
    monkeypatch.setattr(sys, "argv", ["train_hypernetwork.py", str(vlm), "-o", str(tmp_path)])
    model, processor = module.build(module.parse())
    modes, sizes = [], []
    forward = model.forward

    def watched(*args, **kwargs):
        modes.append(model.training)
        sizes.append(len(kwargs["queries_per_video"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(recipe["batches"].Form, "clips", lambda self, most: 2)
    model.train()
    found = module.validate(model, processor, recipe["batches"].Form(2), 5)
    assert sizes == [2, 2, 1] and not any(modes) and model.hypernetwork.training
    assert found["caption"] in (0, 0.2, 0.4, 0.6, 0.8, 1.0)


def test_the_online_teacher_and_evaluation_have_the_ordinary_batches(recipe, vlm, tmp_path):
    rows = rows_of(recipe, recipe["batches"].Form(), 2)
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
