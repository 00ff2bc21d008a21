"""Bootstrap: units that are alike are drawn by kind, and give what scipy gives of the same resamples."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from video2lora.evaluation import bootstrap as bootstrap_module
from video2lora.evaluation.bootstrap import Bootstrap, Units, ratio
from video2lora.evaluation.statistics import compare

stats = pytest.importorskip("scipy.stats")


def right_or_wrong(num_clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of 0 and 1 of a candidate and a baseline, on one to three questions about each video; and the videos."""
    rng = np.random.default_rng(seed)
    videos = np.repeat(np.arange(num_clusters), rng.integers(1, 4, num_clusters))
    baseline = (rng.random(len(videos)) < 0.9).astype(float)
    return np.where(rng.random(len(videos)) < 0.08, 1 - baseline, baseline), baseline, videos


@pytest.mark.parametrize("what", ["effect", "retention"])
def test_interval_is_that_of_scipy(what):
    """Of the same resamples to the last digit; of resamples of its own, nearly."""
    candidate, baseline, videos = right_or_wrong(600)
    units = Units.of(candidate, baseline, videos)
    top = units.candidate - units.baseline if what == "effect" else units.candidate
    bottom = units.sizes if what == "effect" else units.baseline
    assert units.kinds is not None and len(units.kinds.first) < 30 and units.kinds.counts.sum() == 600
    found, values = Bootstrap(0.95, 20_000, 7).by_kind(units.kinds, top, bottom)

    def interval(**given):
        result = stats.bootstrap((top, bottom), ratio, paired=True, rng=np.random.default_rng(3), **given)
        return tuple(result.confidence_interval)

    drawn = SimpleNamespace(bootstrap_distribution=values)
    assert found == pytest.approx(interval(n_resamples=0, bootstrap_result=drawn), abs=1e-12)
    assert found == pytest.approx(interval(n_resamples=20_000, batch=1_000), abs=0.03 * (found[1] - found[0]))
    result = compare(candidate, baseline, margin=0.05, clusters=videos, num_resamples=20_000, seed=7)
    assert (result.interval if what == "effect" else result.retention_interval) == found


def test_units_of_their_own_are_drawn_one_by_one():
    scores = np.random.default_rng(0).normal(size=100)
    assert Units.of(scores, 0 * scores, np.arange(100)).kinds is None


def test_batches_change_nothing(monkeypatch):
    candidate, baseline, videos = right_or_wrong(400)
    whole = compare(candidate, baseline, margin=0.05, clusters=videos, num_resamples=500)
    monkeypatch.setattr(bootstrap_module, "BATCH_ELEMENTS", 600)
    assert compare(candidate, baseline, margin=0.05, clusters=videos, num_resamples=500) == whole


def test_exchanging_the_conditions_mirrors_and_another_scale_scales():
    candidate, baseline, videos = right_or_wrong(400)
    ab = compare(candidate, baseline, margin=0.04, clusters=videos, num_resamples=500)
    ba = compare(baseline, candidate, margin=0.04, clusters=videos, num_resamples=500, higher_is_better=False)
    assert ba.interval == pytest.approx((-ab.interval[1], -ab.interval[0]), abs=1e-12)
    assert ba.p_superiority == pytest.approx(ab.p_superiority, abs=1e-9)
    hundred = compare(100 * candidate, 100 * baseline, margin=4, clusters=videos, num_resamples=500)
    assert hundred.interval == pytest.approx(tuple(100 * end for end in ab.interval))
    assert hundred.retention_interval == pytest.approx(ab.retention_interval)


def test_intervals_cover_and_p_agrees_with_the_verdicts():
    covered, trials = 0, 300
    for seed in range(trials):
        right = (np.random.default_rng(seed).random(200) < 0.8).astype(float)
        result = compare(right, 0.8 * np.ones(200), margin=0.05, num_resamples=999, seed=seed)
        covered += result.interval[0] <= 0 <= result.interval[1]
        p_values = (result.p_equivalence, result.p_non_inferiority, result.p_superiority)
        assert tuple(p < 0.025 for p in p_values) == (result.equivalent, result.non_inferior, result.superior)
    assert 0.91 <= covered / trials <= 0.98


def test_a_rare_error_has_an_interval():
    """No resample may be worse, or nearly none: the bias is still known, or percentiles are told."""
    right = np.ones(1000)
    right[3] = 0
    result = compare(right, np.ones(1000), margin=0.02, num_resamples=2_000)
    assert result.interval[0] < -0.001 <= result.interval[1] <= 0 and result.equivalent
