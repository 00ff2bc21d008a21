"""Evaluation results as a card's metadata: what huggingface_hub reads back, and a card whose text nobody touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from tests.evaluation.report_runs import METRICS, write_run

from video2lora.evaluation.records import EvaluationError
from video2lora.hub_cards.evaluation_card import add_to_card, evaluation_results, model_index

TEXT = "\n# A model\r\nwith --- lines\n---\nmodel-index: none\n\ttabs and ünïcode 日本語\n\n"
HEADER = """---
license: apache-2.0
tags:
- video2lora
custom:
  kept: [1, two]
model-index:
- name: its-own-name
  results:
  - task:
      type: image-classification
    dataset:
      type: cats
      name: Cats
    metrics:
    - type: accuracy
      value: 0.9
---
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    other: dict[str, Any] = {"benchmark__name": "other", "benchmark__title": "Other", "benchmark__dataset": None}
    return [write_run(folder / "a", unreadable=(2,)), write_run(folder / "b", seed=1, **other)]


def metadata(card: Path) -> dict[str, Any]:
    return yaml.safe_load(card.read_text(encoding="utf-8").split("---\n")[1])


def test_the_index_reads_back_as_it_was_written(runs: list[Path]) -> None:
    results = evaluation_results(runs)
    name, back = model_index_to_eval_results(model_index(runs, "my-model"))
    assert name == "my-model" and back == results and len(results) == 2 * len(METRICS)
    rows = pq.read_table(runs[0] / "records.parquet").to_pylist()
    own = [row["token_f1"] for row in rows if row["condition"] == "adapter" and row["token_f1"] is not None]
    base = [row["token_f1"] for row in rows if row["condition"] == "video" and row["token_f1"] is not None]
    first = results[0]
    assert (first.metric_type, first.metric_value) == ("token_f1", round(float(np.mean(own)), 4))
    assert first.metric_args == {
        "condition": "adapter",
        "num_answers": 117,
        "baseline": "video",
        "baseline_score": round(float(np.mean(base)), 4),
    }
    assert (first.dataset_type, first.dataset_config) == (
        "somebody/made-up",
        "made_up v1, 120 questions, 12 frames of 384 px",
    )
    assert results[-1].dataset_type == "other"


def test_several_conditions_are_told_apart(runs: list[Path]) -> None:
    results = evaluation_results(runs[:1], conditions=("adapter", "no_adapter"))
    assert len({result.metric_name for result in results}) == len(results) == 2 * len(METRICS)
    _, back = model_index_to_eval_results(model_index(runs[:1], "m", conditions=("adapter", "no_adapter")))
    assert back == results


def test_scores_that_are_missing_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_samples=3, unreadable=(0, 1, 2))
    assert evaluation_results([run]) == []


def test_two_runs_of_one_thing_are_refused(runs: list[Path], tmp_path: Path) -> None:
    again = write_run(tmp_path / "again", seed=7)
    with pytest.raises(EvaluationError, match="/a and .*/again are of one benchmark"):
        model_index([runs[0], again], "m")
    more = write_run(tmp_path / "more", sampling__num_frames=24)
    assert len(evaluation_results([runs[0], more])) == 2 * len(METRICS)
    with pytest.raises(EvaluationError, match="none of the conditions caption"):
        model_index(runs, "m", conditions=("caption",))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_cards_text_and_other_metadata_stay(runs: list[Path], tmp_path: Path, newline: str) -> None:
    card = tmp_path / "README.md"
    text = TEXT.replace("\r\n", "\n").replace("\n", newline).encode()
    card.write_bytes(HEADER.replace("\n", newline).encode() + text)
    add_to_card(card, model_index(runs, "my-model"))
    assert card.read_bytes().endswith(b"---" + newline.encode() + text)
    found = yaml.safe_load(card.read_text(encoding="utf-8").replace("\r\n", "\n").split("---\n")[1])
    assert (found["license"], found["tags"], found["custom"]) == ("apache-2.0", ["video2lora"], {"kept": [1, "two"]})
    (model,) = found["model-index"]
    assert model["name"] == "its-own-name"
    assert model["results"][0] == {
        "task": {"type": "image-classification"},
        "dataset": {"type": "cats", "name": "Cats"},
        "metrics": [{"type": "accuracy", "value": 0.9}],
    }
    loaded = ModelCard.load(card)
    assert [result.metric_value for result in loaded.data.eval_results or []][1:] == [
        result.metric_value for result in evaluation_results(runs)
    ]


def test_written_again_results_are_replaced(runs: list[Path], tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(HEADER + TEXT, encoding="utf-8", newline="")
    add_to_card(card, model_index(runs, "my-model"))
    once = card.read_bytes()
    add_to_card(card, model_index(runs, "my-model"))
    assert card.read_bytes() == once
    better = write_run(tmp_path / "better", means={"adapter": 0.9, "video": 0.6})
    add_to_card(card, model_index([better], "my-model"))
    results = metadata(card)["model-index"][0]["results"]
    assert len(results) == 3  # cats, made up, other
    scores = {metric["type"]: metric["value"] for metric in results[1]["metrics"]}
    assert len(results[1]["metrics"]) == len(METRICS) and scores["token_f1"] > 0.8
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_card_without_metadata_gets_some(runs: list[Path], tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Only text\n", encoding="utf-8")
    add_to_card(card, model_index(runs[:1], "my-model"))
    assert card.read_text(encoding="utf-8").endswith("---\n# Only text\n")
    assert metadata(card)["model-index"][0]["name"] == "my-model"


def test_what_is_no_card_is_left_alone(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such card"):
        add_to_card(tmp_path / "README.md", model_index(runs[:1], "m"))
    card = tmp_path / "README.md"
    card.write_text("---\nmodel-index: nonsense\n---\n# Text\n", encoding="utf-8")
    before = card.read_bytes()
    with pytest.raises(ValueError, match="model-index"):
        add_to_card(card, model_index(runs[:1], "m"))
    assert card.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
