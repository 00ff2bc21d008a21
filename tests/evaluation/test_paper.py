"""The paper's printed tables: copied without a slip, its verdicts by our rule, and what they hide."""

import re
from dataclasses import replace

import pytest

from video2lora.evaluation.paper import (
    AVERAGE,
    PRINTED_RESULTS,
    SIZES,
    TITLES,
    differing_verdicts,
    how_averaged,
    large_losses,
    paper_verdicts_markdown,
)

BY_NAME = {result.name: result for result in PRINTED_RESULTS}


def test_every_row_is_there_once():
    assert len(PRINTED_RESULTS) == len(BY_NAME) == 2 * (6 + 6 + 5 + 5)
    for table in TITLES:
        for size in SIZES:
            rows = [result for result in PRINTED_RESULTS if (result.table, result.size) == (table, size)]
            assert rows[-1].benchmark == AVERAGE
            assert [row.benchmark for row in rows].count(AVERAGE) == 1


@pytest.mark.parametrize("result", PRINTED_RESULTS, ids=lambda result: result.name)
def test_numbers_of_a_row_belong_together(result):
    """A slip in copying would show: the effect is the difference, in the middle of its interval, to rounding."""
    assert result.effect == pytest.approx(result.candidate - result.baseline, abs=0.00101)
    assert result.interval[0] <= result.effect <= result.interval[1]
    centre = sum(result.interval) / 2
    assert result.effect == pytest.approx(centre, abs=0.0016)


def test_numbers_are_those_of_the_facts(shared_dir):
    facts = (shared_dir / "facts" / "paper.md").read_text(encoding="utf-8").replace("−", "-")
    for result in PRINTED_RESULTS:
        section = facts.split(f"## Table {result.table} ")[1].split("\n\n")[0]
        (line,) = [line for line in section.splitlines() if line.startswith(f"| {result.benchmark} |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        half = len(cells) // 2
        cells = cells[:half] if result.size == "500M" else cells[half:]
        numbers = [float(cell) for cell in (*cells[:3], *re.findall(r"[-+.\d]+", cells[3]))]
        assert numbers == [result.baseline, result.candidate, result.effect, *result.interval], result.name
        marks = cells[4:] or ["Y", "Y"]  # table 1b prints that all are
        assert [mark == "Y" for mark in marks] == [result.equivalent, result.non_inferior], result.name


def test_all_printed_verdicts_follow_from_the_printed_intervals():
    assert differing_verdicts() == []
    for result in PRINTED_RESULTS:
        assert result.verdicts[:2] == (result.equivalent, result.non_inferior)


def test_a_verdict_that_does_not_follow_is_named():
    row = BY_NAME["4a PLM-SGQA 2.2B"]
    assert differing_verdicts([replace(row, equivalent=True)]) == [
        "4a PLM-SGQA 2.2B: printed equivalent = yes, by the rule no"
    ]
    gain = replace(BY_NAME["4b PLM-SGQA 500M"], non_inferior=False)
    assert differing_verdicts([gain]) == ["4b PLM-SGQA 500M: printed non-inferior = no, by the rule yes"]


def test_retention_of_the_averages():
    assert round(100 * BY_NAME["1a Average 500M"].retention, 1) == 84.2
    assert round(100 * BY_NAME["1a Average 2.2B"].retention, 1) == 91.9


def test_large_losses_called_equivalent():
    losses = large_losses()
    assert losses[0].name == "1a VDC 500M"
    assert round(1 - losses[0].retention, 2) == 0.21
    assert all(result.equivalent and result.retention <= 0.85 for result in losses)
    assert [result.name for result in large_losses(0.2)] == ["1a VDC 500M"]


def test_non_inferiority_in_token_f1_of_answers_fails_in_four_of_eight():
    rows = [result for result in PRINTED_RESULTS if result.table == "4b" and result.benchmark != AVERAGE]
    assert (len(rows), sum(not result.verdicts.non_inferior for result in rows)) == (8, 4)


def test_averages_are_made_in_two_ways():
    for size in SIZES:
        assert [how_averaged(table, size) for table in TITLES] == [
            "benchmarks",
            "benchmarks",
            "questions",
            "benchmarks",
        ]


def test_markdown_has_every_row_with_both_verdicts_and_the_remarks():
    text = paper_verdicts_markdown()
    assert text == paper_verdicts_markdown()
    assert "Of 88 printed verdicts 88 follow" in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == len(PRINTED_RESULTS) + len(TITLES)
    assert len({line.count("|") for line in rows}) == 1
    (vdc,) = [line for line in rows if "VDC" in line and "-0.108" in line]
    assert "[-0.118, -0.098] | 78.8% | 29% | worse | yes | yes | yes | yes |" in vdc
    assert "1a VDC 500M -21%" in text
    assert "fails in 4 of 8 rows" in text
