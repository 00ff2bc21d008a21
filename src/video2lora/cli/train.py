"""Command line: `video2lora train`, a training run from a YAML file, on one process or many."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError, about, check_is_there
from ._output import note, print_fields
from ._terminal import printable

if TYPE_CHECKING:
    from ..trainer import Video2LoraTrainer, Video2LoraTrainingArguments
    from ._run_file import RunFile

LEFT_OUT = ("missing_file", "unreadable_video", "span_outside_video")
"""Kinds of problems for which training leaves a row out, and goes on while they are few."""


def train(
    config: Annotated[Path, typer.Argument(help="YAML file: model, data, training.", show_default=False)],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint, if there is one.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as training.max_steps=100; give several."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Check rows and videos before anything is loaded.")] = True,
) -> None:
    """Train a hypernetwork.

    Ends with the model, its card and its learning curve in training.output_dir. Stopped at any moment, the same
    command with --resume goes on. For several GPUs: accelerate launch -m video2lora train ...
    """
    from ..data import DatasetError
    from ._run_file import read_run_file

    run = read_run_file(config, settings or ())
    args = _arguments(run, config)
    checkpoint = _where_to_start(Path(str(args.output_dir)), resume, args.process_index == 0)
    try:
        if check:
            with args.main_process_first(desc="checking the dataset"):
                if args.process_index == 0:
                    _check(run, args)
        trainer = _trainer(run, args, config)
        if checkpoint is not None:
            _check_checkpoint(checkpoint, trainer)
        trainer.train(checkpoint)
        if trainer.eval_dataset is not None and args.eval_strategy == "no":
            trainer.evaluate()
    except DatasetError as error:
        raise CommandError(str(error)) from error
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if args.process_index == 0:
        _show(trainer)
    trainer.accelerator.end_training()


def _arguments(run: RunFile, config: Path) -> Video2LoraTrainingArguments:
    """The training arguments; building them starts this process's part in the launch."""
    from transformers.utils.logging import disable_progress_bar

    from ..trainer import Video2LoraTrainingArguments

    quiet = {} if sys.stderr.isatty() else {"disable_tqdm": True}  # a line for each log entry instead
    if quiet:
        disable_progress_bar()  # those of loading and saving
    with about(str(config)):
        return Video2LoraTrainingArguments(**quiet | run.training)


def _where_to_start(output_dir: Path, resume: bool, main: bool) -> str | None:
    """The checkpoint to go on from.

    Raises:
        CommandError: the folder has an earlier run in it, and nobody said to go on with that.
    """
    from ..trainer.checkpoints import last_complete_checkpoint

    if not resume:
        earlier = last_complete_checkpoint(output_dir) or next(output_dir.glob("model*.safetensors"), None)
        if earlier:
            raise CommandError(
                f"{output_dir} holds an earlier run ({Path(earlier).name}): pass --resume to go on with it, or choose "
                "another training.output_dir."
            )
        cut_short = sorted(path.name for path in output_dir.glob("checkpoint-*"))
        if cut_short and main:
            names = ", ".join(cut_short)
            told = f"{output_dir} holds {names}, not written to the end: what gets the same name is replaced"
            typer.echo(told, err=True)
        return None
    checkpoint = last_complete_checkpoint(output_dir)
    if main:
        found = f"going on from {checkpoint}" if checkpoint else f"no checkpoint in {output_dir}: starting"
        typer.echo(found, err=True)
    return checkpoint


def _check_checkpoint(checkpoint: str, trainer: Video2LoraTrainer) -> None:
    from ..trainer.checkpoints import check_same_model

    with about(checkpoint):
        check_same_model(checkpoint, trainer.accelerator.unwrap_model(trainer.model).config)


# --- data ------------------------------------------------------------------------------------------------------------


def _check(run: RunFile, args: Video2LoraTrainingArguments) -> None:
    """Refuse data that training would stop at; tell of rows it would leave out.

    Raises:
        CommandError: something is wrong in a way training cannot leave out, or in too many rows.
    """
    from ..data import check_rows

    workers = max(args.dataloader_num_workers, 4)
    for key, split in (("train", run.data.get("split")), ("eval", run.data.get("eval_split"))):
        source = run.data.get(key)
        if source is None:
            continue
        with about(str(source)):
            report = check_rows(source, split=split, video_root=run.data.get("video_root"), num_workers=workers)
        if report.problems:
            typer.echo(printable(f"{source}: {report}"), err=True)
        lost = {problem.row for problem in report.errors if problem.kind in LEFT_OUT}
        fatal = {problem.row for problem in report.errors if problem.kind not in LEFT_OUT}
        if fatal or len(lost) > args.max_bad_fraction * report.num_rows:
            raise CommandError(
                f"{source}: {len(fatal | lost)} of {report.num_rows} rows cannot be trained on, as told above: mend "
                "or remove them."
            )
        if report.num_missing_responses:
            raise CommandError(
                f"{source}: {report.num_missing_responses} of {report.num_queries} queries have no response: let a "
                "teacher answer them first (`video2lora teach`)."
            )
        if not report.num_rows:
            raise CommandError(f"{source} has no rows.")


