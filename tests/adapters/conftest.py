"""Adapters' tests: random adapters on tiny bases; what one holds does not matter here, only what becomes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from video2lora.adapters import AdapterProvenance, Segment, VideoAdapter
from video2lora.modeling.lora import LoraWeights
from video2lora.modeling.targets import LoraTargets, resolve_targets
from video2lora.testing import save_tiny_vlm

from ..hub.fixtures import hub, patched_hub

__all__ = ["hub", "patched_hub"]

STATIC_SEED = 1234  # one hypernetwork: its static part is the same for every video


def _random_weights(
    targets: LoraTargets, seed: int, rank: int = 3, static_rank: int = 3, static_seed: int = STATIC_SEED
) -> LoraWeights:
    """A batch of one with scaling 5 whose change is about as large as the weights of a tiny base."""

    def draw(generator: torch.Generator, sizes: dict[str, int], rows: int, scale: float) -> dict[str, Tensor]:
        layers = len(targets.layer_indices)
        return {n: scale * torch.randn(1, layers, rows, size, generator=generator) for n, size in sizes.items()}

    own, shared = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(static_seed)
    parts = [
        (draw(g, targets.in_features, rows, 0.1), draw(g, targets.out_features, rows, 0.05))
        for g, rows in ((own, rank), (shared, static_rank))
    ]
    lora_A, lora_B = ({n: torch.cat([p[kind][n] for p in parts], dim=2) for n in targets.paths} for kind in (0, 1))
    return LoraWeights(lora_A, lora_B, 5.0, (rank + static_rank,), static_rank)


def _merged(vlm: nn.Module, adapter: VideoAdapter) -> nn.Module:
    """A copy of `vlm` with the adapter's change added to its weights."""
    merged = copy.deepcopy(vlm)
    for name, paths in adapter.targets.paths.items():
        for layer, path in zip(adapter.targets.layer_indices, paths, strict=True):
            merged.get_submodule(path).weight.data += adapter.delta_weight(name, layer)
    return merged


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., LoraWeights]:
    return _random_weights


@pytest.fixture(scope="session")
def merged() -> Callable[..., nn.Module]:
    return _merged


@pytest.fixture(scope="session")
def logits() -> Callable[[nn.Module], Tensor]:
    """Logits of a model for one text prompt, `[tokens, vocabulary]`."""

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(20, 32)[None]).logits[0]

    return run


@pytest.fixture(scope="session")
def vlm(tiny_vlm_dir: Path) -> PreTrainedModel:
    """A tiny SmolVLM that knows the directory it came from; never change it."""
    return AutoModelForImageTextToText.from_pretrained(tiny_vlm_dir)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A tiny Qwen2.5-VL, whose vision tower has modules of the same names; never change it."""
    directory = save_tiny_vlm("qwen2_5_vl", tmp_path_factory.mktemp("vlm") / "tiny-qwen2_5_vl")
    return AutoModelForImageTextToText.from_pretrained(directory)


@pytest.fixture(scope="session")
def make_adapter(vlm: PreTrainedModel) -> Callable[..., VideoAdapter]:
    """Random adapters of the tiny SmolVLM: rank 6, of which the last 3 are static."""

    def make(seed: int = 0, base: nn.Module = vlm, modules=("down_proj",), layers=None, **random) -> VideoAdapter:
        targets = resolve_targets(base, modules, layers)
        segment = Segment(
            source=f"/home/somebody/clip-{seed}.mp4",
            sha256="ab" * 32,
            start=10.0 * seed,
            end=10.0 * (seed + 1),
            timestamps=(10.0 * seed, 10.0 * seed + 5),
            num_visual_tokens=8,
            prompt="Internalize this video for later captioning.",
        )
        provenance = AdapterProvenance(segments=(segment,), hypernetwork="user/hypernetwork")
        return VideoAdapter.from_weights(
            _random_weights(targets, seed, **random), vlm=base, targets=targets, provenance=provenance
        )

    return make


@pytest.fixture
def adapter(make_adapter: Callable[..., VideoAdapter]) -> VideoAdapter:
    return make_adapter()
