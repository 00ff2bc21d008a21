"""Moving shapes, ablations: one thing changed at a time, at one small budget, several runs at once on each GPU.

    python ablate.py prepare runs/vlm -o runs/ablations              the clips that all variants see, once
    python ablate.py run runs/vlm -o runs/ablations --minutes 9      all variants; --only rank_2 seed_1 for some
    python ablate.py table runs/ablations -o runs/ablations.md

Each goes on where it was stopped when it is started again. What is run stands in `VARIANTS`, before any run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import train_hypernetwork
from ablate_answers import Scores, exact, prepare_answers, score_base
from ablate_data import (
    FORMS,
    SETTINGS,
    WHOLE,
    Answers,
    Budget,
    PreparedBatches,
    batch_file,
    embed,
    prepare_clips,
    write_settings,
)
from accelerate.utils import send_to_device
from transformers import TrainerCallback

from video2lora import Video2LoraModel
from video2lora.data.files import write_atomically
from video2lora.trainer import Video2LoraTrainer
from video2lora.trainer.checkpoints import last_complete_checkpoint

DEFAULT = ("--rank", "8", "--latents", "8", "--target-modules", "down_proj")
SEEDS = 5


@dataclass(frozen=True)
class Variant:
    """One run.

    Attributes:
        subject: what is changed against the default; empty for the default itself.
        options: of train_hypernetwork.py, behind `DEFAULT`.
        composition: whether the clips that were cut are given as segments.
        answers: that are trained on.
        cost: of a step, against the default's: the longest are started first.
    """

    subject: str = ""
    options: tuple[str, ...] = ()
    composition: bool = True
    answers: Answers = "true"
    cost: float = 1.0


VARIANTS: dict[str, Variant] = {
    **{f"seed_{seed}": Variant(options=("--seed", str(seed))) for seed in range(SEEDS)},
    **{f"rank_{n}": Variant("rank (8)", ("--rank", str(n)), cost=0.9 + n / 50) for n in (2, 4, 16)},
    **{f"latents_{n}": Variant("latents (8)", ("--latents", str(n)), cost=0.9 + n / 50) for n in (2, 4, 16)},
    "and_o_proj": Variant("modules (down_proj)", ("--target-modules", "down_proj", "o_proj"), cost=1.4),
    "no_static_part": Variant("static part (on)", ("--no-static",), cost=0.9),
    "no_composition": Variant("composition in the loop (on)", composition=False, cost=0.8),
    "kl": Variant("target (cross-entropy)", ("--ce", "0", "--kl", "1"), cost=2.0),
    "self_distilled": Variant("target (cross-entropy)", answers="own"),
    "captions_only": Variant("asked (captions, questions)", answers="captions", cost=0.8),
}


def main() -> None:
    options = parse()
    if options.command != "table" and not (options.vlm / "model.safetensors").is_file():
        raise SystemExit(f"{options.vlm} has no model.safetensors: expected the folder of stage 1, such as vlm.")
    until = time.time() + 60 * getattr(options, "minutes", 0.0)
    if options.command == "prepare":
        prepare(options, until)
    elif options.command == "run":
        failed = run_variants(options, until)
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; their logs are in {options.output / 'runs'}.")
    elif options.command == "variant":
        run_variant(options)
    else:
        from ablate_table import write_table
        from results_text import check_free

        check_free(options.output, options.overwrite)
        write_table(options.folder, VARIANTS, options.output)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prepared = commands.add_parser("prepare", help="the clips, once for all variants")
    run = commands.add_parser("run", help="the variants, several at once")
    one = commands.add_parser("variant", help="one of them, in this process")
    for command in (prepared, run, one):
        command.add_argument("vlm", type=Path, help="folder of stage 1")
        command.add_argument("-o", "--output", type=Path, required=True)
    for command in (prepared, run):
        command.add_argument("--minutes", type=float, default=9, help="stop after this long, to go on another time")
    for field in fields(Budget):
        prepared.add_argument(f"--{field.name}", type=int, default=field.default)
    prepared.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    run.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    run.add_argument("--parallel", type=int, default=3, help="runs at once on each GPU, which take turns on it")
    one.add_argument("name", choices=VARIANTS)
    one.add_argument("--until", type=float, default=float("inf"), help="stop then, in seconds of the epoch")
    one.add_argument("--starter", type=int, default=os.getppid(), help="process without which it stops")
    one.add_argument("--beside", type=int, default=1, help="runs at once, to be noted with the seconds")
    for command in (run, one):
        command.add_argument("--workers", type=int, default=1, help="processes of each run that read batches")
    table = commands.add_parser("table", help="what came out")
    table.add_argument("folder", type=Path)
    table.add_argument("-o", "--output", type=Path, default=Path("ablations.md"))
    table.add_argument("--overwrite", action="store_true", help="replace a page that is there already")
    return parser.parse_args()


def prepare(options: argparse.Namespace, until: float) -> None:
    """Write batches, the base's own answers to them, and how good it is by itself."""
    budget = Budget(**{field.name: getattr(options, field.name) for field in fields(Budget)})
    write_settings(options.output, options.vlm, budget)
    recipe = recipe_options(options.vlm, options.output, DEFAULT)
    model, processor = train_hypernetwork.build(recipe)
    vlm: Any = model.vlm.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    complete = prepare_clips(vlm, processor, options.output, budget, options.workers, until)
    data = PreparedBatches(options.output, budget.steps, processor)
    base = options.output / "results" / "base.json"
    if complete and not base.exists():
        write_json(base, score_base(vlm, data, budget.validation_batches))
    if complete:
        complete = prepare_answers(vlm, processor, options.output, budget.steps, options.workers, until)
    print("prepared." if complete else "stopped by the clock: start it again to go on.", flush=True)


