"""internalize_many: what is written, what it is known by, and when it is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from video2lora import VideoAdapter, VideoAdapterStore
from video2lora.data import DatasetError
from video2lora.pipelines.bulk import internalize_many
from video2lora.testing import tiny_clip

from .bulk_runs import NAMES, OPTIONS, counts_of, files_of, index_of

# what is written


def test_every_adapter_is_the_pipelines_own_and_the_index_finds_it(pipe: Any, clips: Path, whole: Path) -> None:
    lines = index_of(whole)
    assert [line["video"] for line in lines] == [str(clips / f"{name}.mp4") for name in NAMES]
    assert len({line["adapter"] for line in lines}) == len(NAMES)  # also of the two of one name
    for line in lines:
        adapter, alone = VideoAdapter.from_pretrained(whole / line["adapter"]), pipe(line["video"])
        for module, tensor in alone.weights.lora_B.items():
            torch.testing.assert_close(adapter.weights.lora_B[module], tensor, rtol=1e-5, atol=1e-6)
        assert adapter.segments[0].timestamps == alone.segments[0].timestamps
        assert line["key"] == pipe.store_key(line["video"])
        assert (line["content_hash"], line["rank"]) == (adapter.content_hash, adapter.rank)
        assert (line["num_frames"], line["segments"], line["sha256"]) == (3, 1, alone.segments[0].sha256)
        assert line["seconds"] == pytest.approx(alone.segments[0].end)
        assert line["bytes"] == sum(path.stat().st_size for path in (whole / line["adapter"]).iterdir())
    assert not (whole / "skipped.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fps": 2.0},
        {"num_frames": 2, "start": 0.25, "end": 0.75},
        {"longest_edge": 16},
        {"chunk_seconds": 0.5},
        {"chunk_seconds": 0.25, "max_rank": 12},
    ],
)
def test_the_key_is_that_of_the_pipelines_store(pipe: Any, clips: Path, tmp_path: Path, options: Any) -> None:
    rows = [str(clips / "c.mp4"), {"video": str(clips / "d.mp4"), "start": 0.5}]
    internalize_many(pipe, rows, tmp_path, **OPTIONS, **options)
    assert [line["key"] for line in index_of(tmp_path)] == [pipe.store_key(row, **options) for row in rows]
    for row, line in zip(rows, index_of(tmp_path), strict=True):
        expected = pipe(row, **options)
        found = VideoAdapter.from_pretrained(tmp_path / line["adapter"])
        assert [s.timestamps for s in found.segments] == [s.timestamps for s in expected.segments]
        assert len(found.segments) == line["segments"]
        assert found.rank == expected.rank
        for module in expected.weights.lora_B:
            for layer in expected.targets.layer_indices:  # a truncation leaves the signs of ranks open
                change = expected.delta_weight(module, layer)
                torch.testing.assert_close(found.delta_weight(module, layer), change, rtol=1e-4, atol=1e-5)


def test_layout_and_dtype_are_those_of_the_files(pipe: Any, clips: Path, tmp_path: Path) -> None:
    internalize_many(pipe, [clips / "c.mp4"], tmp_path, layout="text", dtype=torch.bfloat16)
    (line,) = index_of(tmp_path)
    stored = json.loads((tmp_path / line["adapter"] / "video2lora.json").read_text())
    assert (stored["layout"], stored["dtype"], stored["content_hash"]) == ("text", "bfloat16", line["content_hash"])
    assert counts_of(internalize_many(pipe, [clips / "c.mp4"], tmp_path, layout="text", dtype=torch.bfloat16))[2] == 1


def test_threads_change_nothing(pipe: Any, clips: Path, whole: Path, tmp_path: Path) -> None:
    internalize_many(pipe, clips, tmp_path, batch_size=2, num_workers=0)
    assert files_of(tmp_path) == files_of(whole)


def test_a_summary_reads_well(pipe: Any, clips: Path, whole: Path) -> None:
    summary = internalize_many(pipe, clips, whole, **OPTIONS)
    assert summary.num_bytes == sum(line["bytes"] for line in index_of(whole))
    assert "7 videos: 0 made, 7 already there, 0 skipped" in str(summary) and str(whole) in str(summary)


# what is known of videos and adapters


def test_what_made_an_adapter_counts_not_its_name(
    pipe: Any, clips: Path, tmp_path: Path, read: list[str], made: list[int]
) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    out = tmp_path / "out"
    internalize_many(pipe, folder, out, **OPTIONS)
    before = {line["video"]: line for line in index_of(out)}
    made.clear(), read.clear()

    os.utime(folder / "c.mp4")  # touched: its bytes are read, and are the same
    (folder / "d.mp4").rename(folder / "renamed.mp4")
    shutil.copy(folder / "e.mp4", folder / "copy.mp4")
    assert counts_of(internalize_many(pipe, folder, out, **OPTIONS)) == (0, 0, 8, 0)
    assert made == [] and sorted(read) == ["c.mp4", "copy.mp4", "renamed.mp4"]
    after = {line["video"]: line for line in index_of(out)}
    assert after[str(folder / "renamed.mp4")]["adapter"] == before[str(folder / "d.mp4")]["adapter"]
    assert after[str(folder / "copy.mp4")]["adapter"] == before[str(folder / "e.mp4")]["adapter"]
    read.clear()
    assert counts_of(internalize_many(pipe, folder, out, **OPTIONS)) == (0, 0, 8, 0)
    assert read == []

    old = after[str(folder / "f.mp4")]
    shutil.copy(folder / "c.mp4", folder / "f.mp4")  # another video under the old name: found by its content
    (folder / "c.mp4").unlink()
    tiny_clip(folder / "c.mp4", seed=99)  # and one never seen
    assert counts_of(internalize_many(pipe, folder, out, **OPTIONS)) == (1, 0, 7, 0)
    lines = {line["video"]: line for line in index_of(out)}
    assert lines[str(folder / "f.mp4")]["adapter"] == before[str(folder / "c.mp4")]["adapter"]
    assert lines[str(folder / "c.mp4")]["key"] == pipe.store_key(str(folder / "c.mp4"))
    assert (out / old["adapter"]).is_dir()  # no longer listed, but nothing is deleted unasked


def test_copies_share_an_adapter_whichever_is_read_first(pipe: Any, clips: Path, tmp_path: Path) -> None:
    for number in range(5):
        shutil.copy(clips / f"{'d' if number == 3 else 'c'}.mp4", tmp_path / f"{number}.mp4")
    for batch_size in (1, 4):
        out, store = tmp_path / f"out-{batch_size}", VideoAdapterStore(tmp_path / f"store-{batch_size}")
        summary = internalize_many(pipe, tmp_path, out, batch_size=batch_size, store=store)
        assert counts_of(summary) == (2, 0, 0, 0) and summary.num_shared == 3
        assert "2 made, 0 already there, 3 of the same bytes as another, 0 skipped" in str(summary)
        assert len({line["adapter"] for line in index_of(out)}) == 2
        assert counts_of(internalize_many(pipe, tmp_path, out, store=store)) == (0, 0, 5, 0)


def test_what_comes_from_a_store_goes_by_the_name_it_has_now(pipe: Any, clips: Path, tmp_path: Path) -> None:
    store = VideoAdapterStore(tmp_path / "store")
    pipe(str(clips / "c.mp4"), store=store)
    shutil.copy(clips / "c.mp4", tmp_path / "renamed.mp4")
    summary = internalize_many(pipe, tmp_path / "renamed.mp4", tmp_path / "out", store=store)
    (line,) = index_of(tmp_path / "out")
    assert counts_of(summary) == (0, 1, 0, 0) and line["adapter"].startswith("renamed-")
    found = VideoAdapter.from_pretrained(tmp_path / "out" / line["adapter"])
    assert found.select(source="renamed.mp4").content_hash == line["content_hash"]


def test_a_video_that_changes_and_keeps_size_and_name_is_noticed(pipe: Any, clips: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "clips", tmp_path / "out"
    folder.mkdir()
    data = (clips / "c.mp4").read_bytes()
    (folder / "x.mp4").write_bytes(data)
    internalize_many(pipe, folder, out)
    first = index_of(out)
    (folder / "x.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert internalize_many(pipe, folder, out).num_made == 1
    assert index_of(out)[0]["sha256"] != first[0]["sha256"]


def _truncate(adapter: Path) -> None:
    os.truncate(adapter / "adapter_model.safetensors", 100)


def _flip(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "gone": shutil.rmtree,
    "truncated": _truncate,
    "flipped": _flip,
    "no weights": lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
    "no provenance": lambda adapter: (adapter / "video2lora.json").unlink(),
    "no config": lambda adapter: (adapter / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_made_again(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, damage: str, made: list[int]
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    line = index_of(out)[2]
    DAMAGE[damage](out / line["adapter"])
    assert counts_of(internalize_many(pipe, clips, out, **OPTIONS)) == (1, 0, 6, 0)
    assert made == [1]
    (new,) = [new for new in index_of(out) if new["video"] == line["video"]]
    assert new["adapter"] == line["adapter"]
    assert VideoAdapter.from_pretrained(out / new["adapter"]).content_hash == new["content_hash"]
    assert counts_of(internalize_many(pipe, clips, out, **OPTIONS)) == (0, 0, 7, 0)


def test_an_output_that_was_copied_is_whole(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, read: list[str]
) -> None:
    """Without its files' times: then all of them are read, once."""
    out = shutil.copytree(whole, tmp_path / "out", copy_function=shutil.copyfile)
    (out / index_of(out)[0]["adapter"] / "README.md").write_text("A card of one's own.")
    assert counts_of(internalize_many(pipe, clips, out, **OPTIONS)) == (0, 0, 7, 0)
    assert read == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_frames": 2}, "sampling="),
        ({"start": 0.5}, "sampling="),
        ({"chunk_seconds": 1.0}, "sampling="),
        ({"layout": "text"}, "layout='vlm', but 'text'"),
        ({"dtype": torch.bfloat16}, "file_dtype='float32', but 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(pipe: Any, clips: Path, whole: Path, change: Any, named: str) -> None:
    before = files_of(whole)
    with pytest.raises(DatasetError, match=named):
        internalize_many(pipe, clips, whole, **(OPTIONS | change))
    assert files_of(whole) == before


def test_another_hypernetwork_is_refused_and_overwrite_replaces(
    model_dir: Path, clips: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    old = {line["adapter"] for line in index_of(out)}
    other = pipeline("video-to-lora", model=str(model_dir), device="cpu")
    with torch.no_grad():
        next(other.model.hypernetwork.parameters()).add_(0.1)
    with pytest.raises(DatasetError, match="hypernetwork_sha256"):
        internalize_many(other, clips, out, **OPTIONS)
    assert counts_of(internalize_many(other, clips, out, overwrite=True, **OPTIONS)) == (7, 0, 0, 0)
    new = {line["adapter"] for line in index_of(out)}
    assert not new & old
    assert {path.name for path in out.iterdir() if (path / "video2lora.json").exists()} == new
    assert counts_of(internalize_many(other, clips, out, overwrite=True, **OPTIONS)) == (0, 0, 7, 0)


def test_overwrite_keeps_what_was_made_of_other_videos(pipe: Any, clips: Path, tmp_path: Path) -> None:
    """A second list into the same folder, by a command that always says --overwrite, replaces nothing of the first."""
    internalize_many(pipe, [clips / "c.mp4"], tmp_path, **OPTIONS)
    (first,) = index_of(tmp_path)
    internalize_many(pipe, [clips / "d.mp4"], tmp_path, overwrite=True, **OPTIONS)
    assert VideoAdapter.from_pretrained(tmp_path / first["adapter"]).content_hash == first["content_hash"]
    assert [Path(line["video"]).name for line in index_of(tmp_path)] == ["d.mp4"]
    assert counts_of(internalize_many(pipe, [clips / "c.mp4", clips / "d.mp4"], tmp_path, **OPTIONS)) == (0, 0, 2, 0)


def test_a_store_is_asked_and_filled(pipe: Any, clips: Path, tmp_path: Path, made: list[int]) -> None:
    store = VideoAdapterStore(tmp_path / "store")
    internalize = pipe([str(clips / "c.mp4"), str(clips / "d.mp4")], store=store)
    made.clear()
    summary = internalize_many(pipe, clips, tmp_path / "one", store=store, **OPTIONS)
    assert counts_of(summary) == (5, 2, 0, 0) and sum(made) == 5 and len(store) == 7
    assert counts_of(internalize_many(pipe, clips, tmp_path / "two", store=store, **OPTIONS)) == (0, 7, 0, 0)
    assert sum(made) == 5
    lines = {line["video"]: line for line in index_of(tmp_path / "two")}
    assert lines[str(clips / "c.mp4")]["content_hash"] == internalize[0].content_hash
    assert {line["content_hash"] for line in index_of(tmp_path / "one")} == {x["content_hash"] for x in lines.values()}


def test_journals_of_versions_that_counted_no_errors_are_read(pipe: Any, clips: Path, whole: Path, tmp_path: Path):
    out = shutil.copytree(whole, tmp_path / "out")
    for journal in (out / "journal").glob("*.jsonl"):
        journal.write_text(journal.read_text().replace(' "num_decode_errors": 0,', ""))
        assert "num_decode_errors" not in journal.read_text()
    (out / "index.jsonl").unlink()
    assert counts_of(internalize_many(pipe, clips, out, **OPTIONS)) == (0, 0, 7, 0)
    assert index_of(out) == index_of(whole)
    assert all(line["num_decode_errors"] == 0 for line in index_of(out))
