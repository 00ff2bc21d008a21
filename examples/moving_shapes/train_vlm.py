"""Moving shapes, stage 1: train the small SmolVLM from scratch until it answers with the clip in its context.

    python train_vlm.py -o runs/vlm --steps 8000 --minutes 9
    torchrun --nproc-per-node 2 train_vlm.py -o runs/vlm --steps 6000 --minutes 9    (on two GPUs)

Run it again to go on: it stops after `--minutes` with its state written, and the schedule counts steps, so pieces
make the same model as one long run. The folder `-o` holds the model and its processor in the ordinary form.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from batches import FRAMES, IGNORE, Form, ShapesBatches
from safetensors.torch import load_file, save_file
from small_vlm import PIXELS, build_processor, build_tokenizer, build_vlm, tiles
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from video2lora.data.moving_shapes import draw, sample_times, vocabulary_texts


def main() -> None:
    options = parse()
    rank, world, device = start_processes()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(options.output, rank)
    model = build_vlm(tokenizer, options.seed).to(device)
    trainer = VlmTrainer(
        model, options.steps, options.learning_rate, world, backend="inductor" if device.type == "cuda" else None
    )
    state = options.output / "state.safetensors"
    if state.exists():
        trainer.load_tensors(load_file(state, device=str(device)))
    train(trainer, make_loader(options, tokenizer, trainer, rank), options, device, rank)
    if rank == 0:
        save(trainer, tokenizer, options.output, state)
        if options.validation:
            rows = validate(trainer, tokenizer, options.validation, device)
            print(json.dumps(rows, indent=1))
            with open(options.output / "validation.jsonl", "a") as file:
                file.write(json.dumps({"step": trainer.step, "exact_match": rows}) + "\n")
    sys.stdout.flush()
    if world > 1:
        torch.distributed.barrier()
    if options.workers:
        os._exit(0)  # workers still hold batches drawn ahead


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=60, help="stop after this long, to go on another time")
    parser.add_argument("--tokens", type=int, default=144_000, help="tokens a batch of one process")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="of each process")
    parser.add_argument("--validation", type=int, default=1024, help="clips")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def start_processes() -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its device; torchrun starts several."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def make_loader(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, trainer: VlmTrainer, rank: int
) -> DataLoader:
    """Batches that no step has seen yet: every process takes each `world`-th."""
    rest = (options.steps - trainer.step) * trainer.world
    return DataLoader(
        ShapesBatches(tokenizer, tokens=options.tokens, seed=options.seed),
        sampler=range(trainer.batches + rank, trainer.batches + rest, trainer.world),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=trainer.gradients.is_cuda,
    )


def train(
    trainer: VlmTrainer, loader: DataLoader, options: argparse.Namespace, device: torch.device, rank: int
) -> None:
    """Take steps until they are done or the time is over, and stop a run that has gone astray."""
    started = since = time.monotonic()
    clips, shown, lowest = 0, [], float("inf")
    for batch in loader:
        shown.append(trainer.train_step(batch, device))
        clips += len(batch["tokens"]) * trainer.world
        if trainer.step % 200 == 0:
            loss = torch.stack(shown).nanmean().item()
            spent = time.monotonic() - since
            if rank == 0:
                speed = f"{len(shown) / spent:.1f} steps/s {clips / spent:.0f} clips/s"
                print(f"step {trainer.step} loss {loss:.4f} norm {trainer.norm.item():.2f} {speed}", flush=True)
            if not loss < 2 * lowest:
                raise SystemExit(f"diverged: loss {loss:.4f} after {lowest:.4f}; try a lower --learning-rate.")
            lowest, clips, shown, since = min(lowest, loss), 0, [], time.monotonic()
        if trainer.step % (1 if trainer.world == 1 else 20) == 0:
            over = time.monotonic() - started > 60 * options.minutes
            if trainer.world > 1:  # all stop at the same step
                said = torch.tensor(over, device=device)
                torch.distributed.broadcast(said, 0)
                over = bool(said)
            if over:
                break


def load_tokenizer(output: Path, rank: int = 0) -> PreTrainedTokenizerFast:
    """The run's own tokenizer; trained at the first start."""
    if rank == 0 and not (output / "tokenizer.json").exists():
        output.mkdir(parents=True, exist_ok=True)
        build_processor(build_tokenizer(vocabulary_texts())).save_pretrained(output)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return PreTrainedTokenizerFast.from_pretrained(output)


