"""Statistics: equal to scipy and statsmodels on worked examples, and right about how often they are right."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from video2lora.evaluation import bootstrap as bootstrap_module
from video2lora.evaluation.bootstrap import Bootstrap
from video2lora.evaluation.statistics import (
    _t_power,
    achieved_power,
    compare,
    holm,
    interval_verdicts,
    required_samples,
)

stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")
weightstats = pytest.importorskip("statsmodels.stats.weightstats")

# Extra hours of sleep of ten patients with two drugs (Student, 1908; Cushny & Peebles, 1905).
DRUG_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
DRUG_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def scores(n: int, seed: int = 0, shift: float = 0.0, spread: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Skewed, correlated scores of a candidate and a baseline."""
    rng = np.random.default_rng(seed)
    baseline = rng.beta(2, 3, n)
    return baseline + shift + spread * (rng.exponential(1, n) - 1), baseline


def clustered(rng: np.random.Generator, num_clusters: int = 40, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean 0, half of whose variance is their video's; and the videos."""
    videos = np.repeat(np.arange(num_clusters), size)
    return rng.normal(0, 1, num_clusters)[videos] + rng.normal(0, 1, len(videos)), videos


class TestVerdicts:
    @pytest.mark.parametrize(
        ("interval", "expected"),
        [
            ((-0.04, 0.04), (True, True, False)),
            ((-0.05, 0.04), (False, False, False)),  # a bound on the margin is not inside
            ((-0.04, 0.05), (False, True, False)),
            ((0.01, 0.04), (True, True, True)),
            ((0.0, 0.04), (True, True, False)),
            ((0.06, 0.09), (False, True, True)),
            ((-0.09, -0.06), (False, False, False)),
            ((-0.04, -0.01), (True, True, False)),  # worse, and equivalent
            ((math.nan, math.nan), (False, False, False)),
        ],
    )
    def test_rule(self, interval, expected):
        assert interval_verdicts(interval, 0.05) == expected
        mirrored = (-interval[1], -interval[0])
        assert interval_verdicts(mirrored, 0.05, higher_is_better=False) == expected

    def test_verdict_is_the_interval_and_p_agrees_with_it(self):
        """Over effects on both sides of every bound: p < alpha exactly where the interval says so."""
        seen = set()
        for seed in range(60):
            candidate, baseline = scores(40, seed, shift=np.random.default_rng(seed).uniform(-0.12, 0.12))
            result = compare(candidate, baseline, margin=0.06, num_resamples=400, seed=seed, alpha=0.05)
            verdicts = (result.equivalent, result.non_inferior, result.superior)
            assert verdicts == interval_verdicts(result.interval, 0.06)
            p_values = (result.p_equivalence, result.p_non_inferiority, result.p_superiority)
            assert tuple(p < 0.05 for p in p_values) == verdicts
            seen.add(verdicts)
        assert len(seen) >= 4

    def test_p_is_the_alpha_whose_interval_ends_at_the_bound(self):
        candidate, baseline = scores(50, 5, shift=0.01)
        margin = 0.02
        result = compare(candidate, baseline, margin=margin, num_resamples=5_000)
        for p, end, bound in (
            (result.p_non_inferiority, 0, -margin),
            (result.p_superiority, 0, 0.0),
            (result.p_equivalence, 1, margin),
        ):
            assert 1e-3 < p < 0.5
            at_p = stats.bootstrap(
                (candidate - baseline,),
                np.mean,
                n_resamples=5_000,
                confidence_level=1 - 2 * p,
                rng=np.random.default_rng(0),
            )
            assert at_p.confidence_interval[end] == pytest.approx(bound, abs=1e-9)


class TestAgainstLibraries:
    @pytest.mark.parametrize("alpha", [0.025, 0.05])
    def test_interval_is_that_of_scipy(self, alpha):
        candidate, baseline = scores(80)
        result = compare(candidate, baseline, margin=0.05, alpha=alpha, num_resamples=2_000, seed=7)
        expected = stats.bootstrap(
            (candidate, baseline),
            lambda x, y, axis: x.mean(axis) - y.mean(axis),
            paired=True,
            n_resamples=2_000,
            confidence_level=1 - 2 * alpha,
            method="BCa",
            rng=np.random.default_rng(7),
        )
        assert result.interval == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
        assert result.standard_error == pytest.approx(expected.standard_error, rel=0.05)

    def test_retention_interval_is_that_of_scipy(self):
        candidate, baseline = scores(80)
        result = compare(candidate, baseline, margin=0.05, num_resamples=2_000, seed=7)
        expected = stats.bootstrap(
            (candidate, baseline),
            lambda x, y, axis: x.mean(axis) / y.mean(axis),
            paired=True,
            n_resamples=2_000,
            rng=np.random.default_rng(7),
        )
        assert result.retention == pytest.approx(candidate.mean() / baseline.mean(), rel=1e-12)
        assert result.retention_interval == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)

    def test_interval_of_clusters_is_that_of_scipy(self):
        differences, videos = clustered(np.random.default_rng(0), 30, 5)
        videos[:7] = videos[0]  # of different sizes
        result = compare(differences, 0 * differences, margin=1, clusters=videos, num_resamples=2_000, seed=7)
        groups = [differences[videos == video] for video in dict.fromkeys(videos)]
        expected = stats.bootstrap(
            (np.array([group.sum() for group in groups]), np.array([len(group) for group in groups])),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            n_resamples=2_000,
            rng=np.random.default_rng(7),
        )
        assert result.interval == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
        assert result.num_clusters == len(groups)

    @pytest.mark.parametrize(("candidate", "baseline", "margin"), [(DRUG_2, DRUG_1, 0.5), (DRUG_2, DRUG_1, 3.0)])
    def test_t_values_are_those_of_ttost_paired(self, candidate, baseline, margin):
        result = compare(candidate, baseline, margin=margin, num_resamples=200)
        x, y = np.array(candidate), np.array(baseline)
        p, lower, upper = weightstats.ttost_paired(x, y, -margin, margin)
        assert result.p_equivalence_t == pytest.approx(p, rel=1e-10)
        assert result.p_non_inferiority_t == pytest.approx(lower[1], rel=1e-10)
        reverse = compare(candidate, baseline, margin=margin, num_resamples=200, higher_is_better=False)
        assert reverse.p_non_inferiority_t == pytest.approx(upper[1], rel=1e-10)

    def test_published_paired_t_of_the_sleep_data(self):
        """t = 4.0621 with 9 degrees of freedom, two-sided p = 0.002833, mean 1.58 (R's help page of t.test)."""
        result = compare(DRUG_2, DRUG_1, margin=0.5, num_resamples=200)
        assert result.effect == pytest.approx(1.58)
        assert result.effect / result.standard_error == pytest.approx(4.0621, abs=5e-5)
        assert 2 * result.p_superiority_t == pytest.approx(0.002833, abs=5e-7)

    def test_bootstrap_and_t_agree_where_they_must(self):
        rng = np.random.default_rng(0)
        differences = rng.normal(0.02, 0.3, 1_000)
        result = compare(differences, 0 * differences, margin=0.04)
        p, *_ = weightstats.ttost_paired(differences, 0 * differences, -0.04, 0.04)
        assert result.p_equivalence == pytest.approx(p, rel=0.1)
        assert result.interval == pytest.approx(stats.ttest_1samp(differences, 0).confidence_interval(0.95), abs=1e-3)

    def test_clustered_standard_error_is_that_of_statsmodels(self):
        regression = importlib.import_module("statsmodels.regression.linear_model")
        differences, videos = clustered(np.random.default_rng(1), 25, 4)
        videos[:9] = videos[0]
        fit = regression.OLS(differences, np.ones_like(differences)).fit(
            cov_type="cluster", cov_kwds={"groups": videos}
        )
        result = compare(differences, 0 * differences, margin=1, clusters=videos, num_resamples=200)
        assert result.standard_error == pytest.approx(fit.bse[0], rel=1e-10)

    def test_clusters_of_one_are_no_clusters(self):
        candidate, baseline = scores(60)
        plain = compare(candidate, baseline, margin=0.05, num_resamples=500)
        single = compare(candidate, baseline, margin=0.05, num_resamples=500, clusters=[f"v{i}" for i in range(60)])
        assert single == plain

    def test_batches_change_nothing(self, monkeypatch):
        candidate, baseline = scores(60)
        whole = compare(candidate, baseline, margin=0.05, num_resamples=500)
        monkeypatch.setattr(bootstrap_module, "BATCH_ELEMENTS", 600)
        assert compare(candidate, baseline, margin=0.05, num_resamples=500) == whole


