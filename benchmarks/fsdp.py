"""Benchmark: FSDP against DDP: the same losses and checkpoint? resumed exactly? how fast, in how much memory?

Needs neither files nor a processor: batches are synthetic, drawn from the rows' numbers. Tiny models in float32 say
whether the numbers are right, true sizes (bf16 base and autocast) what they cost.

    torchrun --nproc-per-node 2 benchmarks/fsdp.py [--sizes tiny 500M] [--videos 16] [--steps 8]
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import time
import warnings
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from accelerate.state import AcceleratorState
from gradients import prepared  # which brings the tiny size
from safetensors.torch import load_file
from sizes import table, video_inputs
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments

RANK = int(os.environ.get("RANK", 0))
HEADER = ["size", "processes", "way", "first loss", "last loss", "losses against DDP", "checkpoint against DDP",
          "base unchanged", "resumed against unstopped", "step ms", "videos/s", "peak GB", "held GB"]  # fmt: skip
WAYS: dict[str, dict[str, Any] | None] = {"DDP": None, "FSDP2": {"version": 2}, "FSDP1": {"version": 1}}


class Numbers(Dataset):
    """Rows that are only numbers: the collator draws the batch that belongs to them."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> int:
        return index


class Batches:
    """Draws `videos` of 12 frames with one 96-token query each (64 labelled) from the rows' numbers."""

    def __init__(self, size: str, device: str) -> None:
        self.size, self.device = size, device
        self.frames: Tensor | None = None

    def __call__(self, rows: list[int]) -> dict[str, Any]:
        inputs = video_inputs(self.size, 12, len(rows), "cpu" if self.frames is None else "meta")
        if self.frames is None:
            generator = torch.Generator().manual_seed(RANK)
            self.frames = torch.randn(inputs["pixel_values"].shape, generator=generator).bfloat16().to(self.device)
            self.rest = {name: tensor.to(self.device) for name, tensor in inputs.items() if name != "pixel_values"}
        generator = torch.Generator().manual_seed(sum(rows))
        input_ids = torch.randint(3, 49000, (len(rows), 96), generator=generator).to(self.device)
        labels = input_ids.clone()
        labels[:, :32] = -100
        counts = [1] * len(rows)
        return {
            "input_ids": input_ids, "labels": labels, "queries_per_video": counts, "segments_per_adapter": counts,
            "video_inputs": self.rest | {"pixel_values": self.frames.roll(rows[0], 0)},
            "query_weights": torch.ones(len(rows)), "num_videos": len(rows), "kept": list(range(len(rows))),
            "skipped": [], "query_ids": [(str(row), 0) for row in rows],
        }  # fmt: skip


class NoProcessor:
    """Stands where a processor is saved beside the model."""

    tokenizer = None
    model_input_names = ["input_ids"]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        return None


