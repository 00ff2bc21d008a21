"""Batches: what the template renders, what is drawn, and that neither depends on who makes them."""

from __future__ import annotations

import gc
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Value, Video
from torch.utils.data import DataLoader

from video2lora.data import DatasetError, load_rows
from video2lora.modeling import Video2LoraProcessor
from video2lora.modeling.configuration import Video2LoraConfig
from video2lora.trainer import Video2LoraCollator
from video2lora.video.decoder import VideoDecoder

from ..processes import fork_server
from .runs import losses, make_model, make_trainer


@pytest.fixture(scope="module")
def processor(tiny_vlm_dir: Path) -> Video2LoraProcessor:
    return Video2LoraProcessor.from_config(Video2LoraConfig(base_model_name_or_path=str(tiny_vlm_dir), num_frames=2))


def assert_equal(ours: Any, theirs: Any) -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs)
        for name in ours:
            assert_equal(ours[name], theirs[name])
    else:
        assert ours == theirs


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_labels_are_the_answer_as_the_template_renders_it_with_the_end_of_the_turn(
    family, tiny_vlm_dir, qwen_dir, rows
):
    base = tiny_vlm_dir if family == "smolvlm" else qwen_dir
    processor = Video2LoraProcessor.from_config(Video2LoraConfig(base_model_name_or_path=str(base), num_frames=2))
    batch = Video2LoraCollator(processor)(list(load_rows(rows[:3])))
    end = processor.tokenizer.eos_token_id
    turns = [turn for row in rows[:3] for turn in row["conversations"]]
    assert len(batch["labels"]) == len(turns) == 6
    for turn, ids, mask, labels in zip(
        turns, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        messages = [
            {"role": "user", "content": [{"type": "text", "text": turn["prompt"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": turn["response"]}]},
        ]
        whole = processor.vlm_processor.apply_chat_template(messages, tokenize=False)
        assert whole.startswith(processor.decode(ids[mask.bool()]))
        assert whole.removeprefix(processor.decode(ids[mask.bool()])).strip() == ""  # a line break, at most
        labelled = labels[labels != -100]
        assert labelled[-1] == end and (labelled[:-1] != end).all()
        said = processor.decode(labelled)
        assert said.removesuffix(processor.tokenizer.eos_token).strip() == turn["response"]
        assert torch.equal(ids[labels != -100], labelled)
        assert (labels[mask == 0] == -100).all() and (ids[mask == 0] == processor.pad_token_id).all()


def test_rows_of_every_form_make_the_same_batch(processor, clips, tmp_path):
    chat = {"id": "a", "video": clips[0], "messages": [
        {"role": "user", "content": "what?"}, {"role": "assistant", "content": "yes"},
    ]}  # fmt: skip
    inside = {"path": None, "bytes": Path(clips[0]).read_bytes()}
    forms = [
        {"id": "a", "video": clips[0], "prompt": "what?", "response": "yes"},
        {"id": "a", "video": clips[0], "conversations": [{"prompt": "what?", "response": "yes"}]},
        {"id": "a", "video_path": clips[0], "prompt": "what?", "target_text": "yes"},
        {"id": "a", "video": inside, "prompt": "what?", "response": "yes"},
        chat,
    ]
    collate = Video2LoraCollator(processor)
    batches = [collate(list(load_rows([form]))) for form in forms]
    stored = Dataset.from_list(
        [{"id": "a", "video": inside, "prompt": "what?", "response": "yes"}],
        features=Features({n: Value("string") for n in ("id", "prompt", "response")} | {"video": Video(decode=False)}),
    )
    batches.append(collate(list(load_rows(stored))))
    for batch in batches[1:]:
        assert_equal(batch, batches[0])


def test_a_broken_video_is_left_out_and_said(processor, rows, broken):
    bad = {"id": "bad", "video": broken, "prompt": "p", "response": "r"}
    late = {"id": "late", "video": rows[0]["video"], "start": 100.0, "end": 101.0, "prompt": "p", "response": "r"}
    parsed = list(load_rows([rows[1], bad, rows[2], late]))
    collate = Video2LoraCollator(processor)
    batch = collate(parsed)
    assert (batch["num_videos"], batch["kept"]) == (4, [0, 2])
    assert [message.split(":")[0] for message in batch["skipped"]] == ["bad", "late"]
    assert batch["query_weights"].tolist() == [1.0] * 5 and batch["queries_per_video"] == [2, 3]
    alone = collate([parsed[0], parsed[2]])
    rest = {"num_videos", "kept", "skipped"}
    assert_equal({k: v for k, v in batch.items() if k not in rest}, {k: v for k, v in alone.items() if k not in rest})
    dummy = collate([parsed[1], parsed[3]])
    assert (dummy["num_videos"], dummy["kept"], len(dummy["skipped"])) == (2, [0], 2)
    assert dummy["query_weights"].tolist() == [0.0] and (dummy["labels"] != -100).any()


def test_a_missing_response_is_an_error_that_names_the_row(processor, clips):
    (row,) = load_rows([{"id": "open", "video": clips[0], "prompt": "p"}])
    with pytest.raises(ValueError, match="'open' has no response.*teach"):
        Video2LoraCollator(processor)([row])


def test_draws_depend_on_seed_epoch_and_row_alone(processor, rows):
    parsed = list(load_rows(rows))

    def draw(batches: list[list[int]], seed: int = 3, epoch: int = 0) -> dict[str, Any]:
        collate = Video2LoraCollator(
            processor, seed, composition_probability=0.5, max_segments=4, max_queries_per_video=1
        )
        collate.set_epoch(epoch)
        drawn = {}
        for batch in batches:
            made = collate([parsed[i] for i in batch])
            ids = zip(made["query_ids"], made["segments_per_adapter"], strict=True)  # one query each
            drawn |= {row_id: (number, segments) for (row_id, number), segments in ids}
        return drawn

    together = draw([list(range(8))])
    assert together == draw([[i] for i in reversed(range(8))]) == draw([[5, 2], [7], [0, 1, 3, 4, 6]])
    epochs = [draw([list(range(8))], epoch=epoch) for epoch in range(4)]
    assert all(a != b for a, b in zip(epochs, epochs[1:], strict=False))
    assert draw([list(range(8))], seed=4) != together
    segments = {count for epoch in epochs for _, count in epoch.values()}
    assert segments == {1, 2, 3, 4}
    numbers = [[epoch["row-2"][0] for epoch in epochs], [epoch["row-5"][0] for epoch in epochs]]
    assert len({number for row in numbers for number in row}) > 1
    validation = Video2LoraCollator(
        processor, 3, composition_probability=1.0, max_queries_per_video=1, training=False
    )(parsed)
    assert validation["segments_per_adapter"] == [1] * 8
    assert validation["queries_per_video"] == [len(row["conversations"]) for row in rows]


def test_at_most_so_many_queries_in_their_order(processor, clips):
    turns = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(6)]
    (row,) = load_rows([{"id": "many", "video": clips[0], "conversations": turns}])
    collate = Video2LoraCollator(processor, max_queries_per_video=4)
    chosen = []
    for epoch in range(12):
        collate.set_epoch(epoch)
        batch = collate([row])
        numbers = [number for _, number in batch["query_ids"]]
        assert batch["queries_per_video"] == [4] and numbers == sorted(set(numbers))
        chosen += numbers
    assert set(chosen) == set(range(6))


def test_the_number_of_frames_is_drawn_log_uniformly(processor, rows):
    """Anew every epoch, for each row, and within the bounds; validation takes the processor's own."""
    parsed = list(load_rows(rows))
    collate = Video2LoraCollator(processor, 3, num_frames_range=(1, 7))
    draws = [collate._num_frames(random.Random(seed)) for seed in range(4000)]
    shares = [draws.count(n) / len(draws) for n in range(1, 8)]
    assert sum(shares) == 1
    assert shares == pytest.approx([math.log((n + 1) / n) / math.log(8) for n in range(1, 8)], abs=0.025)

    def frames(collate: Video2LoraCollator, epoch: int, rows: list) -> list[int]:
        """Frames of each video, four tokens each; they are all there is, one behind the other."""
        collate.set_epoch(epoch)
        inputs = collate(rows)["video_inputs"]
        counts = [collate.processor.count_visual_tokens(ids) // 4 for ids in inputs["input_ids"]]
        assert inputs["pixel_values"].shape[:2] == inputs["pixel_attention_mask"].shape[:2] == (1, sum(counts))
        return counts

    epochs = [frames(collate, epoch, parsed) for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] and set().union(*epochs) <= set(range(1, 8))
    alone = [frames(Video2LoraCollator(processor, 3, num_frames_range=(1, 7)), 1, [row])[0] for row in parsed]
    assert alone == epochs[1]
    assert frames(Video2LoraCollator(processor, 3, num_frames_range=(5, 5)), 0, parsed) == [5] * 8
    validation = Video2LoraCollator(processor, 3, training=False, num_frames_range=(5, 5))
    assert frames(validation, 0, parsed) == [2] * 8


def test_each_segment_has_the_frames_drawn(processor, rows):
    collate = Video2LoraCollator(processor, 3, composition_probability=1.0, num_frames_range=(3, 3))
    batch = collate(list(load_rows(rows[:2])))
    assert batch["segments_per_adapter"] == [2, 2] and batch["video_inputs"]["pixel_values"].shape[:2] == (1, 4 * 3)
    assert [collate.processor.count_visual_tokens(ids) for ids in batch["video_inputs"]["input_ids"]] == [3 * 4] * 4


def test_drawing_frames_leaves_the_other_draws_alone(processor, rows):
    parsed, settings = list(load_rows(rows)), {"composition_probability": 0.5, "max_queries_per_video": 1}
    one, other = (Video2LoraCollator(processor, 5, **settings, **more) for more in ({}, {"num_frames_range": (1, 4)}))
    for name in ("query_ids", "segments_per_adapter"):
        assert one(parsed)[name] == other(parsed)[name]


class Refusing(Video2LoraProcessor):
    def encode_video(self, *args: Any, **kwargs: Any) -> Any:
        raise self.error("odd")  # made here: an exception that lives on keeps the frames it went through, and decoders


@pytest.mark.parametrize(
    ("error", "kind", "workers"),
    [(IndexError, RuntimeError, 0), (ValueError, ValueError, 0), (IndexError, RuntimeError, 1)],
)
def test_what_is_no_video_error_names_the_row(error, kind, workers, processor, rows):
    refusing = Refusing(processor.vlm_processor, num_frames=2)
    refusing.error = error
    (row,) = load_rows(rows[:1])
    loader = DataLoader([row], collate_fn=Video2LoraCollator(refusing), num_workers=workers)
    with pytest.raises(kind, match=rf"row 'row-0' \(video {row['video']}\): {error.__name__}: odd") as caught:
        next(iter(loader))
    assert workers or type(caught.value.__cause__) is error


@pytest.mark.parametrize("row", [{"video": "x.mp4", "prompt": "p", "response": "r"}, ["x.mp4"]])
def test_what_is_no_row_is_refused(row, processor):
    with pytest.raises(DatasetError, match="expected a row with id, video, queries.*load_rows"):
        Video2LoraCollator(processor)([row])


@pytest.mark.parametrize("count", [2, 3])
def test_segments_are_composed_as_the_segments_adapters_are(count, tiny_vlm_dir, rows):
    """The adapter in the loop: the segments' generated parts one after the other, the static part once."""
    model = make_model(tiny_vlm_dir)
    processor = Video2LoraProcessor.from_config(model.config)
    collate = Video2LoraCollator(processor, composition_probability=1.0, max_segments=count)
    parsed = list(load_rows(rows[:2]))
    for epoch in range(20):  # until both are cut into `count`
        collate.set_epoch(epoch)
        batch = collate(parsed)
        assert min(batch["segments_per_adapter"]) >= 2
        if batch["segments_per_adapter"] == [count, count]:
            break
    with torch.no_grad():
        lora = model.internalize(batch["segments_per_adapter"], **batch["video_inputs"])
        rank = model.config.rank
        assert lora.ranks == ((count + 1) * rank,) * 2
        for place, row in enumerate(parsed):
            edges = [2.0 * i / count for i in range(count + 1)]
            parts = [
                model.internalize(**processor(row["video"], start=a, end=b))
                for a, b in zip(edges, edges[1:], strict=False)
            ]
            for name in lora.lora_A:
                for whole, pieces in (
                    (lora.lora_A[name][place], [part.lora_A[name][0] for part in parts]),
                    (lora.lora_B[name][place], [part.lora_B[name][0] for part in parts]),
                ):
                    static = pieces[0][:, rank:]
                    expected = torch.cat([*(piece[:, :rank] for piece in pieces), static], dim=1)
                    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
                    assert all(torch.equal(piece[:, rank:], static) for piece in pieces)


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_workers_make_the_same_batches_and_hear_of_the_epoch(context, processor, rows):
    """Forked with what is in memory, and by a server to which all has to be pickled."""
    parsed = load_rows(rows[:4])
    settings: dict[str, Any] = {"composition_probability": 0.5, "max_segments": 3, "max_queries_per_video": 1}
    collate, own = Video2LoraCollator(processor, 7, **settings), Video2LoraCollator(processor, 7, **settings)
    loader = DataLoader(
        parsed, batch_size=2, collate_fn=collate, num_workers=1,
        multiprocessing_context=fork_server() if context == "forkserver" else context,
        persistent_workers=True,
    )  # fmt: skip
    drawn = []
    for epoch in (0, 5):
        collate.set_epoch(epoch)
        own.set_epoch(epoch)
        for batch, start in zip(loader, (0, 2), strict=True):
            assert_equal(batch, own([parsed[i] for i in range(start, start + 2)]))
            drawn.append((batch["query_ids"], batch["segments_per_adapter"]))
    assert drawn[:2] != drawn[2:]


def test_streams_train_for_max_steps_and_every_pass_draws_anew(tiny_vlm_dir, rows, tmp_path):
    def generate():
        yield from rows[:4]

    stream = IterableDataset.from_generator(generate)
    trainer = make_trainer(
        tiny_vlm_dir, tmp_path, stream, max_steps=5, per_device_train_batch_size=2, composition_probability=0.5
    )
    epochs, collate = [], trainer.train_collator.__class__.__call__

    class Spy(Video2LoraCollator):
        def __call__(self, batch: Any) -> dict[str, Any]:
            epochs.append(int(self._epoch))
            return collate(self, batch)

    trainer.train_collator.__class__ = Spy
    trainer.train()
    assert len(losses(trainer)) == 5 and trainer.state.global_step == 5
    assert epochs[:5] == [0, 0, 1, 1, 2]


def test_a_batch_leaves_no_decoder_to_the_garbage_collector(processor, rows, broken):
    """It has threads, and a worker forked with it in memory would wait for them for ever once it collects it."""
    bad = {"id": "bad", "video": broken, "prompt": "p", "response": "r"}
    parsed = list(load_rows([*rows[:2], bad]))
    collate = Video2LoraCollator(processor, composition_probability=1.0, max_segments=3)
    gc.collect()
    gc.disable()
    try:
        batch = collate(parsed)
        left = [item for item in gc.get_objects() if type(item) is VideoDecoder]
    finally:
        gc.enable()
    assert len(batch["skipped"]) == 1 and left == []