class TestCoverage:
    """How often a nominal 95 % interval holds the truth; 300 trials say it to about +- 0.04 (3 standard errors)."""

    TRIALS = 300

    def test_skewed_scores(self):
        covered = 0
        for seed in range(self.TRIALS):
            candidate, baseline = scores(60, seed)
            low, high = compare(candidate, baseline, margin=1, num_resamples=999, seed=seed).interval
            covered += low <= 0 <= high
        assert 0.91 <= covered / self.TRIALS <= 0.98

    def test_clusters_cover_and_single_questions_do_not(self):
        rng = np.random.default_rng(0)
        covered = {"videos": 0, "questions": 0}
        for seed in range(self.TRIALS):
            differences, videos = clustered(rng)
            for name, clusters in (("videos", videos), ("questions", None)):
                result = compare(
                    differences, 0 * differences, margin=1, clusters=clusters, num_resamples=999, seed=seed
                )
                covered[name] += result.interval[0] <= 0 <= result.interval[1]
        assert 0.91 <= covered["videos"] / self.TRIALS <= 0.98
        assert covered["questions"] / self.TRIALS < 0.75

    def test_on_the_margin_equivalence_is_claimed_about_as_often_as_alpha_says(self):
        claimed = 0
        for seed in range(self.TRIALS):
            differences = np.random.default_rng(seed).normal(0.5, 1, 100)  # far from the other margin
            claimed += compare(differences, 0 * differences, margin=0.5, alpha=0.05, num_resamples=499).equivalent
        assert 0.015 <= claimed / self.TRIALS <= 0.09


