"""Trainer: what a run knows about itself, for the model's card."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..hub_cards.training_card import DataFacts, Evaluation, TrainingFacts
from .arguments import Video2LoraTrainingArguments
from .curve import CURVE_FILE, eval_losses

if TYPE_CHECKING:
    from .callbacks import ModelCardCallback
    from .trainer import Video2LoraTrainer

LIBRARIES = ("video2lora", "torch", "transformers", "accelerate", "datasets", "peft")
# where a run keeps things, what it shows, and secrets: of no consequence for the weights
LOCAL = {"output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "accelerator_config"}
LOCAL |= {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "num_eval_samples", "debug"}
LOCAL |= {"eval_max_new_tokens", "overwrite_output_dir", "greater_is_better", "gradient_checkpointing"}
LOCAL_PREFIXES = ("hub_", "log", "save_", "trackio_", "eval_", "dataloader_", "per_device_eval", "ddp_timeout")


def collect_facts(trainer: Video2LoraTrainer, card: ModelCardCallback) -> TrainingFacts:
    """What the card says about a training run, as far as it is known by now."""
    args, state = trainer.args, trainer.state
    output_dir = Path(str(args.output_dir))
    devices = f"{args.world_size} x " if args.world_size > 1 else ""
    best = state.best_global_step if args.load_best_model_at_end else None
    samples = sorted((output_dir / "samples").glob("step-*.md"), key=lambda path: path.stat().st_mtime)
    return TrainingFacts(
        train=describe_data(trainer.train_dataset, card.sources["train"]),
        evals=_describe_evals(trainer.eval_dataset, card.sources["eval"]),
        step=state.global_step,
        max_steps=state.max_steps,
        first_step=card.first_step,
        epochs=state.epoch,
        weights_step=best or state.global_step,
        seconds=card.seconds,
        device=devices + _device_name(args.device),
        per_device_batch=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        optimisation=_optimisation(args),
        loss=_loss(args),
        precision="bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        seed=args.seed,
        evaluations=[Evaluation(name, points) for name, points in eval_losses(state.log_history).items()],
        began_with=card.began_with,
        num_videos=trainer.num_videos,
        num_skipped=trainer.num_skipped,
        hyperparameters=non_default_arguments(args),
        curve=CURVE_FILE if (output_dir / CURVE_FILE).is_file() else None,
        samples=f"samples/{samples[-1].name}" if samples else None,
        versions=_versions(),
    )


def describe_checkpoint(model: Any) -> str | None:
    """Where a model's weights were loaded from: a Hub id at its commit, a folder by its name; `None` if they are new.

    To be asked before training, which forgets the commit.
    """
    if not model.name_or_path:
        return None
    name, hub_id = _source_name(model.name_or_path)
    commit = f" at `{model.checkpoint_commit}`" if hub_id and model.checkpoint_commit else ""
    return f"`{name}`{commit}"


def describe_data(dataset: Any, source: Any = None) -> DataFacts | None:
    """Name and size of a data set.

    Args:
        dataset: the rows, as the trainer has them.
        source: as the user gave them: a path's last part or a Hub id is their name, else the `dataset_name` that the
            `datasets` library keeps in `dataset.info`.
    """
    if dataset is None:
        return None
    name, hub_id = _source_name(source)
    if name is None:
        info: Any = getattr(source, "info", None) or getattr(dataset, "info", None)
        name = getattr(info, "dataset_name", None)
    try:
        num_rows: int | None = len(dataset)
    except TypeError:  # streaming
        return DataFacts(name, hub_id)
    columns = getattr(dataset, "column_names", None) or ()
    queries = sum(len(row["queries"]) for row in dataset.select_columns("queries")) if "queries" in columns else None
    return DataFacts(name, hub_id, num_rows, queries)


def non_default_arguments(args: Video2LoraTrainingArguments) -> dict[str, Any]:
    """Arguments with another value than their default, without those that leave the weights as they are."""
    found = {}
    for field in dataclasses.fields(args):
        if not field.init or field.name in LOCAL or field.name.startswith(LOCAL_PREFIXES) or "token" in field.name:
            continue
        make: Any = field.default_factory
        default = _plain(field.default if make is dataclasses.MISSING else make())
        value = _plain(getattr(args, field.name))
        if value != default and not (default is None and value is False):  # None is resolved to it
            found[field.name] = value
    if found.get("teacher") not in (None, "online"):
        found["teacher"] = Path(found["teacher"]).name
    return found


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _source_name(source: Any) -> tuple[str | None, str | None]:
    """The name of a source that was given as text, and its Hub id where it is one."""
    if isinstance(source, (list, tuple)) and source and all(isinstance(s, (str, os.PathLike)) for s in source):
        return ", ".join(Path(s).name for s in source), None
    if not isinstance(source, (str, os.PathLike)):
        return None, None
    text = os.fspath(source)
    on_hub = isinstance(source, str) and text.count("/") == 1 and not text.startswith((".", "/", "~"))
    if on_hub and not os.path.exists(text):
        return text, text
    return Path(text).resolve().name, None


def _describe_evals(datasets: Any, sources: Any) -> dict[str, DataFacts]:
    if datasets is None:
        return {}
    if isinstance(datasets, dict):
        given: Mapping[str, Any] = sources if isinstance(sources, Mapping) else {}
        described = {name: describe_data(dataset, given.get(name)) for name, dataset in datasets.items()}
    else:
        described = {"": describe_data(datasets, sources)}
    return {name: facts for name, facts in described.items() if facts is not None}


def _optimisation(args: Video2LoraTrainingArguments) -> str:
    warmup = args.warmup_steps
    steps = f"{warmup:g} of the steps" if 0 < warmup < 1 else f"{warmup:g} steps"
    return (
        f"{_plain(args.optim)}, learning rate {args.learning_rate:g} ({_plain(args.lr_scheduler_type)}, warm-up over "
        f"{steps}), weight decay {args.weight_decay:g}, gradients clipped at {args.max_grad_norm:g}"
    )


def _loss(args: Video2LoraTrainingArguments) -> str:
    parts = [f"{args.ce_weight:g} x cross-entropy"] if args.ce_weight else []
    if args.kl_weight:
        temperature = f"T = {args.kl_temperature:g}"
        parts.append(f"{args.kl_weight:g} x KL divergence from the base that sees the video ({temperature})")
    loss = " + ".join(parts)
    if args.composition_probability:
        loss += (
            f"; with probability {args.composition_probability:g} a video is cut into up to {args.max_segments} "
            "segments, which are composed"
        )
    return loss


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # a source checkout that is not installed
            continue
    return found
