"""Modeling: saving and loading a Video2LoraModel, light (hypernetwork and a pinned base) or bundled."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from .base import BaseModelError, check_same_base, load_base, resolve_commit
from .configuration import Video2LoraConfig
from .hashing import HashedTensors
from .hypernetwork import Hypernetwork
from .published import read_published_checkpoint
from .targets import LoraTargets, resolve_targets

HYPERNETWORK = "hypernetwork."
HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download")
BASE_KWARGS = {*HUB_KWARGS, "dtype", "torch_dtype", "device_map", "attn_implementation", "quantization_config"}
BASE_KWARGS |= {"max_memory", "offload_folder"}


class CheckpointError(ValueError):
    """A checkpoint's tensors are not those its configuration asks for."""


class Video2LoraPreTrainedModel(PreTrainedModel):
    """The loading and saving half of [`Video2LoraModel`]."""

    config: Video2LoraConfig
    config_class = Video2LoraConfig
    vlm: PreTrainedModel
    hypernetwork: Hypernetwork
    targets: LoraTargets
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Hypernetwork"]  # the base adds its own
    # of latent size only: bfloat16 weights there would cost digits and save next to nothing
    _keep_in_fp32_modules_strict = ["hypernetwork"]
    checkpoint_commit: str | None = None
    """Commit of the Hub repository the hypernetwork was loaded from."""
    _hashed: dict[str, HashedTensors | None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype, which a bundled checkpoint is loaded in again; the hypernetwork's own is float32."""
        vlm = getattr(self, "vlm", None)  # attached late
        return super().dtype if vlm is None else vlm.dtype

    def attach_vlm(self, vlm: PreTrainedModel) -> None:
        """Freeze `vlm` and make it this model's base."""
        self.vlm = vlm.eval().requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    @classmethod
    def from_vlm(cls, vlm: str | os.PathLike | PreTrainedModel, revision: str | None = None, **kwargs: Any) -> Any:
        """Make a fresh hypernetwork for a base; its adapters change nothing until it is trained.

        Args:
            vlm: Hub id or directory of the base, or the loaded model.
            revision: commit hash, branch or tag of the base; the commit found is pinned in the config. A loaded model
                does not know its own: without it nothing is pinned.
            kwargs: fields of [`Video2LoraConfig`] (`rank=8`, `target_modules=[...]`); the rest goes to the base's
                `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, `token`).

        Raises:
            BaseModelError: the base cannot be had.
            ValueError: a config field is wrong, or the base has no such target modules.
        """
        fields = {
            k: kwargs.pop(k) for k in list(kwargs) if k in Video2LoraConfig.__dataclass_fields__ and k != "dtype"
        }
        if isinstance(vlm, PreTrainedModel):
            if kwargs:
                raise ValueError(f"unknown config fields for an already loaded base: {sorted(kwargs)}.")
            name, commit = vlm.name_or_path or None, revision
        else:
            name = os.fspath(vlm)
            # found out first: a push between two requests must not pin another commit than was loaded
            commit = resolve_commit(name, revision, **kwargs) or revision
            vlm = load_base(name, commit, **kwargs)
        fields.setdefault("base_model_name_or_path", name)
        fields.setdefault("base_model_revision", commit)
        model = cls(Video2LoraConfig(vlm_config=vlm.config, **fields), vlm=vlm)
        model.hypernetwork.to(vlm.device)
        return model.eval()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: Video2LoraConfig | None = None,
        vlm: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model saved by [`save_pretrained`], light or bundled, from a directory or the Hub.

        Args:
            pretrained_model_name_or_path: directory or Hub id of the checkpoint.
            config: its configuration, if already loaded.
            vlm: the base, if already loaded (of a light checkpoint); it is shared, not copied.
            kwargs: what transformers' `from_pretrained` takes (`revision`, `dtype`, `device_map`,
                `attn_implementation`, `token`, ...); `dtype` is that of the base, the hypernetwork stays in float32.
                `base_model_name_or_path=` overrides where the base of a light checkpoint is taken from.

        Raises:
            BaseModelError: the base is missing, gated, not at its pinned revision, of other sizes, or out of reach.
            CheckpointError: a tensor is missing, unexpected or of another shape, or the file is damaged.
            ValueError: not a video2lora checkpoint, or a base was given to a bundled one.
        """
        where, output_loading_info = (
            kwargs.pop("base_model_name_or_path", None),
            kwargs.pop("output_loading_info", False),
        )
        commit = None
        if pretrained_model_name_or_path is not None:
            # found out first: what is loaded is of this commit, also when somebody pushes meanwhile
            commit = resolve_commit(os.fspath(pretrained_model_name_or_path), **_hub(kwargs))
            kwargs |= {"revision": commit} if commit else {}
        if config is None:
            config = Video2LoraConfig.from_pretrained(pretrained_model_name_or_path or "", **_hub(kwargs))
        load: Any = super().from_pretrained
        # tensors of another shape are told to us, with their names, and refused below
        arguments = dict(kwargs, config=config, output_loading_info=True, ignore_mismatched_sizes=True)
        try:
            if config.bundle_base:
                if vlm is not None or where is not None:
                    raise ValueError(
                        f"{pretrained_model_name_or_path} holds its base itself (bundle_base): leave out `vlm=` and "
                        "`base_model_name_or_path=`."
                    )
                model, info = load(pretrained_model_name_or_path, *model_args, **arguments)
                vlm = model.vlm
            else:
                vlm = _light_base(config, vlm, where, kwargs)
                targets = resolve_targets(vlm, config.target_modules, config.layers_to_transform)
                for name in ("device_map", "quantization_config", "attn_implementation"):
                    arguments.pop(name, None)
                model, info = load(pretrained_model_name_or_path, *model_args, targets=targets, **arguments)
        except SafetensorError as error:
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: its weight file is damaged or cut short ({error}). Fetch or save "
                "it again."
            ) from error
        _check_loaded(str(pretrained_model_name_or_path), model, info)
        model.attach_vlm(vlm)
        model.hypernetwork.to(model.vlm.device)
        if where is not None and not config.bundle_base:
            model.config.base_model_name_or_path, model.config.base_model_revision = os.fspath(where), None
        model.checkpoint_commit = commit
        model.eval()
        return (model, info) if output_loading_info else model

    @classmethod
    def from_frames2lora(
        cls,
        path: str | os.PathLike,
        base: str | os.PathLike | PreTrainedModel | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a model of a checkpoint of the published implementation (`*.pt`).

        The file is a pickle; it is read through a reader that refuses every global such files do not hold, before
        anything in it runs.

        Args:
            path: the file.
            base: Hub id or directory of its base, or the loaded base; by default the name in the file.
            revision: commit hash, branch or tag of the base.
            kwargs: sampling fields of [`Video2LoraConfig`], which such files do not hold (`num_frames`,
                `longest_edge`, `internalization_prompt`, `prompt_timestamps`; by default the paper's); the rest goes
                to the base's `from_pretrained`.

        Raises:
            PublishedCheckpointError: not such a file, a foreign global, or a kind of hypernetwork that was never
                released.
            BaseModelError: the base cannot be had, or has other sizes than the file.
        """
        published = read_published_checkpoint(path)
        in_file = published.config.pop("base_model_name_or_path")
        fields = {k: v for k, v in published.config.items() if k not in kwargs}
        model = cls.from_vlm(base if base is not None else in_file, revision=revision, **fields, **kwargs)
        pairs = {
            "decoder layers": (published.num_layers, model.hypernetwork.num_layers),
            "hidden size": (published.hidden_size, model.config.get_text_config().hidden_size),
            "input widths": (published.in_features, dict(model.targets.in_features)),
            "output widths": (published.out_features, dict(model.targets.out_features)),
        }
        wrong = [f"{what} {theirs} (got {ours})" for what, (theirs, ours) in pairs.items() if theirs != ours]
        if wrong:
            raise BaseModelError(
                f"{model.config.base_model_name_or_path!r} is not the base of {os.fspath(path)!r}, which was made for "
                f"{in_file!r}: expected {', '.join(wrong)}."
            )
        model.hypernetwork.load_state_dict(published.state_dict)
        return model

    def hypernetwork_identity(self) -> dict[str, str | None]:
        """What identifies the hypernetwork's weights: the commit they were loaded from, or a hash of them.

        The commit is believed until `train()` is called.

        Returns:
            `hypernetwork_revision` (a commit hash of the Hub) and `hypernetwork_sha256` (where there is no commit).
        """
        if self.checkpoint_commit is not None:
            return {"hypernetwork_revision": self.checkpoint_commit, "hypernetwork_sha256": None}
        return {"hypernetwork_revision": None, "hypernetwork_sha256": self._hash_of("hypernetwork")}

    def base_identity(self) -> dict[str, str | None]:
        """What identifies the base's weights: its name and the commit they are pinned to, or a hash of them.

        A commit is believed: what was written into the base's weights after loading does not change it. Change them
        in a copy of your own, saved and loaded from its directory, which is identified by its hash.

        Returns:
            `base_model`, and `base_revision` (a commit hash of the Hub) or `base_sha256` (where there is none).
        """
        config = self.config
        identity = {"base_model": config.base_model_name_or_path, "base_revision": config.base_model_revision}
        if re.fullmatch(r"[0-9a-f]{40}", config.base_model_revision or ""):
            return identity | {"base_sha256": None}
        return identity | {"base_sha256": self._hash_of("vlm")}

    def _hash_of(self, part: str) -> str:
        """SHA-256 of a part's tensors; they are gigabytes, so anew only when they may have changed."""
        tensors = dict(sorted(self.get_submodule(part).state_dict(keep_vars=True).items()))
        known = self._hashed = self._hashed or {}
        hashed = known.get(part)
        if hashed is None or not hashed.is_of(tensors):
            hashed = known[part] = HashedTensors(tensors)
        return hashed.digest

    @property
    def bundles_base(self) -> bool:
        """Whether a checkpoint of this model holds its base by default: it came with it, and is nowhere else."""
        config: Video2LoraConfig = self.config
        return config.bundle_base and not config.base_model_name_or_path

    def check_base_is_named(self) -> None:
        """Raise ValueError if a checkpoint without the base could not be loaded again."""
        if not self.config.base_model_name_or_path:
            raise ValueError(
                "the base of this model has no name or path, so a light checkpoint could not be loaded again: save "
                "the base and set config.base_model_name_or_path, or save with bundle_base=True."
            )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        bundle_base: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `config.json` and `model.safetensors`: the hypernetwork, and a pinned reference to its base.

        Each file is written under a temporary name and renamed, so that a killed process leaves the old one.

        Args:
            save_directory: where to; made if it does not exist.
            is_main_process: write only there.
            state_dict: the tensors to save if not this model's own (the Trainer and FSDP pass one).
            push_to_hub: also push the directory; `repo_id=`, `token=`, ... in `kwargs`.
            bundle_base: write the base's weights too, so that the checkpoint needs nothing else. By default only where
                the model comes from such a checkpoint and its base is nowhere else (`bundles_base`).
            kwargs: what transformers' `save_pretrained` takes.

        Raises:
            ValueError: a light checkpoint of a model without a named base: nobody could load it.
        """
        model = self
        bundle_base = model.bundles_base if bundle_base is None else bundle_base
        if not bundle_base:
            model.check_base_is_named()
        state_dict = dict(model.state_dict() if state_dict is None else state_dict)
        if not bundle_base:
            state_dict = {k: v for k, v in state_dict.items() if k.startswith(HYPERNETWORK)}
        elif all(name.startswith(HYPERNETWORK) for name in state_dict):  # of a trainer that shards it alone
            state_dict |= {name: tensor for name, tensor in model.state_dict().items() if name not in state_dict}
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file; expected a directory to save the model in.")
        target.mkdir(parents=True, exist_ok=True)
        before = model.config.bundle_base
        model.config.bundle_base = bundle_base
        try:
            with TemporaryDirectory(prefix=".saving-", dir=target) as staging:
                super().save_pretrained(staging, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
                _publish(Path(staging), target, _weight_files(kwargs.get("variant")))
        finally:
            model.config.bundle_base = before
        if push_to_hub and is_main_process:
            hub = {k: kwargs[k] for k in ("token", "private", "revision", "commit_message") if k in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or target.name, bundle_base=bundle_base, **hub)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        bundle_base: bool | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> CommitInfo:
        """Upload the model to the Hub, with a model card unless the repository has one.

        Args:
            repo_id: `user/name`; made if it does not exist.
            bundle_base: upload the base's weights too; by default as [`save_pretrained`].
            private, token, revision, create_pr, commit_message: as everywhere on the Hub.
            kwargs: what [`save_pretrained`] takes.
        """
        from video2lora.hub_cards import model_card

        base = self.config.base_model_name_or_path
        bundle_base = self.bundles_base if bundle_base is None else bundle_base
        if not bundle_base and base is not None and os.path.isdir(base):
            warnings.warn(
                f"the base of this checkpoint is a directory of this machine ({base}), which nobody else can load: "
                "push the base too and set config.base_model_name_or_path to its name, or push with bundle_base=True.",
                stacklevel=2,
            )

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, bundle_base=bundle_base, **kwargs)  # what cannot be saved makes no repository
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, "README.md", revision=revision):
                card = model_card(repo_id, Video2LoraConfig.from_pretrained(folder))
                (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                revision=revision,
                create_pr=create_pr,
                # of an earlier push: a stale file would be loaded instead of shards
                delete_patterns=_weight_files(kwargs.get("variant")),
            )


def _hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `kwargs` that say where on the Hub, or in its cache, to look."""
    return {k: kwargs[k] for k in (*HUB_KWARGS, "revision", "subfolder") if kwargs.get(k) is not None}