class TestDirection:
    def test_flips_with_higher_is_better(self):
        candidate, baseline = scores(80, shift=0.03)
        up = compare(candidate, baseline, margin=0.05, num_resamples=500)
        down = compare(candidate, baseline, margin=0.05, num_resamples=500, higher_is_better=False)
        assert up.superior and not down.superior
        assert (up.effect, up.interval, up.retention) == (down.effect, down.interval, down.retention)
        assert (up.equivalent, up.p_equivalence) == (down.equivalent, down.p_equivalence)
        assert down.p_superiority == pytest.approx(1 - up.p_superiority, abs=2e-3)

    def test_exchanging_the_conditions_mirrors_everything(self):
        """Margins are symmetric: what is better than A by so much is what A is worse than it by."""
        candidate, baseline = scores(80, shift=0.02)
        ab = compare(candidate, baseline, margin=0.04, num_resamples=500)
        ba = compare(baseline, candidate, margin=0.04, num_resamples=500, higher_is_better=False)
        assert ba.effect == pytest.approx(-ab.effect, abs=1e-12)
        assert ba.interval == pytest.approx((-ab.interval[1], -ab.interval[0]), abs=1e-12)
        for name in ("equivalent", "non_inferior", "superior"):
            assert getattr(ab, name) == getattr(ba, name)
        for name in ("equivalence", "non_inferiority", "superiority"):
            for suffix in ("", "_t"):
                field = f"p_{name}{suffix}"
                assert getattr(ab, field) == pytest.approx(getattr(ba, field), abs=1e-9)

    def test_scale_does_not_matter(self):
        candidate, baseline = scores(50)
        one = compare(candidate, baseline, margin=0.05, num_resamples=500)
        hundred = compare(100 * candidate, 100 * baseline, margin=5, num_resamples=500)
        assert hundred.interval == pytest.approx(tuple(100 * end for end in one.interval))
        assert hundred.p_equivalence == pytest.approx(one.p_equivalence, rel=1e-6)
        assert hundred.retention_interval == pytest.approx(one.retention_interval)


