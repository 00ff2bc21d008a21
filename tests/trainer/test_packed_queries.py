"""Queries of a video one behind the other in a row train what queries in rows of their own train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from torch.testing import assert_close

from video2lora.data import load_rows
from video2lora.modeling import Video2LoraModel, Video2LoraProcessor, turns
from video2lora.testing import save_tiny_vlm
from video2lora.trainer import Video2LoraCollator
from video2lora.trainer.collator import _rows
from video2lora.trainer.teacher import teach

from .runs import SGD, DrawnSquares, losses, make_model, make_trainer, run_training, saved, succeed, weights
from .test_packed_frames import inputs_of, step


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def base(request, tiny_vlm_dir, tmp_path_factory) -> Path:
    if request.param == "smolvlm":
        return tiny_vlm_dir
    return save_tiny_vlm("idefics3", tmp_path_factory.mktemp("idefics3") / "base")


@pytest.fixture(scope="module")
def many(rows) -> list[dict[str, Any]]:
    """Rows with 1, 4, 7 and 30 queries, short and long."""
    counts = (1, 4, 7, 30)
    return [
        row
        | {"conversations": [{"prompt": f"{i}?" * (1 + i % 4), "response": "no " * (1 + 3 * i % 5)} for i in range(n)]}
        for row, n in zip(rows, counts, strict=False)
    ]


@pytest.fixture(scope="module")
def unequal(rows) -> list[dict[str, Any]]:
    """Rows with a long answer and some short ones, which share rows (turns of like length hardly do)."""
    return [row | {"conversations": unequal_queries(i)} for i, row in enumerate(rows)]


def unequal_queries(i: int) -> list[dict[str, str]]:
    short = [{"prompt": f"{i} {j}?", "response": "no " * (1 + (i + j) % 2)} for j in range(2 + i % 3)]
    return [*short[:1], {"prompt": f"{i}?", "response": "yes and " * 12 + str(i)}, *short[1:]]


class Drawn(DrawnSquares):
    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"queries": unequal_queries(index)}


@pytest.fixture
def turns_in_rows(monkeypatch) -> list[int]:
    """Filled with the number of turns of every row that is trained or evaluated on."""
    seen: list[int] = []
    count = turns.rows_per_video
    monkeypatch.setattr(
        "video2lora.modeling.model.rows_per_video", lambda rows, queries: seen.extend(rows) or count(rows, queries)
    )
    return seen


def both(model: Video2LoraModel, rows: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch of these rows, packed and not."""
    processor = Video2LoraProcessor.from_config(model.config)
    parsed = list(load_rows(rows))
    packed, apart = (Video2LoraCollator(processor, pack_queries=pack, **settings)(parsed) for pack in (True, False))
    return packed, apart


