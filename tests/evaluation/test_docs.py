"""docs/evaluation.md, run as it stands on small random models: what it shows works."""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from video2lora import Video2LoraModel, Video2LoraProcessor
from video2lora.cli import app
from video2lora.evaluation import BENCHMARKS, METRICS, read_run
from video2lora.evaluation.conditions import CONDITIONS
from video2lora.testing import save_tiny_vlm, tiny_clip

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "evaluation.md").read_text(encoding="utf-8")
MODEL = "user/model"
SMALL = {
    "evaluate": ["--max-new-tokens", "3", "--num-frames", "3", "--device", "cpu"],
    "report": ["--resamples", "200"],
    "benchmark": ["--repeats", "1", "--new-tokens", "2", "--device", "cpu"],
}
SMALLER = {"--num-samples 100": "--num-samples 2", "--frames 8,64": "--frames 2,3", "224,512": "16,32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the checkpoint, its card and the questions that the page names."""
    folder = tmp_path_factory.mktemp("evaluation-docs")
    save_tiny_vlm("smolvlm", folder / "base")
    model = Video2LoraModel.from_vlm(folder / "base", rank=2, latent_size=8, num_latents=2, num_blocks=1, num_frames=3)
    torch.manual_seed(0)
    for scaler in model.hypernetwork.scaler_B.values():
        torch.nn.init.normal_(scaler)
    model.save_pretrained(folder / MODEL)
    Video2LoraProcessor.from_config(model.config).save_pretrained(folder / MODEL)
    for seed, name in enumerate(("kitchen", "garden")):
        tiny_clip(folder / f"{name}.mp4", seed=seed)
    (folder / "README.md").write_text("# A model\n")
    (rows,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    (folder / "questions.jsonl").write_text(rows)
    return folder


def _in_order() -> Iterator[tuple[str, str]]:
    """The page's code, as (language, text): a command a line, Python a block."""
    for language, text in re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL):
        yield from ((language, part) for part in (text.splitlines() if language == "bash" else [text]))


def _run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, f"{shlex.join(words)}: {done.output}{done.stderr}{done.exception!r}"
    return done.stdout


def _command(text: str) -> str:
    """Run a command of the page at small sizes; return its name."""
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    words = shlex.split(text, comments=True)
    if words[0] == "pip":
        return "pip"
    if words[1:] == ["evaluate", "--list"]:
        assert all(name in _run(*words[1:]) for name in BENCHMARKS)
        return "list"
    small = SMALL[words[1]]
    if "--num-frames" in words:
        small = small[:2] + small[4:]
    for other, more in (("other-run", []), ("own-run-16", ["--num-frames", "6"])):
        if other in words:  # of another checkpoint, and of more frames
            arguments = ["evaluate", MODEL, "-b", "questions.jsonl", "-o", other, *(more or ["--num-frames", "8"])]
            _run(*arguments, "--max-new-tokens", "3", "--device", "cpu", "--metrics", "token_f1")
    _run(*words[1:], *small)
    return words[1]


def test_the_page_runs_from_top_to_bottom(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {}
    ran = []
    for language, text in _in_order():
        if language == "python":
            exec(compile(text, "docs/evaluation.md", "exec"), namespace)
        else:
            ran.append(_command(text))
    assert ran == ["pip", "evaluate", "evaluate", "evaluate", "list", "evaluate", *["report"] * 4, "benchmark"]
    for name in ("run.json", "records.parquet", "report.md", "report.html", "answers", "plots"):
        assert (folder / "my-run" / name).exists()
    assert list((folder / "own-run" / "frames").glob("*.jpg"))
    assert (folder / "by-frames" / "report.md").is_file() and (folder / "all" / "report.md").is_file()
    tuned = read_run(folder / "tuned-run")
    assert tuned.conditions == ["video", "adapter", "lora_from_adapter_5_steps", "adapter_2_segments"]
    run = read_run(folder / "python-run")
    assert run.conditions == ["video", "adapter", "adapter_2_segments", "lora_from_adapter_5_steps"]
    assert "rouge_l" in run.metrics and isinstance(namespace["videos"], int)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "model-index" in card and card.endswith("# A model\n")
    assert (folder / "speed" / "report.md").is_file()


def test_every_option_of_a_condition_is_in_the_table() -> None:
    (table,) = re.findall(r"\| \| options \|\n(.*?)\n\n", TEXT, re.DOTALL)
    rows = {name: row for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    for name, condition in CONDITIONS.items():
        _, _, *options = inspect.signature(condition).parameters
        assert set(re.findall(r"`(\w+)`", rows.get(name, "| |").split("|")[-2])) == set(options), name


def test_its_tables_name_everything() -> None:
    names = set(re.findall(r"`([a-z0-9_]+)`", TEXT))
    assert names >= set(CONDITIONS) | set(BENCHMARKS) | set(METRICS)


def test_the_paper_row_is_the_reports() -> None:
    from video2lora.evaluation.paper import PRINTED_RESULTS
    from video2lora.evaluation.report_tables import _paper_row

    found = [one for one in PRINTED_RESULTS if (one.benchmark, one.size, one.table) ==
             ("ActivityNet Captions", "500M", "1a")]  # fmt: skip
    assert "| " + " | ".join(_paper_row(found[0])) + " |" in TEXT


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)):
        if "://" not in link:
            assert (DOCS / link).exists(), link


def test_rows_are_json() -> None:
    (rows,) = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert all(json.loads(line)["video"] for line in rows.splitlines())