def read_budget(folder: Path, names: Sequence[str]) -> Budget:
    """What a folder is prepared for.

    Raises:
        SystemExit: it is not, or lacks something that these variants need.
    """
    path = folder / SETTINGS
    if not path.exists():
        raise SystemExit(f"{folder} has no {SETTINGS}: run `ablate.py prepare` first.")
    budget = Budget(**json.loads(path.read_text())["budget"])
    needed = {"validation": budget.validation_batches, "train": budget.steps}
    if any(VARIANTS[name].answers == "own" for name in names):
        needed["answers"] = budget.steps
    wanted = [batch_file(folder, split, i) for split, number in needed.items() for i in range(number)]
    missing = [file for file in wanted if not file.exists()]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(wanted)} files are not prepared: start `ablate.py prepare` again.")
    return budget


def recipe_options(vlm: Path, output: Path, arguments: tuple[str, ...]) -> argparse.Namespace:
    """Options of train_hypernetwork.py: its own defaults where `arguments` say nothing."""
    given, sys.argv = sys.argv, ["train_hypernetwork.py", str(vlm), "-o", str(output), *arguments]
    try:
        return train_hypernetwork.parse()
    finally:
        sys.argv = given


# --- many runs -------------------------------------------------------------------------------------------------------


def run_variants(options: argparse.Namespace, until: float) -> list[str]:
    """Run the variants that have no result, several processes on each GPU; return those that failed."""
    write_settings(options.output, options.vlm, read_budget(options.output, options.only))  # of the same base
    names = sorted(options.only, key=lambda name: -VARIANTS[name].cost)
    for name in names:
        check_result(options.output, name)
    waiting = [name for name in names if not result_file(options.output, name).exists()]
    free = visible_gpus() * options.parallel
    running: dict[str, tuple[subprocess.Popen, str | None]] = {}
    failed = []
    at_once = min(len(free), len(waiting))
    while running or (waiting and time.time() < until):
        while waiting and free and time.time() < until:
            gpu, name = free.pop(0), waiting.pop(0)
            running[name] = (start_run(options, name, gpu, at_once, until), gpu)
        for name, (process, gpu) in list(running.items()):
            if process.poll() is not None:
                del running[name]
                free.append(gpu)
                if process.returncode:
                    failed.append(name)
                print(f"{name}: {last_line(log_file(options.output, name))}", flush=True)
        time.sleep(0.2)
    left = [name for name in names if not result_file(options.output, name).exists()]
    hint = ": start it again to go on" if left and not failed else ""
    print(f"{len(names) - len(left)} of {len(names)} done{hint}.", flush=True)
    return failed


def start_run(options: argparse.Namespace, name: str, gpu: str | None, at_once: int, until: float) -> subprocess.Popen:
    """One variant in a process of its own, which logs to a file."""
    command = [sys.executable, __file__, "variant", str(options.vlm), name, "-o", str(options.output)]
    command += ["--until", str(until), "--workers", str(options.workers), "--beside", str(at_once)]
    command += ["--starter", str(os.getpid())]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))} | os.environ
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = log_file(options.output, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # where this process is interrupted, runs stop by themselves, with a checkpoint
        )