class TestInput:
    def test_seed_decides(self):
        candidate, baseline = scores(50)
        first = compare(candidate, baseline, margin=0.05, num_resamples=500, seed=1)
        assert compare(list(candidate), tuple(baseline), margin=0.05, num_resamples=500, seed=1) == first
        assert compare(candidate, baseline, margin=0.05, num_resamples=500, seed=2).interval != first.interval

    def test_missing_scores_leave_their_pair_out(self):
        candidate, baseline = scores(50)
        expected = compare(candidate[3:], baseline[3:], margin=0.05, num_resamples=500)
        holes = [None, math.nan, *candidate[2:]]
        other = [*baseline[:2], None, *baseline[3:]]
        result = compare(holes, other, margin=0.05, num_resamples=500)
        assert (result.n, result.num_left_out, result.interval) == (47, 3, expected.interval)
        assert result.notes == ("pairs left out because a score is missing: 3 of 50",)

    def test_a_cluster_without_pairs_is_no_unit(self):
        result = compare([None, None, 1, 0.5], [1, 1, 0, 0.25], margin=1, clusters=["a", "a", "b", "c"])
        assert (result.n, result.num_clusters) == (2, 2)

    def test_a_model_compared_with_itself_is_equivalent(self):
        _, baseline = scores(50)
        result = compare(baseline, baseline, margin=0.05, num_resamples=500)
        assert (result.effect, result.interval) == (0.0, (0.0, 0.0))
        assert (result.equivalent, result.non_inferior, result.superior) == (True, True, False)
        assert result.p_equivalence == 1 / 501 and result.p_superiority == 1.0
        assert (result.retention, result.retention_interval) == (1.0, (1.0, 1.0))
        assert "the interval has no width" in result.notes[0]

    def test_equal_differences_have_an_interval_without_width(self):
        _, baseline = scores(50)
        result = compare(baseline + 0.1, baseline, margin=0.05, num_resamples=500)
        assert result.interval == (result.effect, result.effect) == pytest.approx((0.1, 0.1))
        assert (result.equivalent, result.non_inferior, result.superior) == (False, True, True)
        assert (result.p_equivalence, result.p_equivalence_t) == (1.0, 1.0)
        assert (result.p_superiority, result.p_superiority_t) == (1 / 501, 0.0)

    @pytest.mark.parametrize("clusters", [None, ["a"]])
    def test_one_pair_shows_nothing(self, clusters):
        result = compare([0.5], [0.4], margin=1, clusters=clusters)
        self.nothing_shown(result)
        assert (result.effect, result.retention) == pytest.approx((0.1, 1.25))
        assert "independent units: 1" in result.notes[0]

    def test_one_video_shows_nothing_whatever_its_questions(self):
        candidate, baseline = scores(50)
        self.nothing_shown(compare(candidate, baseline, margin=1, clusters=["a"] * 50))

    @pytest.mark.parametrize("values", [([], []), ([None], [1.0]), ([1.0, math.nan], [None, 0.0])])
    def test_no_pair_shows_nothing(self, values):
        result = compare(*values, margin=1)
        self.nothing_shown(result)
        assert result.n == 0 and math.isnan(result.effect) and math.isnan(result.candidate_mean)

    @staticmethod
    def nothing_shown(result):
        assert all(math.isnan(end) for end in result.interval)
        assert not (result.equivalent or result.non_inferior or result.superior)
        assert {result.p_equivalence, result.p_non_inferiority, result.p_superiority} == {1.0}
        assert {result.p_equivalence_t, result.p_non_inferiority_t, result.p_superiority_t} == {1.0}
        json.dumps(result.to_dict(), allow_nan=False)

    @pytest.mark.parametrize("baseline", [np.zeros(40), np.r_[np.zeros(39), 0.1], -scores(40)[1]])
    def test_no_retention_of_a_baseline_near_or_below_zero(self, baseline):
        result = compare(baseline + scores(40)[1], baseline, margin=0.05, num_resamples=500)
        assert math.isnan(result.retention) and all(math.isnan(end) for end in result.retention_interval)
        assert "no retention" in result.notes[-1]
        assert not math.isnan(result.interval[0])

    def test_few_units_are_noted(self):
        candidate, baseline = scores(40)
        notes = compare(candidate, baseline, margin=1, num_resamples=200, clusters=np.arange(40) // 4).notes
        assert "independent units: 10" in notes[0]
        assert compare(candidate, baseline, margin=1, num_resamples=200).notes == ()

    def test_binary_scores(self):
        rng = np.random.default_rng(0)
        candidate, baseline = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
        result = compare(candidate, baseline, margin=0.2, num_resamples=2_000)
        assert result.interval[0] < result.effect < result.interval[1]
        assert (result.p_equivalence < 0.025) == result.equivalent

    def test_result_is_frozen_and_json(self):
        candidate, baseline = scores(40)
        result = compare(candidate, baseline, margin=0.05, num_resamples=500)
        with pytest.raises(FrozenInstanceError):
            result.n = 1  # type: ignore[misc]
        values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert values["interval"] == list(result.interval)
        assert values["equivalent"] is result.equivalent
        assert {type(getattr(result, name)) for name in ("effect", "p_equivalence", "retention")} == {float}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"candidate": [1.0]}, "1 candidate scores, 3 baseline scores"),
            ({"clusters": ["a"]}, "and 1 clusters"),
            ({"candidate": [1.0, math.inf, 2.0]}, "candidate score 1 is infinite"),
            ({"candidate": [[1.0], [2.0], [3.0]]}, "shape"),
            ({"margin": 0.0}, "margin=0.0"),
            ({"margin": math.nan}, "margin=nan"),
            ({"alpha": 0.5}, "alpha=0.5"),
            ({"num_resamples": 39}, "num_resamples=39"),
        ],
    )
    def test_nonsense_is_refused_by_name(self, change, message):
        arguments = {"candidate": [1.0, 2.0, 3.0], "baseline": [1.0, 1.0, 1.0], "margin": 0.1} | change
        with pytest.raises(ValueError, match=message):
            compare(arguments.pop("candidate"), arguments.pop("baseline"), **arguments)

    def test_undefined_bca_falls_back_to_percentiles(self, monkeypatch):
        call = Bootstrap.__call__
        monkeypatch.setattr(Bootstrap, "__call__", lambda *args: ((math.nan, math.nan), call(*args)[1]))
        differences = np.random.default_rng(0).normal(0, 1, 50)
        result = compare(differences, 0 * differences, margin=0.2, num_resamples=500, seed=3)
        expected = stats.bootstrap(
            (differences,), np.mean, method="percentile", n_resamples=500, rng=np.random.default_rng(3)
        )
        assert result.interval == pytest.approx(tuple(expected.confidence_interval))
        assert "percentile" in result.notes[0]

    def test_a_missing_library_names_the_extra(self, monkeypatch):
        def missing(name):
            raise ImportError(name)

        monkeypatch.setattr(bootstrap_module, "import_module", missing)
        with pytest.raises(ImportError, match=r'statistics need scipy: pip install "video2lora\[evaluation\]"'):
            compare(DRUG_1, DRUG_2, margin=1)
        with pytest.raises(ImportError, match="statistics need statsmodels"):
            holm({"a": 0.01})