def _data(run: RunFile, seed: int) -> tuple[Any, Any]:
    """The rows to train on, and those to evaluate on or `None`."""
    from datasets import IterableDataset

    from ..data import group_queries, load_rows

    data, root = run.data, run.data.get("video_root")
    with about(str(data["train"])):
        train: Any = load_rows(data["train"], split=data.get("split"), video_root=root)
    held_out: Any = None
    count = data.get("eval_rows")
    if data.get("eval") is not None:
        with about(str(data["eval"])):
            held_out = load_rows(data["eval"], split=data.get("eval_split"), video_root=root)
        if count is not None:
            held_out = held_out.take(count) if isinstance(held_out, IterableDataset) else _first(held_out, count)
    elif count is not None and isinstance(train, IterableDataset):
        train, held_out = train.skip(count), train.take(count)
    elif count is not None:
        train, held_out = hold_out(train, count, seed)
    sets = [train, held_out]
    if data.get("group_queries"):
        sets = [None if rows is None else group_queries(rows) for rows in sets]
    names = [_name(data["train"]), _name(data["eval"]) if data.get("eval") else f"{_name(data['train'])}, held out"]
    for rows, name in zip(sets, names, strict=True):
        if rows is not None:
            rows.info.dataset_name = name  # the model's card tells where they are from
    return sets[0], sets[1]


def hold_out(rows: Any, count: int, seed: int) -> tuple[Any, Any]:
    """Take whole videos, drawn by `seed`, out of `rows` until at least `count` rows are out: (the rest, those).

    Raises:
        CommandError: nothing would be left to train on.
    """
    from ..data.forms import video_key

    keys = [video_key(row["video"]) for row in rows.select_columns("video")]
    sizes = Counter(keys)  # in the order of the rows: where the videos lie does not matter
    videos = list(sizes)
    random.Random(seed).shuffle(videos)
    chosen: set[str] = set()
    out = 0
    while videos and out < count:
        chosen.add(videos[-1])
        out += sizes[videos.pop()]
    rest = [i for i, key in enumerate(keys) if key not in chosen]
    if not rest:
        raise CommandError(f"data.eval_rows is {count}, which leaves nothing of {len(keys)} rows to train on.")
    return rows.select(rest), rows.select([i for i, key in enumerate(keys) if key in chosen])


def _first(rows: Any, count: int) -> Any:
    return rows.select(range(min(count, len(rows))))


def _name(source: str | list[str]) -> str:
    if isinstance(source, list):
        return ", ".join(Path(part).name for part in source)
    return Path(source).name if Path(source).exists() else source


# --- model -----------------------------------------------------------------------------------------------------------


def _trainer(run: RunFile, args: Video2LoraTrainingArguments, config: Path) -> Video2LoraTrainer:
    from transformers import set_seed

    from ..trainer import Video2LoraTrainer

    train, held_out = _data(run, args.seed)
    set_seed(args.seed)  # a fresh hypernetwork is drawn
    with about(str(run.model.get("base") or run.model["checkpoint"])):
        model, processor = _model(run, args.process_index == 0)
    with about(str(config)):
        return Video2LoraTrainer(
            model=model, args=args, train_dataset=train, eval_dataset=held_out, processing_class=processor
        )


def _model(run: RunFile, main: bool) -> tuple[Any, Any]:
    """The model, and its processor where a checkpoint has one."""
    from ..modeling import Video2LoraModel, Video2LoraProcessor
    from ..modeling.processor import SETTINGS
    from ._models import load_config

    options = {key: run.model[key] for key in ("dtype", "attn_implementation") if run.model.get(key) is not None}
    revision, fields = run.model.get("revision"), run.config_fields
    name = run.model.get("base") or run.model["checkpoint"]
    check_is_there(name, "the base model " if run.model.get("base") else "")
    if main:
        note(f"loading {name}")
    if run.model.get("base") is not None:
        return Video2LoraModel.from_vlm(name, revision, **fields, **options), None
    fixed = load_config(name, revision)
    for key, value in fields.items():
        made_with = getattr(fixed, key)
        if key not in SETTINGS and value != made_with:
            raise CommandError(f"model.{key} is {value!r}, but the checkpoint {name} was made with {made_with!r}.")
    model = Video2LoraModel.from_pretrained(name, revision=revision, **options)
    processor = Video2LoraProcessor.from_pretrained(name, revision=revision)
    for key in set(fields) & set(SETTINGS):
        setattr(model.config, key, fields[key])
        setattr(processor, key, fields[key])
    return model, processor


def _show(trainer: Video2LoraTrainer) -> None:
    """What came of it, and where it is."""
    from ..trainer.curve import CURVE_FILE, eval_losses, logged

    output_dir, history = Path(str(trainer.args.output_dir)), trainer.state.log_history
    losses = logged(history, "loss") or logged(history, "train_loss")
    fields: dict[str, object] = {
        "steps": trainer.state.global_step,
        "training loss": f"{losses[-1][1]:.4f}" if losses else None,
    }
    for name, points in eval_losses(history).items():
        step, best = min(points, key=lambda point: point[1])
        fields[f"evaluation loss{', ' * bool(name)}{name}"] = f"{points[-1][1]:.4f} (best {best:.4f} at step {step})"
    left_out = f"{trainer.num_skipped} of {trainer.num_videos} videos" if trainer.num_skipped else None
    samples = output_dir / "samples"
    fields |= {
        "left out": left_out,
        "best checkpoint": trainer.state.best_model_checkpoint,
        "model": output_dir,
        "card": output_dir / "README.md",
        "learning curve": output_dir / CURVE_FILE if (output_dir / CURVE_FILE).exists() else None,
        "samples": samples if samples.exists() else None,
    }
    print_fields(fields)
