"""Moving shapes, stage 3: answer held-out questions in every condition, and write down what came out.

    python prove.py run CHECKPOINT -o runs/proof                      (killed and started again, it goes on)
    python prove.py run CHECKPOINT -o runs/proof --only main frames_4 --processes 12
    python prove.py report runs/proof -o results.md [--captions-only runs/proof_captions_only]

What is run, on how many clips, and within which margins, stands in proof_runs.py; `run` writes it into the folder
before the first answer. Runs are cut into shards, which processes take one by one, those that take longest first;
several processes share a GPU, since one keeps neither a GPU nor the cores busy.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from proof_runs import (
    ALPHA,
    ENOUGH,
    GROUP,
    GROUP_PICTURES,
    KEPT,
    LEARNT,
    LOSS,
    MARGIN,
    METRICS,
    QUESTIONS,
    RUNS,
    Run,
    ShapesProcessor,
    benchmark_of,
    make_condition,
    processor_of,
)
from pyarrow import ArrowException
from pyarrow.parquet import read_schema

from video2lora import Video2LoraModel
from video2lora.data.files import write_atomically
from video2lora.evaluation.conditions import Decoding
from video2lora.evaluation.records import RECORDS
from video2lora.evaluation.runner import evaluate_model

DECLARED = "proof.json"
TRIES = 4  # of a shard, where several processes share the memory of a GPU


@dataclass(frozen=True)
class Job:
    """A shard of a run: what a process takes at a time."""

    name: str
    run: Run
    clips: range
    output: Path

    @classmethod
    def all_of(cls, name: str, run: Run, folder: Path) -> list[Job]:
        """The shards of a run, each with a folder of its own."""
        return [cls(name, run, clips, folder / name / f"clips_{clips.start:05d}") for clips in run.shards]

    @property
    def finished(self) -> bool:
        """Whether its answers are there and scored; a kill may have come between the two."""
        file = self.output / RECORDS
        try:
            return file.exists() and set(METRICS) <= set(read_schema(file).names)
        except ArrowException as error:
            raise SystemExit(f"{file} is damaged ({error}): remove {self.output} and run it again.") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("checkpoint")
    run.add_argument("-o", "--output", type=Path, required=True)
    run.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    run.add_argument("--clips", type=int, help="at most so many a run instead of those declared: for trying out")
    run.add_argument("--processes", type=int, default=default_processes(), help="spread over the GPUs there are")
    report = commands.add_parser("report")
    report.add_argument("runs", type=Path)
    report.add_argument("-o", "--output", type=Path, default=Path("results.md"))
    report.add_argument("--captions-only", type=Path, help="the folder of a hypernetwork trained on captions only")
    report.add_argument("--overwrite", action="store_true", help="replace a page that is there already")
    options = parser.parse_args()
    if options.command == "report":
        from results import write_results
        from results_text import check_free

        check_free(options.output, options.overwrite)
        write_results(options.runs, options.output, options.captions_only)
        return
    runs = declare(options.output, options.clips)
    jobs = [job for name in options.only for job in Job.all_of(name, runs[name], options.output)]
    prove(options.checkpoint, jobs, options.processes)


def default_processes() -> int:
    """One for two cores where there is a GPU: each draws and encodes its own clips. One on a CPU alone.

    They take turns on a GPU, which is why each asks so many questions at once: more processes launch no more.
    """
    return max(1, (os.cpu_count() or 1) // 2) if torch.cuda.is_available() else 1


def declare(folder: Path, clips: int | None) -> dict[str, Run]:
    """Write down what is going to be run, unless that was done; what was declared stays.

    Raises:
        SystemExit: something else was declared in this folder.
    """
    runs = RUNS if clips is None else {name: replace(run, clips=min(clips, run.clips)) for name, run in RUNS.items()}
    cut = {"group": GROUP, "group_pictures": GROUP_PICTURES}  # shards of another size have the same names
    limits = cut | {"margin": MARGIN, "loss": LOSS, "kept": KEPT, "learnt": LEARNT, "enough": ENOUGH, "alpha": ALPHA}
    declared: dict[str, Any] = json.loads(json.dumps(limits | {"runs": {n: asdict(run) for n, run in runs.items()}}))
    file = folder / DECLARED
    if file.exists():
        there = json.loads(file.read_text(encoding="utf-8"))
        if {name: there.get(name) for name in declared} != declared:
            raise SystemExit(f"{file} declares other runs or margins, and they stay: name another folder.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        date = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        write_atomically(file, json.dumps(date | declared, indent=1).encode() + b"\n")
    return runs


def read_declared(folder: Path) -> tuple[dict[str, Any], dict[str, Run]]:
    """What a folder declares, and its runs."""
    declared = json.loads((folder / DECLARED).read_text(encoding="utf-8"))
    runs = {name: Run(**run | {"conditions": tuple(run["conditions"])}) for name, run in declared["runs"].items()}
    return declared, runs


def prove(checkpoint: str, jobs: list[Job], processes: int) -> None:
    """Do the jobs that are not done, in this process or in several; those that take longest first.

    Raises:
        RuntimeError: a process died; what is done is kept.
    """
    left = sorted((job for job in jobs if not job.finished), key=lambda job: -job.run.cost(job.clips))
    started, processes = time.monotonic(), min(processes, len(left))
    print(f"{len(left)} of {len(jobs)} shards to do, {processes} processes", flush=True)

    def tell(number: int, job: Job, seconds: float) -> None:
        spent = time.monotonic() - started
        print(f"{number}/{len(left)} {job.name} {job.clips.start} {seconds:.1f} s, {spent:.0f} s in all", flush=True)

    if processes <= 1:
        if left:
            begin(checkpoint, 0)
        for number, job in enumerate(left, start=1):
            tell(number, job, answer(job))
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("spawn")
    arguments = (checkpoint, None, context.Value("i", 0))
    with ProcessPoolExecutor(processes, context, begin, arguments) as pool:
        waiting = {pool.submit(answer, job): job for job in left}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                tell(number, waiting[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_worker: dict[str, Any] = {}  # of this process: its model and where that is from


def begin(checkpoint: str, rank: int | None, ranks: Any = None) -> None:
    """Make a process ready: its share of the GPUs, one thread, the model."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if ranks is not None:
        threading.Thread(target=_die_with_parent, daemon=True).start()
        torch.set_num_threads(1)
        with ranks.get_lock():
            rank, ranks.value = ranks.value, ranks.value + 1
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device((rank or 0) % torch.cuda.device_count())
    model = Video2LoraModel.from_pretrained(checkpoint, dtype=torch.bfloat16 if on_gpu else torch.float32)
    _worker.update(checkpoint=checkpoint, model=model.to("cuda" if on_gpu else "cpu").eval())


