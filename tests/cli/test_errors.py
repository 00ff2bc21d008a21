"""Bad input on the command line: one clear line on stderr, an exit code, and nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from video2lora import VideoAdapter
from video2lora.testing import save_tiny_vlm

from ..video.clips import write_sound

Run = Callable[..., Any]


class _Foreign:
    """Unpickling it would make a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


class Bench:
    """A directory with one bad thing of every kind, made when it is asked for."""

    def __init__(self, path: Path, clip: Path, model: Path, base: Path, adapter: Path) -> None:
        self.path, self.clip, self.model, self.base, self.adapter = path, clip, model, base, adapter
        self.out = path / "out"

    def file(self, name: str, content: bytes) -> Path:
        (self.path / name).write_bytes(content)
        return self.path / name

    def internalize(self, video: object, *options: object) -> list[object]:
        return ["internalize", video, "-m", self.model, "-o", self.out, *options]

    def no_frame(self) -> Path:
        """A video whose index is there and whose pictures are all zeros."""
        data = bytearray(self.clip.read_bytes())
        start = data.index(b"mdat") + 4
        stop = data.index(b"moov") - 4
        assert stop > start
        data[start:stop] = bytes(stop - start)
        return self.file("zeros.mp4", bytes(data))

    def changed_adapter(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        directory = shutil.copytree(self.adapter, self.path / "changed")
        weights = directory / "adapter_model.safetensors"
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})
        return directory

    def nameless_adapter(self, known: bool = True) -> Path:
        """An adapter that does not name its base, or even what made it."""
        adapter = VideoAdapter.from_pretrained(self.adapter)
        changed = {"base_model": None} | ({"hypernetwork": "box"} if known else {"hypernetwork": None})
        changed |= {} if known else {"hypernetwork_sha256": None}
        adapter = replace(adapter, provenance=replace(adapter.provenance, **changed))
        return adapter.save_pretrained(self.path / "nameless")

    def other_base(self, **sizes: int) -> Path:
        return save_tiny_vlm("smolvlm", self.path / "other-base", **sizes)

    def foreign_pickle(self) -> Path:
        torch.save({"weight": _Foreign(self.path / "executed")}, self.path / "foreign.pt")
        return self.path / "foreign.pt"


@pytest.fixture
def bench(tmp_path: Path, clip: Path, model_dir: Path, base_dir: Path, adapter_dir: Path) -> Bench:
    return Bench(tmp_path, clip, model_dir, base_dir, adapter_dir)


def _rename(tensors: dict[str, torch.Tensor]) -> None:
    key = next(iter(tensors))
    tensors[key.replace("lora_", "lara_")] = tensors.pop(key)


