"""The page of results: of the very model in the box, and what README and card quote is what stands in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "moving_shapes"
PAGE = (RECIPE / "results.md").read_text(encoding="utf-8")
NEVER_ASKED = "†"


def rows_below(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    _, found, rest = PAGE.partition(f"\n{heading}\n")
    assert found, heading
    table = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


@pytest.fixture(scope="module")
def at_12_frames() -> dict[str, tuple[int, float, float]]:
    """Questions, and accuracy of the video in context and of the adapter, by task."""
    rows = {row[0]: row for row in rows_below("### Adapter against the video in context") if row[0][0] != "*"}
    return {task: (int(row[1].replace(",", "")), float(row[2]), float(row[3])) for task, row in rows.items()}


def test_it_is_of_the_model_in_the_box() -> None:
    from video2lora import Video2LoraModel

    found = set(re.findall(r"hypernetwork_sha256 (\w+)", PAGE))
    model = Video2LoraModel.from_pretrained(RECIPE / "checkpoint")
    assert found == {model.hypernetwork_identity()["hypernetwork_sha256"]}


def test_nothing_is_missing_and_every_run_has_enough_clips(at_12_frames: dict[str, tuple[int, float, float]]) -> None:
    assert "Not run" not in PAGE
    assert len(at_12_frames) == 11 and min(number for number, _, _ in at_12_frames.values()) >= 2000


def test_the_card_has_its_numbers(at_12_frames: dict[str, tuple[int, float, float]]) -> None:
    card = (RECIPE / "checkpoint" / "README.md").read_text(encoding="utf-8")
    for task, (number, video, adapter) in at_12_frames.items():
        name = task.replace(f" {NEVER_ASKED}", " (never trained on)").replace("how often", "how_often")
        assert f"| {name} | {number:,} | {video:.3f} | {adapter:.3f} |" in card, task


@pytest.mark.parametrize("file", [ROOT / "README.md", RECIPE / "README.md"], ids=["README", "recipe"])
def test_the_readmes_quote_it(file: Path, at_12_frames: dict[str, tuple[int, float, float]]) -> None:
    text = " ".join(file.read_text(encoding="utf-8").split())
    asked = {task: values for task, values in at_12_frames.items() if NEVER_ASKED not in task}
    _, video, caption = asked.pop("caption")
    least, most = (f"{take(adapter for _, _, adapter in asked.values()):.3f}" for take in (min, max))
    assert f"{least} to {most}" in text
    shown = (f"{caption:.0%} of cases instead of {video:.0%}".replace("%", " %"), f"({caption:.3f})")
    assert any(words in text for words in shown)
    kept = dict(re.findall(r"all tasks: (\d) segments keep 97% [^\n]*?keeps ([\d.]+)%", PAGE))
    if file.parent == RECIPE:
        few = f"keep {kept['2']} and {kept['4']} % of the whole clip's adapter's accuracy"
        assert f"{few}, of 8 segments {kept['8']} %" in text
        assert f"and {video - caption:.3f} below it in whole captions" in text
    else:
        two, four = (f"{float(kept[number]):.0f}" for number in "24")
        assert f"keep {two} and {four} % of the whole clip's adapter's accuracy" in text
        assert f"eight keep {kept['8']} and" in text
    for plot in re.findall(r"!\[[^\]]*\]\(([^)]*accuracy\.png)\)", text):
        assert (file.parent / plot).is_file()