class TestHolm:
    def test_by_hand(self):
        """Sorted .005, .01, .03, .04 times 4, 3, 2, 1 is .02, .03, .06, .04; none may then fall: .06 twice."""
        result = holm({"c": 0.03, "a": 0.01, "b": 0.04, "d": 0.005}, alpha=0.05)
        assert list(result) == ["c", "a", "b", "d"]
        assert [result[name].adjusted for name in "dacb"] == pytest.approx([0.02, 0.03, 0.06, 0.06])
        assert [result[name].rejected for name in "dacb"] == [True, True, False, False]
        assert result["a"].p_value == 0.01

    def test_equals_statsmodels(self):
        p_values = np.random.default_rng(0).beta(0.3, 3, 12)
        rejected, adjusted, *_ = multitest.multipletests(p_values, alpha=0.025, method="holm")
        result = holm({str(number): p for number, p in enumerate(p_values)})
        assert [row.adjusted for row in result.values()] == pytest.approx(list(adjusted))
        assert [row.rejected for row in result.values()] == list(rejected)
        assert 0 < sum(rejected) < 12

    def test_one_benchmark_needs_no_correction_and_none_is_none(self):
        assert holm({"a": 0.02})["a"] == (0.02, 0.02, True)
        assert holm({}) == {}

    @pytest.mark.parametrize("p", [math.nan, -0.1, 1.1])
    def test_what_is_no_p_value_is_refused(self, p):
        with pytest.raises(ValueError, match="'vdc'"):
            holm({"vdc": p})


