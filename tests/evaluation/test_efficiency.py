"""Efficiency: token counts are the processors' own, nothing measured is lost, and the arithmetic of what pays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, SmolVLMImageProcessor
from typer.testing import CliRunner

from video2lora.cli import app
from video2lora.cli.demo import _random_checkpoint
from video2lora.evaluation import efficiency, efficiency_conditions, efficiency_measure
from video2lora.evaluation.efficiency import Sweep, run_sweep
from video2lora.evaluation.efficiency_conditions import Bench, kv_bytes, measure_case, measure_queries
from video2lora.evaluation.efficiency_models import SIZES, find_subject, size_config
from video2lora.evaluation.efficiency_prompts import (
    QUESTION,
    PromptRules,
    count_words,
    make_case,
    split_tiles,
    text_tokens,
)
from video2lora.evaluation.efficiency_report import report
from video2lora.evaluation.efficiency_results import EfficiencyError, break_even, read_results
from video2lora.modeling import Video2LoraProcessor, inject_lora, merge_lora
from video2lora.testing import save_tiny_vlm, tiny_smolvlm
from video2lora.video import VideoFrames

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"repeats": 2, "new_tokens": 3}
VIDEO_CONDITIONS = {"video_cold", "video_cached", "kv_cache", "internalize"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint: tiles of 32 pixels, 4 tokens each."""
    return _random_checkpoint(tmp_path_factory.mktemp("efficiency"))


@pytest.fixture(scope="module")
def bench(checkpoint: Path) -> Bench:
    subject = find_subject(str(checkpoint))
    model = subject.load(CPU, torch.float32, 0)
    return Bench(model, subject.rules.image_token_id, subject.rules.tile, 16, 2, 3)


