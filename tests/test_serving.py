"""Serving: the page's code and the example, run from top to bottom on a small base."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from video2lora import LoraWeights, VideoAdapter
from video2lora.modeling import resolve_targets
from video2lora.testing import save_tiny_vlm

ROOT = Path(__file__).parents[1]
BASE = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
QUESTIONS = ["What happens first?", "Who is there?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the base and the adapters that the page names, of different ranks."""
    folder = tmp_path_factory.mktemp("serving")
    save_tiny_vlm("smolvlm", folder / BASE)
    vlm = AutoModelForImageTextToText.from_pretrained(folder / BASE)
    targets = resolve_targets(vlm, ["down_proj"])
    for seed, (name, rank) in enumerate({"kitchen": 4, "garden": 6}.items()):
        generator = torch.Generator().manual_seed(seed)
        layers = len(targets.layer_indices)
        lora_A = {"down_proj": torch.randn(1, layers, rank, targets.in_features["down_proj"], generator=generator)}
        lora_B = {"down_proj": torch.randn(1, layers, rank, targets.out_features["down_proj"], generator=generator)}
        adapter = VideoAdapter.from_weights(LoraWeights(lora_A, lora_B, 0.05, (rank,)), vlm=vlm, targets=targets)
        adapter.save_pretrained(folder / f"{name}-lora")
    return folder


def test_the_page_runs_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/serving.md", "exec"), namespace)
    ask, base = namespace["ask"], namespace["vlm"]
    plain = AutoModelForImageTextToText.from_pretrained(folder / BASE, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), plain.parameters(), strict=True))
    alone = ask(QUESTIONS)
    with namespace["kitchen"].merged(base):
        assert len({*alone, *ask(QUESTIONS)}) == 4
    assert (folder / "smolvlm2-text" / "config.json").is_file()
    assert (folder / "kitchen-lora-text" / "adapter_model.safetensors").is_file()


def test_the_example_answers_alike_in_every_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    words = ["serving.py", BASE, "kitchen-lora", "garden-lora", "--max-new-tokens", "8"]
    words += [word for question in QUESTIONS for word in ("-q", question)]
    said = []
    for extra in ([], ["--merged"], ["--static"], ["--static", "--merged"]):
        monkeypatch.setattr(sys, "argv", [*words, *extra])
        runpy.run_path(str(ROOT / "examples" / "serving.py"), run_name="__main__")
        said.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    assert all(answers == said[0] for answers in said)
    asked = [(line["video"], line["question"]) for line in said[0]]
    assert asked == [(video, question) for video in ("kitchen-lora", "garden-lora") for question in QUESTIONS]
    assert len({line["answer"] for line in said[0]}) == 4