def _light_base(
    config: Video2LoraConfig, vlm: PreTrainedModel | None, where: str | os.PathLike | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    """The base of a light checkpoint, checked against its configuration."""
    name = os.fspath(where) if where is not None else config.base_model_name_or_path
    if vlm is None:
        if name is None:
            raise BaseModelError("the checkpoint names no base model: pass the loaded base as `vlm=`.")
        arguments = {k: v for k, v in kwargs.items() if k in BASE_KWARGS}
        vlm = load_base(name, None if where is not None else config.base_model_revision, **arguments)
    if config.vlm_config is not None:
        check_same_base(config.vlm_config, vlm.config, vlm.name_or_path or name or type(vlm).__name__)
    return vlm


def _check_loaded(name: str, model: Any, info: dict[str, Any]) -> None:
    """Raise [`CheckpointError`] naming the tensors that are missing, unexpected or of another shape."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    problems = {
        "missing": sorted(set(info["missing_keys"]) - tied),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    found = [f"{kind}: {', '.join(keys[:5])}{' ...' * (len(keys) > 5)}" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"{name} does not hold the tensors its configuration asks for ({'; '.join(found)}). The file is damaged "
            "or belongs to another configuration."
        )


def _weight_files(variant: str | None) -> list[str]:
    """Patterns of the weight files of one variant (`None`: the usual one), in one file or in shards."""
    dotted = f".{variant}" if variant else ""
    return [
        f"model{dotted}.safetensors",
        f"model{dotted}-*-of-*.safetensors",
        f"model.safetensors.index{dotted}.json",
    ]


def _publish(staging: Path, target: Path, weight_files: list[str]) -> None:
    """Move what was written into place, the configuration last, and drop weight files of an earlier save."""
    written = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
    for path in written:
        shutil.copymode(staging / "config.json", path)  # safetensors makes files that only their owner may read
        os.replace(path, target / path.name)
    names = {path.name for path in written}
    if names:
        for stale in [path for pattern in weight_files for path in target.glob(pattern)]:
            if stale.name not in names:
                stale.unlink()