@pytest.fixture(scope="module")
def swept(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep; read it, never write to it."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    run_sweep(Sweep(str(checkpoint), (3, 26), (16, 32, 64), max_tokens=1000, **OPTIONS), folder, device=CPU)
    return folder


# --- tokens --------------------------------------------------------------------------------------------------------


def test_tiles_are_those_of_the_image_processor() -> None:
    tile = 8
    # nearest pixel: torch's Lanczos stumbles over pictures of a pixel's width
    processor = SmolVLMImageProcessor(max_image_size={"longest_edge": tile}, resample=0)
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (40, 1), (16, 9), (64, 48), (48, 64)] + random.integers(1, 80, (60, 2)).tolist()
    for width, height in sizes:
        edge = int(random.integers(1, 41))
        output = processor(
            [np.zeros((height, width, 3), np.uint8)],
            size={"longest_edge": edge},
            do_image_splitting=True,
            return_row_col_info=True,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        rows, cols = split_tiles(width, height, edge, tile)
        assert ([[rows]], [[cols]]) == (output["rows"], output["cols"]), (width, height, edge)
        assert output["pixel_values"].shape[1] == rows * cols + 1, (width, height, edge)


@pytest.mark.parametrize("longest_edge", [32, 64, 96])
@pytest.mark.parametrize("path", ["images", "video"])
def test_token_counts_are_those_of_the_tiny_processor(path: Any, longest_edge: int) -> None:
    _, processor = tiny_smolvlm()
    _check_counts(processor, PromptRules(32, 4, processor.image_token_id, _counter(processor)), path, longest_edge)


@pytest.mark.parametrize("longest_edge", [224, 512, 1024, 2048])
@pytest.mark.parametrize("path", ["images", "video"])
def test_token_counts_are_those_of_the_real_processor(shared_dir: Path, path: Any, longest_edge: int) -> None:
    processor = AutoProcessor.from_pretrained(shared_dir / "smolvlm2" / "SmolVLM2-500M-Video-Instruct")
    _check_counts(processor, find_subject("500M").rules, path, longest_edge)


def test_words_are_counted_as_the_real_tokenizer_does(shared_dir: Path) -> None:
    processor = AutoProcessor.from_pretrained(shared_dir / "smolvlm2" / "SmolVLM2-500M-Video-Instruct")
    real = PromptRules(512, 64, processor.image_token_id, _counter(processor))
    ours = find_subject("500M").rules
    assert text_tokens(real) == text_tokens(ours)
    for frames in [*range(1, 130), 256, 384, 512, 999, 1024]:
        for path in ("images", "video"):
            assert make_case(real, path, frames, (1280, 720), 1024, 42.7) == make_case(  # type: ignore[arg-type]
                ours, path, frames, (1280, 720), 1024, 42.7
            )


def test_tokens_of_a_frame_at_true_sizes() -> None:
    """64 / 320 / 832 tokens at 512 / 1,024 / 2,048 pixels (500M); the 2.2B cuts at 384."""
    for size, edges in {"500M": {224: 64, 512: 64, 1024: 320}, "2.2B": {224: 81, 512: 405, 1024: 567}}.items():
        rules = find_subject(size).rules
        for edge, tokens in edges.items():
            case = make_case(rules, "images", 10, (1280, 720), edge, 10.0)
            assert case.visual_tokens == 10 * tokens
            assert len(case.ids(rules.image_token_id, 7)) == case.prefix_tokens + 7
            assert case.ids(rules.image_token_id, 7).count(rules.image_token_id) == case.visual_tokens
        assert make_case(rules, "video", 10, (1280, 720), 1024, 10.0).visual_tokens == 10 * edges[224]


def _check_counts(processor: Any, rules: PromptRules, path: Any, longest_edge: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 36, 64, 3), np.uint8)
    case = make_case(rules, path, 3, (64, 36), longest_edge, 3.0)
    if path == "video":
        video = VideoFrames(frames, (0.0, 1.0, 2.0), 0.0, 3.0, 3.0, "<frames>", None, (64, 36), 0)
        ours = Video2LoraProcessor(processor)
        features = ours.encode_video(video, QUESTION, add_generation_prompt=True)
        internalization = ours.encode_video(video)["input_ids"]
        assert internalization.shape[1] == case.prefix_tokens + case.internalization_tokens
        assert len(processor.tokenizer(ours.render(QUESTION))["input_ids"]) == text_tokens(rules)
    else:
        content: list[Any] = []
        for second, frame in enumerate(frames):
            stamp = {"type": "text", "text": f"\nFrame from 00:{second:02d}:"}
            content += [stamp, {"type": "image", "image": frame}]
        content.append({"type": "text", "text": "\n\n" + QUESTION})
        features = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"size": {"longest_edge": longest_edge}, "do_image_splitting": True},
        )
    ids = features["input_ids"][0]
    assert len(ids) == case.context_tokens
    assert int((ids == rules.image_token_id).sum()) == case.visual_tokens
    visual = torch.tensor(case.ids(rules.image_token_id, case.question_tokens)) == rules.image_token_id
    assert torch.equal(visual, ids == rules.image_token_id)
    assert features["pixel_values"].shape[1] == case.frames * case.tiles


def _counter(processor: Any) -> Callable[[str], int]:
    return lambda text: len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


# --- models --------------------------------------------------------------------------------------------------------


def test_true_sizes_have_the_published_numbers_of_parameters() -> None:
    for size, parameters in {"500M": 507_482_304, "2.2B": 2_246_784_880}.items():
        with torch.device("meta"):
            vlm = AutoModelForImageTextToText.from_config(size_config(size))
        assert sum(p.numel() for p in vlm.parameters()) == parameters
        assert find_subject(size).trained_context == 8192
        assert size_config(size, 100_000).get_text_config().max_position_embeddings == 100_000


def test_kv_cache_bytes_at_true_sizes() -> None:
    assert kv_bytes(size_config("500M"), torch.bfloat16, 1) == 2 * 32 * 5 * 64 * 2
    assert kv_bytes(size_config("2.2B"), torch.bfloat16, 1000) == 1000 * 2 * 24 * 32 * 64 * 2


def test_a_base_without_tiles_is_refused(tmp_path: Path) -> None:
    name = save_tiny_vlm("qwen2_5_vl", tmp_path / "qwen")
    with pytest.raises(EfficiencyError, match="qwen2_5_vl.*tiles"):
        find_subject(str(name))