class TestSampleSize:
    def test_published_power_of_tost(self):
        """PowerTOST's example: 2x2 crossover, CV 0.30, ratio 0.95, n 40: power 0.815845; 39 subjects have less."""
        sd, effect, bound = math.sqrt(math.log(1 + 0.30**2)), math.log(0.95), math.log(1.25)
        error = sd * math.sqrt(2 / 40)
        power = _t_power((-bound - effect) / error, (bound - effect) / error, 40 - 2, 0.05)
        assert power == pytest.approx(0.815845, abs=1e-6)

    def test_published_power_of_non_inferiority(self):
        """PowerTOST's example: power.noninf(CV=0.3, n=24) is 0.4916748."""
        sd, effect, bound = math.sqrt(math.log(1 + 0.3**2)), math.log(0.95), math.log(0.8)
        power = _t_power((bound - effect) / (sd * math.sqrt(2 / 24)), math.inf, 24 - 2, 0.025)
        assert power == pytest.approx(0.4916748, abs=1e-7)

    @pytest.mark.parametrize(("n", "effect"), [(2, 0.0), (10, 0.1), (200, -0.05), (5_000, -0.14)])
    def test_non_inferiority_is_the_one_sided_t_test_of_statsmodels(self, n, effect):
        power = importlib.import_module("statsmodels.stats.power").TTestPower()
        expected = power.power((effect + 0.15) / 0.4, n, 0.025, alternative="larger")
        assert achieved_power(n, 0.4, 0.15, effect=effect, test="non_inferiority") == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("sd", "margin"), [(0.3, 0.05), (0.35, 0.15), (0.1, 0.05)])
    def test_near_the_normal_formula(self, sd, margin):
        """(z_alpha + z_beta/2)^2 sd^2 / margin^2 (Chow, Shao & Wang), z_beta for non-inferiority; t needs few more."""
        for test, beta in (("equivalence", 0.1), ("non_inferiority", 0.2)):
            formula = (stats.norm.isf(0.025) + stats.norm.isf(beta)) ** 2 * sd**2 / margin**2
            assert formula <= required_samples(sd, margin, power=0.8, test=test) <= formula + 4

    @pytest.mark.parametrize("test", ["equivalence", "non_inferiority"])
    @pytest.mark.parametrize("effect", [0.0, -0.02])
    def test_is_the_smallest_that_is_enough(self, test, effect):
        n = required_samples(0.2, 0.05, alpha=0.05, power=0.9, effect=effect, test=test)
        assert achieved_power(n, 0.2, 0.05, 0.05, effect, test=test) >= 0.9
        assert achieved_power(n - 1, 0.2, 0.05, 0.05, effect, test=test) < 0.9

    def test_equivalence_has_no_direction_and_non_inferiority_has(self):
        assert required_samples(0.2, 0.05, effect=0.02) == required_samples(0.2, 0.05, effect=-0.02)
        assert required_samples(0.2, 0.05, effect=0.02, test="non_inferiority") < required_samples(
            0.2, 0.05, effect=-0.02, test="non_inferiority"
        )

    @pytest.mark.parametrize("effect", [0.0, 0.02])
    def test_simulation(self, effect):
        """So many pairs give the verdict of the t test as often as asked: 20,000 trials, within 4 standard errors."""
        n = required_samples(0.2, 0.06, alpha=0.05, power=0.8, effect=effect)
        differences = np.random.default_rng(0).normal(effect, 0.2, (20_000, n))
        margin = stats.t.isf(0.05, n - 1) * differences.std(axis=1, ddof=1) / math.sqrt(n)
        means = differences.mean(axis=1)
        shown = ((means - margin > -0.06) & (means + margin < 0.06)).mean()
        assert shown == pytest.approx(achieved_power(n, 0.2, 0.06, 0.05, effect), abs=0.0114)

    def test_simulation_of_the_bootstrap_verdict(self):
        n = required_samples(0.2, 0.1, alpha=0.05, power=0.8)
        rng = np.random.default_rng(0)
        trials = [rng.normal(0, 0.2, n) for _ in range(200)]
        shown = [compare(d, 0 * d, margin=0.1, alpha=0.05, num_resamples=499).equivalent for d in trials]
        assert 0.70 <= np.mean(shown) <= 0.92

    def test_sd_of_a_comparison_with_clusters_counts_videos(self):
        differences, videos = clustered(np.random.default_rng(0), 200, 8)
        result = compare(differences, 0 * differences, margin=1, clusters=videos, num_resamples=200)
        assert result.sd == pytest.approx(math.sqrt(1 + 1 / 8), rel=0.1)
        plain = compare(differences, 0 * differences, margin=1, num_resamples=200)
        assert plain.sd == pytest.approx(np.std(differences, ddof=1))

    def test_small_samples_and_no_spread(self):
        assert achieved_power(2, 1.0, 0.1) == pytest.approx(0, abs=1e-3)
        assert required_samples(0.0, 0.1) == 2
        assert achieved_power(2, 0.0, 0.1, effect=0.2) == 0.0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"effect": 0.05}, "no number of pairs"),
            ({"effect": -0.05, "test": "non_inferiority"}, "no number of pairs"),
            ({"power": 1.0}, "power=1.0"),
            ({"sd": -1.0}, "sd=-1.0"),
            ({"test": "superiority"}, "test='superiority'"),
            ({"effect": 0.05 - 1e-9}, "more than 1e"),
        ],
    )
    def test_nonsense_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            required_samples(**({"sd": 0.2, "margin": 0.05} | arguments))
