"""Training runs of tiny models, in this process or in new ones (of one rank or two) that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import TrainerCallback

from video2lora.data import load_rows
from video2lora.modeling import Video2LoraModel
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments
from video2lora.trainer.callbacks import LearningCurveCallback

from ..processes import launch as start
from ..processes import output_to

MODEL: dict[str, Any] = {"latent_size": 8, "num_blocks": 1, "rank": 2, "num_latents": 2, "num_frames": 2}
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "num_eval_samples": 0,
}
SGD: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant"}
"""Linear in the gradients: AdamW turns the rounding of a gradient near 0 into a whole step."""


class DrawnSquares(Dataset):
    """Rows in memory alone: a square that moves through 8 frames, drawn when its row is asked for."""

    def __init__(self, length: int = 8, hole: int | None = None) -> None:
        self.length, self.hole = length, hole

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(index)
        frames = np.full((8, 32, 32, 3), random.integers(0, 60), dtype=np.uint8)
        top, step = random.integers(0, 8), random.integers(1, 3)
        for time, frame in enumerate(frames):
            frame[top : top + 10, step * time : step * time + 10] = random.integers(100, 255, 3)
        video = frames[:0] if index == self.hole else frames
        queries = [{"prompt": f"row {i}?", "response": f"{step} " * (i + 1)} for i in range(1 + index % 3)]
        return {"id": f"drawn-{index}", "video": video, "start": None, "end": None, "queries": queries}


def make_model(base: str | Path, seed: int = 0, **overrides: Any) -> Video2LoraModel:
    """A small hypernetwork whose adapters already change something."""
    torch.manual_seed(seed)
    model = Video2LoraModel.from_vlm(str(base), dtype=torch.float32, **MODEL | overrides)
    with torch.no_grad():
        for name, parameter in model.hypernetwork.named_parameters():
            if name.startswith(("scaler_B", "bias_B")):
                parameter.normal_(std=0.1)
    return model


def make_trainer(
    base: str | Path,
    output: str | Path,
    rows: Sequence[Mapping[str, Any]],
    model: Video2LoraModel | None = None,
    callbacks: list[Any] | None = None,
    eval_rows: Any = None,
    **arguments: Any,
) -> Video2LoraTrainer:
    """A trainer of a fresh model with the settings of these tests."""
    args = Video2LoraTrainingArguments(output_dir=str(output), **ARGUMENTS | arguments)
    model = make_model(base) if model is None else model
    trainer = Video2LoraTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, callbacks=callbacks)
    trainer.remove_callback(LearningCurveCallback)  # 0.2 s a run; test_callbacks.py has trainers that draw it
    return trainer


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of the hypernetwork's parameters."""
    return {name: tensor.detach().clone() for name, tensor in model.hypernetwork.state_dict().items()}


def losses(trainer: Any, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- what runs in new processes ------------------------------------------------------------------------------------


class KillInStep(TrainerCallback):
    """kill -9 in the middle of a step: before the optimizer's, with gradients there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            _die()


def _kill_workers() -> None:
    """Those of the data loader, which would notice only after some seconds that they are alone."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _die() -> None:
    _kill_workers()
    os.kill(os.getpid(), 9)


def train(settings: dict[str, Any], **changes: Any) -> Video2LoraTrainer:
    """Train as `settings` say: what [`make_trainer`] takes, and `resume`, `kill_step`, `kill_writing`."""
    settings = dict(settings) | changes
    resume, kill_step = settings.pop("resume", None), settings.pop("kill_step", None)
    kill_writing = settings.pop("kill_writing", None)
    trainer = make_trainer(**settings, callbacks=[] if kill_step is None else [KillInStep(kill_step)])
    if kill_writing is not None:
        _kill_writing(trainer, *kill_writing)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _kill_writing(trainer: Any, step: int, method: str) -> None:
    """kill -9 right after `method` wrote its part of the checkpoint of `step`; before the mark, after all else."""
    owner = sys.modules[Video2LoraTrainer.__module__] if method == "mark_complete" else trainer
    write = getattr(owner, method)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = None if method == "mark_complete" else write(*args, **kwargs)
        if trainer.state.global_step == step and trainer.is_world_process_zero():
            _die()
        return write(*args, **kwargs) if method == "mark_complete" else result

    setattr(owner, method, dying)


def run_training(output: Path, settings: dict[str, Any]) -> None:
    """Train; leave the weights and the log in `output`."""
    trainer = train(settings)
    if trainer.is_world_process_zero():
        save_file(weights(trainer.model), output / "weights.safetensors")
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))