def test_random_sizes_and_plain_bases_are_swept_too(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path
) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    small = {
        "text_config": SIZES["500M"]["text_config"] | text | {"intermediate_size": 64},
        "vision_config": SIZES["500M"]["vision_config"]
        | {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 32, "num_hidden_layers": 1},
        "scale_factor": 4,
    }
    monkeypatch.setitem(SIZES, "500M", small)
    for model in ("500M", str(checkpoint.parent / "base")):
        results = run_sweep(Sweep(model, (1,), (32,), repeats=1, new_tokens=1), tmp_path / model[-4:], device=CPU)
        assert {results.status(cell, c) for cell in results.cells for c in VIDEO_CONDITIONS} == {"ok"}
        assert "random" in results.settings["weights"]


# --- conditions ----------------------------------------------------------------------------------------------------


def test_every_condition_has_times_and_true_counts(swept: Path, checkpoint: Path) -> None:
    results = read_results(swept)
    subject = find_subject(str(checkpoint))
    assert [cell.column for cell in results.cells[::2]] == ["16 px", "32 px", "64 px", "video"]
    skipped = 0
    for cell in results.cells:
        case = make_case(subject.rules, cell.path, cell.frames, (1280, 720), cell.longest_edge or 32, 26 / 24)  # type: ignore[arg-type]
        assert (cell.context_tokens, cell.tiles) == (case.context_tokens, case.tiles)
        assert cell.visual_tokens == 4 * cell.frames * cell.tiles
        if cell.context_tokens > 1000:
            skipped += 1
            assert {results.status(cell, c) for c in VIDEO_CONDITIONS} == {"over 1,000 tokens"}
            continue
        assert {results.status(cell, c) for c in VIDEO_CONDITIONS} == {"ok"}
        for condition in ("video_cold", "video_cached", "kv_cache"):
            assert (results.seconds(cell, condition) or 0) > 0
            assert results.get(cell, condition, "context_tokens") == case.context_tokens
            assert results.get(cell, condition, "visual_tokens") == case.visual_tokens
        for condition, name in [("internalize", "seconds"), ("kv_cache", "per_token"), ("video_cold", "encode")]:
            assert (results.seconds(cell, condition, name) or 0) > 0
        size = results.get(cell, "kv_cache", "kv_cache_bytes")
        assert size == results.get(cell, "kv_cache", "kv_cache_bytes_by_config")
        assert size == kv_bytes(subject.config, torch.float32, case.prefix_tokens)
        assert results.get(cell, "kv_cache", "per_token")["runs"] == OPTIONS["new_tokens"]
        assert (results.reading_seconds(cell) or 0) > 0
        assert set(results.costs(cell)) == {*VIDEO_CONDITIONS, "adapter_attached", "adapter_merged"} - {"internalize"}
    assert skipped == 1  # 26 frames of 5 tiles
    for condition in ("text_only", "adapter_attached", "adapter_merged"):
        row = results.rows[f"query:{condition}"]
        assert (row["context_tokens"], row["visual_tokens"]) == (text_tokens(subject.rules), 0)
        assert row["first_token"]["median"] > 0 and row["per_token"]["median"] > 0
    for frames in (3, 26):
        assert results.rows[f"decode:{frames}"]["frames_used"] == frames
    assert results.rows["preprocess:images:26:64"]["scaled_from"] == 24
    assert "scaled_from" not in results.rows["preprocess:images:3:64"]


