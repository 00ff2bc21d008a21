"""Segments of a long video's adapter: picking a time range, and sharing a rank budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from video2lora.adapters import AdapterError, VideoAdapter, compose_adapters


def change(adapter: VideoAdapter) -> torch.Tensor:
    return torch.stack([adapter.delta_weight("down_proj", layer) for layer in adapter.targets.layer_indices])


@pytest.fixture(scope="module")
def parts(make_adapter):
    """Three segments, of 0..10, 10..20 and 20..30 seconds."""
    return [make_adapter(seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def whole(parts):
    return compose_adapters(parts)


@pytest.mark.parametrize(
    "start, end, chosen",
    [(None, None, [0, 1, 2]), (0, 10, [0]), (10, 20, [1]), (9.5, 10.5, [0, 1]), (20, None, [2]), (None, 10.1, [0, 1])],
)
def test_a_time_range_equals_composing_just_its_segments(parts, whole, start, end, chosen):
    picked = whole.select(start, end)
    expected = compose_adapters([parts[i] for i in chosen])
    assert picked.content_hash == expected.content_hash
    assert picked.segments == expected.segments
    assert picked.static_rank == whole.static_rank


def test_picking_survives_saving_and_goes_on(whole, parts, tmp_path):
    loaded = VideoAdapter.from_pretrained(whole.save_pretrained(tmp_path / "whole"))
    picked = loaded.select(10, 30)
    assert picked.content_hash == compose_adapters(parts[1:]).content_hash
    assert picked.select(20, 30).content_hash == compose_adapters(parts[2:]).content_hash
    again = compose_adapters([whole.select(0, 10), whole.select(20, 30)])  # the static part once
    assert again.content_hash == compose_adapters([parts[0], parts[2]]).content_hash


def test_a_source_is_picked_where_several_videos_were_composed(whole, parts):
    assert whole.select(source="clip-1.mp4").content_hash == compose_adapters([parts[1]]).content_hash


def test_videos_of_one_name_are_told_apart_by_their_hash(parts):
    def named(part: VideoAdapter, sha256: str) -> VideoAdapter:
        segment = replace(part.segments[0], source="video.mp4", sha256=sha256)
        return replace(part, provenance=replace(part.provenance, segments=(segment,)))

    one, other = named(parts[0], "12" * 32), named(parts[1], "34" * 32)
    both = compose_adapters([one, other, parts[2]])
    with pytest.raises(AdapterError, match=r"2 videos are called video.mp4: .*\(121212121212, 343434343434\)"):
        both.select(source="videos/video.mp4")
    assert both.select(source="343434").content_hash == compose_adapters([other]).content_hash
    assert both.select(15, source="34" * 32).segments[0].sha256 == "34" * 32
    assert both.select(source="elsewhere/clip-2.mp4").segments[0].source == "clip-2.mp4"
    assert [segment.source for segment in both.select(5, 15).segments] == ["video.mp4"] * 2  # of every video


def test_what_cannot_be_picked(whole):
    for bounds in ((float("nan"), None), (None, float("nan")), (0, float("inf")), ("1", 2)):
        with pytest.raises(AdapterError, match="(start|end)=.* is no time: expected finite seconds"):
            whole.select(*bounds)
    with pytest.raises(
        AdapterError, match=r"no segment lies in 30\.\.40 s .* clip-0.mp4 0\.\.10 s, clip-1.mp4 10\.\.20"
    ):
        whole.select(30, 40)
    with pytest.raises(AdapterError, match="end=5 s is not after start=5 s"):
        whole.select(5, 5)
    with pytest.raises(AdapterError, match=r"no segment is of other.mp4; there are: clip-0.mp4 0\.\.10 s"):
        whole.select(source="other.mp4")
    with pytest.raises(AdapterError, match="no segment of the video goes on after 30 s; there are"):
        whole.select(30)
    with pytest.raises(AdapterError, match="no segment of clip-2.mp4 begins before 20 s; there are"):
        whole.select(end=20, source="clip-2.mp4")
    with pytest.raises(AdapterError, match="truncated as a whole.*keep_segments=True"):
        whole.truncate(8)[0].select(0, 10)
    unknown = tuple(replace(segment, start=None) for segment in whole.segments)
    timeless = replace(whole, provenance=replace(whole.provenance, segments=unknown))
    with pytest.raises(AdapterError, match="which seconds"):
        timeless.select(0, 10)
    assert timeless.select(source="clip-2.mp4").generated_rank == 3


def test_a_budget_is_shared_by_what_segments_say(make_adapter):
    loud, quiet = make_adapter(0), compose_adapters([make_adapter(1)], weights=[0.05])
    composed = compose_adapters([loud, quiet])
    reduced, error = composed.truncate(7, keep_segments=True)  # 3 of them static
    assert (reduced.rank, reduced.static_rank) == (7, 3)
    assert [segment.ranks for segment in reduced.segments] == [(0, 3), (3, 4)]
    exact = (change(composed) - change(reduced)).norm() / change(composed).norm()
    assert error == pytest.approx(exact.item(), rel=1e-4)
    # what is kept of a segment is the nearest to it of that rank
    kept, alone = reduced.select(source="clip-1.mp4"), composed.select(source="clip-1.mp4")
    static = change(compose_adapters([loud], weights=[0.0]))
    singular = torch.linalg.svdvals((change(alone) - static).double())
    lost = (change(alone) - change(kept)).norm()
    assert lost.item() == pytest.approx(singular[:, 1:].square().sum().sqrt().item(), rel=1e-4)


def test_a_segment_that_keeps_its_ranks_is_not_touched(make_adapter):
    loud, quiet = make_adapter(0), compose_adapters([make_adapter(1)], weights=[0.05])
    composed = compose_adapters([loud, quiet])
    reduced, _ = composed.truncate(7, keep_segments=True)
    for before, after in zip(
        (composed.weights.lora_A, composed.weights.lora_B),
        (reduced.weights.lora_A, reduced.weights.lora_B),
        strict=True,
    ):
        for name in before:
            assert torch.equal(before[name][:, :, :3], after[name][:, :, :3])  # the loud one
            assert torch.equal(before[name][:, :, -3:], after[name][:, :, -3:])  # the static part
    same, error = composed.truncate(composed.rank - 1, keep_segments=True)
    assert 0 < error < 0.05 and same.rank == composed.rank - 1


def test_weights_move_the_budget(make_adapter):
    composed = compose_adapters([make_adapter(0), make_adapter(1)])
    for weights, ranks in (([1000, 1], [(0, 3), (3, 4)]), ([1, 1000], [(0, 1), (1, 4)])):
        reduced, _ = composed.truncate(7, keep_segments=True, weights=weights)
        assert [segment.ranks for segment in reduced.segments] == ranks


def test_the_share_loses_least_of_all_shares(make_adapter):
    composed = compose_adapters([make_adapter(seed, static_rank=0) for seed in (0, 1, 2)])
    spans = [s.ranks for s in composed.segments]
    squares = [torch.linalg.svdvals(change(composed.select(source=s.source)).double()) for s in composed.segments]

    def loss(shares):
        return sum(values[:, share:].square().sum().item() for values, share in zip(squares, shares, strict=True))

    every = [(i, j, 6 - i - j) for i in (1, 2, 3) for j in (1, 2, 3) if 1 <= 6 - i - j <= 3]
    reduced, _ = composed.truncate(6, keep_segments=True)
    shares = [end - start for start, end in (s.ranks for s in reduced.segments)]
    assert spans == [(0, 3), (3, 6), (6, 9)]
    assert loss(shares) == pytest.approx(min(map(loss, every)))


def test_a_reduced_composition_can_be_composed_picked_and_saved(make_adapter, tmp_path):
    reduced, error = compose_adapters([make_adapter(0), make_adapter(1)]).truncate(5, keep_segments=True)
    assert error > 0 and reduced.provenance.truncations[-1].static_part_folded is False
    loaded = VideoAdapter.from_pretrained(reduced.save_pretrained(tmp_path / "reduced"))
    both = compose_adapters([loaded, make_adapter(2)])
    assert (both.rank, both.static_rank) == (2 + 3 + 3, 3)
    assert both.select(20, 30).content_hash == compose_adapters([make_adapter(2)]).content_hash


def test_budgets_that_cannot_be_met(whole):
    for rank, weights, reason in (
        (5, None, "no rank for a segment: 3 segments and the static part's 3 need at least 6"),
        (8, [1.0], "expected 3 positive weights"),
        (8, [1.0, 0.0, 1.0], "expected 3 positive weights"),
    ):
        with pytest.raises(AdapterError, match=reason):
            whole.truncate(rank, keep_segments=True, weights=weights)
    with pytest.raises(AdapterError, match="keep_segments=True"):
        whole.truncate(8, weights=[1, 1, 1])
    with pytest.raises(AdapterError, match="truncated as a whole"):
        whole.truncate(8)[0].truncate(7, keep_segments=True)