def _die_with_parent() -> None:
    """A killed parent's processes would go on writing into folders in which another start works."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def answer(job: Job) -> float:
    """Do a shard; its folder gets the records and `run.json`. Returns seconds."""
    started = time.monotonic()
    for attempt in range(TRIES):
        try:
            evaluate(job, _worker["model"], processor_of(_worker["checkpoint"], job.run))
            break
        except torch.OutOfMemoryError:  # the others' memory; what was answered stays
            if attempt == TRIES - 1:
                raise
        torch.cuda.empty_cache()
        time.sleep(5)
    if _worker["model"].device.type == "cuda":
        torch.cuda.empty_cache()  # several processes share the memory
    return time.monotonic() - started


def evaluate(job: Job, model: Video2LoraModel, processor: ShapesProcessor) -> None:
    """Let all conditions of a run answer the questions about a shard's clips."""
    evaluate_model(
        model,
        processor,
        benchmark_of(job.run, job.clips),
        [make_condition(name, model, processor) for name in job.run.conditions],
        job.output,
        decoding=Decoding(max_new_tokens=96, batch_size=QUESTIONS * job.run.group),
        metrics=METRICS,
        margins={"exact_match": MARGIN},
        alpha=ALPHA,
        num_workers=1,
    )


if __name__ == "__main__":
    main()