def by_query(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each query of a packed batch."""
    found = []
    for ids, labels, turn in zip(batch["input_ids"], batch["labels"], batch["turns"], strict=True):
        for number in range(1, int(turn.max()) + 1):
            found.append((ids[turn == number].tolist(), labels[turn == number].tolist()))
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"composition_probability": 0.5, "max_segments": 3, "num_frames_range": (1, 4), "seed": 3},
        {"online_teacher": True},
        {"max_queries_per_video": 2},
        {"max_queries_per_video": 1},
    ],
    ids=["segments", "teacher", "few", "one"],
)
def test_a_packed_batch_trains_what_single_rows_train(settings, base, many):
    model = make_model(base)
    packed, apart = both(model, many, **settings)
    assert packed["turns"].shape == packed["input_ids"].shape and "turns" not in apart
    assert packed["query_ids"] == apart["query_ids"] and packed["queries_per_video"] == apart["queries_per_video"]
    assert torch.equal(packed["query_weights"], apart["query_weights"])
    mask = apart["attention_mask"].bool()
    theirs = [
        (i[m].tolist(), x[m].tolist()) for i, x, m in zip(apart["input_ids"], apart["labels"], mask, strict=True)
    ]
    assert by_query(packed) == theirs
    assert torch.equal(packed["attention_mask"].bool(), packed["turns"] > 0)
    assert packed["input_ids"].numel() <= apart["input_ids"].numel()
    if "max_queries_per_video" not in settings:
        assert len(packed["input_ids"]) < len(apart["input_ids"])
    ours, expected = step(model, packed), step(model, apart)
    assert ours.keys() == expected.keys() and ("teacher_logits" in ours) == bool(settings.get("online_teacher"))
    for name in ours:
        assert_close(ours[name], expected[name], rtol=1e-4, atol=2e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_of_every_attention(implementation, autocast, base, many):
    model = make_model(base)
    model.vlm.set_attn_implementation(implementation)
    packed, apart = both(model, many)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = step(model, packed), step(model, apart)
    for name in ("query_losses", "label_logits"):
        tolerance = {"rtol": 0.02, "atol": 0.15} if autocast else {"rtol": 1e-4, "atol": 2e-6}
        assert_close(ours[name], expected[name], **tolerance)


def test_bases_in_bfloat16(base, many):
    """Whose masks have its dtype, in transformers' older versions too."""
    model = make_model(base)
    model.vlm.bfloat16()
    for implementation in ("sdpa", "eager"):
        model.vlm.set_attn_implementation(implementation)
        packed, apart = both(model, many)
        assert_close(model(**inputs_of(packed)).loss, model(**inputs_of(apart)).loss, rtol=0.01, atol=0)


@torch.no_grad()
def test_turns_that_see_each_other_would_show(base, many, monkeypatch):
    model = make_model(base)
    packed, apart = both(model, many)
    expected = model(**inputs_of(apart)).query_losses
    assert_close(model(**inputs_of(packed)).query_losses, expected, rtol=1e-4, atol=2e-6)
    correct = turns.turn_inputs

    def spoilt(vlm: Any, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = numbers.shape[1]
        mask = torch.ones(len(numbers), 1, tokens, tokens, dtype=torch.bool).tril()
        return correct(vlm, numbers) | {"attention_mask": mask}

    monkeypatch.setattr("video2lora.modeling.model.turn_inputs", spoilt)
    assert (model(**inputs_of(packed)).query_losses - expected).abs().max() > 0.01


@torch.no_grad()
def test_no_turn_predicts_the_next_ones_first_token(base, many):
    """As nothing predicts the first column of rows of their own."""
    model = make_model(base)
    packed, apart = both(model, many)
    apart["labels"][:, 0] = 7
    first = packed["turns"].diff(dim=1, prepend=packed["turns"].new_zeros(len(packed["turns"]), 1)) > 0
    packed["labels"][first] = 7
    assert first.sum() == len(apart["labels"]) == 42
    ours, theirs = (model(**inputs_of(batch)) for batch in (packed, apart))
    assert len(ours.label_logits) == len(theirs.label_logits)
    assert_close(ours.query_losses, theirs.query_losses, rtol=1e-4, atol=2e-6)


def test_rows_are_of_similar_length(tiny_vlm_dir, many):
    model = make_model(tiny_vlm_dir)
    packed, apart = both(model, many)
    longest = int(apart["attention_mask"].sum(1).max())
    assert packed["input_ids"].shape[1] <= 4 * longest
    assert len(packed["input_ids"]) > len(many), "30 queries in one row"
    real = packed["attention_mask"].float().mean()
    assert real > 0.8 > 0.75 > apart["attention_mask"].float().mean()


def test_turns_fill_rows_to_their_end():
    turn = ([0] * 10, [0] * 10)
    assert _rows([[turn] * 4]) == [[4]]
    assert _rows([[turn] * 30]) == [[3] * 10], "four times the longest at most"
    assert _rows([[turn], [turn] * 2, [turn] * 3]) == [[1], [1, 1], [1, 1, 1]], "the fewest tokens"


def test_a_batch_with_nothing_left_packs_its_dummy(tiny_vlm_dir, broken):
    bad = [{"id": "bad", "video": broken, "conversations": [{"prompt": "p", "response": "r"}]}]
    packed, apart = both(make_model(tiny_vlm_dir), bad, online_teacher=True)
    assert torch.equal(packed["input_ids"], apart["input_ids"]) and bool((packed["turns"] == 1).all())
    assert packed["query_weights"].tolist() == [0.0] and packed["kept"] == [0]


RUN: dict[str, Any] = {"composition_probability": 0.5, "max_steps": 3, "per_device_eval_batch_size": 3} | SGD


@pytest.mark.parametrize("kind", ["rows", "stream", "drawn", "online", "stored", "accumulated"])
def test_a_run_trains_and_evaluates_as_unpacked(kind, base, unequal, turns_in_rows, tmp_path):
    rows = unequal
    settings: dict[str, Any] = RUN | {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
    data: Any = rows
    if kind == "stream":
        data = IterableDataset.from_generator(lambda: iter(rows))
    elif kind == "drawn":
        data = Drawn()
    elif kind == "accumulated":
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    elif kind == "online":
        settings |= {"teacher": "online", "kl_weight": 0.5, "kl_temperature": 2.0}
    elif kind == "stored":
        model = make_model(base)
        teach(model.vlm, Video2LoraProcessor.from_config(model.config), load_rows(rows), tmp_path / "taught", top_k=4)
        settings |= {"teacher": str(tmp_path / "taught"), "kl_weight": 0.5, "composition_probability": 0.0}
    found = []
    for pack in (True, False):
        trainer = make_trainer(base, tmp_path / str(pack), data, eval_rows=rows[:7], pack_queries=pack, **settings)
        trainer.train()
        trained_on = len(turns_in_rows)
        found.append((losses(trainer), trainer.evaluate()["eval_loss"], weights(trainer.model)))
        if pack:
            assert max(turns_in_rows[:trained_on]) > 1 and max(turns_in_rows[trained_on:]) > 1, "nothing was packed"
    (ours, evaluated, trained), (theirs, expected, as_trained) = found
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=1e-5) and len(set(ours)) > 1
    assert evaluated == pytest.approx(expected, rel=1e-5)
    for name in trained:
        assert_close(trained[name], as_trained[name], rtol=1e-4, atol=1e-5)
    start = weights(make_model(base))
    assert any((trained[name] - start[name]).abs().max() > 1e-3 for name in trained)


def test_two_processes_train_as_one_unpacked(tiny_vlm_dir, unequal, tmp_path):
    """Queries are counted, not rows."""
    rows = unequal
    settings = RUN | {"base": str(tiny_vlm_dir), "rows": rows}
    packed = settings | {"output": str(tmp_path / "two"), "per_device_train_batch_size": 2, "pack_queries": True}
    ours = saved(succeed(run_training, tmp_path / "results", processes=2, settings=packed))
    trainer = make_trainer(tiny_vlm_dir, tmp_path / "one", rows, per_device_train_batch_size=4, **RUN)
    trainer.train()
    theirs = weights(trainer.model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_bases_that_cannot_keep_turns_apart_are_refused(qwen_dir, tiny_vlm_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="several positions a token.*pack_queries=False"):
        make_trainer(qwen_dir, tmp_path, rows, pack_queries=True)
    model = make_model(tiny_vlm_dir)
    model.vlm.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"'flash_attention_2' takes no mask.*attn_implementation=\"sdpa\""):
        make_trainer(tiny_vlm_dir, tmp_path, rows, model=model, pack_queries=True)
    make_trainer(tiny_vlm_dir, tmp_path, rows, model=model)