def run_two(output: Path, base: str, rows: list, broken: str) -> None:
    """All that two processes have to show without being killed, in one go; the results go to `output`."""
    results: dict[str, Any] = {}
    bad = [{"id": f"bad-{i}", "video": broken, "conversations": [{"prompt": "p", "response": "r"}]} for i in range(12)]
    tensors: dict[str, torch.Tensor] = {}

    def keep(name: str, trainer: Any, **more: Any) -> None:
        results[name] = {"losses": losses(trainer), "norms": losses(trainer, "grad_norm"), **more}
        tensors.update({f"{name}/{key}": tensor for key, tensor in weights(trainer.model).items()})

    settings: dict[str, Any] = {"base": base, "max_steps": 3} | SGD
    composed = settings | {"composition_probability": 0.5, "max_queries_per_video": 2}
    keep("equal", train(composed, rows=rows, output=str(output / "equal"), per_device_train_batch_size=2))
    some_bad = [*rows[:3], bad[0]]
    trainer = train(settings, rows=some_bad, output=str(output / "bad"), per_device_train_batch_size=2)
    keep("broken", trainer, counts=[trainer.num_videos, trainer.num_skipped])
    # one row a process: the broken one's process has nothing else in its batch
    trainer = train(settings, rows=[rows[1], bad[0]], output=str(output / "bad1"), per_device_train_batch_size=1)
    keep("dummy", trainer, counts=[trainer.num_videos, trainer.num_skipped])
    for name, few in (("many", {}), ("none", {"max_bad_fraction": 0.0})):
        given = bad if name == "many" else [*rows[:7], bad[0]]
        try:
            train(settings, rows=given, output=str(output / name), per_device_train_batch_size=2, **few)
        except ValueError as error:
            results[name] = str(error)
    trainer = make_trainer(
        base, output / "eval", None, eval_rows=[*rows[:5], bad[0], rows[5]], per_device_eval_batch_size=2
    )
    results["eval"] = trainer.evaluate()["eval_loss"]
    results["streams"] = _evaluate_streams(base, output, [*rows[:5], bad[0], *rows[5:]])
    rank = os.environ["RANK"]
    (output / f"results-{rank}.json").write_text(json.dumps(results))
    save_file(tensors, output / f"weights-{rank}.safetensors")


def _evaluate_streams(base: str, output: Path, rows: list) -> dict[str, Any]:
    """Of each number of shards and workers: the loss, and the ids of the rows that this process collated."""
    found: dict[str, Any] = {}
    for shards, workers in ((1, 0), (4, 0), (3, 2)):
        settings = {"per_device_eval_batch_size": 2, "dataloader_num_workers": workers}
        stream = load_rows(rows).to_iterable_dataset(num_shards=shards)
        trainer = make_trainer(
            base, output / "stream", None, eval_rows={"all": stream, "few": stream.take(1)}, **settings
        )
        seen: list[str] = []
        take = trainer.prediction_step

        def spying(model: Any, inputs: Any, *args: Any, take: Any = take, seen: Any = seen, **kwargs: Any) -> Any:
            seen += [row for row, number in inputs["query_ids"] if number == 0 and row]  # "" is a dummy's
            seen += [message.partition(":")[0] for message in inputs["skipped"]]
            return take(model, inputs, *args, **kwargs)

        trainer.prediction_step = spying
        metrics = trainer.evaluate()
        passed = trainer.evaluate(stream)["eval_loss"], trainer.predict(stream).metrics["test_loss"]
        losses = [metrics["eval_all_loss"], *passed]
        found[f"{shards} {workers}"] = {"losses": losses, "few": metrics["eval_few_loss"], "seen": seen}
    return found


