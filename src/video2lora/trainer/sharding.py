"""Trainer: FSDP. The hypernetwork's parameters, gradients and optimizer are sharded, the frozen base is replicated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from packaging.version import Version
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME

from ..modeling import Video2LoraModel

FSDP2_FLOORS = {"accelerate": "1.12.0", "torch": "2.7"}
OPTIMIZERS = {True: "optimizer.bin", False: "optimizer.pt"}
"""Where the optimizer is in a checkpoint, with FSDP and without."""


def shard_hypernetwork_alone(plugin: Any, model: Video2LoraModel, device: torch.device) -> None:
    """Settle how FSDP is to treat a model, before it is wrapped.

    One group holds the whole hypernetwork: it is not run by its own `forward`, so nothing inside it can be gathered by
    itself. What the base is called for happens inside `Video2LoraModel.forward`, but it needs no gathering either: it
    is replicated. bfloat16 comes from autocast, as without FSDP, and never reaches the weights.

    Args:
        plugin: accelerate's.
        model: not wrapped yet.
        device: where this process trains.

    Raises:
        ValueError: the base has weights on the main process alone, or FSDP2 cannot leave it out.
    """
    if plugin.fsdp_version == 2:
        for library, floor in FSDP2_FLOORS.items():
            if Version(version(library)) < Version(floor):
                raise ValueError(
                    f"FSDP2 needs {library} {floor}, which can leave the frozen base unsharded, and this is "
                    f"{version(library)}: upgrade it, or set fsdp_version to 1."
                )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: with it only the main process loads the base, which FSDP "
            "does not shard here and so does not send to the others. (In `fsdp_config`: cpu_ram_efficient_loading.)"
        )
    plugin.ignored_modules = [model.vlm]
    plugin.auto_wrap_policy = None
    plugin.mixed_precision_policy = None
    plugin.activation_checkpointing = False  # the perceiver's own is `gradient_checkpointing`
    plugin.state_dict_config = plugin.optim_state_dict_config = None
    plugin.set_state_dict_type("FULL_STATE_DICT")  # half a gigabyte, and any number of processes can go on from it
    nn.Module.to(model, device)  # FSDP leaves what it ignores where it is
    for tensor in [*model.parameters(), *model.buffers()]:  # as DDP does; FSDP2 takes each process's own for a shard
        torch.distributed.broadcast(tensor.data, src=0)


def save_optimizer(trainer: Any, output_dir: str) -> None:
    """Write optimizer and scheduler; the parent would also write all weights, the base's too, as a pickle."""
    save_fsdp_optimizer(
        trainer.accelerator.state.fsdp_plugin, trainer.accelerator, trainer.optimizer, trainer.model, output_dir
    )
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))


def load_sharded(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `hypernetwork.*` tensors, whole on every process, into a wrapped model.

    Raises:
        KeyError: a tensor of the hypernetwork is missing, or one is unexpected.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    result = set_model_state_dict(model, dict(state), options=options)
    missing = [name for name in result.missing_keys if "hypernetwork." in name]
    if missing or result.unexpected_keys:
        raise KeyError(f"the checkpoint lacks {missing} and has unexpected {result.unexpected_keys}.")


def check_same_sharding(checkpoint: str, plugin: Any) -> None:
    """Refuse an optimizer that was saved in the other form, or that FSDP1 gathered.

    Args:
        checkpoint: its folder.
        plugin: accelerate's of FSDP; None without it.

    Raises:
        ValueError: the checkpoint was written with FSDP and this run is without, or the other way round; or FSDP1 is
            to go on.
    """
    sharded = plugin is not None
    if sharded and plugin.fsdp_version == 1:
        raise ValueError(
            f"FSDP1 cannot go on from {checkpoint}: the optimizer's state that it gathered was found wrong (on "
            "CPUs), so the run would not be the one that was stopped. Train with fsdp_config {version: 2}, or start "
            "anew from the checkpoint's model (`model.checkpoint`)."
        )
    there = {kind: os.path.isfile(os.path.join(checkpoint, name)) for kind, name in OPTIMIZERS.items()}
    if there[not sharded] and not there[sharded]:
        words = {True: "with FSDP", False: "without FSDP"}
        raise ValueError(
            f"{checkpoint} was written {words[not sharded]} and this run is {words[sharded]}: go on as it began, or "
            "start anew from its model (`model.checkpoint`)."
        )
