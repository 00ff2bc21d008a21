"""Efficiency: a sweep over frames and resolutions of what answering questions about a video takes, with and without
adapters; in a folder that keeps every measurement as it is made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import torch
import transformers

from ..adapters.provenance import public_name
from ..video import load_video
from .efficiency_conditions import QUERY_CONDITIONS, VIDEO_CONDITIONS, Bench, attempt, measure_case, measure_queries
from .efficiency_measure import Clock
from .efficiency_models import Subject, find_subject
from .efficiency_prompts import Case, make_case, text_tokens
from .efficiency_results import (
    FORMAT_VERSION,
    Cell,
    EfficiencyError,
    Folder,
    Results,
    decode_key,
    device_key,
    preprocess_key,
    query_key,
)
from .efficiency_video import FPS, HEIGHT, WIDTH, make_video, measure_decode, measure_preprocess

__all__ = ["EfficiencyError", "Sweep", "run_sweep"]

DECODED_ONCE_ABOVE = 64
"""Frames from which decoding is timed by a single run: it takes seconds."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        model: "500M" or "2.2B" (SmolVLM2's sizes, random weights), or a checkpoint or base by name.
        frames: numbers of frames.
        longest_edges: pixels that frames as images are resized to.
        repeats: runs of a measurement, at most.
        new_tokens: tokens of an answer after the first.
        max_tokens: cases with more tokens in their context are left out.
    """

    model: str
    frames: tuple[int, ...]
    longest_edges: tuple[int, ...]
    repeats: int = 5
    new_tokens: int = 32
    max_tokens: int = 131072

    def __post_init__(self) -> None:
        for name in ("frames", "longest_edges"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise EfficiencyError(f"{name} must be numbers of at least 1, got {list(values)}.")
            object.__setattr__(self, name, tuple(sorted(set(values))))
        for name in ("repeats", "new_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise EfficiencyError(f"{name} must be at least 1, got {getattr(self, name)}.")


def run_sweep(
    sweep: Sweep,
    output_dir: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Callable[[str], None] | None = None,
) -> Results:
    """Measure all that is not yet in `output_dir`.

    A sweep that was cut short goes on where it stopped; the same folder takes more frames or resolutions later. Cells
    whose work on the device is the same (resolutions that give the same tiles) are measured once.

    Args:
        sweep: what to measure.
        output_dir: gets `sweep.json` and `measurements.jsonl`.
        device: where the model runs.
        dtype: of the base; bfloat16 on an accelerator, float32 on a CPU by default.
        progress: told of each measurement in a line.

    Returns:
        All measurements in the folder.

    Raises:
        EfficiencyError: the folder holds another sweep, or the base cuts no images into tiles.
    """
    subject = find_subject(sweep.model)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    cells, cases = _plan(sweep, subject)
    folder = Folder(output_dir, _settings(sweep, subject, device, dtype), cells)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for key, row in _timed(_measure_device(sweep, subject, folder, cases, device, dtype)):
            folder.append(key, row)
            _tell(progress, key, row)
    for key, row in _timed(_measure_cpu(sweep, subject, folder, cells)):
        folder.append(key, row)
        _tell(progress, key, row)
    return folder.results


def _plan(sweep: Sweep, subject: Subject) -> tuple[list[Cell], dict[str, Case]]:
    """All cells, and the different cases among them, the short ones first."""
    duration = max(sweep.frames) / FPS
    cells, cases = [], {}
    edges: list[int | None] = [*sweep.longest_edges]
    if subject.video_processor is not None:
        edges.append(None)
    for edge in edges:
        for frames in sweep.frames:
            path: Any = "video" if edge is None else "images"
            case = make_case(subject.rules, path, frames, (WIDTH, HEIGHT), edge or subject.rules.tile, duration)
            cases[case.key] = case
            cells.append(Cell(path, frames, edge, case.key, case.tiles, case.context_tokens, case.visual_tokens))
    return cells, dict(sorted(cases.items(), key=lambda item: item[1].context_tokens))


def _settings(sweep: Sweep, subject: Subject, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "format_version": FORMAT_VERSION,
        "model": public_name(sweep.model),
        "weights": subject.weights,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "av": av.__version__},
        "frames": sweep.frames,
        "longest_edges": sweep.longest_edges,
        "repeats": sweep.repeats,
        "new_tokens": sweep.new_tokens,
        "max_tokens": sweep.max_tokens,
        "trained_context": subject.trained_context,
        "text_tokens": text_tokens(subject.rules),
        "video": {"width": WIDTH, "height": HEIGHT, "fps": FPS},
        "threads": torch.get_num_threads(),
    }


def _measure_device(
    sweep: Sweep, subject: Subject, folder: Folder, cases: dict[str, Case], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measurement on the device that the folder lacks."""
    fitting = [case for case in cases.values() if case.context_tokens <= sweep.max_tokens]
    missing: dict[str, tuple[str, ...]] = {
        case.key: tuple(c for c in VIDEO_CONDITIONS if not folder.has(device_key(case.key, c))) for case in fitting
    }
    todo = [case for case in fitting if missing[case.key]]
    has_queries = all(folder.has(query_key(name)) for name in QUERY_CONDITIONS)
    if not fitting or (not todo and has_queries):
        return
    positions = max(case.context_tokens for case in fitting) + 1 + sweep.new_tokens
    model = subject.load(device, dtype, positions)
    rules, smallest = subject.rules, min(fitting, key=lambda case: case.frames * case.tiles)
    tiles = max(case.frames * case.tiles for case in [smallest, *todo])
    bench = Bench(model, rules.image_token_id, rules.tile, tiles, sweep.repeats, sweep.new_tokens)
    attempt(lambda: _warm_up(bench, smallest))
    if not has_queries:
        for row in measure_queries(bench, smallest, text_tokens(rules)):
            yield query_key(row["condition"]), row
    for case in todo:
        for row in measure_case(bench, case, missing[case.key]):
            yield device_key(case.key, row["condition"]), row