def _fsdp_on_a_cpu() -> None:
    """accelerate switches FSDP on for GPUs alone, and falls back to DDP; FSDP itself runs on gloo too."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    init = AcceleratorState.__init__

    def switched_on(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.device = PartialState._shared_state["device"] = torch.device("cpu")  # not cpu:0
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = switched_on  # type: ignore[method-assign]


def run_fsdp(output: Path, settings: dict[str, Any]) -> None:
    """Train with FSDP; leave the model, the log and what became of the base in `output`."""
    _fsdp_on_a_cpu()
    settings = dict(settings)
    resume, kill_step = settings.pop("resume", None), settings.pop("kill_step", None)
    trainer = make_trainer(**settings, callbacks=[] if kill_step is None else [KillInStep(kill_step)])
    base = {name: tensor.clone() for name, tensor in trainer.model.vlm.state_dict().items()}
    assert trainer.is_fsdp_enabled and trainer.accelerator.distributed_type.value == "FSDP"
    trainer.train(resume_from_checkpoint=resume)
    vlm = trainer.accelerator.unwrap_model(trainer.model).vlm
    after = vlm.state_dict()
    sharded = [name for name, p in trainer.model.named_parameters() if hasattr(p, "placements")]
    found = {
        "kinds": [type(module).__name__ for module in trainer.model.modules() if "FSDP" in type(module).__name__
                  or type(module).__name__ == "FullyShardedDataParallel"],
        "sharded": sharded,
        "base": all(torch.equal(after[name], tensor) for name, tensor in base.items()) and set(after) == set(base),
        "frozen": all(p.grad is None and not p.requires_grad for p in vlm.parameters()),
        "log": trainer.state.log_history,
    }  # fmt: skip
    trainer.save_model(str(output / "model"))
    (output / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


def _child(rank: int, target: Callable[..., None], output: Path, arguments: dict[str, Any]) -> None:
    if "RANK" in os.environ:
        ARGUMENTS["ddp_backend"] = "gloo"
        os.environ["ACCELERATE_USE_CPU"] = "true"
    output_to(output / f"stderr-{rank}.txt")
    try:
        target(output, **arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        _kill_workers()
        os._exit(1)
    sys.stderr.flush()
    _kill_workers()
    os._exit(0)


def launch(
    target: Callable[..., None], output: Path, processes: int = 1, timeout: float = 120, **arguments: Any
) -> list[int | None]:
    """Run `target(output, **arguments)` in new processes (`tests.processes.launch`); their exit codes."""
    output.mkdir(parents=True, exist_ok=True)
    return start(_child, target, output, arguments, processes=processes, timeout=timeout)


def succeed(target: Callable[..., None], output: Path, processes: int = 1, **arguments: Any) -> Path:
    """[`launch`] that must end well; returns `output`."""
    codes = launch(target, output, processes, **arguments)
    if any(codes) or None in codes:
        said = [path.read_text()[-3000:] for path in sorted(output.glob("stderr-*.txt"))]
        raise AssertionError(f"exit codes {codes}:\n" + "\n---\n".join(said))
    return output


def saved(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "weights.safetensors")


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The hypernetwork in a checkpoint folder."""
    state = load_file(checkpoint / "model.safetensors")
    assert all(name.startswith("hypernetwork.") for name in state)
    return {name.removeprefix("hypernetwork."): tensor for name, tensor in state.items()}


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def assert_near(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """To float32 rounding: the difference against the largest value of each tensor."""
    assert set(ours) == set(theirs)
    for name in ours:
        gap = (ours[name] - theirs[name]).abs().max().item()
        assert gap <= tolerance * theirs[name].abs().max().item(), (name, gap)
