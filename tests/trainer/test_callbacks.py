"""What a run leaves for people: samples, learning curve, card; and that looking on changes nothing."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers.integrations import WandbCallback

from video2lora.hub_cards import GENERATED
from video2lora.modeling import Video2LoraModel
from video2lora.testing import tiny_clip
from video2lora.trainer import Video2LoraTrainer, Video2LoraTrainingArguments, callbacks
from video2lora.trainer import trainer as trainer_module
from video2lora.trainer.callbacks import SamplesCallback, markdown_table
from video2lora.trainer.card import describe_data, non_default_arguments
from video2lora.trainer.curve import draw_learning_curve, eval_losses, logged

SIZES: dict[str, Any] = {"rank": 2, "latent_size": 8, "num_latents": 2, "num_blocks": 1, "num_frames": 3}
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "num_eval_samples": 2,
    "eval_max_new_tokens": 6,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Six rows about three clips, two queries in the second, a `|` in the first question."""
    folder = tmp_path_factory.mktemp("clips")
    clips = [str(tiny_clip(folder / f"{seed}.mp4", seed=seed)) for seed in range(3)]
    rows: list[dict[str, Any]] = [
        {"id": f"r{i}", "video": clips[i % 3], "prompt": f"Is it {i} | {i + 1}?", "response": "yes " * (i + 1)}
        for i in range(6)
    ]
    del rows[1]["prompt"], rows[1]["response"]
    queries = [{"prompt": "What moves?", "response": "A ball."}, {"prompt": "Where?", "response": "Left."}]
    rows[1] |= {"start": 0.5, "end": 1.5, "conversations": queries}
    return rows


@pytest.fixture
def make(tiny_vlm_dir: Path, rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    """A trainer whose adapters change something at once; it trains on the last four rows, evaluates on the others."""

    def trainer(
        train: Any = None, evaluation: Any = "rows", output: str = "run", model: Any = None, **arguments: Any
    ) -> Video2LoraTrainer:
        torch.manual_seed(0)
        if model is None:
            model = Video2LoraModel.from_vlm(tiny_vlm_dir, dtype=torch.float32, **SIZES)
            for scaler in model.hypernetwork.scaler_B.values():
                torch.nn.init.normal_(scaler, std=0.3)
        args = Video2LoraTrainingArguments(output_dir=str(tmp_path / output), **ARGUMENTS | arguments)
        held_out = rows[:2] if evaluation == "rows" else evaluation
        return Video2LoraTrainer(model, args, train_dataset=train or rows[2:], eval_dataset=held_out)

    return trainer


def _samples(trainer: Video2LoraTrainer) -> SamplesCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, SamplesCallback))