class Clock(TrainerCallback):
    """Seconds of each step but the first three."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        gaps = sorted(b - a for a, b in zip(self.times[2:], self.times[3:], strict=False))
        return gaps[len(gaps) // 2]


def make_trainer(
    size: str, fsdp: dict[str, Any] | None, output: Path, options: argparse.Namespace, **more: Any
) -> tuple[Any, Clock]:
    for name in [name for name in os.environ if name == "ACCELERATE_USE_FSDP" or name.startswith("FSDP_")]:
        del os.environ[name]  # accelerate leaves it there for the next run in this process
    AcceleratorState._reset_state(True)
    on_cpu = options.device == "cpu"
    arguments: dict[str, Any] = {"fsdp": True, "fsdp_config": dict(fsdp)} if fsdp else {}
    if fsdp and on_cpu and fsdp["version"] == 1:
        arguments["fsdp_config"]["sync_module_states"] = False
    args = Video2LoraTrainingArguments(
        output_dir=str(output), max_steps=options.steps, per_device_train_batch_size=options.videos,
        bf16=size != "tiny", logging_steps=1, report_to="none", disable_tqdm=True, num_eval_samples=0,
        dataloader_pin_memory=False, warmup_steps=0, save_only_model=False, use_cpu=on_cpu,
        **({"ddp_backend": "gloo"} if on_cpu else {}), **{"save_strategy": "no"} | arguments | more,
    )  # fmt: skip
    model = prepared(size, str(args.device))
    model.config.base_model_name_or_path = f"random/{size}"  # a name is needed to save; nobody loads it
    if size == "tiny":
        model.vlm.float()
    clock = Clock(options.device)
    trainer = Video2LoraTrainer(
        model, args, Numbers(), processing_class=NoProcessor(), data_collator=Batches(size, str(args.device)),
        callbacks=[clock],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    """The largest difference against each tensor's largest value."""
    if set(ours) != set(theirs):
        return f"other tensors: {sorted(set(ours) ^ set(theirs))[:3]}"
    gaps = [((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max().clamp_min(1e-30)).item() for n in theirs]
    return "identical" if max(gaps) == 0 else f"{max(gaps):.1e}"


def run(size: str, way: str, folder: Path, reference: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Train one way; keep DDP's results in `reference`."""
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    checkpoints = {"save_strategy": "steps", "save_steps": options.steps // 2} if size == "tiny" else {}
    trainer, clock = make_trainer(size, WAYS[way], folder / way, options, **checkpoints)
    base = {name: tensor.clone() for name, tensor in trainer.model.vlm.state_dict().items()}
    trainer.train()
    held, peak = (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()) if on_gpu else (0, 0)
    held -= sum(tensor.nbytes for tensor in base.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    after = trainer.accelerator.unwrap_model(trainer.model).vlm.state_dict()
    unchanged = all(torch.equal(after[name], tensor) for name, tensor in base.items())
    trainer.save_model(str(folder / way / "model"))
    processes = trainer.accelerator.num_processes
    del trainer, base, after
    free(on_gpu)
    resumed = ""
    checkpoints = checkpoints and way != "FSDP1"  # whose resuming is refused
    if checkpoints:
        trainer, _ = make_trainer(size, WAYS[way], folder / way, options)
        trainer.train(resume_from_checkpoint=str(folder / way / f"checkpoint-{options.steps // 2}"))
        trainer.save_model(str(folder / way / "resumed"))
        del trainer
        free(on_gpu)
    torch.distributed.barrier()
    saved = weights(folder / way / "model")
    if checkpoints:
        resumed = difference(weights(folder / way / "resumed"), saved)
    if way == "DDP":
        reference |= {"losses": losses, "weights": saved}
    gap = max(abs(a - b) / abs(b) for a, b in zip(losses, reference["losses"], strict=True))
    seconds = clock.seconds
    return [
        size, str(processes), way, f"{losses[0]:.6f}", f"{losses[-1]:.6f}", f"{gap:.1e}",
        difference(saved, reference["weights"]), str(unchanged), resumed, f"{seconds * 1e3:.0f}",
        f"{processes * options.videos / seconds:.1f}", f"{peak / 1e9:.2f}", f"{held / 1e9:.2f}",
    ]  # fmt: skip


def free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "500M"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--videos", type=int, default=16, help="of a batch, on each GPU")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # torch's, about FSDP1
    folder = Path(gettempdir()) / "video2lora-fsdp"
    rows = []
    for size in options.sizes:
        reference: dict[str, Any] = {}
        for way in options.ways:
            try:
                rows.append(run(size, way, folder / size, reference, options))
            except Exception as error:  # the other ways are worth knowing too
                if way == "DDP":
                    raise
                rows.append([size, "", way, f"{type(error).__name__}: {error}"[:300], *[""] * (len(HEADER) - 4)])
            free(options.device == "cuda")
    if RANK == 0:
        print(f"torch {torch.__version__}")
        print(table(HEADER, rows), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