class VlmTrainer:
    """The model, its optimiser, and a step over a batch of clips with many questions each."""

    def __init__(
        self, model: Any, steps: int, learning_rate: float, world: int = 1, backend: str | None = None
    ) -> None:
        self.model, self.steps, self.learning_rate, self.world = model.train(), steps, learning_rate, world
        self.step, self.batches, self.norm = 0, 0, torch.zeros(())
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                # softmax does not see it: its gradient is rounding noise, which Adam would take for full steps
                parameter.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.dim() > 1]
        plain = [p for p in trained if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        fused = trained[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=fused)
        # all gradients are views of one tensor: one collective, one norm
        self.gradients = torch.zeros(sum(p.numel() for p in trained), device=trained[0].device)
        for p, part in zip(trained, self.gradients.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)
        if backend:
            for layer in (*model.model.text_model.layers, *model.model.vision_model.encoder.layers):
                layer.compile(backend=backend, dynamic=False)

    def rate(self) -> float:
        """Warm-up over 500 steps, then constant, then falling to nothing over the last third."""
        warm = min(1.0, (self.step + 1) / 500)
        return self.learning_rate * warm * min(1.0, max(0.0, (self.steps - self.step) / (self.steps / 3)))

    def train_step(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """One step; returns the loss, which is not a number where the step was left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = self.loss(batch, device)
        loss.backward()
        if self.world > 1:
            torch.distributed.all_reduce(self.gradients)
            self.gradients.div_(self.world)
        self.norm = self.gradients.norm()
        # a step that went wrong adds nothing, without asking the device
        scale = torch.where(self.norm.isfinite(), self.norm.clamp_min(1.0).reciprocal(), 0.0)
        self.gradients.nan_to_num_(0.0, 0.0, 0.0).mul_(scale)
        self.optimizer.step()
        self.gradients.zero_()
        self.step += 1
        self.batches += self.world
        return loss.detach()

    def loss(self, batch: dict[str, Any], device: torch.device) -> Tensor:
        """Mean over answers; long ones count more than short ones, but not by their length."""
        logits, labels = self.label_logits(batch, device)
        losses = cross_entropy(logits.float(), labels[labels != IGNORE], reduction="none")
        lengths = answer_lengths(labels)
        return (losses / lengths.sqrt()).sum() / (1 / lengths).sum()

    def label_logits(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        """Logits of the tokens that predict labelled ones, and the labels `[clips, tokens]`."""
        form = batch["form"]
        # the usual shape is compiled; it would take longer for all the others than they save
        usual = self.model.training and form.num_frames == FRAMES and form.longest_edge is None
        with torch.compiler.set_stance("default" if usual else "force_eager"):
            return self._label_logits(batch, device)

    def _label_logits(self, batch: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
        moved = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor)}
        prefix, tokens = moved["prefix"], moved["tokens"]
        clips, start = len(tokens), len(prefix)
        model, inner = self.model, self.model.model
        half = device.type == "cuda"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            features = self.visual_features(batch["scenes"], batch["form"]).float()  # the residual stream's dtype
            embed = inner.text_model.get_input_embeddings()
            embeds = embed(torch.cat([prefix.expand(clips, -1), tokens], 1))
            visual = (prefix == model.config.image_token_id).nonzero()[:, 0]
            embeds = embeds.index_copy(1, visual, features)
            positions = torch.cat([torch.arange(start, device=device).expand(clips, -1), moved["positions"]], 1)
            mask = turn_mask(moved["segments"], start, embeds.dtype)
            hidden = inner.text_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
            ).last_hidden_state
            labels = moved["labels"]
            logits = model.lm_head(hidden[:, start - 1 : -1][labels != IGNORE])
        return logits, labels

    def visual_features(self, scenes: Any, form: Form) -> Tensor:
        """What the connector makes of the clips: `[clips, visual tokens, hidden_size]`."""
        times = sample_times(form.num_frames, form.seconds)
        pixels = draw(scenes, times, size=form.longest_edge or PIXELS, device=self.model.device)
        pixels = tiles(pixels.flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1)
        hidden = self.model.model.vision_model(pixel_values=pixels).last_hidden_state
        features = self.model.model.connector(hidden)
        return features.reshape(scenes.num_scenes, -1, features.shape[-1])

    def tensors(self) -> dict[str, Tensor]:
        """Everything a later piece goes on from."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        counts = {"step": torch.tensor(self.step), "batches": torch.tensor(self.batches)}
        return {name: value.contiguous() for name, value in tensors.items()} | counts

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.step, self.batches = int(tensors.pop("step")), int(tensors.pop("batches"))
        model = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
        self.model.load_state_dict(model)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            _, index, kind = name.split(".")
            state.setdefault(int(index), {})[kind] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})