def _states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def _weights(trainer: Video2LoraTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.hypernetwork.state_dict().items()}


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_are_what_the_model_generates(make: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    trainer = make()
    trainer.evaluate()
    model, processor = trainer.model, trainer.processor
    expected = []
    for row, query in ((rows[0], rows[0]), (rows[1], rows[1]["conversations"][0])):
        inputs = processor(row["video"], start=row.get("start"), end=row.get("end"))
        with torch.no_grad():
            adapters = model.internalize(**inputs)
        question = processor(text=query["prompt"])
        output = model.generate(**question, adapters=adapters, max_new_tokens=6, do_sample=False)
        answer = processor.decode(output[0, question["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        expected.append((row["id"], query["prompt"], query["response"], answer))
    assert expected[0][3] != expected[1][3]
    text = (tmp_path / "run" / "samples" / "step-0.md").read_text(encoding="utf-8")
    assert text == markdown_table(("row", "question", "target", "answer"), expected)
    assert r"| r0 | Is it 0 \| 1? | yes |" in text


def test_looking_on_changes_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random states and mode are as before, and training with samples gives the weights of training without."""
    trainer = make()
    before = _states()
    for training in (True, False):
        trainer.model.train(training)
        _samples(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, {})
        assert trainer.model.training is training
        assert not trainer.model.vlm.training
    assert _states() == before

    trainer.train()
    without = make(output="without", num_eval_samples=0)
    without.train()
    assert not (Path(without.args.output_dir) / "samples").exists()
    for name, tensor in _weights(trainer).items():
        assert torch.equal(tensor, _weights(without)[name]), name


def test_samples_draw_nothing_even_if_generation_did(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.setattr(type(trainer.model), "internalize", lambda self, **inputs: torch.rand(3) and None)
    before = _states()
    with pytest.raises(RuntimeError):  # and the mode comes back after an error too
        trainer.model.train()
        _samples(trainer).answers(list(trainer.eval_dataset))
    assert _states() == before and trainer.model.training


def test_a_broken_video_is_a_line_of_the_table(make: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    trainer = make(evaluation=[{**rows[0], "id": "bad", "video": str(broken)}, rows[0]])
    trainer.evaluate()
    lines = (tmp_path / "run" / "samples" / "step-0.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    assert "| bad |" in lines[2] and "cannot be read" in lines[2] and "cannot be read" not in lines[3]


def test_each_of_several_evaluation_sets_has_its_samples(
    make: Any, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    trainer = make(evaluation={"near": rows[:1], "far": rows[1:2]})
    trainer.evaluate()
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "run" / "samples").iterdir()}
    assert set(files) == {"step-0-near.md", "step-0-far.md"}
    assert "| r0 |" in files["step-0-near.md"] and "| r1 |" in files["step-0-far.md"]
    trainer.create_model_card()
    results = ModelCard.load(tmp_path / "run" / "README.md").data.eval_results
    losses = {name: points[-1][1] for name, points in eval_losses(trainer.state.log_history).items()}
    assert {r.dataset_name: r.metric_value for r in results} == pytest.approx(losses, abs=1e-6)
    assert set(losses) == {"near", "far"}


def test_a_stream_gives_its_first_rows(make: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from datasets import Dataset

    columns = ("id", "video", "prompt", "response")
    stream = Dataset.from_list([{name: row[name] for name in columns} for row in rows[2:]]).to_iterable_dataset()
    make(evaluation=stream).evaluate()
    text = (tmp_path / "run" / "samples" / "step-0.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (r\d) ", text, re.MULTILINE) == ["r2", "r3"]


def test_sharded_models_are_left_alone(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    _samples(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert not (tmp_path / "run" / "samples").exists()


def test_only_the_main_process_answers(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.state.is_world_process_zero = False
    _samples(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, {})
    assert not (tmp_path / "run" / "samples").exists()


def test_reporting_callbacks_get_the_table(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen: list[dict[str, Any]] = []
    wandb = WandbCallback.__new__(WandbCallback)  # as a user without the library would not have it
    monkeypatch.setattr(wandb, "on_log", lambda *_, logs=None, **__: seen.append(logs), raising=False)
    trainer = make(report_to="tensorboard")
    trainer.callback_handler.callbacks.append(wandb)
    monkeypatch.setattr(WandbCallback, "on_train_begin", lambda *_, **__: None)
    monkeypatch.setattr(WandbCallback, "on_train_end", lambda *_, **__: None)
    trainer.train()
    table = (tmp_path / "run" / "samples" / "step-3.md").read_text(encoding="utf-8")
    assert [logs["eval_samples"] for logs in seen if "eval_samples" in logs][-1] == table

    (folder,) = {path.parent for path in (tmp_path / "run" / "runs").rglob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    stored = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in stored] == [2, 3]
    assert stored[-1].tensor_proto.string_val[0].decode() == table
    assert all(isinstance(value, (int, float)) for entry in trainer.state.log_history for value in entry.values())


@pytest.mark.parametrize("terminal", [False, True])
def test_samples_are_shown_where_somebody_looks(
    terminal: bool, make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    monkeypatch.setattr(callbacks.sys.stderr, "isatty", lambda: terminal, raising=False)
    _samples(trainer).on_evaluate(trainer.args, trainer.state, trainer.control, {})
    captured = capsys.readouterr()
    assert ("| row | question |" in captured.err) is terminal
    assert "question" not in captured.out


# --- curve -----------------------------------------------------------------------------------------------------------


HISTORY: list[dict[str, Any]] = [
    {"loss": 3.0, "learning_rate": 0.0, "step": 1},
    {"loss": float("nan"), "learning_rate": 0.1, "step": 2},
    {"eval_loss": 2.5, "eval_runtime": 1.0, "step": 2},
    {"loss": 2.0, "learning_rate": 0.05, "step": 3},
    {"loss": 1.5, "learning_rate": 0.05, "step": 3},  # again, after a resume
    {"train_loss": 2.2, "step": 3},
]


def test_series_of_a_log() -> None:
    assert logged(HISTORY, "loss") == [(1, 3.0), (3, 1.5)]
    assert eval_losses(HISTORY) == {"": [(2, 2.5)]}
    assert eval_losses([{"eval_near_loss": 1.0, "step": 4}, {"eval_far_loss": 2.0, "step": 4}]) == {
        "far": [(4, 2.0)],
        "near": [(4, 1.0)],
    }


def test_the_curve_is_a_png(tmp_path: Path) -> None:
    assert draw_learning_curve(HISTORY, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
        picture.load()
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
    assert not draw_learning_curve(HISTORY[-1:], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_without_matplotlib_one_message_and_a_whole_run(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(callbacks, "find_spec", lambda name: None)
    trainer = make()
    with caplog.at_level("WARNING"):
        trainer.train()
    messages = [record.message for record in caplog.records if "matplotlib" in record.message]
    assert len(messages) == 1 and "pip install" in messages[0]
    assert not (tmp_path / "run" / "learning_curve.png").exists()
    assert "learning_curve" not in (tmp_path / "run" / "README.md").read_text()


# --- card ------------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_the_run_was(make: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    train = [*rows[2:5], {**rows[2], "id": "bad", "video": str(broken)}]
    trainer = make(
        train, gradient_accumulation_steps=2, max_steps=2, max_bad_fraction=0.5, hub_token="hf_secret", seed=7
    )
    trainer.train()
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "rows in memory: 4 rows, 4 queries" in text and "rows in memory: 2 rows, 3 queries" in text
    assert "| global batch | 4 videos: 2 a device, 2 accumulated, 1 process |" in text
    assert "| steps | 2, 2.00 epochs |" in text
    assert "| left out | 2 of 8 videos taken could not be read |" in text
    assert "float32, 7" in text and "learning rate 0.01 (cosine" in text
    assert re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE) == [
        ("per_device_train_batch_size", "2"),
        ("max_steps", "2"),
        ("learning_rate", "0.01"),
        ("gradient_accumulation_steps", "2"),
        ("seed", "7"),
        ("use_cpu", "True"),
        ("max_bad_fraction", "0.5"),
    ]
    assert "![Loss" in text and (tmp_path / "run" / "learning_curve.png").is_file()
    assert "samples/step-2.md" in text and (tmp_path / "run" / "samples" / "step-2.md").is_file()
    assert 'pipeline("video-to-lora", model="run")' in text and "Nobody has written" not in text
    assert "hf_secret" not in text and str(tmp_path) not in text


def test_the_card_tells_which_weights_the_run_began_with(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.create_model_card()
    assert "began with" not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    trainer.model.save_pretrained(tmp_path / "earlier")
    model = Video2LoraModel.from_pretrained(tmp_path / "earlier")
    card = tmp_path / "further" / "README.md"
    make(model=model, output=card.parent.name).train()
    assert "| began with | the weights of `earlier` |" in card.read_text(encoding="utf-8")
    assert str(tmp_path) not in card.read_text(encoding="utf-8")
    model = Video2LoraModel.from_pretrained(tmp_path / "earlier")
    model.name_or_path, model.checkpoint_commit = "somebody/kitchen", "0" * 40  # as from the Hub
    card = tmp_path / "from_hub" / "README.md"
    make(model=model, output=card.parent.name).train()
    assert f"the weights of `somebody/kitchen` at `{'0' * 40}` |" in card.read_text(encoding="utf-8")


def test_zero_3_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 cuts every weight"):
        make()


def test_metadata_is_valid_on_the_hub(make: Any, tmp_path: Path) -> None:
    trainer = make(hub_model_id="user/my-model")
    trainer.train()
    trainer.create_model_card(license="apache-2.0", tags="kitchen", language="en")
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    (result,) = data.eval_results
    loss = dict(eval_losses(trainer.state.log_history)[""])[3]
    assert (result.metric_type, result.metric_value) == ("loss", pytest.approx(loss, abs=1e-6))
    assert (data.model_name, data.license, data.language) == ("my-model", "apache-2.0", "en")
    assert data.tags == ["video2lora", "hypernetwork", "lora", "kitchen"]
    assert data.pipeline_tag == "video-text-to-text"
    assert data.get("base_model") is None  # a directory here is nobody else's base
    assert 'model="user/my-model"' in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_the_card_is_of_the_weights_that_were_kept(make: Any, tmp_path: Path) -> None:
    """Of a run that gets worse, the best checkpoint is loaded, and its loss is what the card claims."""
    settings = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    trainer = make(**settings, learning_rate=3.0, warmup_steps=0, max_steps=4, lr_scheduler_type="constant")
    trainer.train()
    losses = dict(eval_losses(trainer.state.log_history)[""])
    best = min(losses, key=lambda step: losses[step])
    assert best != 4
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"step {best}." in text
    assert f"| last | 4 | {losses[4]:.4f} |" in text and f"| best | {best} | {losses[best]:.4f} |" in text
    (result,) = ModelCard(text).data.eval_results
    assert result.metric_value == pytest.approx(losses[best], abs=1e-6)


def test_a_card_somebody_wrote_stays(make: Any, tmp_path: Path) -> None:
    trainer = make()
    card = tmp_path / "run" / "README.md"
    trainer.create_model_card()
    first = card.read_text(encoding="utf-8")
    assert GENERATED in first
    trainer.create_model_card(license="mit")
    assert "license: mit" in card.read_text(encoding="utf-8")
    card.write_text("mine", encoding="utf-8")
    trainer.create_model_card()
    assert card.read_text(encoding="utf-8") == "mine"


def test_a_card_goes_along_when_pushing(make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert (tmp_path / "run" / "README.md").is_file()


def test_no_card_is_worth_a_training(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(callbacks, "collect_facts", fail)
    monkeypatch.setattr(callbacks, "draw_learning_curve", fail)
    trainer = make()
    assert trainer.train().global_step == 3
    assert sum("could not be written" in record.message for record in caplog.records) == 2


def test_data_are_named_by_what_is_known(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    from video2lora.data import load_rows

    dataset = load_rows(rows)
    assert str(describe_data(dataset, str(tmp_path / "train.jsonl"))) == "`train.jsonl`: 6 rows, 7 queries"
    facts = describe_data(dataset, "user/videos")
    assert facts is not None and facts.hub_id == "user/videos"
    dataset.info.dataset_name = "kitchen"
    assert str(describe_data(dataset, dataset)) == "`kitchen`: 6 rows, 7 queries"
    assert (
        str(describe_data(dataset.to_iterable_dataset(), ["a/x.jsonl", "b/y.jsonl"])) == "`x.jsonl, y.jsonl`, streamed"
    )
    assert describe_data(None) is None


def test_defaults_are_no_news(tmp_path: Path) -> None:
    args = Video2LoraTrainingArguments(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=3, report_to="none")
    assert non_default_arguments(args) == {}
    stored = Video2LoraTrainingArguments(
        output_dir=str(tmp_path), kl_weight=0.5, teacher=str(tmp_path / "taught"), lr_scheduler_type="linear"
    )
    assert non_default_arguments(stored) == {"kl_weight": 0.5, "teacher": "taught", "lr_scheduler_type": "linear"}
