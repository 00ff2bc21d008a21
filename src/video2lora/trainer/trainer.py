"""Trainer: a thin Trainer for hypernetworks; the base is frozen, the loss is counted over queries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, has_length, rotate_checkpoints
from transformers.utils import PushInProgress, logging

from ..data import load_rows
from ..data.errors import DatasetError
from ..modeling import Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from ..modeling.processor import IGNORE_INDEX
from ..modeling.turns import check_turns_fit
from .arguments import Video2LoraTrainingArguments
from .callbacks import add_run_callbacks
from .checkpoints import (
    HUB_FILES,
    check_same_model,
    is_complete,
    last_complete_checkpoint,
    mark_complete,
    mark_incomplete,
    position_in_data,
)
from .collator import Video2LoraCollator
from .losses import kl_per_token, kl_top_k_per_token, mean_per_query
from .sharding import check_same_sharding, load_sharded, save_optimizer, shard_hypernetwork_alone
from .streams import EvenStream, SkipFillers

logger = logging.get_logger(__name__)


class Video2LoraTrainer(Trainer):
    """Trains the hypernetwork of a [`Video2LoraModel`]; everything else is transformers' Trainer.

    The loss is the mean over all queries of a global step (every process and every accumulated batch) of each query's
    mean over its labelled tokens, so unequal numbers of queries, accumulation and processes change nothing.

    Args:
        model: the model.
        args: [`Video2LoraTrainingArguments`].
        train_dataset, eval_dataset: whatever [`load_rows`] takes (a JSONL path, rows, a `datasets` object, streaming
            too), or what it returned; or a `torch.utils.data.Dataset` with a length whose items are rows of that form
            (`id`, `video`, `queries`, and `start`, `end` of a span), for videos that are drawn or read by own code:
            `video` may be frames in memory, and items are asked for in the data loader's workers.
        processing_class: the model's processor; by default that of its base with the model's settings, or the one
            beside the model where that holds its base.
        kwargs: what transformers' Trainer takes. A `data_collator` of your own makes the training batches, as its own
            options say.
    """

    args: Video2LoraTrainingArguments
    # Trainer must not divide again by the number of accumulated batches (two spellings of two versions)
    loss_is_scaled_for_ga = True
    push_in_progress: Any

    def __init__(
        self,
        model: Video2LoraModel,
        args: Video2LoraTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Video2LoraProcessor | None = None,
        **kwargs: Any,
    ) -> None:
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "DeepSpeed's ZeRO-3 cuts every weight of the base into pieces, which passes through single layers of "
                "it do not put together: train with DDP or FSDP instead (docs/training.md)."
            )
        self.processor = processing_class or _processor_of(model)
        options: dict[str, Any] = {"seed": args.seed, "online_teacher": args.teacher == "online"}
        options["pixel_dtype"] = model.vlm.dtype
        if args.pack_queries:
            check_turns_fit(model.vlm)
            options["pack_queries"] = True
        self.train_collator = Video2LoraCollator(
            self.processor,
            composition_probability=args.composition_probability,
            max_segments=args.max_segments,
            max_queries_per_video=args.max_queries_per_video,
            num_frames_range=args.num_frames_range,
            **options,
        )
        collator = kwargs.pop("data_collator", None) or self.train_collator
        if isinstance(collator, Video2LoraCollator):
            self.train_collator = collator  # it is told which epoch it is
        self.eval_collator = SkipFillers(Video2LoraCollator(self.processor, training=False, **options))
        self.teacher = _open_teacher(args.teacher)
        if args.n_gpu > 1:
            logger.warning(f"training on one of {args.n_gpu} GPUs: start with `accelerate launch` to use all of them.")
            args._n_gpu = 1  # Trainer would wrap the model in DataParallel, which cannot split these batches
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=_as_rows(train_dataset),
            eval_dataset=_as_rows(eval_dataset),
            processing_class=self.processor,
            **kwargs,
        )
        model.config.__dict__.pop("use_cache", None)  # Trainer's, and no field of this configuration
        if self.is_fsdp_enabled:
            shard_hypernetwork_alone(self.accelerator.state.fsdp_plugin, model, args.device)
        self.model_accepts_loss_kwargs = True
        self.num_videos = self.num_skipped = 0
        self._losses: list[Tensor] = []
        self.passes = _Passes(self)
        self.add_callback(self.passes)
        self.card = add_run_callbacks(self, train_dataset, eval_dataset)

    # --- batches ---------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's, with all queries and whole videos."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._evenly(_as_rows(eval_dataset))
        with self._evaluation_batches():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the parent's, with all queries and whole videos."""
        with self._evaluation_batches():
            return super().get_test_dataloader(self._evenly(_as_rows(test_dataset)))

    @contextmanager
    def _evaluation_batches(self) -> Iterator[None]:
        training, self.data_collator = self.data_collator, self.eval_collator
        given, self.eval_dataset = self.eval_dataset, self._evenly(self.eval_dataset)
        try:
            yield
        finally:
            self.data_collator, self.eval_dataset = training, given

    def _evenly(self, dataset: Any) -> Any:
        """The dataset, or each of several; streams such that they give every process as many batches."""
        if isinstance(dataset, dict):
            return {name: self._evenly(part) for name, part in dataset.items()}
        if self.args.world_size == 1 or not isinstance(dataset, TorchIterableDataset):
            return dataset
        return EvenStream(dataset, self.args.eval_batch_size * self.args.world_size)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The weights of all queries of a global step together, over all processes.

        The videos left out are counted in the same exchange, so every process sees the same count and stops, or goes
        on, with the others.
        """
        if not batch_samples:
            return None
        weight = sum(float(batch["query_weights"].sum()) for batch in batch_samples)
        skipped = [message for batch in batch_samples for message in batch["skipped"]]
        videos = sum(int(batch["num_videos"]) for batch in batch_samples)
        _log_skipped(skipped)
        left_out = len(skipped)
        if self.accelerator.num_processes > 1:  # alone there is nobody to ask, and no device to wait for
            counts = torch.tensor([[weight, videos, left_out]], dtype=torch.float32, device=device)
            weight, videos, left_out = self.accelerator.gather(counts).sum(0).tolist()
        self._count(int(videos), int(left_out))
        return weight or 1.0

    def _count(self, videos: int, skipped: int) -> None:
        """Keep count of the videos left out, and stop when they are too many."""
        self.num_videos += videos
        self.num_skipped += skipped
        allowed = max(self.args.max_bad_fraction * self.num_videos, self.args.max_bad_fraction * 100)
        if self.num_skipped > allowed:
            raise DatasetError(
                f"{self.num_skipped} of {self.num_videos} videos could not be read, more than max_bad_fraction="
                f"{self.args.max_bad_fraction} allows: run check_rows on the dataset (the log names each video)."
            )

    # --- loss ------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum of the weighted query losses over the queries of the global step."""
        names = ("input_ids", "attention_mask", "labels", "turns", "video_inputs", "teacher_inputs")
        arguments = {name: inputs[name] for name in names if name in inputs}
        counts = {name: inputs[name] for name in ("queries_per_video", "segments_per_adapter")}
        with self.accelerator.autocast():  # which FSDP2 leaves to us
            outputs = model(**arguments, **counts)
        losses = self._query_losses(outputs, inputs)
        weights = inputs["query_weights"].to(losses)
        if num_items_in_batch is None:
            num_items_in_batch = weights.sum().clamp_min(1.0)
        # gradients are averaged over processes, but the queries were counted over all of them
        loss = (losses * weights).sum() / num_items_in_batch * self.accelerator.num_processes
        self._losses = [losses.detach(), weights]
        return (loss, outputs) if return_outputs else loss

    def _query_losses(self, outputs: Any, inputs: dict[str, Any]) -> Tensor:
        """Each query's loss: the recipe's cross-entropy, the divergence from the teacher, or a mixture."""
        args = self.args
        losses = args.ce_weight * outputs.query_losses
        if not args.kl_weight:
            return losses
        if outputs.teacher_logits is not None:
            divergence = kl_per_token(outputs.label_logits, outputs.teacher_logits, args.kl_temperature)
        elif not inputs["query_weights"].any():  # nothing is stored for a dummy
            return losses
        else:
            divergence = kl_top_k_per_token(outputs.label_logits, **self._stored_targets(inputs))
        return losses + args.kl_weight * mean_per_query(divergence, inputs["labels"], inputs.get("turns"))

    def _stored_targets(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What a teacher has stored for the labelled tokens of a batch, in row order.

        Raises:
            DatasetError: there is nothing for a query, or it is of other tokens than are trained on.
        """
        stored = []
        labels, turns = inputs["labels"].cpu(), inputs.get("turns")
        queries: Any = labels
        if turns is not None:  # numbered anew in every row
            queries = [
                row[turn == n] for row, turn in zip(labels, turns.cpu(), strict=True) for n in turn.unique() if n
            ]
        for key, labels in zip(inputs["query_ids"], queries, strict=True):
            row_id, number = key
            if key not in self.teacher:
                raise DatasetError(f"{self.args.teacher} has no logits for query {number} of row {row_id!r}.")
            targets = self.teacher[key]
            if targets.pop("labels").tolist() != labels[labels != IGNORE_INDEX].tolist():
                raise DatasetError(
                    f"the teacher's logits for query {number} of row {row_id!r} are of another response or tokenizer: "
                    "train on the manifest that lies beside them."
                )
            stored.append(targets)
        device = inputs["labels"].device
        return {name: torch.cat([targets[name] for targets in stored]).to(device) for name in stored[0]}

    # --- evaluation ------------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, None, None]:
        """The loss alone; generated answers are the samples callback's business."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs) / self.accelerator.num_processes
        _log_skipped(inputs["skipped"])
        losses, weights = self._losses
        counts = inputs["queries_per_video"]
        by_video = zip((losses * weights).split(counts), weights.split(counts), strict=True)
        totals = losses.new_zeros(int(inputs["num_videos"]), 2)
        for place, (part, count) in zip(inputs["kept"], by_video, strict=True):
            totals[place] = torch.stack([part.sum(), count.sum()])
        # drops the rows that were repeated to give every process a full last batch
        self._eval_totals += self.accelerator.gather_for_metrics(totals).cpu().double().sum(0)
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's, with the loss counted over queries rather than averaged over batches.

        Raises:
            DatasetError: not one video could be read.
        """
        self._eval_totals = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        total, count = self._eval_totals.tolist()
        if not count:  # a loss of 0 would be the best there is
            raise DatasetError("no video of the evaluation set could be read: run check_rows on it.")
        metrics: dict[str, float] = output.metrics or {}
        metrics[f"{prefix}_loss"] = total / count
        return output

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end.

        Raises:
            ValueError: there is none, or it was cut short, or it is of a model of another rank, targets or base; or no
                checkpoint could be saved, since the base has no name.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.args.save_strategy != "no" and not model.bundles_base:
            model.check_base_is_named()  # before the work, not at its first checkpoint
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir}: nothing to resume from.")
        if resume_from_checkpoint:
            if not is_complete(resume_from_checkpoint):
                raise ValueError(f"{resume_from_checkpoint} is no complete checkpoint: it was cut short, or is none.")
            check_same_model(resume_from_checkpoint, self._config())
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            check_same_sharding(resume_from_checkpoint, plugin)
        self.passes.resumed = position_in_data(resume_from_checkpoint) if resume_from_checkpoint else None
        # Trainer would write the tokenizer's special tokens into the configuration of the base, which stays as it is
        self.processing_class = None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.processing_class = self.processor

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As the parent's, with the place in a stream, whose length it cannot know."""
        done, batches = super()._init_training_state(*args, **kwargs)
        if not has_length(self.train_dataset) and self.passes.resumed is not None and not self.args.ignore_data_skip:
            done, batches = self.passes.resumed
        self.passes.start(done, batches // self.args.gradient_accumulation_steps)
        return done, batches

    def _config(self) -> Video2LoraConfig:
        model: Any = self.accelerator.unwrap_model(self.model)
        return model.config

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint, then its marker, and only then upload it and drop older ones."""
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            mark_incomplete(folder)  # of an earlier run in the same place
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_arguments(folder)
            mark_complete(folder, self.state.global_step, self.passes.position)
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if push:
            self._push_from_checkpoint(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the parent's, without the pickled arguments that it uploads."""
        done = self.push_in_progress is None or self.push_in_progress.is_done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not done and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        output_dir, checkpoint = str(self.args.output_dir), Path(checkpoint_folder)
        for path in [path for pattern in HUB_FILES for path in checkpoint.glob(pattern)]:
            if path.is_dir():
                shutil.copytree(path, Path(output_dir, path.name), dirs_exist_ok=True)
            else:
                shutil.copy(path, output_dir)
        upload = partial(
            HfApi(token=self.args.hub_token).upload_folder,
            repo_id=self.hub_model_id,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            run_as_future=True,
        )
        jobs: Any = [upload(folder_path=output_dir, ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"])]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else checkpoint.name
            jobs.append(upload(folder_path=checkpoint_folder, path_in_repo=name))
        if done:
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the hypernetwork, strictly; the base is in memory already."""
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = load_file(os.path.join(resume_from_checkpoint, "model.safetensors"))
        if self.is_fsdp_enabled:
            load_sharded(self.model_wrapped, state)
            return
        target: Any = self.accelerator.unwrap_model(model or self.model)
        prefix = "hypernetwork."
        target.hypernetwork.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            save_optimizer(self, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As the parent's, with the arguments as JSON: nothing that is shipped is a pickle."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            Path(folder, "training_args.bin").unlink(missing_ok=True)
            self._save_arguments(folder)

    def _save_arguments(self, folder: str) -> None:
        Path(folder, "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`, the card of this run; arguments are the parent's."""
        self.card.write(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Load the hypernetwork of the best checkpoint."""
        if self.state.best_model_checkpoint is None:
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _processor_of(model: Video2LoraModel) -> Video2LoraProcessor:
    """The processor of a model that came without."""
    if model.bundles_base and model.name_or_path:
        return Video2LoraProcessor.from_pretrained(model.name_or_path, revision=model.checkpoint_commit)
    return Video2LoraProcessor.from_config(model.config)


class _Passes(TrainerCallback):
    """Counts passes over the data and tells the collator: of a stream `state.epoch` is only a share of all steps."""

    def __init__(self, trainer: Video2LoraTrainer) -> None:
        self.trainer = trainer
        self.resumed: tuple[int, int] | None = None
        self._next = self._first_step = 0

    def start(self, done: int, steps: int) -> None:
        """Training begins after so many whole passes and so many steps of another."""
        self._next, self._first_step = done, self.trainer.state.global_step - steps

    @property
    def position(self) -> tuple[int, int]:
        """Passes finished, and batches of the one begun."""
        steps = self.trainer.state.global_step - self._first_step
        return self._next - 1, steps * self.trainer.args.gradient_accumulation_steps

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.processing_class = self.trainer.processor  # to be saved with every checkpoint

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.train_collator.set_epoch(self._next)
        self._next += 1

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first_step = state.global_step


def _log_skipped(messages: list[str]) -> None:
    for message in messages:
        logger.warning(f"left out: {message}")


def _open_teacher(teacher: str | None) -> Any:
    """The reader of a teacher's stored logits, where `teacher` is their directory."""
    if teacher in (None, "online"):
        return None
    from .teacher import TeacherLogits

    return TeacherLogits(teacher)


def _as_rows(dataset: Any) -> Any:
    if dataset is None:
        return None
    if isinstance(dataset, dict) and not {"video", "video_path"} & set(dataset):
        return {name: _as_rows(part) for name, part in dataset.items()}
    if isinstance(dataset, TorchDataset) and not isinstance(dataset, TorchIterableDataset):
        return dataset
    return load_rows(dataset)
