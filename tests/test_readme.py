"""The README's code, run as it stands on small random models: a feature it names is a feature that works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BASE = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
MODEL = "user/video2lora-smolvlm2-500m"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parity_dir) -> Path:
    """A working directory with everything the README's code names: base, model, clips, a published checkpoint."""
    from tests.modeling.published_files import published_draft

    from video2lora import Video2LoraModel, Video2LoraProcessor
    from video2lora.testing import save_tiny_vlm, tiny_clip

    folder = tmp_path_factory.mktemp("readme")
    save_tiny_vlm("smolvlm", folder / BASE)
    sizes = {"rank": 16, "latent_size": 16, "num_latents": 4, "num_blocks": 2}
    model = Video2LoraModel.from_vlm(folder / BASE, **sizes)
    torch.manual_seed(0)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(folder / MODEL)
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / MODEL)
    tiny_clip(folder / "clip.mp4")
    tiny_clip(folder / "other.mp4", seconds=3, seed=1)
    published_draft(parity_dir).save(folder / "hypernet.pt")
    return folder


def test_python_blocks_run_in_order(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    namespace: dict = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    assert (folder / "clip-lora" / "adapter_model.safetensors").is_file()
    assert namespace["adapter"].rank == 32
    assert 0 <= namespace["error"] <= 1
    assert namespace["model"].config.rank > 0


def test_commands_run(folder, monkeypatch):
    from typer.testing import CliRunner

    from video2lora.cli import app

    monkeypatch.chdir(folder)
    (commands,) = [block for block in blocks("bash") if block.startswith("video2lora internalize")]
    runner = CliRunner()
    extra = {"internalize": ["--overwrite"], "compose": ["--overwrite"], "ask": ["--max-new-tokens", "2"]}
    assert runner.invoke(app, ["internalize", "other.mp4", "--model", MODEL, "-o", "other-lora"]).exit_code == 0
    for line in commands.strip().splitlines():
        command = shlex.split(line)[1:]
        if command[0] == "import-checkpoint":
            command[command.index("-o") + 1] = "imported-model"
        result = runner.invoke(app, [*command, *extra.get(command[0], [])])
        assert result.exit_code == 0, f"{line}: {result.output}"


def test_the_evaluation_runs(folder, monkeypatch):
    from typer.testing import CliRunner

    from video2lora.cli import app

    monkeypatch.chdir(folder)
    rows = [{"video": f"{name}.mp4", "prompt": "What moves?", "response": "A square."} for name in ("clip", "other")]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = [block for block in blocks("bash") if block.startswith("video2lora evaluate")]
    result = CliRunner().invoke(app, [*shlex.split(command)[1:], "--max-new-tokens", "2", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert (folder / "run" / "report.html").is_file()


def test_install_and_make_commands_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in README.read_text(encoding="utf-8")
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (README.parent / link).exists(), link