def _poison(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def _existing(bench: Bench) -> Path:
    bench.out.mkdir()
    return bench.out


# name -> arguments of the command, made on the bench, and what the line must name
CASES: dict[str, tuple[Callable[[Bench], list[object]], list[str]]] = {
    "not a video": (lambda b: b.internalize(b.file("notes.mp4", b"no pictures " * 99)), ["notes.mp4"]),
    "audio only": (lambda b: b.internalize(write_sound(b.path / "sound.m4a")), ["sound.m4a", "no video stream"]),
    "empty file": (lambda b: b.internalize(b.file("empty.mp4", b"")), ["empty.mp4", "empty"]),
    "truncated": (lambda b: b.internalize(b.file("cut.mp4", b.clip.read_bytes()[:900])), ["cut.mp4"]),
    "no frame": (lambda b: b.internalize(b.no_frame()), ["zeros.mp4"]),
    "missing video": (lambda b: b.internalize(b.path / "gone.mp4"), ["gone.mp4", "no such file"]),
    "start after end": (lambda b: b.internalize(b.clip, "--start", 2, "--end", 1), ["start=2.0", "end=1.0"]),
    "start outside": (lambda b: b.internalize(b.clip, "--start", 99), ["clip.mp4", "start=99.0"]),
    "zero frames": (lambda b: b.internalize(b.clip, "--num-frames", 0), ["num_frames=0"]),
    "frames and fps": (lambda b: b.internalize(b.clip, "--num-frames", 2, "--fps", 1), ["num_frames=2", "fps=1.0"]),
    "no chunk": (lambda b: b.internalize(b.clip, "--chunk-seconds", 0), ["chunk_seconds", "0.0"]),
    "endless chunk": (lambda b: b.internalize(b.clip, "--chunk-seconds", "inf"), ["clip.mp4", "chunk_seconds=inf"]),
    "chunk of nan": (lambda b: b.internalize(b.clip, "--chunk-seconds", "nan"), ["chunk_seconds=nan"]),
    "no batch": (lambda b: b.internalize(b.clip, "--batch-size", 0), ["--batch-size", "0"]),
    "device": (lambda b: b.internalize(b.clip, "--device", "toaster"), ["toaster"]),
    "same name": (
        lambda b: ["internalize", b.clip, shutil.copy(b.clip, b.path), "-m", b.model, "-o", b.out],
        ["clip.mp4", "would both become"],
    ),
    "existing output": (
        lambda b: ["internalize", b.clip, "-m", b.model, "-o", _existing(b)],
        ["out", "exists already", "--overwrite"],
    ),
    "foreign output": (
        lambda b: ["internalize", b.clip, "-m", b.model, "-o", b.file("x", b"").parent, "--overwrite"],
        ["something other than a video2lora adapter"],
    ),
    "output in a file": (
        lambda b: ["internalize", b.clip, "-m", b.model, "-o", b.file("x", b"") / "out"],
        ["is a file"],
    ),
    "no network": (lambda b: ["internalize", b.clip, "-m", "somebody/model", "-o", b.out], ["somebody/model"]),
    "missing model": (lambda b: ["internalize", b.clip, "-m", b.path / "gone", "-o", b.out], ["gone", "not there"]),
    "a base as model": (
        lambda b: ["internalize", b.clip, "-m", b.base, "-o", b.out],
        ["smolvlm model, not a video2lora checkpoint"],
    ),
    "an adapter as model": (
        lambda b: ["internalize", b.clip, "-m", b.adapter, "-o", b.out],
        ["clip-lora is an adapter", "'checkpoint'"],
    ),
    "no model of that name": (
        lambda b: ["internalize", b.clip, "-m", "nopedir", "-o", b.out],
        ["no directory nopedir here", "Hub"],
    ),
    "no base inside": (lambda b: ["ask", b.nameless_adapter(), "What?"], ["'box'", "SHA-256", "--base CHECKPOINT"]),
    "no base known": (lambda b: ["ask", b.nameless_adapter(known=False), "What?"], ["does not say", "--base"]),
    "wider base": (
        lambda b: ["ask", b.adapter, "What?", "--base", b.other_base(intermediate_size=96)],
        ["down_proj", "96", "other-base"],
    ),
    "shorter base": (
        lambda b: ["ask", b.adapter, "What?", "--base", b.other_base(num_hidden_layers=2)],
        ["4 decoder layers", "found 2"],
    ),
    "no network for the base": (
        lambda b: ["ask", b.adapter, "What?", "--base", "somebody/base"],
        ["base model 'somebody/base'"],
    ),
    "no question": (lambda b: ["ask", b.adapter], ["no question"]),
    "no tokens": (lambda b: ["ask", b.adapter, "What?", "--max-new-tokens", 0], ["--max-new-tokens", "0"]),
    "renamed key": (lambda b: ["ask", b.changed_adapter(_rename), "What?"], ["lara_", "missing"]),
    "NaN": (lambda b: ["ask", b.changed_adapter(_poison), "What?"], ["NaN", "lora_"]),
    "NaN, inspected": (lambda b: ["inspect", b.changed_adapter(_poison)], ["NaN", "lora_"]),
    "nothing to inspect": (lambda b: ["inspect", b.path], ["neither an adapter", "nor a model"]),
    "no network to inspect": (lambda b: ["inspect", "somebody/thing"], ["somebody/thing"]),
    "weights": (lambda b: ["compose", b.adapter, "-o", b.out, "--weights", "1;2"], ["1;2"]),
    "too few weights": (lambda b: ["compose", b.adapter, b.adapter, "-o", b.out, "--weights", 1], ["2 adapters"]),
    "rank": (lambda b: ["compose", b.adapter, "-o", b.out, "--rank", 0], ["rank", "0"]),
    "foreign global": (
        lambda b: ["import-checkpoint", b.foreign_pickle(), "--base", b.base, "-o", b.out],
        ["foreign.pt", "mkdir"],
    ),
    "missing checkpoint": (lambda b: ["import-checkpoint", b.path / "no.pt", "-o", b.out], ["no.pt", "not there"]),
    "demo of no video": (lambda b: ["demo", b.file("notes.mp4", b"text " * 99), "-o", b.out], ["notes.mp4"]),
    "demo of no model": (lambda b: ["demo", "-m", b.base, "-o", b.out], ["not a video2lora checkpoint"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_nothing_written(run: Run, bench: Bench, case: str) -> None:
    build, named = CASES[case]
    arguments = build(bench)
    before = sorted(bench.path.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in named:
        assert part in line
    assert sorted(bench.path.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        ("ask", "./no/adapter", "What?"),
        ("inspect", "./no/adapter"),
        ("compose", "./no/adapter", "./no/other", "-o", "out"),
        ("internalize", "clip.mp4", "-m", "./no/adapter", "-o", "out"),
        ("demo", "-m", "./no/adapter"),
    ],
    ids=lambda command: command[0],
)
def test_a_path_that_is_not_there_is_said_before_torch_is_imported(command: tuple[str, ...], tmp_path: Path) -> None:
    lines = [
        "import sys",
        "from _video2lora_cli import main",
        f"sys.argv = {['video2lora', *command]!r}",
        "try:",
        "    main()",
        "finally:",
        "    assert not {'torch', 'transformers', 'av'} & set(sys.modules)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "./no/adapter is not there" in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "./" + "x" * 300], ids=["empty", "too long"])
def test_a_name_that_can_be_neither_path_nor_hub_id(name: str, run: Run) -> None:
    done = run("ask", name, "What?")
    assert done.exit_code == 2 and "is not there: give a directory or a Hub id" in done.stderr


def test_a_hypernetwork_that_lost_a_tensor(run: Run, bench: Bench) -> None:
    directory = shutil.copytree(bench.model, bench.path / "model")
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    lost = next(key for key in tensors if "scaler_B" in key)
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    result = run("internalize", bench.clip, "-m", directory, "-o", bench.out)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert lost in line and str(directory) in line
    assert not bench.out.exists()


def test_existing_output_is_refused_before_a_model_is_loaded(
    run: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("video2lora.cli._models.load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run("internalize", bench.clip, "-m", bench.model, "-o", _existing(bench)).exit_code == 2
    two = ["internalize", bench.clip, shutil.copy(bench.clip, bench.path / "b.mp4"), "-m", bench.model]
    shutil.copytree(bench.adapter, bench.out / "b")
    assert "exists already" in run(*two, "-o", bench.out).stderr
    assert "is an adapter" in run(*two, "-o", bench.out / "b").stderr


def test_ctrl_c_ends_quietly_and_leaves_nothing(run: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path, *_: object, **__: object) -> None:
        (directory / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("video2lora.adapters.storage.write_files", interrupted)
    for arguments in (bench.internalize(bench.clip), ["demo", bench.clip, "-m", bench.model, "-o", bench.out]):
        result = run(*arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")
        assert list(bench.path.iterdir()) == []


def test_a_bug_keeps_its_traceback(run: Run, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("video2lora.cli._models.load_pipeline", broken)
    result = run(*bench.internalize(bench.clip))
    assert isinstance(result.exception, TypeError)
    assert result.exit_code == 1


def test_debug_shows_the_traceback_of_an_expected_error(run: Run, bench: Bench) -> None:
    result = run(*bench.internalize(bench.path / "gone.mp4"), "--debug")
    assert type(result.exception).__name__ == "UnreadableVideoError"