def turn_mask(segments: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask `[clips, 1, tokens, tokens]`: a turn sees the prefix, if it is its own, and itself."""
    clips, width = segments.shape
    whole = torch.cat([segments.new_zeros(clips, prefix), segments], 1)  # 0: the prefix (and padding)
    keys_in_prefix = torch.arange(prefix + width, device=segments.device) < prefix
    padding = (whole == 0) & ~keys_in_prefix
    same = whole[:, :, None] == whole[:, None, :]
    sees = (whole > 0)[:, :, None] & keys_in_prefix[None, None, :]
    causal = torch.ones(prefix + width, prefix + width, dtype=torch.bool, device=segments.device).tril()
    allowed = ((same & ~padding[:, None, :]) | sees) & causal
    allowed |= torch.eye(prefix + width, dtype=torch.bool, device=segments.device)  # no row may see nothing
    return torch.zeros((), dtype=dtype, device=segments.device).masked_fill(~allowed, -1e4)[:, None]


def answer_lengths(labels: Tensor) -> Tensor:
    """For each labelled token, how many its answer has."""
    wanted = labels != IGNORE
    begins = wanted & ~torch.nn.functional.pad(wanted, (1, 0))[:, :-1]
    number = begins.flatten().cumsum(0)[wanted.flatten()] - 1
    return torch.bincount(number)[number].float()


@torch.no_grad()
def validate(
    trainer: VlmTrainer, tokenizer: PreTrainedTokenizerFast, clips: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Share of questions answered to the letter, by task, for 12 frames.

    Every token of the right answer is the likeliest after those before it: just then greedy generation gives it.
    """
    trainer.model.eval()
    right: dict[str, list[float]] = {}
    data = ShapesBatches(tokenizer, split="validation", tokens=144_000, seed=0, varied=False)
    seen = 0
    for number in range(10_000):
        batch, tasks = data.validation_batch(number)
        logits, labels = trainer.label_logits(batch, device)
        wanted = labels[labels != IGNORE]
        begins = torch.nn.functional.pad(labels != IGNORE, (1, 0))
        begins = (begins[:, 1:] & ~begins[:, :-1]).flatten()[(labels != IGNORE).flatten()]
        answers = begins.cumsum(0) - 1
        wrong = torch.bincount(answers, (logits.argmax(-1) != wanted).float())
        for task, count in zip(tasks, wrong.tolist(), strict=True):
            right.setdefault(task, []).append(float(count == 0))
        seen += len(batch["tokens"])
        if seen >= clips:
            break
    trainer.model.train()
    return {task: {"accuracy": sum(v) / len(v), "n": len(v)} for task, v in sorted(right.items())}


def save(trainer: VlmTrainer, tokenizer: PreTrainedTokenizerFast, output: Path, state: Path) -> None:
    """Write the model in the ordinary form, and the state to go on from; each under another name first."""
    part = state.with_suffix(".part")
    save_file(trainer.tensors(), part)
    os.replace(part, state)
    trainer.model.save_pretrained(output)
    build_processor(tokenizer).save_pretrained(output)


if __name__ == "__main__":
    main()
