"""Several turns in one row: masks and positions, whose rows are whose, and what is refused."""

from __future__ import annotations

import pytest
import torch

from video2lora.modeling.turns import Labelled, check_turns_fit, rows_per_video, turn_inputs
from video2lora.testing import tiny_smolvlm

TURNS = torch.tensor([[1, 1, 1, 2, 3, 3], [1, 2, 2, 0, 0, 0]])


@pytest.fixture(scope="module")
def vlm():
    return tiny_smolvlm()[0]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_each_token_sees_what_came_before_it_in_its_turn(implementation, vlm):
    vlm.set_attn_implementation(implementation)
    inputs = turn_inputs(vlm, TURNS)
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2]]
    mask = inputs["attention_mask"]
    assert mask.shape == (2, 1, 6, 6)
    if implementation == "eager":
        assert mask.dtype == vlm.dtype and set(mask.unique().tolist()) == {0.0, torch.finfo(vlm.dtype).min}
        mask = mask == 0
    assert mask.dtype == torch.bool
    for row, turns in enumerate(TURNS.tolist()):
        for query, of in enumerate(turns):
            seen = [key for key in range(6) if mask[row, 0, query, key]]
            assert seen == [key for key in range(query + 1) if turns[key] == of]


def test_labels_belong_to_their_turns():
    labels = torch.tensor([[5, 5, -100, 5, 5, 5], [5, 5, 5, 5, -100, -100]])
    labels[1, 4:] = 7  # padding, of no turn
    labelled = Labelled.of(labels, TURNS)
    assert list(zip(labelled.rows.tolist(), labelled.columns.tolist(), strict=True)) == [(0, 0), (0, 4), (1, 1)]
    assert labelled.queries.tolist() == [0, 2, 4] and labelled.num_queries == 5
    assert labelled.mean_per_query(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1.0, 0.0, 2.0, 0.0, 3.0]


def test_a_videos_rows():
    assert rows_per_video([2, 1, 3], [3, 3]) == [2, 1]
    assert rows_per_video([1, 1], [1, 1]) == [1, 1]
    for turns, queries in (([2, 1], [1, 2]), ([2], [1]), ([2, 1], [2]), ([1], [1, 1]), ([0, 1], [1]), ([1], [0, 1])):
        with pytest.raises(ValueError, match="every row must hold turns, all of one video"):
            rows_per_video(turns, queries)


@torch.no_grad()
def test_the_base_alone_answers_turns_as_rows(vlm):
    vlm.set_attn_implementation("sdpa")
    ids = torch.randint(10, 200, (1, 6), generator=torch.Generator().manual_seed(0))
    together = vlm(input_ids=ids, **turn_inputs(vlm, TURNS[:1])).logits[0]
    apart = torch.cat([vlm(input_ids=ids[:, part]).logits[0] for part in (slice(3), slice(3, 4), slice(4, 6))])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("_attn_implementation_internal", "flash_attention_2", "flash_attention_2"),
        ("_attn_implementation_internal", "flex_attention", "flex_attention"),
        ("layer_types", ["full_attention", "linear_attention"], "linear_attention"),
        ("sliding_window", 5, "rows of 6 tokens are longer than the attention window of 5"),
    ],
)
def test_bases_that_cannot_keep_turns_apart_are_refused(name, value, match, monkeypatch):
    vlm, _ = tiny_smolvlm()
    monkeypatch.setattr(vlm.config.get_text_config(), "sliding_window", 6, raising=False)
    turn_inputs(vlm, TURNS)
    monkeypatch.setattr(vlm.config.get_text_config(), name, value, raising=False)
    with pytest.raises(ValueError, match=f"{match}.*pack_queries=False"):
        turn_inputs(vlm, TURNS)
    if name != "sliding_window":
        with pytest.raises(ValueError, match=match):
            check_turns_fit(vlm)
