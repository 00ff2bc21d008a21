"""Streams in evaluation: dealt out evenly, with nothing counted that only fills up."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset

from video2lora.data import load_rows
from video2lora.trainer.streams import EvenStream, SkipFillers

from .runs import make_trainer


@pytest.mark.parametrize("length", range(14))
@pytest.mark.parametrize(("batch_size", "processes"), [(1, 2), (2, 3), (4, 2)])
def test_every_row_goes_to_one_process_and_all_have_as_many(length: int, batch_size: int, processes: int) -> None:
    stream: Any = EvenStream([{"id": i} for i in range(length)], batch_size * processes)
    parts = [
        list(IterableDatasetShard(stream, batch_size=batch_size, num_processes=processes, process_index=i))
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1 and len(parts[0]) % batch_size == 0
    given = [row["id"] for part in parts for row in part if row is not None]
    assert sorted(given) == list(range(length))


def test_fillers_take_a_place_and_bring_nothing(tiny_vlm_dir: Any, rows: Any, tmp_path: Any) -> None:
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None)
    assert isinstance(trainer.eval_collator, SkipFillers)
    some = load_rows(rows)
    batch = trainer.eval_collator([some[0], some[1], None])
    alone = trainer.eval_collator([some[0], some[1]])
    assert batch["num_videos"] == 3 and batch["kept"] == [0, 1] and batch["skipped"] == []
    assert batch["query_ids"] == alone["query_ids"] and bool(batch["query_weights"].all())
    nothing = trainer.eval_collator([None, None])
    assert nothing["num_videos"] == 2 and not nothing["query_weights"].any() and nothing["skipped"] == []


def test_one_process_reads_a_stream_as_it_is(tiny_vlm_dir: Any, rows: Any, tmp_path: Any) -> None:
    stream = Dataset.from_list(rows).to_iterable_dataset(num_shards=3)
    trainer = make_trainer(tiny_vlm_dir, tmp_path, None, eval_rows=stream, per_device_eval_batch_size=3)
    given = trainer.eval_dataset
    loss = trainer.evaluate()["eval_loss"]
    assert trainer.eval_dataset is given
    assert loss == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-6)