def visible_gpus() -> list[str | None]:
    """What `CUDA_VISIBLE_DEVICES` may be for each; `[None]` without any."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    count = torch.cuda.device_count()
    return list(named) if named != [""] and count else [str(i) for i in range(count)] or [None]


def result_file(folder: Path, name: str) -> Path:
    return folder / "results" / f"{name}.json"


def described(name: str) -> dict[str, Any]:
    """What a variant is, as its result notes it."""
    variant = VARIANTS[name]
    options = [*DEFAULT, *variant.options]
    return {"options": options, "composition": variant.composition, "answers": variant.answers}


def check_result(folder: Path, name: str) -> None:
    """Refuse a result of a variant that was another one then.

    Raises:
        SystemExit: it was.
    """
    path = result_file(folder, name)
    found = json.loads(path.read_text()).get("variant") if path.exists() else None
    if found not in (None, described(name)):
        raise SystemExit(f"{path} is of {found}, and {name} is {described(name)} now: choose another folder.")


def log_file(folder: Path, name: str) -> Path:
    return folder / "runs" / f"{name}.log"


def last_line(path: Path) -> str:
    return next((line for line in reversed(path.read_text().splitlines()) if line.strip()), "")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1).encode())


# --- one run ---------------------------------------------------------------------------------------------------------


def run_variant(options: argparse.Namespace) -> None:
    """Train one variant and write its result, or stop with a checkpoint when the time is over."""
    folder, name = options.output, options.name
    budget, output = read_budget(folder, [name]), folder / "runs" / name
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a run whose starter was killed may still be writing its checkpoint
        if result_file(folder, name).exists():
            return
        trainer, data = make_trainer(options, budget)
        checkpoint = last_complete_checkpoint(str(output))
        clock = output / "seconds.json"  # spent up to each checkpoint
        spent = json.loads(clock.read_text()) if clock.exists() else {}
        before = spent.get(Path(checkpoint).name, 0.0) if checkpoint else 0.0
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds, step = before + time.monotonic() - started, trainer.state.global_step
        if step < budget.steps:
            write_json(clock, spent | {f"checkpoint-{step}": seconds})
            print(f"stopped at step {step} of {budget.steps}", flush=True)
            return
        result = measure(trainer, data, budget) | {"seconds": seconds, "beside": options.beside, "steps": step}
        result["variant"] = described(name)
        result["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        write_json(result_file(folder, name), result)
        shutil.rmtree(output)  # the lock of a run that is done is of no use
        print(f"done in {seconds:.0f} s", flush=True)


def make_trainer(options: argparse.Namespace, budget: Budget) -> tuple[PreparedTrainer, PreparedBatches]:
    """The library's trainer over prepared batches."""
    variant, output = VARIANTS[options.name], options.output / "runs" / options.name
    given = ("--steps", str(budget.steps), "--batch-size", "1", "--workers", str(options.workers))
    prepared = ("--composition", "0")  # the clips are cut
    recipe = recipe_options(options.vlm, output, (*given, *prepared, *DEFAULT, *variant.options))
    model, processor = train_hypernetwork.build(recipe)
    arguments = train_hypernetwork.arguments(recipe)
    arguments.disable_tqdm = True
    data = PreparedBatches(
        options.output,
        budget.steps,
        processor,
        composition=variant.composition,
        answers=variant.answers,
        teacher=bool(recipe.kl),
    )
    trainer = PreparedTrainer(
        model,
        arguments,
        train_dataset=data,
        processing_class=processor,
        data_collator=itemgetter(0),  # an item is a whole batch
        callbacks=[StopInTime(options.until, options.starter)],
    )
    return trainer, data


class PreparedTrainer(Video2LoraTrainer):
    """The library's trainer over batches whose videos are still to be embedded."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        videos = [name for name in ("video_inputs", "teacher_inputs") if name in inputs]
        vlm = self.accelerator.unwrap_model(model).vlm
        embedded = {name: embed(vlm, inputs[name]) for name in videos}
        return super().compute_loss(model, inputs | embedded, *args, **kwargs)


class StopInTime(TrainerCallback):
    """Stops a run at some time, or when the process that started it is gone, with a checkpoint to go on from."""

    def __init__(self, until: float, starter: int) -> None:
        self.until, self.starter = until, starter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step < state.max_steps and (time.time() > self.until or os.getppid() != self.starter):
            control.should_training_stop = control.should_save = True
        return control


@torch.no_grad()
def measure(trainer: PreparedTrainer, data: PreparedBatches, budget: Budget) -> dict[str, Any]:
    """Accuracy on the validation clips in every form, by task, and the sizes of things."""
    model: Video2LoraModel = trainer.accelerator.unwrap_model(trainer.model).eval()
    names = ("input_ids", "attention_mask", "labels", "video_inputs", "queries_per_video", "segments_per_adapter")
    accuracy: dict[str, Any] = {}
    for form in FORMS:
        scores = Scores()
        for number in range(budget.validation_batches):
            batch, tasks = data.validation(number, form)
            batch["video_inputs"] = embed(model.vlm, batch["video_inputs"])
            inputs = send_to_device({key: batch[key] for key in names}, trainer.args.device)
            with trainer.accelerator.autocast():
                outputs = model(**inputs)
            scores.add(tasks, exact(outputs.label_logits, inputs["labels"]))
            if form == WHOLE:
                adapter = outputs.lora[0]
        accuracy[form] = scores.counts
    factors = [*adapter.lora_A.values(), *adapter.lora_B.values()]
    return {
        "accuracy": accuracy,
        "adapter_rank": adapter.ranks[0],
        "adapter_parameters": sum(tensor.numel() for tensor in factors),
        "hypernetwork_parameters": sum(p.numel() for p in model.hypernetwork.parameters()),
        "learning_rate": trainer.args.learning_rate,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


if __name__ == "__main__":
    main()
