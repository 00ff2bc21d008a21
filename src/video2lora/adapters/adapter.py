"""Adapters: one video's LoRA adapter in memory, between the hypernetwork, PEFT and the disk."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..hub_cards.adapter_card import adapter_card
from ..modeling.injection import is_injected, is_merged, merge_lora
from ..modeling.lora import LoraWeights
from ..modeling.targets import LoraTargets, base_fingerprint, resolve_targets
from . import rank_space, storage
from .directories import check_target, new_directory
from .errors import AdapterError, AdapterKeyError
from .layouts import BaseDescription, Layout, check_base, named_tensors, peft_config, to_state_dict
from .provenance import AdapterProvenance, Segment, Truncation, is_local, public_name, same_repository
from .rank_space import check_weights
from .segments import choose_segments, with_ranks


@dataclass(frozen=True, eq=False, repr=False)
class VideoAdapter:
    """A LoRA adapter made from a video.

    Attributes:
        weights: a batch of one in float32, with scaling 1 (the multiplier is folded into `lora_B`).
        targets: the adapted modules, as they are called in the VLM.
        base: what must be known of the VLM when it is not at hand.
        provenance: where the adapter comes from.
    """

    weights: LoraWeights
    targets: LoraTargets
    base: BaseDescription
    provenance: AdapterProvenance

    @classmethod
    def from_weights(
        cls,
        weights: LoraWeights,
        *,
        vlm: nn.Module,
        targets: LoraTargets | None = None,
        provenance: AdapterProvenance | None = None,
        copy: bool = True,
    ) -> VideoAdapter:
        """Make an adapter of generated weights.

        Args:
            weights: a batch of one with any scaling and dtype; zero rows behind its rank are cut.
            vlm: the base it was generated for.
            targets: the adapted modules of `vlm`; without it, those called like the weights in every decoder layer.
            provenance: what is known of its origin. The base's name is read off `vlm` if none is given (its commit
                cannot be: transformers does not keep it), and ranks are given to segments without them, the same
                number to each.
            copy: have memory of its own. Without, float32 tensors may be taken over as they are, views too, and must
                not be changed afterwards: an hour's adapter is a gigabyte.

        Raises:
            AdapterError: not a batch of one, or ranks of segments that do not fit.
            AdapterKeyError: the weights' names or shapes do not fit the targets.
            NonFiniteAdapterError: a tensor holds NaN or Inf.
        """
        if len(weights) != 1:
            raise AdapterError(f"expected weights of one adapter, got a batch of {len(weights)}; take weights[i].")
        if any(isinstance(module, BaseTunerLayer) for module in vlm.modules()):
            raise AdapterError("vlm carries PEFT adapters already; pass the plain base.")
        targets = targets or resolve_targets(vlm, tuple(weights.lora_A))
        weights = weights[0].detach().to(dtype=torch.float32).fold()
        _check_shapes(weights, targets)
        if copy:  # no views of the batch
            lora_A, lora_B = ({n: t.clone() for n, t in side.items()} for side in (weights.lora_A, weights.lora_B))
            weights = replace(weights, lora_A=lora_A, lora_B=lora_B)
        provenance = provenance or AdapterProvenance()
        segments = with_ranks(provenance.segments or (Segment(),), weights.ranks[0] - weights.static_rank)
        provenance = replace(provenance, segments=segments)
        if provenance.base_model is None:
            provenance = replace(provenance, base_model=_name_of(vlm))
        if provenance.base_model is None:
            provenance = replace(provenance, base_sha256=base_fingerprint(vlm, targets))
        base = BaseDescription.of(vlm, targets)
        storage.check_finite(named_tensors(weights, targets, base, "vlm"))
        return cls(weights, targets, base, provenance)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> VideoAdapter:
        """Load an adapter from a directory or the Hub, in any layout; the base is not needed.

        Args:
            name_or_path: directory, or Hub id.
            revision: commit, branch or tag on the Hub.
            token: Hub token; by default the one you are logged in with.
            cache_dir: where Hub files are kept.
            local_files_only: use cached files only.

        Raises:
            AdapterNotFoundError: there is no adapter of this name, or the Hub cannot be asked.
            ForeignAdapterError: a PEFT adapter without `video2lora.json`.
            AdapterFormatError: a file is damaged or does not fit the others (`AdapterKeyError`: by a tensor's name or
                shape).
            NonFiniteAdapterError: a tensor holds NaN or Inf.
        """
        directory = storage.locate(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        stored = storage.read_directory(directory)
        return cls(stored.weights, stored.targets, stored.base, stored.provenance)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        layout: Layout = "vlm",
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
    ) -> Path:
        """Write an ordinary PEFT adapter directory, all at once or not at all.

        Args:
            save_directory: the directory to make.
            layout: `"vlm"` for the base itself, `"text"` for its text tower as a plain causal LM.
            dtype: of the file: float32, bfloat16, or float16 if no value overflows.
            overwrite: replace an existing adapter.

        Returns:
            The directory.

        Raises:
            OutputExistsError: it exists, and `overwrite` is false or it is not an adapter.
            NonFiniteAdapterError: a tensor holds NaN or Inf, or overflows in `dtype`.
        """
        directory = Path(save_directory).expanduser()
        return self._write(directory, layout, dtype, overwrite, name=directory.resolve().name)

    def _write(self, directory: Path, layout: str, dtype: torch.dtype, overwrite: bool, name: str) -> Path:
        check_target(directory, overwrite=overwrite, replaceable=storage.is_replaceable)
        stored = storage.StoredAdapter(self.weights, self.targets, self.base, self.provenance)
        state, document = storage.encode(stored, layout, dtype)
        base_model = self.provenance.base_model
        card = adapter_card(document, name=name, base_on_hub=base_model is not None and not is_local(base_model))
        config = self._peft_config(layout)
        with new_directory(directory, overwrite=overwrite, replaceable=storage.is_replaceable) as temporary:
            storage.write_files(temporary, config, state, document, card)
        return directory

    def push_to_hub(
        self,
        repo_id: str,
        *,
        layout: Layout = "vlm",
        dtype: torch.dtype = torch.float32,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload video adapter",
    ) -> CommitInfo:
        """Upload the adapter to the Hub as one commit; the repository is made if need be.

        Args:
            repo_id: Hub id.
            layout: as in `save_pretrained`.
            dtype: as in `save_pretrained`.
            private: whether a new repository is private.
            token: Hub token; by default the one you are logged in with.
            revision: branch to commit to, made if need be.
            commit_message: of that commit.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self._write(Path(scratch) / "adapter", layout, dtype, False, name=repo_id)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )

    def attach(self, vlm: nn.Module, adapter_name: str | None = None) -> PeftModel:
        """Put the adapter on its base, in memory, and make it the active one.

        Args:
            vlm: the base, which PEFT changes in place, or a `PeftModel` of it that gets one more adapter.
            adapter_name: PEFT's name for it; `"default"`, or on a `PeftModel` one made of the content hash.

        Returns:
            A plain `PeftModel`.

        Raises:
            BaseMismatchError: `vlm` has not the modules the adapter was made for; it is left as it was.
            AdapterError: the name is taken, or the base carries adapters outside a `PeftModel`: PEFT's, or one that is
                merged or injected for a while.
        """
        model = vlm if isinstance(vlm, PeftModel) else None
        base = vlm if model is None else model.get_base_model()
        name = adapter_name or ("default" if model is None else f"video-{self.content_hash[:12]}")
        if model is not None and name in model.peft_config:
            raise AdapterError(f"an adapter called {name!r} is attached already; pass another adapter_name.")
        if model is None and any(isinstance(module, BaseTunerLayer) for module in base.modules()):
            raise AdapterError("this model carries PEFT adapters already; pass the PeftModel, or a fresh base.")
        self._check_base(base)
        modules = [base.get_submodule(path) for paths in self.targets.paths.values() for path in paths]
        plain: list[Any] = [getattr(module, "base_layer", module) for module in modules]
        if any(is_merged(module.weight) or is_injected(module) for module in plain):
            raise AdapterError("an adapter is on this base already (merged, or inject_lora): leave its block first.")
        config = self._peft_config("vlm", short_names=False)
        if model is None:
            model = PeftModel(base, config, name)
        else:
            model.add_adapter(name, config)
        state = to_state_dict(self.weights, self.targets, self.base, "vlm")
        result: Any = set_peft_model_state_dict(model, state, adapter_name=name)
        missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]
        if missing or result.unexpected_keys:
            raise AdapterKeyError(f"PEFT left out {missing} and did not know {result.unexpected_keys}.")
        model.set_adapter(name, inference_mode=True)
        return model.eval()

    @contextmanager
    def merged(self, vlm: nn.Module) -> Iterator[None]:
        """Add the adapter to its base's weights inside a `with` block; afterwards they are bit for bit what they were.

        The fastest way to ask many questions about one video: the base itself answers, with compiled code and CUDA
        graphs it had before. See [`merge_lora`]; `attach(vlm).merge_and_unload()` is the way to a merged model that
        stays.

        Args:
            vlm: the base, no `PeftModel`. All its users see the adapter while the block is open.

        Raises:
            BaseMismatchError: `vlm` has not the modules the adapter was made for.
            AdapterError: the base carries PEFT adapters.
            ValueError: the base is quantised.
            RuntimeError: another adapter is merged into it; merge a composition instead.
        """
        if isinstance(vlm, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in vlm.modules()):
            raise AdapterError("this model carries PEFT adapters: pass the plain base (`unload()` gives it back).")
        self._check_base(vlm)
        with merge_lora(vlm, self.targets, self.weights):
            yield

    def _check_base(self, vlm: nn.Module) -> None:
        """Refuse a base without the adapter's modules; warn about another base of the same sizes."""
        name = _name_of(vlm)
        made_for = f"{self.provenance.base_model or 'an unnamed base'} ({self.base.model_class})"
        given = f"{name or 'an unnamed base'} ({type(vlm).__name__})"
        check_base(vlm, self.targets, self.base, made_for, given)
        known = self.provenance.base_sha256
        if known is not None and base_fingerprint(vlm, self.targets) not in (known, None):
            warnings.warn(
                f"this adapter was made for {made_for}, whose weights are others than those of {given}; its answers "
                "may be wrong. The base is inside the checkpoint that made the adapter.",
                stacklevel=3,
            )
        if not same_repository(self.provenance.base_model, name) or type(vlm).__name__ != self.base.model_class:
            warnings.warn(
                f"this adapter was made for {made_for}, not for {given}; its answers may be wrong.", stacklevel=3
            )

    def _peft_config(self, layout: str, *, short_names: bool = True) -> LoraConfig:
        base = self.base if short_names else replace(self.base, short_names=())
        provenance = self.provenance
        return peft_config(self.targets, base, layout, self.rank, provenance.base_model, provenance.base_revision)

    def truncate(
        self, rank: int, *, keep_segments: bool = False, weights: Sequence[float] | None = None
    ) -> tuple[VideoAdapter, float]:
        """Reduce the rank, by QR and SVD of the factors.

        By default as well as possible for the adapter as a whole: the static part and the segments are mixed into the
        ranks by it, so the result cannot be composed, nor a segment picked, any more: do that first. With
        `keep_segments` every segment is reduced by itself and the static part stays: what segments get of `rank` is
        shared by what they have to say (their largest singular values, over all layers), or by that and `weights`.
        An adapter of no larger rank stays as it is.

        Args:
            rank: stored rank to reduce to, the static part's included.
            keep_segments: keep segments and static part apart.
            weights: with `keep_segments`, how much each segment matters; 1 by default.

        Returns:
            The adapter, and the relative error in the Frobenius norm over all its modules.

        Raises:
            AdapterError: `rank` is no whole number from 1; or, with `keep_segments`, leaves no rank for a segment, an
                earlier truncation has mixed them, or the weights are not a positive number for each.
        """
        if not isinstance(rank, SupportsIndex) or isinstance(rank, bool) or index(rank) < 1:
            raise AdapterError(f"rank must be a whole number from 1, got {rank!r}.")
        if weights is not None and not keep_segments:
            raise AdapterError("weights say how segments share the rank: pass keep_segments=True with them.")
        rank, segments = index(rank), self.segments
        factors = check_weights(weights, len(segments))
        if rank >= self.rank:
            return self, 0.0
        if keep_segments:
            spans = self._segment_ranks()
            least = len(spans) + self.static_rank
            if rank < least:
                raise AdapterError(
                    f"rank {rank} leaves no rank for a segment: {len(spans)} segments and the static part's "
                    f"{self.static_rank} need at least {least}."
                )
            reduced, kept, error = rank_space.truncate_segments(self.weights, spans, rank, factors)
            segments = tuple(replace(s, ranks=span) for s, span in zip(segments, kept, strict=True))
        else:
            reduced, error = rank_space.truncate(self.weights, rank)
            segments = tuple(replace(segment, ranks=None) for segment in segments)
        folded = self.static_rank > 0 and not keep_segments
        record = Truncation(self.rank, rank, error, static_part_folded=folded)
        truncations = (*self.provenance.truncations, record)
        provenance = replace(self.provenance, segments=segments, truncations=truncations)
        return VideoAdapter(reduced, self.targets, self.base, provenance), error

    def select(
        self, start: float | None = None, end: float | None = None, *, source: str | None = None
    ) -> VideoAdapter:
        """The adapter of those segments alone that lie, at least partly, in a time range.

        It equals the adapter that composing just these segments would have given: the static part stays.

        Args:
            start, end: seconds of the file's time; `end` is exclusive, None is open. Where several videos were
                composed and `source` names none, of each of them.
            source: name of a video, where several were composed, or the first digits of its SHA-256.

        Raises:
            AdapterError: no segment lies there, the segments' times are not known, the range is empty, several videos
                have this name, or a truncation has mixed the segments (`truncate(keep_segments=True)` does not).
        """
        spans = self._segment_ranks()
        chosen = choose_segments(self.segments, start, end, source)
        ranks = [rank for i in chosen for rank in range(*spans[i])]
        segments, first = [], 0
        for i in chosen:
            length = spans[i][1] - spans[i][0]
            segments.append(replace(self.segments[i], ranks=(first, first + length)))
            first += length
        provenance = replace(self.provenance, segments=tuple(segments))
        return VideoAdapter(rank_space.keep_ranks(self.weights, ranks), self.targets, self.base, provenance)

    def _segment_ranks(self) -> list[tuple[int, int]]:
        """The generated ranks of each segment; refused once they are mixed."""
        spans = [segment.ranks for segment in self.segments if segment.ranks is not None]
        if len(spans) < len(self.segments):
            raise AdapterError(
                "this adapter was truncated as a whole, so its segments cannot be told apart any more: pick them "
                "before, or truncate with keep_segments=True."
            )
        return spans

    def delta_weight(self, module: str, layer: int) -> Tensor:
        """The change of one weight, `[d_out, d_in]`.

        Args:
            module: target module name, such as `down_proj`.
            layer: index of the decoder layer.

        Raises:
            AdapterError: the adapter does not change that module or layer.
        """
        if module not in self.targets.paths or layer not in self.targets.layer_indices:
            raise AdapterError(
                f"this adapter does not change {module!r} of layer {layer}; it changes "
                f"{list(self.targets.module_names)} of layers {list(self.targets.layer_indices)}."
            )
        position = self.targets.layer_indices.index(layer)
        return self.weights.lora_B[module][0, position].T @ self.weights.lora_A[module][0, position]

    def to(self, device: torch.device | str) -> VideoAdapter:
        """The same adapter on `device`."""
        return VideoAdapter(self.weights.to(device), self.targets, self.base, self.provenance)

    @property
    def rank(self) -> int:
        """Stored rank: generated and static."""
        return self.weights.ranks[0]

    @property
    def static_rank(self) -> int:
        """Ranks, the last ones, of the hypernetwork's static part."""
        return self.weights.static_rank

    @property
    def generated_rank(self) -> int:
        """Ranks that were generated from video."""
        return self.rank - self.static_rank

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stretches of video in the adapter, in the order of their ranks."""
        return self.provenance.segments

    @property
    def num_parameters(self) -> int:
        """Numbers in the adapter."""
        tensors = (*self.weights.lora_A.values(), *self.weights.lora_B.values())
        return sum(tensor.numel() for tensor in tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in memory (float32)."""
        return 4 * self.num_parameters

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over tensors and their names; the same in every layout."""
        return storage.content_hash(named_tensors(self.weights, self.targets, self.base, "vlm"))

    def __repr__(self) -> str:
        sources = ", ".join(segment.source or "unnamed video" for segment in self.segments)
        return (
            f"VideoAdapter({sources}; rank {self.rank} ({self.static_rank} static) on "
            f"{', '.join(self.targets.module_names)} of {len(self.targets.layer_indices)} layers of "
            f"{public_name(self.provenance.base_model) or self.base.model_class})"
        )


def _name_of(vlm: nn.Module) -> str | None:
    """Hub id or directory that a model was loaded from, where transformers knows it."""
    return getattr(getattr(vlm, "config", None), "_name_or_path", None) or None


def _check_shapes(weights: LoraWeights, targets: LoraTargets) -> None:
    """Compare tensors with targets, and raise `AdapterKeyError` naming the first that does not fit."""
    layers, rank = len(targets.layer_indices), weights.ranks[0]
    sizes = {"lora_A": targets.in_features, "lora_B": targets.out_features}
    for kind, tensors in (("lora_A", weights.lora_A), ("lora_B", weights.lora_B)):
        if set(tensors) != set(targets.module_names):
            raise AdapterKeyError(f"{kind} has modules {sorted(tensors)}, expected {list(targets.module_names)}.")
        for name, tensor in tensors.items():
            expected = [1, layers, rank, sizes[kind][name]]
            if list(tensor.shape) != expected:
                raise AdapterKeyError(
                    f"{kind} of {name!r} has shape {list(tensor.shape)}, expected {expected} (batch, layers, rank, "
                    "features); if only some layers are adapted, pass targets=."
                )
    if not 0 <= weights.static_rank <= rank:
        raise AdapterError(f"static_rank must lie in 0..{rank}, got {weights.static_rank}.")
