"""Moving shapes, stage 2: train a hypernetwork for the small VLM, which stays as it is, with the library's Trainer.

    python train_hypernetwork.py vlm -o runs/hypernetwork --steps 10000 --minutes 9
    torchrun --nproc-per-node 2 train_hypernetwork.py ...    (on two GPUs)

Run it again to go on: it stops after `--minutes` with a checkpoint, and the schedule counts steps: constant after the
warm-up, falling to nothing over the last third, so how many there are may be decided till then. Clips are never the
same twice, and drawn where the model is (clips.py); what is asked about them leaves out two kinds of question and all
held-out phrasings, to see what an adapter knows that it was never trained to say.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from batches import Form
from clips import FormedClips, SceneClips, SceneCollator, SceneTrainer
from safetensors.torch import load_file
from small_vlm import compile_layers, fuse_norms
from transformers import AutoProcessor, TrainerCallback

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.data.moving_shapes import TASKS, MovingShapes
from video2lora.modeling.turns import Labelled
from video2lora.trainer import Video2LoraTrainingArguments

HELD_OUT_TASKS = ("existence", "size")
TRAINED_TASKS = tuple(task for task in TASKS if task not in HELD_OUT_TASKS)
IN_TURN = ("colour", "shape", "count", "position")  # what is learnt soonest: one of them about each clip
ASKED = (*(task for task in TRAINED_TASKS if task not in IN_TURN), "how_often", "order")  # the last to be learnt twice
HISTORY = "history.json"  # beside the weights: the runs that made them


def main() -> None:
    options = parse()
    if (options.output / "model.safetensors").exists():
        raise SystemExit(f"{options.output} is finished: name another folder, and --start-from {options.output}.")
    model, processor = build(options)
    made = arguments(options)
    train = FormedClips(
        options.batch_size * made.world_size,
        plain=options.plain,
        composition=options.composition,
        seed=options.seed,
        queries_per_video=options.queries,
        tasks=options.tasks or ASKED,
        in_turn=() if options.tasks else IN_TURN,
    )
    asked = list(dict.fromkeys(options.tasks or TRAINED_TASKS))
    validation = MovingShapes("validation", max(1, options.validation), tasks=asked)
    trainer = SceneTrainer(
        model,
        made,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=processor,
        callbacks=[StopAfter(options.minutes)],
    )
    if trainer.is_world_process_zero() and not (options.output / HISTORY).exists():  # else it goes on
        run = {"steps": options.steps, "clips": options.batch_size * made.world_size}
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / HISTORY).write_text(json.dumps([*history(options.start_from), run]), encoding="utf-8")
    trainer.train(resume_from_checkpoint=any(options.output.glob("checkpoint-*")))
    if trainer.state.global_step >= options.steps:
        trainer.save_model()
        if options.validation:  # behind what must not be lost
            trainer.evaluate()
            trainer.save_model()  # its card tells of it
    if options.validation and trainer.is_world_process_zero():
        found = {name: validate(model, processor, form, options.validation) for name, form in VALIDATED.items()}
        print(as_table(found), flush=True)
        with open(options.output / "validation.jsonl", "a") as file:
            file.write(json.dumps({"step": trainer.state.global_step, "exact_match": found}) + "\n")
    state = PartialState()
    state.wait_for_everyone()  # a process that outlives the others hangs when it lets go of them
    state.destroy_process_group()


def history(folder: Path | None) -> list[dict[str, int]]:
    """Steps, and clips a step at most, of the runs that made a model's weights, in order; none if not written."""
    file = folder / HISTORY if folder else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vlm", type=Path, help="folder of stage 1")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a folder of a model, whose hypernetwork to begin with")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long and validate, to go on later")
    parser.add_argument("--batch-size", type=int, default=256, help="clips of one process")
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--queries", type=int, help="about each clip; by default one for each of its tasks")
    easy, rest = ", ".join(IN_TURN), ", ".join(dict.fromkeys(ASKED))
    told = f"asked about each clip, a name twice for two questions; by default {rest}, and one of {easy}"
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help=told)
    parser.add_argument(
        "--plain", type=int, default=1000, help="steps at first that show 12 frames of whole clips; not with --kl"
    )
    parser.add_argument("--composition", type=float, default=0.4, help="share of later steps with clips in segments")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--target-modules", nargs="+", default=["down_proj"])
    parser.add_argument("--no-static", action="store_true", help="no learned part common to all videos")
    parser.add_argument(
        "--kl",
        type=float,
        default=0.0,
        help="weight of the divergence from the VLM that sees the clip, 12 frames of it: slow, drawn on the CPU",
    )
    parser.add_argument("--ce", type=float, default=1.0, help="weight of the cross-entropy on the answers")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--validation", type=int, default=512, help="clips; 0: none")
    parser.add_argument("--compile", action="store_true", help="compile the layers: slow to start, for long runs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[Video2LoraModel, Video2LoraProcessor]:
    """A hypernetwork on the trained VLM, new or as it was left, in bfloat16 where there is a GPU."""
    torch.manual_seed(options.seed)
    model = Video2LoraModel.from_vlm(
        options.vlm,
        dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        rank=options.rank,
        target_modules=options.target_modules,
        use_static_lora=not options.no_static,
        latent_size=256,
        num_latents=options.latents,
        num_blocks=options.blocks,
        perceiver_num_heads=8,
        perceiver_num_key_value_heads=4,
        perceiver_head_dim=32,
        num_frames=12,
        longest_edge=64,
        # a sum of adapters knows no order: a segment has to say itself when it was
        prompt_timestamps="file",
    )
    fuse_norms(model.vlm)
    if options.start_from:
        tensors, prefix = load_file(options.start_from / "model.safetensors"), "hypernetwork."
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        model.hypernetwork.load_state_dict(weights)
        model.name_or_path = str(options.start_from)  # what the run's card says it began with
    if options.compile:
        compile_layers(model)
    processor = AutoProcessor.from_pretrained(options.vlm)
    return model, Video2LoraProcessor.from_config(model.config, vlm_processor=processor)


def arguments(options: argparse.Namespace) -> Video2LoraTrainingArguments:
    """The run's arguments; the rest is the recipe's."""
    return Video2LoraTrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=128,
        learning_rate=options.learning_rate,
        warmup_steps=min(200, options.steps // 10),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": options.steps // 3},
        train_sampling_strategy="sequential",  # every row is drawn by chance already
        seed=options.seed,
        ce_weight=options.ce,
        kl_weight=options.kl,
        teacher="online" if options.kl else None,
        composition_probability=options.composition if options.kl else 0.0,  # else by the batch: clips.py
        max_segments=8,
        adam_beta2=0.98,
        logging_nan_inf_filter=False,  # which waits for the device at every step
        pack_queries=True,
        bf16=torch.cuda.is_available(),
        dataloader_num_workers=options.workers,
        dataloader_persistent_workers=options.workers > 0,
        dataloader_prefetch_factor=4 if options.workers else None,
        logging_steps=max(1, min(50, options.steps // 4)),
        num_eval_samples=8,
        save_strategy="no",  # when it stops
        report_to="none",
    )


VALIDATED = {
    "12 frames": Form(),
    "96 frames": Form(96, 96),
    "2 segments": Form(12, 96, segments=2),
    "8 segments": Form(12, 96, segments=8),
    "128 pixels": Form(longest_edge=128),
}


@torch.no_grad()
def validate(model: Video2LoraModel, processor: Video2LoraProcessor, form: Form, clips: int) -> dict[str, float]:
    """Share of questions about new clips that the adapter answers to the letter, by task; those held out too.

    Every token of the right answer is the likeliest after those before it: just then greedy generation gives it.
    """
    rows, collator = SceneClips("validation", clips, num_frames=form.seconds), SceneCollator(processor)
    device, size = model.device, form.clips(256)
    right: dict[str, list[float]] = {}
    model.eval()
    for start in range(0, clips, size):
        part = [rows[i] | {"form": form} for i in range(start, min(start + size, clips))]
        batch = collator.batch_of(part)
        frames = batch["frames"].pixel_values(device, model.vlm.dtype, form.longest_edge)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask", "labels", "turns")}
        videos = {name: value.to(device) for name, value in batch["video_inputs"].items()} | {"pixel_values": frames}
        counts = {name: batch[name] for name in ("queries_per_video", "segments_per_adapter")}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(**inputs, **counts, video_inputs=videos).label_logits
        labelled = Labelled.of(inputs["labels"], inputs["turns"])
        wrong = logits.argmax(-1) != inputs["labels"][labelled.rows, labelled.columns + 1]
        wrong_of = torch.bincount(labelled.queries, wrong.float(), labelled.num_queries).tolist()
        tasks = [query["task"] for row in part for query in row["queries"]]
        for task, count in zip(tasks, wrong_of, strict=True):
            right.setdefault(task, []).append(float(count == 0))
    model.train()
    return {task: round(sum(values) / len(values), 4) for task, values in sorted(right.items())}


def as_table(found: dict[str, dict[str, float]]) -> str:
    """Accuracies by form and task, to be read."""
    tasks = list(next(iter(found.values())))
    lines = ["".join(f"{word:>12}" for word in ["", *tasks])]
    lines += ["".join([f"{name:>12}", *(f"{row[task]:>12.3f}" for task in tasks)]) for name, row in found.items()]
    return "\n".join(lines)


class StopAfter(TrainerCallback):
    """Stops a run after some minutes, with a checkpoint to go on from; all processes at the same step."""

    def __init__(self, minutes: float) -> None:
        self.started, self.minutes, self.first = time.monotonic(), minutes, 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.first:
            self.first, self.since = state.global_step + 1, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % (10 if args.world_size > 1 else 1) == 0:
            over = torch.tensor(time.monotonic() > self.started + 60 * self.minutes, device=args.device)
            if bool(broadcast(over)):
                control.should_training_stop = control.should_save = True
        return control

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken = state.global_step - self.first + 1
        if state.is_world_process_zero and self.first:
            spent = time.monotonic() - self.since
            print(f"step {state.global_step}: {taken / spent:.2f} steps/s", flush=True)


if __name__ == "__main__":
    main()
