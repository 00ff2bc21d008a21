"""What every command does when all goes well, and what it prints."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from video2lora import Video2LoraModel, Video2LoraProcessor, VideoAdapter
from video2lora.cli._terminal import printable
from video2lora.testing import save_tiny_vlm

from ..modeling.published_files import random_draft

Run = Callable[..., Any]
QUESTION = "What moves?"


def test_internalize_writes_what_the_pipeline_makes(run: Run, clip: Path, model_dir: Path, adapter_dir: Path) -> None:
    expected = pipeline("video-to-lora", model=str(model_dir), device="cpu")(str(clip))
    loaded = VideoAdapter.from_pretrained(adapter_dir)
    assert loaded.content_hash == expected.content_hash
    assert loaded.segments[0].source == clip.name


def test_internalize_describes_the_adapter_as_json(run: Run, clip: Path, model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--num-frames", 3, "--start", 0.5, "--end", 1.5, "--dtype", "bfloat16", "--layout", "text", "--json"]
    result = run("internalize", clip, "-m", model_dir, "-o", out, *options)
    (entry,) = json.loads(result.stdout)["adapters"]
    adapter = VideoAdapter.from_pretrained(out)
    assert (entry["start"], entry["end"], entry["num_frames"]) == (0.5, 1.5, 3)
    assert entry["num_visual_tokens"] == 3 * 4
    assert entry["rank"] == adapter.rank
    assert entry["bytes"] == sum(path.stat().st_size for path in out.iterdir())
    stored = json.loads((out / "video2lora.json").read_text())
    assert (stored["layout"], stored["dtype"]) == ("text", "bfloat16")


def test_internalize_several_videos_gives_each_what_it_gets_alone(
    run: Run, clip: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    shutil.copy(clip, tmp_path / "second.mp4")
    out = tmp_path / "out"
    result = run("internalize", clip, tmp_path / "second.mp4", "-m", model_dir, "-o", out, "--batch-size", 2)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["clip", "second"]
    alone = VideoAdapter.from_pretrained(adapter_dir)
    for name in ("clip", "second"):
        for module, tensor in VideoAdapter.from_pretrained(out / name).weights.lora_B.items():
            torch.testing.assert_close(tensor, alone.weights.lora_B[module], rtol=1e-5, atol=1e-6)
    header, first, second = result.stdout.splitlines()
    assert header.split("  ")[0] == "video" and "visual tokens" in header
    assert first.startswith("clip.mp4") and second.startswith("second.mp4")


def test_internalize_chunks_become_segments(run: Run, clip: Path, model_dir: Path, tmp_path: Path) -> None:
    result = run("internalize", clip, "-m", model_dir, "-o", tmp_path / "out", "--chunk-seconds", 1, "--num-frames", 2)
    assert result.exit_code == 0, result.stderr
    segments = VideoAdapter.from_pretrained(tmp_path / "out").segments
    assert [(segment.start, segment.end) for segment in segments] == [(0.0, 1.0), (1.0, 2.0)]
    assert "in 2" in result.stdout


def test_internalize_overwrites_an_adapter_when_told_to(
    run: Run, clip: Path, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(adapter_dir, tmp_path / "out")
    result = run("internalize", clip, "-m", model_dir, "-o", out, "--num-frames", 2, "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert VideoAdapter.from_pretrained(out).segments[0].num_frames == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


CUT = "(cut after 8 tokens: --max-new-tokens takes more)\n"


def test_ask_answers_as_the_model_in_memory_does(
    run: Run, model_dir: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Video2LoraModel.from_pretrained(model_dir)
    processor = Video2LoraProcessor.from_pretrained(model_dir)
    inputs = processor(text=[QUESTION])
    adapter = VideoAdapter.from_pretrained(adapter_dir)
    tokens = model.generate(**inputs, adapters=adapter, max_new_tokens=8, do_sample=False)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not torch.equal(plain, tokens), "the adapter changes nothing: the test would show nothing"
    document = json.loads(run("ask", adapter_dir, QUESTION, "--max-new-tokens", 8, "--json").stdout)
    assert document["visual_tokens_in_context"] == 0
    assert document["answers"][0]["answer"] == expected
    assert document["answers"][0]["context_tokens"] == inputs["input_ids"].shape[1]
    asked = run("ask", adapter_dir, QUESTION, "--max-new-tokens", 8)
    assert (asked.stdout, asked.stderr) == (printable(expected) + "\n", CUT) and not document["answers"][0]["ended"]
    monkeypatch.setattr(Video2LoraProcessor, "end_token_ids", {int(tokens[0, -1])})
    asked = run("ask", adapter_dir, QUESTION, "--max-new-tokens", 8)
    assert (asked.stdout, asked.stderr) == (printable(expected) + "\n", "")


def test_ask_takes_the_text_layout_and_another_place_of_the_base(
    run: Run, adapter_dir: Path, base_dir: Path, tmp_path: Path
) -> None:
    VideoAdapter.from_pretrained(adapter_dir).save_pretrained(tmp_path / "text", layout="text")
    moved = shutil.copytree(base_dir, tmp_path / "base")
    expected = run("ask", adapter_dir, QUESTION, "--max-new-tokens", 8).stdout
    result = run("ask", tmp_path / "text", QUESTION, "--base", moved, "--max-new-tokens", 8)
    assert (result.exit_code, result.stdout, result.stderr) == (0, expected, CUT)


def test_ask_warns_about_another_base_of_the_same_size(run: Run, adapter_dir: Path, tmp_path: Path) -> None:
    other = save_tiny_vlm("smolvlm", tmp_path / "other", seed=1)
    result = run("ask", adapter_dir, QUESTION, "--base", other, "--max-new-tokens", 2)
    assert result.exit_code == 0
    line, _cut = result.stderr.splitlines()
    assert line.startswith("warning: this adapter was made for") and "other" in line


def test_ask_reads_questions_from_stdin_and_interactively(run: Run, adapter_dir: Path) -> None:
    arguments = ["ask", adapter_dir, "--max-new-tokens", 4]
    answers = run(*arguments, "first", "second", "--json")
    expected = [entry["answer"] for entry in json.loads(answers.stdout)["answers"]]
    piped = json.loads(run(*arguments, "-", "--json", input="first\n\nsecond\n").stdout)
    assert [entry["answer"] for entry in piped["answers"]] == expected
    typed = run(*arguments, "-i", input="first\nsecond\n\nnever asked\n")
    assert typed.exit_code == 0
    assert typed.stdout == "".join(f"{answer}\n" for answer in expected)


def test_inspect_adapter_tells_its_norms_and_provenance(run: Run, adapter_dir: Path, clip: Path) -> None:
    document = json.loads(run("inspect", adapter_dir, "--json").stdout)
    adapter = VideoAdapter.from_pretrained(adapter_dir)
    norms = [adapter.delta_weight("down_proj", layer).norm().item() for layer in range(4)]
    assert document["norms"]["down_proj"] == pytest.approx(norms, rel=1e-5)
    assert document["content_hash"] == adapter.content_hash
    assert (document["rank"], document["static_rank"]) == (adapter.rank, adapter.static_rank)
    shown = run("inspect", adapter_dir).stdout
    assert clip.name in shown and adapter.content_hash in shown and "4 of it static" in shown


@pytest.mark.parametrize("bundle", [False, True])
def test_inspect_model_counts_parameters(run: Run, model_dir: Path, tmp_path: Path, bundle: bool) -> None:
    model = Video2LoraModel.from_pretrained(model_dir)
    model.save_pretrained(tmp_path / "model", bundle_base=bundle)
    document = json.loads(run("inspect", tmp_path / "model", "--json").stdout)
    parts = document["hypernetwork_parameters"]
    assert sum(parts.values()) == sum(p.numel() for p in model.hypernetwork.parameters())
    assert document["base_parameters"] == sum(p.numel() for p in model.vlm.parameters())
    assert document["bundled"] is bundle
    assert run("inspect", tmp_path / "model").exit_code == 0


def test_commands_take_hub_ids(run: Run, patched_hub: Any, model_dir: Path, adapter_dir: Path, clip: Path) -> None:
    """Both kinds of repository are told apart, and a model is loaded from there."""
    VideoAdapter.from_pretrained(adapter_dir).push_to_hub("owner/clip-lora")
    model = Video2LoraModel.from_pretrained(model_dir)
    model.push_to_hub("owner/model")
    assert json.loads(run("inspect", "owner/clip-lora", "--json").stdout)["kind"] == "adapter"
    assert json.loads(run("inspect", "owner/model", "--json").stdout)["kind"] == "model"
    out = patched_hub.home / "out"
    result = run("internalize", clip, "-m", "owner/model", "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert VideoAdapter.from_pretrained(out).provenance.hypernetwork == "owner/model"
    assert run("ask", "owner/clip-lora", QUESTION, "--max-new-tokens", 2).exit_code == 0


def test_compose_counts_the_static_part_once(run: Run, clip: Path, model_dir: Path, tmp_path: Path) -> None:
    for name, start in (("a", 0), ("b", 1)):
        run("internalize", clip, "-m", model_dir, "-o", tmp_path / name, "--start", start, "--num-frames", 2)
    parts = [VideoAdapter.from_pretrained(tmp_path / name) for name in "ab"]
    options = ["--weights", "1,0.5", "--json"]
    document = json.loads(run("compose", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c", *options).stdout)
    composed = VideoAdapter.from_pretrained(tmp_path / "c")
    assert document["rank"] == composed.rank == 3 * parts[0].static_rank
    assert [segment.weight for segment in composed.segments] == [1.0, 0.5]
    assert document["relative_error"] == 0
    cut = run("compose", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "d", "--rank", 2, "--json")
    cut_document = json.loads(cut.stdout)
    assert VideoAdapter.from_pretrained(tmp_path / "d").rank == 2
    assert 0 < cut_document["relative_error"] < 1
    assert cut_document["rank_before_truncation"] == composed.rank


def test_import_checkpoint_makes_a_checkpoint_that_works(run: Run, clip: Path, tmp_path: Path) -> None:
    base = save_tiny_vlm("smolvlm", tmp_path / "base", hidden_size=24, num_hidden_layers=3)
    file = random_draft(modules={"down_proj": (128, 24)}).save(tmp_path / "published.pt")
    options = ["--base", base, "--num-frames", 5, "--json"]
    result = run("import-checkpoint", file, "-o", tmp_path / "model", *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["rank"], document["layers"], document["num_frames"]) == (2, 3, 5)
    made = run("internalize", clip, "-m", tmp_path / "model", "-o", tmp_path / "out", "--json")
    assert json.loads(made.stdout)["adapters"][0]["num_frames"] == 5
    again = run("import-checkpoint", file, "-o", tmp_path / "model", "--base", base, "--bundle-base", "--overwrite")
    assert again.exit_code == 0, again.stderr
    assert json.loads((tmp_path / "model" / "config.json").read_text())["bundle_base"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "out", "published.pt"]


def test_env_names_the_libraries(run: Run) -> None:
    document = json.loads(run("env", "--json").stdout)
    assert document["torch"] == torch.__version__.split("+")[0]
    assert document["offline"] is True
    assert "libavcodec" in document["ffmpeg"]
    assert "transformers" in run("env").stdout


def test_import_checkpoint_never_deletes_what_is_not_a_checkpoint(run: Run, tmp_path: Path) -> None:
    base = save_tiny_vlm("smolvlm", tmp_path / "base", hidden_size=24, num_hidden_layers=3)
    file = random_draft(modules={"down_proj": (128, 24)}).save(tmp_path / "published.pt")
    out = tmp_path / "model"
    assert run("import-checkpoint", file, "-o", out, "--base", base).exit_code == 0
    (out / "models.txt").write_text("mine")
    result = run("import-checkpoint", file, "-o", out, "--base", base, "--overwrite")
    assert result.exit_code == 2 and "would delete" in result.stderr
    assert (out / "models.txt").read_text() == "mine" and (out / "model.safetensors").exists()


def test_a_base_inside_the_checkpoint_is_named_and_found(
    run: Run, bundled_dir: Path, adapter_dir: Path, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    made = run("internalize", clip, "-m", bundled_dir, "-o", out)
    assert made.exit_code == 0, made.stderr
    (hint,) = made.stderr.splitlines()
    words = shlex.split(hint.partition("ask the adapter: ")[2])
    assert words[:3] == ["video2lora", "ask", str(out)] and words[-2:] == ["--base", str(bundled_dir)]
    assert "in the checkpoint that made it" in run("inspect", out).stdout
    told = run("ask", out, QUESTION)
    assert told.exit_code == 2 and "'box'" in told.stderr and "--base CHECKPOINT" in told.stderr
    asked = run(*words[1:3], QUESTION, *words[-2:], "--max-new-tokens", 8)
    assert asked.exit_code == 0 and asked.stderr.startswith("(cut after ") and len(asked.stderr.splitlines()) == 1
    assert asked.stdout == run("ask", adapter_dir, QUESTION, "--max-new-tokens", 8).stdout
    as_json = run("internalize", clip, "-m", bundled_dir, "-o", tmp_path / "json", "--json")
    assert as_json.stderr == "" and json.loads(as_json.stdout)["adapters"][0]["num_decode_errors"] == 0


def test_ask_follows_a_light_checkpoint_to_its_base(
    run: Run, model_dir: Path, base_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    arguments = ["ask", adapter_dir, QUESTION, "--max-new-tokens", 8, "--json"]
    plain, followed = (json.loads(run(*arguments, "--base", base).stdout) for base in (base_dir, model_dir))
    assert followed["base"] == str(base_dir) and followed["answers"][0]["answer"] == plain["answers"][0]["answer"]
    lost = shutil.copytree(model_dir, tmp_path / "lost")
    values = json.loads((lost / "config.json").read_text())
    (lost / "config.json").write_text(json.dumps(values | {"base_model_name_or_path": None}))
    result = run(*arguments, "--base", lost)
    assert result.exit_code == 2 and "neither holds its base model nor names it" in result.stderr


def test_inspect_counts_only_the_models_own_files(run: Run, model_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_dir, tmp_path / "model")
    expected = sum(path.stat().st_size for path in model.rglob("*") if path.is_file())
    shutil.copytree(model_dir, model / "checkpoint-10")
    (model / "learning_curve.png").write_bytes(bytes(999))
    assert json.loads(run("inspect", model, "--json").stdout)["bytes"] == expected


def test_a_damaged_video_is_used_and_told(
    run: Run, model_dir: Path, damaged: Path, clip: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    made = run("internalize", damaged, "-m", model_dir, "-o", out, "--num-frames", 50, "--json")
    count = VideoAdapter.from_pretrained(out).segments[0].num_decode_errors
    assert count > 0
    assert made.stderr == f"warning: damaged.mp4: {count} packets or frames do not decode; the rest was used\n"
    assert json.loads(made.stdout)["adapters"][0]["num_decode_errors"] == count
    assert "not decoded" in run("inspect", out).stdout
    assert f"({count} packets or frames do not decode)" in (out / "README.md").read_text()
    run("internalize", clip, "-m", model_dir, "-o", tmp_path / "sound")
    assert "not decoded" not in run("inspect", tmp_path / "sound").stdout
    assert "do not decode" not in (tmp_path / "sound" / "README.md").read_text()