def test_resolutions_with_the_same_tiles_are_measured_once(swept: Path) -> None:
    results = read_results(swept)
    first, second = (cell for cell in results.cells if cell.frames == 3 and cell.longest_edge in (16, 32))
    assert first.case == second.case
    lines = (swept / "measurements.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines)
    assert sum("device:images/3/" in json.loads(line)["key"] for line in lines) == 2 * len(VIDEO_CONDITIONS)


def test_the_ways_give_the_answers_they_stand_for(
    bench: Bench, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reused cache and cached frames say what the cold video says; a merged adapter what an attached one says."""
    outputs: list[tuple[dict[str, Any], Any, Any]] = []
    generate = Bench.generate

    def recorded(self: Bench, clock: Any, inputs: Any, new_tokens: int, adapters: Any = None, **kwargs: Any) -> Any:
        output = generate(self, clock, inputs, new_tokens, adapters, **kwargs)
        new = getattr(output, "sequences", output)[0, -new_tokens:].tolist()
        outputs.append((kwargs, adapters, new))
        return output

    monkeypatch.setattr(Bench, "generate", recorded)
    rules = find_subject(str(checkpoint)).rules
    case = make_case(rules, "images", 3, (64, 36), 64, 3.0)
    list(measure_case(bench, case))
    reused = [new for kwargs, _, new in outputs if "past_key_values" in kwargs]
    others = [new for kwargs, _, new in outputs if "past_key_values" not in kwargs]
    assert reused and len({tuple(new[:1]) for new in reused + others}) == 1
    assert {tuple(new) for new in reused if len(new) > 1} == {tuple(_cold_answer(bench, case, 4))}
    outputs.clear()
    list(measure_queries(bench, case, text_tokens(rules)))
    attached = {tuple(new) for _, adapters, new in outputs if adapters is not None}
    plain = [tuple(new) for _, adapters, new in outputs if adapters is None]
    assert attached == set(plain[len(plain) // 2 :])  # the second half is measured on the merged base
    assert {len(new) for new in attached} == {1, 4}


def _cold_answer(bench: Bench, case: Any, tokens: int) -> list[int]:
    inputs = bench.inputs(case, case.question_tokens)
    output: Any = bench.vlm.generate(  # type: ignore[operator]
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return output[0, -tokens:].tolist()


def test_a_merged_base_is_bit_for_bit_what_it_was(bench: Bench, checkpoint: Path) -> None:
    model = bench.model
    case = make_case(find_subject(str(checkpoint)).rules, "video", 2, (64, 36), 32, 2.0)
    with torch.no_grad():
        lora = model.internalize(**bench.inputs(case, case.internalization_tokens))
        before = {name: tensor.clone() for name, tensor in bench.vlm.state_dict().items()}
        ids = torch.arange(20)[None]
        with inject_lora(bench.vlm, model.targets, lora):
            expected = bench.vlm(input_ids=ids).logits
        with pytest.raises(KeyboardInterrupt), merge_lora(bench.vlm, model.targets, lora):
            torch.testing.assert_close(bench.vlm(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
            changed = {n for n, tensor in bench.vlm.state_dict().items() if not torch.equal(tensor, before[n])}
            raise KeyboardInterrupt
    assert changed == {path + ".weight" for path in model.targets.all_paths()}
    for name, tensor in bench.vlm.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    list(measure_queries(bench, case, 9))
    for name, tensor in bench.vlm.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_does_not_fit_into_memory_says_so_and_the_sweep_goes_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video2lora.modeling import streaming

    embed_frames = efficiency_conditions.embed_frames

    def too_much(vlm: Any, inputs: Any) -> Any:
        if inputs["pixel_values"].shape[1] >= 8:
            raise torch.OutOfMemoryError("CUDA out of memory (not really)")
        return embed_frames(vlm, inputs)

    monkeypatch.setattr(efficiency_conditions, "embed_frames", too_much)
    sweep = Sweep(str(checkpoint), (2, 4), (32, 64), **OPTIONS)
    results = run_sweep(sweep, tmp_path / "out", device=CPU)
    for cell in results.cells:
        expected = "out of memory" if cell.frames * cell.tiles >= 8 else "ok"
        assert results.status(cell, "video_cold") == results.status(cell, "kv_cache") == expected
        assert results.status(cell, "internalize") == "ok"
    assert "| out of memory |" in report(results)
    again = run_sweep(sweep, tmp_path / "out", device=CPU)  # not tried again
    assert again.rows == results.rows
    monkeypatch.setattr(efficiency_conditions, "embed_frames", embed_frames)
    monkeypatch.setattr(streaming, "embed_frames", too_much)
    results = run_sweep(Sweep(str(checkpoint), (2,), (64,), **OPTIONS), tmp_path / "other", device=CPU)
    (cell,) = (cell for cell in results.cells if cell.longest_edge == 64)
    assert results.status(cell, "internalize") == "out of memory"
    assert results.status(cell, "video_cold") == "ok"


# --- the folder ----------------------------------------------------------------------------------------------------


def test_a_cut_sweep_goes_on_where_it_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    sweep = Sweep(str(checkpoint), (2, 3), (32,), **OPTIONS)
    append, left = efficiency.Folder.append, [7]

    def dying(self: Any, key: str, row: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        append(self, key, row)

    monkeypatch.setattr(efficiency.Folder, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, folder, device=CPU)
    monkeypatch.setattr(efficiency.Folder, "append", append)
    kept = (folder / "measurements.jsonl").read_bytes()
    assert kept.count(b"\n") == 7
    (folder / "measurements.jsonl").write_bytes(kept + b'{"key": "device:images/2')  # torn by the kill
    assert len(read_results(folder).rows) == 7
    results = run_sweep(sweep, folder, device=CPU)
    after = (folder / "measurements.jsonl").read_bytes()
    assert after.startswith(kept)
    assert len(results.rows) == len(after.splitlines()) == 3 + 4 * 4 + 2 + 4
    monkeypatch.setattr(efficiency, "find_subject", _unloadable(efficiency.find_subject))
    assert run_sweep(sweep, folder, device=CPU).rows == results.rows  # nothing left: the model is not even loaded


def _unloadable(find: Callable[[str], Any]) -> Callable[[str], Any]:
    from dataclasses import replace

    def load(*_: Any) -> Any:
        raise AssertionError("the model was loaded for nothing")

    return lambda name: replace(find(name), load=load)


def test_a_sweep_takes_more_cells_later_but_not_another_model(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    small = {"repeats": 1, "new_tokens": 2}
    first = run_sweep(Sweep(str(checkpoint), (2,), (32,), **small), folder, device=CPU)
    second = run_sweep(Sweep(str(checkpoint), (3,), (32,), **small), folder, device=CPU)
    assert {cell.frames for cell in second.cells} == {2, 3}
    assert second.rows.items() > first.rows.items()
    with pytest.raises(EfficiencyError, match="new_tokens 2, not 5.*another folder"):
        run_sweep(Sweep(str(checkpoint), (2,), (32,), repeats=1, new_tokens=5), folder, device=CPU)
    with pytest.raises(EfficiencyError, match="model 'checkpoint', not 'base'"):
        run_sweep(Sweep(str(checkpoint.parent / "base"), (2,), (32,), **small), folder, device=CPU)
    (folder / "measurements.jsonl").write_text("{}\n")
    with pytest.raises(EfficiencyError, match="damaged"):
        read_results(folder)
    with pytest.raises(EfficiencyError, match="no sweep"):
        read_results(tmp_path / "nothing")


@pytest.mark.parametrize(
    "wrong", [{"frames": ()}, {"frames": (0,)}, {"longest_edges": (-1,)}, {"repeats": 0}, {"max_tokens": 0}]
)
def test_a_senseless_sweep_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(EfficiencyError, match=next(iter(wrong))):
        Sweep(**{"model": "500M", "frames": (8,), "longest_edges": (224,)} | wrong)


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_break_even_is_the_first_number_of_questions_that_takes_less_in_all() -> None:
    assert break_even((10.0, 1.0), (0.0, 3.0)) == 6  # 5 questions are a tie: 15 and 15
    assert break_even((0.5, 1.0), (0.0, 3.0)) == 1
    assert break_even((1.0, 1.0), (0.0, 1.0)) is None
    assert break_even((1.0, 2.0), (0.0, 1.0)) is None
    assert break_even((0.0, 2.0), (5.0, 1.0)) == 1
    random = np.random.default_rng(0)
    for _ in range(200):
        ours, theirs = (tuple(random.integers(0, 12, 2) / 4) for _ in range(2))
        counts = [n for n in range(1, 500) if ours[0] + n * ours[1] < theirs[0] + n * theirs[1]]
        assert break_even(ours, theirs) == (counts[0] if counts else None)


def test_costs_count_the_first_question_of_a_kv_cache_as_cold(swept: Path) -> None:
    results = read_results(swept)
    cell = results.cells[0]
    costs = results.costs(cell)
    assert sum(costs["kv_cache"]) == pytest.approx(sum(costs["video_cold"]))
    assert costs["video_cold"][0] == 0
    for condition in ("video_cold", "kv_cache", "adapter_attached"):
        setup, first = results.costs(cell, more_tokens=0)[condition]
        assert setup == costs[condition][0] and first < costs[condition][1]
    making = results.seconds(cell, "internalize", "seconds")
    assert costs["adapter_attached"][0] == making
    assert costs["adapter_merged"][0] > (making or 0)


def test_measuring_warms_up_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Any] = []
    duration = [0.0]

    class Fake:
        def __init__(self, device: Any) -> None:
            self.number = len(runs)

        def seconds(self) -> list[float]:
            return [duration[0] + self.number / 1000]

    monkeypatch.setattr(efficiency_measure, "Clock", Fake)
    for seconds, repeats, kept in [(0.01, 5, 5), (0.3, 5, 3), (1.2, 5, 2), (1.2, 1, 1), (2.5, 5, 2), (2.5, 1, 1)]:
        runs.clear()
        duration[0] = seconds
        found = efficiency_measure.measure(runs.append, CPU, repeats).timing()
        warming = 0 if seconds >= 1.5 else 1
        assert (found["runs"], len(runs)) == (kept, kept + warming), seconds
        assert found["low"] >= seconds + warming / 1000  # the first run, the shortest here, does not count


def test_a_timing_is_median_and_quartiles() -> None:
    assert efficiency_measure.timing([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "runs": 5}
    assert efficiency_measure.timing([2.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "runs": 2}


def test_count_words() -> None:
    assert count_words("\n\n") == 1
    assert count_words("\n\nWhat is 12?") == 2 + 2 + 1 + 2 + 1


# --- what is shown -------------------------------------------------------------------------------------------------


def test_the_report_compares_with_the_paper_where_it_can(swept: Path) -> None:
    results = read_results(swept)
    text = report(results)
    assert "over 1,000 tokens" in text and "16 px, 32 px (1 tile)" in text and "video (1 tile)" in text
    assert "~" in text and "Against the paper" not in text
    results.settings |= {"model": "500M", "trained_context": 300}
    text = report(results)
    assert "Against the paper" in text and "†" in text.split("## The video")[1]
    for heading in [line for line in text.splitlines() if line.startswith("| ---")]:
        assert heading.count("|") > 4


def test_commands_measure_report_and_draw(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ["--frames", "2,3", "--longest-edge", "32,64", "--repeats", "1", "--new-tokens", "2", "--device", "cpu"]
    result = CliRunner().invoke(app, ["benchmark", "-m", str(checkpoint), "-o", str(folder), *options, "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["cells"], document["not measured"]) == (6, 0)
    drawn = ["first_token.png", "speedup.png", "tokens.png", "amortisation.png"]  # memory is not counted on a CPU
    assert [Path(path).name for path in document["plots"]] == drawn
    for name in [*drawn, "report.md"]:
        (folder / name).unlink()
    result = CliRunner().invoke(app, ["benchmark", "--plot-only", str(folder)])
    assert result.exit_code == 0, result.output
    for name in drawn:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.md").read_text().startswith("# Efficiency: checkpoint\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "8"], "--model and --output"),
        (["-m", "500M", "--plot-only", "x"], "without --model"),
        (["-m", "500M", "-o", "x", "--frames", "8,many"], "--frames 8,many"),
        (["--plot-only", "nowhere"], "holds no sweep"),
        (["-m", "nowhere/at-all", "-o", "x"], "nowhere/at-all"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["benchmark", *options])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from _video2lora_cli import main; sys.argv = ['video2lora', 'benchmark', '--help']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers', 'av', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
