"""internalize_many: a folder of adapters that is the same whatever stops, splits or repeats the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor, VideoAdapter, VideoAdapterStore, VideoError
from video2lora.adapters.errors import OutputExistsError
from video2lora.data import DatasetError
from video2lora.pipelines import bulk
from video2lora.pipelines.bulk import BulkSummary, BulkVideos, internalize_many, plan_units
from video2lora.testing import save_tiny_vlm, tiny_clip
from video2lora.video import VideoReader

SIZES = {"rank": 4, "latent_size": 16, "num_latents": 4, "num_blocks": 2, "num_frames": 3, "longest_edge": 64}
OPTIONS: dict[str, Any] = {"batch_size": 2, "num_workers": 2}
NAMES = ("c", "d", "e", "f", "a/clip", "b/clip", "b/long")  # in the order they are listed

RUN = """
import os, resource, signal, sys
import torch
from transformers import pipeline
import video2lora
from video2lora import VideoAdapter
from video2lora.pipelines.bulk import internalize_many
torch.set_num_threads(1)
model, videos, output, saves, limit = sys.argv[1:]
save, left = VideoAdapter.save_pretrained, int(saves)
def dying(self, *args, **kwargs):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, *args, **kwargs)
VideoAdapter.save_pretrained = dying
pipe = pipeline("video-to-lora", model=model, device="cpu")
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
print(internalize_many(pipe, videos, output, batch_size=2, num_workers=2))
torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips of different lengths in folders, two of one name, and files that are none; never write to it."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        tiny_clip(folder / f"{name}.mp4", seed=seed, seconds=1 + seed % 3)
    (folder / "notes.txt").write_text("no video")
    (folder / "b" / "._long.mp4").write_bytes(b"what a Mac leaves behind")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose adapters change something; read it, never write to it."""
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_vlm("smolvlm", folder / "base")
    torch.manual_seed(0)
    model = Video2LoraModel.from_vlm(base, dtype=torch.float32, **SIZES)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(folder / "checkpoint")
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / "checkpoint")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def pipe(model_dir: Path) -> Any:
    return pipeline("video-to-lora", model=str(model_dir), device="cpu")


@pytest.fixture(scope="module")
def whole(pipe: Any, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run never stopped; read it, never write to it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    internalize_many(pipe, clips, folder, **OPTIONS)
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the videos that were opened."""
    names: list[str] = []

    class Counting(VideoReader):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            names.append(self.name)

    monkeypatch.setattr(bulk, "VideoReader", Counting)
    return names


