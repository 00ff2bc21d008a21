"""FSDP on two processes (gloo, on the CPU): the numbers of one process, whole checkpoints, exact resuming."""

from __future__ import annotations

import json
from importlib.metadata import version as installed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version

from video2lora import Video2LoraModel
from video2lora.trainer.checkpoints import last_complete_checkpoint
from video2lora.trainer.sharding import FSDP2_FLOORS, check_same_sharding, shard_hypernetwork_alone

from .runs import (
    SGD,
    assert_near,
    assert_same,
    launch,
    losses,
    make_model,
    make_trainer,
    run_fsdp,
    run_training,
    saved_weights,
    succeed,
    train,
    weights,
)


def fsdp(version: int, **more: Any) -> dict[str, Any]:
    if version == 2 and any(Version(installed(name)) < Version(floor) for name, floor in FSDP2_FLOORS.items()):
        pytest.skip(f"FSDP2 is refused with libraries older than {FSDP2_FLOORS}")
    on_cpu = {"sync_module_states": False} if version == 1 else {}  # which accelerate does on GPUs alone
    return {"fsdp": True, "fsdp_config": {"version": version, **on_cpu, **more}}


@pytest.fixture(scope="module")
def settings(tiny_vlm_dir, rows) -> dict[str, Any]:
    return {
        "base": str(tiny_vlm_dir), "rows": rows, "num_train_epochs": 2, "per_device_train_batch_size": 1,
        "composition_probability": 0.5, "max_queries_per_video": 2,
    }  # fmt: skip


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_equals_one_process(version, settings, tmp_path):
    """With an evaluation in the loop, and accumulation; the base is replicated and stays as it is."""
    settings = settings | SGD | {
        "gradient_accumulation_steps": 2, "eval_rows": settings["rows"][:3], "eval_strategy": "epoch"
    }  # fmt: skip
    ours = settings | fsdp(version) | {"output": str(tmp_path / "fsdp"), "save_strategy": "epoch"}
    output = succeed(run_fsdp, tmp_path / "two", 2, settings=ours)
    one = train(settings, output=str(tmp_path / "one"), per_device_train_batch_size=2)
    for rank in (0, 1):
        found = json.loads((output / f"found-{rank}.json").read_text())
        assert found["base"] and found["frozen"]
        assert found["kinds"] and all("vlm" not in name for name in found["sharded"])
        if version == 2:
            assert len(found["sharded"]) == len(weights(one.model))
        for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("eval_loss", 1e-6)):
            logged = [entry[key] for entry in found["log"] if key in entry]
            assert rank or logged == pytest.approx(losses(one, key), rel=tolerance)
    for folder in (output / "model", tmp_path / "fsdp/checkpoint-4"):
        assert_near(saved_weights(folder), weights(one.model), 2e-6)
        model = Video2LoraModel.from_pretrained(folder)
        assert_near(weights(model), weights(one.model), 2e-6)
    files = {path.name for path in (tmp_path / "fsdp/checkpoint-4").iterdir()}
    assert "optimizer.bin" in files and not any("pytorch_model" in name for name in files)


def test_killed_and_resumed(settings, tmp_path):
    """FSDP2; on a CPU the older one stores AdamW's second moments in place of the first (benchmarks/fsdp.py)."""
    settings = settings | fsdp(2) | {"save_strategy": "steps", "save_steps": 1}
    succeed(run_fsdp, tmp_path / "unstopped", 2, settings=settings | {"output": str(tmp_path / "a")})
    settings |= {"output": str(tmp_path / "run")}
    assert -9 in launch(run_fsdp, tmp_path / "killed", 2, settings=settings | {"kill_step": 6})
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run/checkpoint-6")
    succeed(run_fsdp, tmp_path / "resumed", 2, settings=settings | {"resume": True})
    assert_same(saved_weights(tmp_path / "resumed/model"), saved_weights(tmp_path / "unstopped/model"))
    with pytest.raises(ValueError, match="was written with FSDP and this run is without FSDP"):
        train(settings | {"fsdp": None, "fsdp_config": None}, resume=True)


def test_bfloat16_is_autocast_and_the_weights_stay_in_float32(settings, tmp_path):
    settings = settings | {"bf16": True, "max_steps": 2}
    output = succeed(run_fsdp, tmp_path / "two", 2, settings=settings | fsdp(2) | {"output": str(tmp_path / "fsdp")})
    succeed(run_training, tmp_path / "ddp", 2, settings=settings | {"output": str(tmp_path / "run")})
    logged = [json.loads((output / "found-0.json").read_text())["log"]]
    logged.append(json.loads((tmp_path / "ddp/log.json").read_text()))
    fsdp_losses, ddp_losses = ([entry["loss"] for entry in log if "loss" in entry] for log in logged)
    assert fsdp_losses == pytest.approx(ddp_losses, rel=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in saved_weights(output / "model").values())


def test_loading_on_the_main_process_alone_is_refused(settings, tmp_path):
    ours = settings | fsdp(2, cpu_ram_efficient_loading=True) | {"output": str(tmp_path / "run"), "max_steps": 1}
    assert any(launch(run_fsdp, tmp_path / "refused", 2, settings=ours))
    said = (tmp_path / "refused/stderr-0.txt").read_text()
    assert "fsdp_cpu_ram_efficient_loading must be false" in said


def test_versions_of_accelerate_that_would_shard_the_base_are_refused(settings, tmp_path, monkeypatch):
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=False)
    monkeypatch.setattr("video2lora.trainer.sharding.version", {"accelerate": "1.10.1", "torch": "2.11"}.get)
    with pytest.raises(ValueError, match=r"FSDP2 needs accelerate 1.12.0.* this is 1.10.1"):
        shard_hypernetwork_alone(plugin, make_model(settings["base"]), torch.device("cpu"))


def test_a_checkpoint_without_fsdp_is_not_gone_on_from_with_it(settings, tmp_path):
    trainer = make_trainer(**settings, output=tmp_path, save_strategy="steps", save_steps=1)
    trainer.args.max_steps = 1
    trainer.train()
    trainer.is_fsdp_enabled = True
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=2)
    with pytest.raises(ValueError, match=f"{Path(tmp_path, 'checkpoint-1')} was written without FSDP"):
        trainer.train(resume_from_checkpoint=True)


def test_fsdp1_does_not_go_on_from_what_it_gathered(settings, tmp_path):
    for version, known in ((1, "FSDP1 cannot go on from"), (2, None)):
        (tmp_path / "optimizer.bin").touch()
        plugin = SimpleNamespace(fsdp_version=version)
        if known is None:
            check_same_sharding(str(tmp_path), plugin)
        else:
            with pytest.raises(ValueError, match=known):
                check_same_sharding(str(tmp_path), plugin)
