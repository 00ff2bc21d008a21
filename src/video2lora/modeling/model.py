"""Modeling: Video2LoraModel, a frozen vision-language model with the hypernetwork that turns videos into adapters."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import ModelOutput

from .checkpoint import Video2LoraPreTrainedModel
from .configuration import Video2LoraConfig
from .hypernetwork import Hypernetwork, Padding
from .injection import inject_lora, is_injected, is_merged
from .lengths import length_groups
from .lora import LoraWeights, stack_lora
from .streaming import keep_rope_deltas, stream_hidden_states
from .targets import LoraTargets, resolve_targets
from .turns import Labelled, rows_per_video, turn_inputs
from .vision import are_frames, embed_frames

TOKENS_IN_FLIGHT = 262144
"""Tokens of hidden states (summed over layers and videos) that wait until the perceiver reads them together."""


@dataclass
class Video2LoraOutput(ModelOutput):
    """What [`Video2LoraModel.forward`] returns.

    Args:
        loss: mean over the queries of each query's mean over its labelled tokens; `None` without labels.
        query_losses: `[queries]`, those means.
        label_logits: `[labelled tokens, vocabulary]`, the logits that predict them, in row order; with labels only.
        teacher_logits: `[labelled tokens, vocabulary]`, those of the base that sees the video; with `teacher_inputs`.
        logits: `[queries, tokens, vocabulary]`; without labels only.
        lora: the adapters, still in the autograd graph.
    """

    loss: Tensor | None = None
    query_losses: Tensor | None = None
    label_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    logits: Tensor | None = None
    lora: LoraWeights | None = None


class Video2LoraModel(Video2LoraPreTrainedModel):
    """A frozen vision-language model and the hypernetwork that writes LoRA adapters for it from videos.

    `internalize` turns videos into adapters in one forward pass; `generate` answers questions with them, without a
    visual token in the context. Works on any model behind `AutoModelForImageTextToText` whose decoder layers are
    `vlm.get_decoder().layers`.

    Args:
        config: the configuration.
        vlm: the base; built with random weights from `config.vlm_config` if left out. Use
            [`Video2LoraModel.from_pretrained`] or [`Video2LoraModel.from_vlm`] to get trained weights.
        targets: the modules to adapt, where they are known but the base is attached later.

    Raises:
        ValueError: neither a base nor its configuration was given, or the base lacks the target modules.
    """

    def __init__(
        self, config: Video2LoraConfig, vlm: PreTrainedModel | None = None, targets: LoraTargets | None = None
    ) -> None:
        super().__init__(config)
        if config.vlm_config is None:
            raise ValueError(
                "config.vlm_config is None: use Video2LoraModel.from_vlm(name) to start from a base model."
            )
        if vlm is not None:
            for module in vlm.modules():  # post_init() must not draw its weights anew
                module.__dict__["_is_hf_initialized"] = True
        if vlm is None and targets is None:
            vlm = AutoModelForImageTextToText.from_config(config.vlm_config)
        self.vlm: PreTrainedModel = None  # type: ignore[assignment]
        if targets is None and vlm is not None:
            targets = resolve_targets(vlm, config.target_modules, config.layers_to_transform)
        assert targets is not None
        self.targets = targets
        self.hypernetwork = Hypernetwork(config, targets, config.get_text_config().hidden_size)
        if vlm is not None:
            self.attach_vlm(vlm)
        self.post_init()

    def train(self, mode: bool = True) -> Video2LoraModel:
        """Set training mode on the hypernetwork; the frozen base stays in evaluation mode."""
        super().train(mode)
        self._hashed = None
        if mode:
            self.checkpoint_commit = None  # what is trained is no longer what was loaded
        if self.vlm is not None:
            self.vlm.eval()
        return self

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Recomputing the VLM in the backward pass would run it after the adapters are taken off: perceiver only.
        self.hypernetwork.gradient_checkpointing = enable

    def get_input_embeddings(self) -> nn.Module:
        return self.vlm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.vlm.get_output_embeddings()

    # --- video to adapter ------------------------------------------------------------------------------------------

    def internalize(self, segments_per_adapter: Sequence[int] | None = None, **video_inputs: Tensor) -> LoraWeights:
        """Turn videos into LoRA adapters in one forward pass.

        Args:
            segments_per_adapter: how many consecutive videos (segments) make one adapter; one each by default.
            video_inputs: what the processor returns for the internalization turn: `input_ids` and `attention_mask`
                `[batch, tokens]`, `pixel_values` (a row each, or packed: see [`Video2LoraProcessor.pad`]) and whatever
                else the base takes.

        Returns:
            A batch of adapters with the static part, in float32; rank `2 * config.rank` for one segment. Call it under
            `torch.no_grad()` unless the hypernetwork is being trained.

        Raises:
            ValueError: the segment counts do not add up to the batch.
        """
        return self.hypernetwork.combine(self.generate_segments(**video_inputs), segments_per_adapter)

    def generate_segments(self, **video_inputs: Tensor) -> LoraWeights:
        """The generated part of the adapters alone, `config.rank` rows for each video, to be combined later.

        `hypernetwork.combine` makes adapters of them; so the segments of a long video need not be in memory together.

        Args:
            video_inputs: as in [`internalize`].

        Raises:
            ValueError: the base carries an adapter: PEFT's, or one that is merged or injected for a while.
        """
        self._check_plain_base("videos would be read by another model than the hypernetwork was made for")
        return self.hypernetwork.generate_weights(self._embed_layers(video_inputs))

    def _check_plain_base(self, consequence: str) -> None:
        """Refuse a base that carries an adapter already.

        Raises:
            ValueError: it does; `consequence` says in the message what that would lead to.
        """
        for paths in self.targets.paths.values():
            module: Any = self.vlm.get_submodule(paths[0])
            if hasattr(module, "base_layer") and not getattr(module, "disable_adapters", False):
                raise ValueError(
                    f"the base carries a PEFT adapter at {paths[0]}, so {consequence}: unload() the PeftModel, or "
                    "attach adapters to a base of their own."
                )
            if is_merged(module.weight):
                raise ValueError(
                    f"an adapter is merged into the base, so {consequence}: leave its block first, or merge into a "
                    "base of its own."
                )
            if is_injected(module):
                raise ValueError(
                    f"adapters are injected into the base (inject_lora), so {consequence}: leave their block first."
                )

    def _embed_layers(self, video_inputs: Mapping[str, Tensor]) -> Tensor:
        """Stream the VLM's hidden states through the perceiver: `[batch, layers, modules * rank, latent_size]`.

        Videos of very unequal length are read in a few groups of similar length, whose padding is little.
        """
        inputs = self._to_vlm(video_inputs)
        attention_mask = inputs.get("attention_mask")
        groups = None
        if attention_mask is not None and attention_mask.dim() == 2 and not self._is_sharded():
            groups = length_groups(attention_mask)
        if groups is not None:
            with torch.no_grad():
                embedded = embed_frames(self.vlm, inputs)
            # of other inputs nobody knows which rows they belong to
            if set(embedded) <= {"inputs_embeds", "input_ids", "attention_mask"}:
                parts = [self._embed_group(group.of(embedded), group.padding) for group in groups]
                order = torch.cat([group.rows for group in groups]).argsort()
                return torch.cat(parts).index_select(0, order.to(parts[0].device))
            inputs = embedded
        return self._embed_group(inputs, None if attention_mask is None else Padding.of(attention_mask))

    def _embed_group(self, inputs: dict[str, Any], padding: Padding | None) -> Tensor:
        """The same of videos that run through the base together."""
        device = self.hypernetwork.device
        if padding is not None:
            padding = Padding(padding.mask.to(device), padding.index.to(device))
        grad = torch.is_grad_enabled()
        embeddings: list[Tensor] = []
        waiting: list[Tensor] = []

        def flush() -> None:
            if waiting:
                layers = len(waiting)
                stacked = torch.cat(waiting)
                waiting.clear()
                repeated = None if padding is None else padding.repeat(layers)
                embeddings.extend(self.hypernetwork.embed(stacked, repeated).chunk(layers))

        def consume(_position: int, hidden_states: Tensor) -> None:
            waiting.append(hidden_states.to(device))
            # in training all activations stay anyway, and one read of all layers launches the fewest kernels
            if not grad and len(waiting) * hidden_states.shape[0] * hidden_states.shape[1] >= TOKENS_IN_FLIGHT:
                flush()

        stream_hidden_states(self.vlm, inputs, self.targets.layer_indices, consume, stop_early=not self._is_sharded())
        flush()
        return torch.stack(embeddings, dim=1)

    def _is_sharded(self) -> bool:
        """Whether FSDP shards any of the base: leaving its forward pass half way would leave that unsharded."""
        kinds = {base.__name__ for module in self.vlm.modules() for base in type(module).__mro__}
        return any("FSDP" in kind or kind == "FullyShardedDataParallel" for kind in kinds)

    def _to_vlm(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs on the base's device and pixels in its dtype; frames stay where they are until they are read."""
        frames = are_frames(inputs.get("pixel_values"))
        moved = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and not (frames and name.startswith("pixel_")):
                # a number for each video (Qwen's seconds per grid step) must not be rounded to the base's dtype
                pixels = value.is_floating_point() and value.dim() > 1
                value = value.to(self.vlm.device, self.vlm.dtype if pixels else None)
            moved[name] = value
        return moved

    # --- adapter to answers ----------------------------------------------------------------------------------------

    # Dynamo does not notice hooks that come and go within a call, and this one is made of them: torch.compile of the
    # whole model runs it as it is, and modules of the hypernetwork can be compiled by themselves.
    @torch.compiler.disable
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        video_inputs: Mapping[str, Tensor] | None = None,
        adapters: LoraWeights | Sequence[Any] | None = None,
        queries_per_video: int | Sequence[int] | Tensor | None = None,
        segments_per_adapter: Sequence[int] | Tensor | None = None,
        teacher_inputs: Mapping[str, Tensor] | None = None,
        turns: Tensor | None = None,
    ) -> Video2LoraOutput:
        """Answer text queries about videos with adapters instead of visual tokens; the step of training.

        Args:
            input_ids: `[queries, tokens]`, text only, the queries of one video side by side.
            attention_mask: `[queries, tokens]`.
            labels: `[queries, tokens]`, -100 where no loss is wanted.
            video_inputs: inputs of [`internalize`] for the videos these queries are about.
            adapters: adapters made before, instead of `video_inputs`. With neither the base answers by itself.
            queries_per_video: how many consecutive queries each video (or adapter) has; one each by default.
            segments_per_adapter: see [`internalize`].
            teacher_inputs: the same turns with the video in their context and `labels` of their own, for distilling
                from the base that sees the video.
            turns: `[rows, tokens]`, where several queries of a video lie one behind the other in a row of `input_ids`
                and `labels`: 1, 2, ... in each row, 0 for padding. Each sees itself alone, as in a row of its own, and
                is a query in every count here; a video's may take several rows.

        Returns:
            [`Video2LoraOutput`]. Cross-entropy is the mean over queries of each query's token mean (the recipe).

        Raises:
            ValueError: both `video_inputs` and `adapters`, or counts that do not add up; or `turns` for a base whose
                attention or positions cannot keep them apart.
        """
        if video_inputs is not None and adapters is not None:
            raise ValueError("expected video_inputs or adapters, got both.")
        # what waits for the device comes before there is work on it
        labelled = None if labels is None else Labelled.of(labels, turns)
        turns_in_rows = None if turns is None else turns.amax(1).tolist()
        text = {"attention_mask": attention_mask} if turns is None else turn_inputs(self.vlm, turns)
        if video_inputs is not None:
            lora: LoraWeights | None = self.internalize(_as_counts(segments_per_adapter), **video_inputs)
        else:
            lora = self._as_lora(adapters)
        rows = input_ids.shape[0] if turns_in_rows is None else turns_in_rows
        with self._adapted(lora, rows, queries_per_video), self._predict_only(labelled):
            logits = self.vlm(input_ids=input_ids, **text, use_cache=False).logits
        if labels is None or labelled is None:
            return Video2LoraOutput(logits=logits, lora=lora)
        label_logits = logits[0]
        teacher_logits = None if teacher_inputs is None else self._teacher_logits(teacher_inputs)
        targets = labels[labelled.rows, labelled.columns + 1]
        query_losses = labelled.mean_per_query(cross_entropy(label_logits.float(), targets, reduction="none"))
        return Video2LoraOutput(query_losses.mean(), query_losses, label_logits, teacher_logits, lora=lora)

    @torch.no_grad()
    def _teacher_logits(self, teacher_inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits of the base that sees the video, where its labels stand: `[labelled tokens, vocabulary]`."""
        inputs = self._to_vlm(teacher_inputs)
        labelled = Labelled.of(inputs.pop("labels"))
        inputs = embed_frames(self.vlm, inputs)
        with keep_rope_deltas(self.vlm), self._predict_only(labelled):
            return self.vlm(**inputs, use_cache=False).logits[0]

    @contextmanager
    def _predict_only(self, labelled: Labelled | None) -> Iterator[None]:
        """Let the base's head see only the tokens that predict labelled ones, as one row `[1, labelled, hidden_size]`.

        A hook on the head, because some bases scale or cap (Gemma) its output in their own forward.
        """
        if labelled is None:
            yield
            return
        thread = threading.get_ident()

        def select(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
            if threading.get_ident() != thread:
                return None
            return (args[0][labelled.rows, labelled.columns][None],)

        handle = self.get_output_embeddings().register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: LoraWeights | Sequence[Any] | None = None,
        queries_per_adapter: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate answers to text queries, each with the adapter of its video.

        Args:
            input_ids: `[queries, tokens]`, text only, padded on the left, the queries of one adapter side by side.
            attention_mask: `[queries, tokens]`.
            adapters: what [`internalize`] returns, or a list of [`VideoAdapter`]s. One adapter answers all queries;
                with none the base answers by itself.
            queries_per_adapter: how many consecutive queries each adapter answers; one each by default.
            kwargs: what the base's `generate` takes, such as `max_new_tokens`.

        Returns:
            What the base's `generate` returns: token ids `[queries, tokens]` by default, the prompt included.
        """
        if "pad_token_id" not in kwargs and kwargs.get("generation_config") is None:
            kwargs["pad_token_id"] = self._pad_token_id()
        if attention_mask is not None:
            kwargs["attention_mask"] = attention_mask
        with self._adapted(self._as_lora(adapters), input_ids.shape[0], queries_per_adapter):
            generate: Any = self.vlm.generate
            return generate(input_ids=input_ids, **kwargs)

    def _pad_token_id(self) -> int | None:
        """A pad id inside the vocabulary: SmolVLM2's own top-level one, 128002, is not."""
        text = self.vlm.config.get_text_config()
        eos = self.vlm.generation_config.eos_token_id
        candidates = [self.vlm.generation_config.pad_token_id, text.pad_token_id]
        candidates += eos if isinstance(eos, list) else [eos]
        return next((token for token in candidates if token is not None and 0 <= token < text.vocab_size), None)

    def _adapted(
        self, lora: LoraWeights | None, rows: int | Sequence[int], queries: int | Sequence[int] | Tensor | None
    ):
        """The base with `lora` on it, as a context manager, for so many rows of a query each, or with so many each."""
        if lora is None:
            return nullcontext()
        total = rows if isinstance(rows, int) else sum(rows)
        counts = _as_counts(queries)
        if counts is None:
            counts = [total] if len(lora) == 1 else [1] * len(lora)
        elif len(counts) == 1:
            counts = counts * len(lora)
        if sum(counts) != total:
            given = f"{total} rows" if isinstance(rows, int) else f"{total} turns"
            raise ValueError(
                f"queries {counts} of {len(lora)} adapters do not add up to the {given} given: say how many "
                "consecutive ones each adapter has (queries_per_adapter of generate, queries_per_video of forward)."
            )
        if not isinstance(rows, int):
            counts = rows_per_video(rows, counts)
        self._check_plain_base("answers would be of both adapters")
        return inject_lora(self.vlm, self.targets, lora, counts)

    def _as_lora(self, adapters: LoraWeights | Sequence[Any] | None) -> LoraWeights | None:
        """Adapters of any form as one batch; a `VideoAdapter` is anything with `.weights`."""
        if adapters is None or isinstance(adapters, LoraWeights):
            return adapters
        if hasattr(adapters, "weights"):
            adapters = [adapters]
        if isinstance(adapters, str | PathLike):
            adapters = [adapters]
        weights = [getattr(item, "weights", item) for item in adapters]
        for item in weights:
            if isinstance(item, str | PathLike):
                raise TypeError(f"expected adapters, got a name, {item!r}: load it with VideoAdapter.from_pretrained.")
            if not isinstance(item, LoraWeights):
                raise TypeError(f"expected adapters (VideoAdapter or LoraWeights), got {type(item).__name__}.")
        return stack_lora(weights)


def _as_counts(counts: int | Sequence[int] | Tensor | None) -> list[int] | None:
    if counts is None or isinstance(counts, int):
        return None if counts is None else [counts]
    return [int(n) for n in counts]