@pytest.fixture
def made(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the model has read."""
    counts: list[int] = []
    generate = pipe.model.generate_segments

    def counting(**inputs: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(pipe.model, "generate_segments", counting)
    return counts


def _index(folder: Path) -> list[dict[str, Any]]:
    return _lines(folder / "index.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves but its journal, which holds times."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("journal")}


def _counts(summary: BulkSummary) -> tuple[int, int, int, int]:
    assert summary.num_made + summary.num_from_store + summary.num_found + summary.num_skipped == summary.num_videos
    return summary.num_made, summary.num_from_store, summary.num_found, summary.num_skipped


def _run(
    model: Path, videos: Path, output: Path, *, saves: int = 10**6, limit: int = 0, launch: Any = ("-c", RUN)
) -> Any:
    command = [sys.executable, *launch, str(model), str(videos), str(output), str(saves), str(limit)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


# what is written


def test_every_adapter_is_the_pipelines_own_and_the_index_finds_it(pipe: Any, clips: Path, whole: Path) -> None:
    lines = _index(whole)
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
    assert [line["key"] for line in _index(tmp_path)] == [pipe.store_key(row, **options) for row in rows]
    for row, line in zip(rows, _index(tmp_path), strict=True):
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
    (line,) = _index(tmp_path)
    stored = json.loads((tmp_path / line["adapter"] / "video2lora.json").read_text())
    assert (stored["layout"], stored["dtype"], stored["content_hash"]) == ("text", "bfloat16", line["content_hash"])
    assert _counts(internalize_many(pipe, [clips / "c.mp4"], tmp_path, layout="text", dtype=torch.bfloat16))[2] == 1


def test_threads_change_nothing(pipe: Any, clips: Path, whole: Path, tmp_path: Path) -> None:
    internalize_many(pipe, clips, tmp_path, batch_size=2, num_workers=0)
    assert _files(tmp_path) == _files(whole)


# stopped, split and repeated


@pytest.mark.parametrize("saves", [0, 3])
def test_killed_and_started_again_equals_a_run_never_stopped(
    pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path, saves: int
) -> None:
    killed = _run(model_dir, clips, tmp_path, saves=saves)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "index.jsonl").exists()
    journal = tmp_path / "journal" / "1-of-1-00000.jsonl"
    units = journal.read_bytes().splitlines()
    assert len(units) == saves // 2 and len([p for p in tmp_path.iterdir() if "-" in p.name]) == saves
    with journal.open("ab") as file:
        file.write(b'[{"video": "half a li')  # killed while it wrote a line
    leftover = tmp_path / ".clip-0123456789abcdef.tmp-0123456789ab"  # or an adapter
    leftover.mkdir()
    (leftover / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / ".index.jsonl.4829.part").write_bytes(b"half")  # or the index
    summary = internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert _counts(summary) == (7 - saves // 2 * 2, 0, saves // 2 * 2, 0)
    assert _files(tmp_path) == _files(whole)
    assert not leftover.exists()


def test_two_processes_equal_one(model_dir: Path, clips: Path, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = _run(model_dir, clips, tmp_path / "out", launch=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 videos: 7 made, 0 already there, 0 skipped") == 2  # the same in both
    assert _files(tmp_path / "out") == _files(whole)


def test_one_of_two_processes_is_killed(pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    assert _run(model_dir, clips, tmp_path / "out", saves=2, launch=launch).returncode != 0
    made = _counts(internalize_many(pipe, clips, tmp_path / "out", **OPTIONS))[0]  # with one process
    assert made >= 3
    assert _files(tmp_path / "out") == _files(whole)


def test_an_error_in_the_main_process_ends_all(model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    (tmp_path / "empty").mkdir()
    done = _run(model_dir, tmp_path / "empty", tmp_path / "out", launch=launch)
    assert done.returncode != 0 and "holds no videos" in done.stderr
    assert not (tmp_path / "out").exists()


def test_shards_together_equal_one_run(pipe: Any, clips: Path, whole: Path, tmp_path: Path) -> None:
    summaries = [internalize_many(pipe, clips, tmp_path, shard=(part, 3), **OPTIONS) for part in (2, 3, 1)]
    assert [summary.num_videos for summary in summaries] == [2, 2, 3]
    assert _files(tmp_path) == _files(whole)
    assert _counts(internalize_many(pipe, clips, tmp_path, **OPTIONS)) == (0, 0, 7, 0)


def test_a_second_run_does_nothing(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, read: list[str], made: list[int]
) -> None:
    shutil.copytree(whole, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if "journal" not in str(path)}
    assert _counts(internalize_many(pipe, clips, tmp_path / "out", **OPTIONS)) == (0, 0, 7, 0)
    assert (read, made) == ([], [])
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_runs_at_once_are_refused(pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pipe.forward

    def nested(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(pipe, "forward", forward)
        half = tmp_path / ".clip-0123456789abcdef.tmp-0123456789ab"  # what the first is writing just now
        half.mkdir()
        settings = (tmp_path / "internalize.json").read_bytes()
        for change in ({}, {"num_frames": 2, "overwrite": True}):
            with pytest.raises(DatasetError, match="another run is writing"):
                internalize_many(pipe, clips, tmp_path, **OPTIONS, **change)
        assert half.is_dir() and (tmp_path / "internalize.json").read_bytes() == settings
        internalize_many(pipe, [clips / "c.mp4"], tmp_path, shard=(1, 2), **OPTIONS)  # a launch beside it
        assert half.is_dir()
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe, "forward", nested)
    summary = internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert summary.num_made + summary.num_found == 7 and len(_index(tmp_path)) == 7


# what is known of videos and adapters


def test_what_made_an_adapter_counts_not_its_name(
    pipe: Any, clips: Path, tmp_path: Path, read: list[str], made: list[int]
) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    out = tmp_path / "out"
    internalize_many(pipe, folder, out, **OPTIONS)
    before = {line["video"]: line for line in _index(out)}
    made.clear(), read.clear()

    os.utime(folder / "c.mp4")  # touched: its bytes are read, and are the same
    (folder / "d.mp4").rename(folder / "renamed.mp4")
    shutil.copy(folder / "e.mp4", folder / "copy.mp4")
    assert _counts(internalize_many(pipe, folder, out, **OPTIONS)) == (0, 0, 8, 0)
    assert made == [] and sorted(read) == ["c.mp4", "copy.mp4", "renamed.mp4"]
    after = {line["video"]: line for line in _index(out)}
    assert after[str(folder / "renamed.mp4")]["adapter"] == before[str(folder / "d.mp4")]["adapter"]
    assert after[str(folder / "copy.mp4")]["adapter"] == before[str(folder / "e.mp4")]["adapter"]
    read.clear()
    assert _counts(internalize_many(pipe, folder, out, **OPTIONS)) == (0, 0, 8, 0)
    assert read == []

    old = after[str(folder / "f.mp4")]
    shutil.copy(folder / "c.mp4", folder / "f.mp4")  # another video under the old name: found by its content
    (folder / "c.mp4").unlink()
    tiny_clip(folder / "c.mp4", seed=99)  # and one never seen
    assert _counts(internalize_many(pipe, folder, out, **OPTIONS)) == (1, 0, 7, 0)
    lines = {line["video"]: line for line in _index(out)}
    assert lines[str(folder / "f.mp4")]["adapter"] == before[str(folder / "c.mp4")]["adapter"]
    assert lines[str(folder / "c.mp4")]["key"] == pipe.store_key(str(folder / "c.mp4"))
    assert (out / old["adapter"]).is_dir()  # no longer listed, but nothing is deleted unasked


def test_a_video_that_changes_and_keeps_size_and_name_is_noticed(pipe: Any, clips: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "clips", tmp_path / "out"
    folder.mkdir()
    data = (clips / "c.mp4").read_bytes()
    (folder / "x.mp4").write_bytes(data)
    internalize_many(pipe, folder, out)
    first = _index(out)
    (folder / "x.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert internalize_many(pipe, folder, out).num_made == 1
    assert _index(out)[0]["sha256"] != first[0]["sha256"]


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
    line = _index(out)[2]
    DAMAGE[damage](out / line["adapter"])
    assert _counts(internalize_many(pipe, clips, out, **OPTIONS)) == (1, 0, 6, 0)
    assert made == [1]
    (new,) = [new for new in _index(out) if new["video"] == line["video"]]
    assert new["adapter"] == line["adapter"]
    assert VideoAdapter.from_pretrained(out / new["adapter"]).content_hash == new["content_hash"]
    assert _counts(internalize_many(pipe, clips, out, **OPTIONS)) == (0, 0, 7, 0)


def test_an_output_that_was_copied_is_whole(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, read: list[str]
) -> None:
    """Without its files' times: then all of them are read, once."""
    out = shutil.copytree(whole, tmp_path / "out", copy_function=shutil.copyfile)
    (out / _index(out)[0]["adapter"] / "README.md").write_text("A card of one's own.")
    assert _counts(internalize_many(pipe, clips, out, **OPTIONS)) == (0, 0, 7, 0)
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
    before = _files(whole)
    with pytest.raises(DatasetError, match=named):
        internalize_many(pipe, clips, whole, **(OPTIONS | change))
    assert _files(whole) == before


def test_another_hypernetwork_is_refused_and_overwrite_replaces(
    model_dir: Path, clips: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    old = {line["adapter"] for line in _index(out)}
    other = pipeline("video-to-lora", model=str(model_dir), device="cpu")
    with torch.no_grad():
        next(other.model.hypernetwork.parameters()).add_(0.1)
    with pytest.raises(DatasetError, match="hypernetwork_sha256"):
        internalize_many(other, clips, out, **OPTIONS)
    assert _counts(internalize_many(other, clips, out, overwrite=True, **OPTIONS)) == (7, 0, 0, 0)
    new = {line["adapter"] for line in _index(out)}
    assert not new & old
    assert {path.name for path in out.iterdir() if (path / "video2lora.json").exists()} == new
    assert _counts(internalize_many(other, clips, out, overwrite=True, **OPTIONS)) == (0, 0, 7, 0)


def test_overwrite_keeps_what_was_made_of_other_videos(pipe: Any, clips: Path, tmp_path: Path) -> None:
    """A second list into the same folder, by a command that always says --overwrite, replaces nothing of the first."""
    internalize_many(pipe, [clips / "c.mp4"], tmp_path, **OPTIONS)
    (first,) = _index(tmp_path)
    internalize_many(pipe, [clips / "d.mp4"], tmp_path, overwrite=True, **OPTIONS)
    assert VideoAdapter.from_pretrained(tmp_path / first["adapter"]).content_hash == first["content_hash"]
    assert [Path(line["video"]).name for line in _index(tmp_path)] == ["d.mp4"]
    assert _counts(internalize_many(pipe, [clips / "c.mp4", clips / "d.mp4"], tmp_path, **OPTIONS)) == (0, 0, 2, 0)


def test_a_store_is_asked_and_filled(pipe: Any, clips: Path, tmp_path: Path, made: list[int]) -> None:
    store = VideoAdapterStore(tmp_path / "store")
    internalize = pipe([str(clips / "c.mp4"), str(clips / "d.mp4")], store=store)
    made.clear()
    summary = internalize_many(pipe, clips, tmp_path / "one", store=store, **OPTIONS)
    assert _counts(summary) == (5, 2, 0, 0) and sum(made) == 5 and len(store) == 7
    assert _counts(internalize_many(pipe, clips, tmp_path / "two", store=store, **OPTIONS)) == (0, 7, 0, 0)
    assert sum(made) == 5
    lines = {line["video"]: line for line in _index(tmp_path / "two")}
    assert lines[str(clips / "c.mp4")]["content_hash"] == internalize[0].content_hash
    assert {line["content_hash"] for line in _index(tmp_path / "one")} == {x["content_hash"] for x in lines.values()}


# bad files


def test_bad_files_are_skipped_named_and_tried_again(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, made: list[int]
) -> None:
    folder, out = shutil.copytree(clips, tmp_path / "clips"), tmp_path / "out"
    good = (folder / "d.mp4").read_bytes()
    (folder / "d.mp4").write_bytes(b"no video")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "gone.mp4").symlink_to(folder / "nowhere")
    for _ in range(2):
        summary = internalize_many(pipe, folder, out, **OPTIONS)
        assert summary.num_skipped == 3 and summary.num_videos == 9
        skipped = _lines(out / "skipped.jsonl")
        assert [Path(line["video"]).name for line in skipped] == ["d.mp4", "empty.mp4", "gone.mp4"]
        assert all(Path(line["video"]).name in line["error"] for line in skipped)
        assert len(_index(out)) == 6
    assert sum(made) == 6
    journal = (out / "journal" / "1-of-1-00000.jsonl").read_text()
    assert journal.count('"error"') == 3  # the same is not noted twice
    (folder / "d.mp4").write_bytes(good)
    (folder / "empty.mp4").unlink(), (folder / "gone.mp4").unlink()
    assert _counts(internalize_many(pipe, folder, out, **OPTIONS)) == (1, 0, 6, 0)
    assert not (out / "skipped.jsonl").exists() and len(_index(out)) == 7


def test_too_many_bad_files_stop_the_run_if_wanted(pipe: Any, clips: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clips, tmp_path / "clips")
    for name in ("e", "a/clip"):
        (folder / f"{name}.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match=r"of 7 videos could not be read, more than max_bad_fraction=0.1"):
        internalize_many(pipe, folder, tmp_path / "out", max_bad_fraction=0.1, **OPTIONS)
    assert len(_lines(tmp_path / "out" / "skipped.jsonl")) == 1  # it stopped at once
    assert [Path(line["video"]).name for line in _index(tmp_path / "out")] == ["c.mp4", "d.mp4", "f.mp4"]
    assert internalize_many(pipe, folder, tmp_path / "out", max_bad_fraction=0.3, **OPTIONS).num_skipped == 2


def test_what_the_model_cannot_do_with_one_video_is_no_ones_elses_matter(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that yields no finite adapter, one too large for the memory, one that trips a library."""
    forward, preprocess = pipe.forward, pipe.preprocess

    def fails(inputs: Any, **kwargs: Any) -> Any:
        sources = {segment.source for segment in inputs["segments"]}
        if "d.mp4" in sources:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        outputs = forward(inputs, **kwargs)
        if "long.mp4" in sources:
            next(iter(outputs["generated"].lora_A.values()))[:] = float("nan")
        return outputs

    def trips(frames: Any, **kwargs: Any) -> Any:
        if frames.source == "f.mp4":
            raise KeyError("deep in a library")
        return preprocess(frames, **kwargs)

    monkeypatch.setattr(pipe, "forward", fails)
    monkeypatch.setattr(pipe, "preprocess", trips)
    assert _counts(internalize_many(pipe, clips, tmp_path, **OPTIONS)) == (4, 0, 0, 3)
    errors = {Path(line["video"]).name: line["error"] for line in _lines(tmp_path / "skipped.jsonl")}
    assert "NaN" in errors["long.mp4"] and "out of memory" in errors["d.mp4"] and "KeyError" in errors["f.mp4"]


def test_a_chunk_that_trips_a_library_is_no_ones_elses_matter(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pipe._prepare

    def trips(frames: Any) -> Any:
        if frames.source == "d.mp4" and frames.start > 0.5:
            raise KeyError("deep in a library")
        return prepare(frames)

    monkeypatch.setattr(pipe, "_prepare", trips)
    videos = [clips / f"{name}.mp4" for name in "cde"]
    assert _counts(internalize_many(pipe, videos, tmp_path / "out", chunk_seconds=1.0, **OPTIONS)) == (2, 0, 0, 1)
    (skipped,) = _lines(tmp_path / "out" / "skipped.jsonl")
    assert skipped["error"] == "KeyError: 'deep in a library'"

    def fails(inputs: Any, **kwargs: Any) -> Any:
        raise KeyError("a bug of the model's")

    monkeypatch.setattr(pipe, "forward", fails)
    with pytest.raises(KeyError, match="bug of the model"):
        internalize_many(pipe, videos, tmp_path / "bug", chunk_seconds=1.0, **OPTIONS)


def test_a_bug_or_ctrl_c_keeps_what_is_done(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = pipe.forward, iter([None, RuntimeError("a bug"), None, KeyboardInterrupt()])

    def fails(*args: Any, **kwargs: Any) -> Any:
        if error := next(calls):
            raise error
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "forward", fails)
        for expected, done in ((RuntimeError, 2), (KeyboardInterrupt, 4)):
            with pytest.raises(expected):
                internalize_many(pipe, clips, tmp_path, **OPTIONS)
            assert len(_index(tmp_path)) == done
    internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert _files(tmp_path) == _files(whole)


# where it cannot write


def test_a_full_disk_stops_it_and_leaves_nothing_half_written(
    pipe: Any, model_dir: Path, clips: Path, whole: Path, tmp_path: Path
) -> None:
    done = _run(model_dir, clips, tmp_path, limit=10_000)  # bytes a file may have; an adapter's has more
    assert done.returncode == 1
    assert "OSError" in done.stderr and "cannot be written" in done.stderr and "start again" in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "journal"]
    internalize_many(pipe, clips, tmp_path, **OPTIONS)
    assert _files(tmp_path) == _files(whole)


def test_an_output_that_is_something_else_is_refused_and_left_alone(pipe: Any, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    before = _files(tmp_path)
    with pytest.raises(DatasetError, match="is a file"):
        internalize_many(pipe, clips, tmp_path / "file")
    with pytest.raises(DatasetError, match="mine.txt"):
        internalize_many(pipe, clips, tmp_path / "folder")
    with pytest.raises(OSError):
        internalize_many(pipe, clips, tmp_path / "file" / "out")
    assert _files(tmp_path) == before and len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that not even root may write to")
def test_an_unwritable_output(pipe: Any, clips: Path) -> None:
    with pytest.raises(OSError, match="/proc/out"):
        internalize_many(pipe, clips, "/proc/out")


def test_something_else_in_an_adapters_place_is_never_deleted(
    pipe: Any, clips: Path, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    adapter = out / _index(out)[0]["adapter"]
    (adapter / "video2lora.json").unlink()
    (adapter / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match=adapter.name):
        internalize_many(pipe, clips, out, **OPTIONS)
    assert (adapter / "mine.txt").read_text() == "mine"


# sources


def test_rows_of_a_jsonl_file_relative_to_it_with_spans(
    pipe: Any, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(clips, tmp_path / "data")
    rows: list[Any] = [
        {"id": "r0", "video": "b/long.mp4", "start": 0.5, "end": 1.5, "prompt": "What moves?"},
        {"id": "r1", "video": "b/long.mp4", "start": 0.5, "end": 1.5, "prompt": "And where?"},
        {"id": "r2", "video": "b/long.mp4"},
        {"video_path": "c.mp4", "metadata": {"start_time": "00:00:00.500"}, "queries": "not asked"},
        {"id": "r4", "video": "b/long.mp4", "start": 50},
        {"prompt": "of no video"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n"
    (tmp_path / "data" / "rows.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        summary = internalize_many(pipe, "data/rows.jsonl", tmp_path / "out", **OPTIONS)
        assert (summary.num_videos, summary.num_skipped) == (6, 3)
    data = tmp_path / "data"
    lines = _index(tmp_path / "out")
    spans = [(line["video"], line["start"], line["end"], line.get("ids")) for line in lines]
    assert spans == [
        (str(data / "b" / "long.mp4"), 0.5, 1.5, ["r0", "r1"]),
        (str(data / "b" / "long.mp4"), None, None, ["r2"]),
        (str(data / "c.mp4"), 0.5, None, None),
    ]
    assert len({line["adapter"] for line in lines}) == 3
    assert VideoAdapter.from_pretrained(tmp_path / "out" / lines[0]["adapter"]).segments[0].start == 0.5
    late, without, broken = _lines(tmp_path / "out" / "skipped.jsonl")
    assert late["ids"] == ["r4"] and "start=50" in late["error"]
    assert without["row"] == "rows.jsonl:6" and "no video" in without["error"]
    assert broken["row"] == "rows.jsonl:7" and "not JSON" in broken["error"]


def test_a_dataset_with_its_videos_inside(
    pipe: Any, clips: Path, tmp_path: Path, made: list[int], read: list[str]
) -> None:
    def row(name: str) -> dict[str, Any]:
        return {"path": f"{name}.mp4", "bytes": (clips / f"{name}.mp4").read_bytes()}

    dataset = Dataset.from_dict(
        {"id": ["x", "y", "z"], "video": [row("c"), row("d"), row("c")], "start": [None, 0.25, None]}
    )
    out = tmp_path / "out"
    assert _counts(internalize_many(pipe, dataset, out, **OPTIONS))[3] == 0
    lines = _index(out)
    assert [(line["video"], line["row"], line["ids"]) for line in lines] == [
        ("c.mp4", "rows[0]", ["x"]), ("d.mp4", "rows[1]", ["y"]), ("c.mp4", "rows[2]", ["z"])
    ]  # fmt: skip
    assert lines[0]["adapter"] == lines[2]["adapter"] != lines[1]["adapter"]
    assert lines[0]["key"] == pipe.store_key(str(clips / "c.mp4"))
    made.clear(), read.clear()
    assert _counts(internalize_many(pipe, dataset, out, **OPTIONS)) == (0, 0, 3, 0)
    assert read == []
    assert _counts(internalize_many(pipe, dataset.select([1, 0]), out, **OPTIONS)) == (0, 0, 2, 0)
    assert made == []  # the bytes are the same
    dataset.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    assert _counts(internalize_many(pipe, tmp_path / "parquet", out, **OPTIONS)) == (0, 0, 3, 0)
    assert made == []


def test_lists_of_anything(pipe: Any, clips: Path, tmp_path: Path) -> None:
    data = (clips / "e.mp4").read_bytes()
    videos = [clips / "a", str(clips / "c.mp4"), {"video": str(clips / "d.mp4"), "end": 0.5}, data]
    videos += [{"path": "named.mp4", "bytes": (clips / "f.mp4").read_bytes()}, f"file://{clips / 'b' / 'clip.mp4'}"]
    summary = internalize_many(pipe, videos, tmp_path, **OPTIONS)
    assert _counts(summary) == (6, 0, 0, 0)
    assert [line["video"] and Path(line["video"]).name for line in _index(tmp_path)] == [
        "clip.mp4", "c.mp4", "d.mp4", "<bytes>", "named.mp4", "clip.mp4"
    ]  # fmt: skip
    assert _counts(internalize_many(pipe, iter(videos), tmp_path, **OPTIONS)) == (0, 0, 6, 0)


def test_sources_that_are_none(pipe: Any, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        internalize_many(pipe, tmp_path / "rows.jsonl", tmp_path / "out")
    with pytest.raises(DatasetError, match="streaming"):
        rows = Dataset.from_dict({"video": [str(clips / "c.mp4")]}).to_iterable_dataset()
        internalize_many(pipe, rows, tmp_path / "out")
    with pytest.raises(DatasetError, match="no video or video_path"):
        internalize_many(pipe, Dataset.from_dict({"film": ["a"]}), tmp_path / "out")
    for wrong in (3, [torch.zeros(2, 8, 8, 3)]):
        with pytest.raises(TypeError):
            internalize_many(pipe, wrong, tmp_path / "out")
    for options in (
        {"shard": (0, 2)},
        {"batch_size": -1},
        {"num_workers": -1},
        {"max_bad_fraction": 2.0},
        {"max_rank": 9},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            internalize_many(pipe, clips, tmp_path / "out", **options)  # type: ignore[arg-type]
    for sampling in ({"num_frames": 0}, {"fps": 1.0, "num_frames": 2}, {"chunk_seconds": 0.0}):
        with pytest.raises(VideoError):
            internalize_many(pipe, clips, tmp_path / "out", **sampling)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_once(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(clips / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "UPPER.MP4").symlink_to(clips / "c.mp4")
    names = [Path(item.video or "").relative_to(tmp_path) for item in BulkVideos(tmp_path).items()]
    assert names == [Path("UPPER.MP4"), Path("linked/clip.mp4"), Path("linked/long.mp4")]


def test_units_depend_on_the_list_alone(clips: Path) -> None:
    items = BulkVideos(clips).items()
    assert [[item.name for item in unit] for unit in plan_units(items, 3)] == [
        [item.name for item in items[:3]], [item.name for item in items[3:6]], [items[6].name]
    ]  # fmt: skip


def test_a_summary_reads_well(pipe: Any, clips: Path, whole: Path) -> None:
    summary = internalize_many(pipe, clips, whole, **OPTIONS)
    assert summary.num_bytes == sum(line["bytes"] for line in _index(whole))
    assert "7 videos: 0 made, 7 already there, 0 skipped" in str(summary) and str(whole) in str(summary)