@torch.no_grad()
def _warm_up(bench: Bench, case: Case) -> dict[str, Any]:
    """Load kernels and libraries, which takes seconds once."""
    inputs = bench.inputs(case, case.question_tokens)
    bench.generate(Clock(bench.device), inputs, 2)
    bench.model.internalize(**inputs)
    return {}


def _measure_cpu(
    sweep: Sweep, subject: Subject, folder: Folder, cells: Sequence[Cell]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measurement of decoding and preprocessing that the folder lacks, on a video made for it."""
    decodes = [frames for frames in sweep.frames if not folder.has(decode_key(frames))]
    keys = {cell: preprocess_key(cell.path, cell.frames, cell.longest_edge) for cell in cells}
    prepares = [cell for cell in cells if not folder.has(keys[cell])]
    if not decodes and not prepares:
        return
    with TemporaryDirectory(prefix="video2lora-benchmark-") as temporary:
        video = Path(temporary) / "video.mp4"
        about = make_video(video, max(sweep.frames))
        load_video(video, num_frames=1)
        for frames in decodes:
            repeats = sweep.repeats if frames <= DECODED_ONCE_ABOVE else 1
            yield (
                decode_key(frames),
                {"video": about} | measure_decode(video, frames, max(sweep.longest_edges), repeats),
            )
        for cell in prepares:
            row = measure_preprocess(
                subject, video, cell.path, cell.frames, cell.longest_edge, cell.tiles, sweep.repeats
            )
            yield keys[cell], row


def _timed(measurements: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measurements with the seconds that each took in all, to plan by."""
    start = time.perf_counter()
    for key, row in measurements:
        now = time.perf_counter()
        yield key, row | {"wall_seconds": round(now - start, 3)}
        start = now


def _tell(progress: Callable[[str], None] | None, key: str, row: dict[str, Any]) -> None:
    line = f"{key}: {row.get('status', 'ok')}, {row['wall_seconds']:.1f} s"
    logger.info(line)
    if progress is not None:
        progress(line)
