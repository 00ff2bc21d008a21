"""Evaluation: every metric against hand-worked values, independent implementations and models of known skill."""

from __future__ import annotations

import math
import random
import re
import string
import sys
import unicodedata
from fractions import Fraction as F
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from video2lora.evaluation.metrics import METRICS, Bleu, JudgeScore, score
from video2lora.evaluation.metrics_text import is_empty, repetition, rouge_words, token_f1, words
from video2lora.evaluation.samples import Answer

# prediction, references, words in common, words of the prediction, words of the reference (the best one)
HAND_WORKED = [
    # plain
    ("a dog runs", ["the dog runs"], 2, 2, 2),  # articles gone
    ("a dog runs fast", ["the dog runs"], 2, 3, 2),
    ("dog", ["a black dog on the grass"], 1, 1, 4),
    ("cats", ["dogs"], 0, 1, 1),
    ("The DOG.", ["the dog"], 1, 1, 1),  # case and punctuation
    ("runs the dog", ["dog runs"], 2, 2, 2),  # a bag knows no order
    ("dog  \n\t runs ", ["dog runs"], 2, 2, 2),  # white space
    # repeated words count as often as they occur in both
    ("dog dog dog", ["dog"], 1, 3, 1),
    ("dog dog dog", ["dog dog"], 2, 3, 2),
    ("no no yes", ["no yes yes"], 2, 3, 3),
    # articles
    ("an apple and a pear", ["apple and pear"], 3, 3, 3),
    ("the the the", ["theatre"], 0, 3, 1),  # nothing else is left, so the articles stay
    ("A", ["A"], 1, 1, 1),
    ("B", ["A"], 0, 1, 1),
    ("The Who", ["who"], 1, 1, 1),
    # numbers
    ("2 dogs", ["two dogs"], 1, 2, 2),  # no conversion
    ("1,000 people", ["1000 people"], 2, 2, 2),
    ("3.5 meters", ["35 meters"], 2, 2, 2),  # SQuAD's rule deletes the point, too
    ("$5", ["5"], 1, 1, 1),
    ("２ dogs", ["2 dogs"], 2, 2, 2),  # full-width digit
    # punctuation is deleted, not a space
    ("it's a well-known man", ["its wellknown man"], 3, 3, 3),
    ("well known", ["well-known"], 0, 2, 1),
    ("“red”—blue…", ["redblue"], 1, 1, 1),  # noqa: RUF001
    # unicode
    ("cafe\u0301 noir", ["caf\u00e9"], 1, 2, 1),  # composed and decomposed
    ("cafe", ["café"], 0, 1, 1),  # accents count
    ("ÜBER Straße", ["über strasse"], 1, 2, 2),
    ("一只狗在跑", ["狗在跑。"], 3, 5, 3),  # every character a word
    ("собака бежит", ["Собака!"], 1, 2, 1),
    # empty
    ("", ["dog"], 0, 0, 1),
    ("...", ["dog"], 0, 0, 1),
    ("dog", [""], 0, 1, 0),
    # several references: the best counts
    ("red car", ["blue car", "red car", "red"], 2, 2, 2),
    ("red car", ["a big red car that drives", "car"], 1, 2, 1),  # 2/3 beats 4/7
]


@pytest.mark.parametrize(("prediction", "references", "common", "predicted", "reference"), HAND_WORKED)
def test_token_f1_equals_hand_worked_values(
    prediction: str, references: list[str], common: int, predicted: int, reference: int
) -> None:
    expected = F(0)
    if common:
        precision, recall = F(common, predicted), F(common, reference)
        expected = 2 * precision * recall / (precision + recall)
    assert score("token_f1", [prediction], [references]) == [float(expected)]


def test_two_texts_without_words_agree() -> None:
    assert token_f1("", ["..."]) == 1
    assert token_f1("!", ["dog", ""]) == 1
    assert token_f1("the", [""]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I ❤️ NY 1️⃣!", ["i", "ny", "1"]),
        ("soft\u00adhyphen zero\u200bwidth\ufeff", ["softhyphen", "zerowidth"]),
        ("ﬁre", ["fire"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs stay with their consonants
        ("ｶﾞ犬dog", ["ガ", "犬", "dog"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("20°C €5", ["20c", "5"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def naive_f1(prediction: str, reference: str) -> float:
    """SQuAD's script by the book, one step a line, with Unicode's categories instead of `string.punctuation`."""

    def split(text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).lower()
        text = "".join(c for c in text if unicodedata.category(c)[0] not in "PS")
        text = re.sub(r"([\u3040-\u30ff\u4e00-\u9fff])", r" \1 ", text)
        without = re.sub(r"\b(a|an|the)\b", " ", text).split()
        return without if without else text.split()

    left, right = split(prediction), split(reference)
    if not left or not right:
        return float(left == right)
    rest, common = list(right), 0
    for word in left:
        if word in rest:
            rest.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(left), common / len(right)
    return 2 * precision * recall / (precision + recall)


def test_token_f1_equals_a_naive_implementation_on_random_text() -> None:
    rng = random.Random(7)
    pieces = "a an the The dog Dog's 2 2.5 é e\u0301 狗 か — ... € ß Ａ".split()
    alphabet = string.printable[:95]
    seen = set()
    for _ in range(3000):
        pair = []
        for _ in range(2):
            parts = [
                rng.choice(pieces) if rng.random() < 0.8 else "".join(rng.choices(alphabet, k=rng.randrange(4)))
                for _ in range(rng.randrange(14))
            ]
            pair.append(rng.choice(["", " ", " ", " "]).join(parts))
        ours = token_f1(pair[0], [pair[1]])
        assert ours == pytest.approx(naive_f1(*pair), abs=1e-12), pair
        assert ours == token_f1(pair[1], [pair[0]])  # F1 does not know which is which
        seen.add(round(ours, 3))
    assert len(seen) > 20


def test_normalisation_is_squads_on_ascii() -> None:
    def squad(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    rng = random.Random(3)
    for _ in range(2000):
        text = "".join(rng.choices(string.printable[:95] + " a an the ", k=rng.randrange(40)))
        if squad(text):
            assert words(text) == squad(text), text


def test_exact_match_shares_the_normalisation() -> None:
    said = ["The dog.", "dog the runs", "runs dog", "", "2", "red"]
    right = [["dog"], ["dog runs"], ["dog runs"], ["dog"], ["two"], ["blue", "Red!"]]
    assert score("exact_match", said, right) == [1, 1, 0, 0, 0, 1]


def texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["The", "man", "rides", "a", "horse,", "dog's", "2.5", "runs.", "and", "falls", "-", "HE", "(red)"]
    return [" ".join(rng.choices(vocabulary, k=rng.randrange(1, 14))) for _ in range(count)]


def test_rouge_l_is_the_librarys() -> None:
    said, one, two = texts(0, 60), texts(1, 60), texts(2, 60)
    scorer = RougeScorer(["rougeL"])
    expected = [scorer.score_multi([x, y], s)["rougeL"].fmeasure for s, x, y in zip(said, one, two, strict=True)]
    assert score("rouge_l", said, list(zip(one, two, strict=True))) == expected
    assert len(set(expected)) > 20


def test_rouge_words_are_the_librarys_on_ascii_and_words_elsewhere() -> None:
    from rouge_score.tokenize import tokenize

    rng = random.Random(5)
    for _ in range(500):
        text = "".join(rng.choices([chr(code) for code in range(128)], k=30))
        assert rouge_words(text) == tokenize(text, None)
    assert score("rouge_l", ["狗在跑", "Ärger"], [["狗在跑"], ["ärger"]]) == [1, 1]


def test_bleu_is_the_librarys() -> None:
    said, one, two = texts(0, 40), texts(1, 40), texts(2, 40)
    references = [[x, y] if n % 3 else [x] for n, (x, y) in enumerate(zip(one, two, strict=True))]
    sentence = BLEU(effective_order=True)
    expected = [sentence.sentence_score(s, r).score / 100 for s, r in zip(said, references, strict=True)]
    result = Bleu().compute(predictions=said, references=references)
    assert result["scores"] == pytest.approx(expected, abs=1e-12)
    assert result["bleu"] == pytest.approx(sum(expected) / len(expected))
    streams = [one, [y if n % 3 else None for n, y in enumerate(two)]]
    assert result["corpus_bleu"] == pytest.approx(BLEU().corpus_score(said, streams).score / 100)
    assert "nrefs:var|case:mixed|eff:yes|tok:13a|smooth:exp" in result["signature"]
    assert "eff:no" in result["corpus_signature"]


def test_bleu_of_short_right_answers_is_one_and_never_more() -> None:
    assert score("bleu", ["yes", "a dog runs", ""], [["yes"], ["a dog runs"], ["yes"]]) == [1, 1, 0]


def test_repetition_counts_four_grams_seen_before() -> None:
    assert repetition("dog " * 64) == float(F(60, 61))  # 61 4-grams, all the same
    assert repetition("the a the a the a") == float(F(1, 3))  # 3 4-grams, 2 of them alike; articles count
    assert repetition("one two three four five") == 0
    assert repetition("no no no") == repetition("") == 0
    assert repetition("狗跑狗跑狗跑") == float(F(1, 3))


def test_empty_is_an_answer_without_words() -> None:
    assert [is_empty(text) for text in ("", " \n", "...!", "\u200b", "the", "0", "狗")] == [1, 1, 1, 1, 0, 0, 0]


def answers(ended: list[bool]) -> list[Answer]:
    return [Answer("x", 1, done, 10, 0, 8) for done in ended]


REFERENCES = [["a red ball bounces to the left"], ["two dogs sleep", "dogs are sleeping"], ["yes"], ["狗在跑"]]


class ReferenceJudge:
    """Stands for a judge that is right about everything."""

    def score(self, predictions, references, questions):  # type: ignore[no-untyped-def]
        return [float(said in right) for said, right in zip(predictions, references, strict=True)]


def every_metric(predictions: list[str], references: list[list[str]], ended: bool) -> dict[str, list[float | None]]:
    return {
        name: score(name, predictions, references, answers=answers([ended] * len(predictions)), judge=ReferenceJudge())  # type: ignore[arg-type]
        for name in METRICS
    }


def test_a_perfect_model_has_the_best_score_everywhere() -> None:
    for name, scores in every_metric([right[0] for right in REFERENCES], REFERENCES, True).items():
        spec = METRICS[name]
        assert scores == [spec.range[1] if spec.higher_is_better else spec.range[0]] * 4, name


def test_a_broken_model_has_the_worst_score_everywhere() -> None:
    for name, scores in every_metric(["", "", "", ""], REFERENCES, False).items():
        spec = METRICS[name]
        if name != "repetition":
            assert scores == [spec.range[0] if spec.higher_is_better else spec.range[1]] * 4, name
    assert min(score("repetition", ["horse " * 64], [["x"]])) > 0.98  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["token_f1", "exact_match", "rouge_l", "bleu", "judge"])
def test_a_constant_model_has_its_answers_share(name: str) -> None:
    references = [["yes"]] * 30 + [["no"]] * 70
    scores = every_metric(["yes"] * 100, references, True)[name]
    assert math.fsum(map(float, scores)) / 100 == pytest.approx(0.3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["token_f1", "exact_match", "rouge_l", "bleu", "judge"])
def test_a_random_model_has_chance(name: str) -> None:
    options = ["red", "green", "blue", "yellow"]
    rng = random.Random(0)
    references = [[rng.choice(options)] for _ in range(4000)]
    scores = every_metric([rng.choice(options) for _ in references], references, True)[name]
    error = math.sqrt(0.25 * 0.75 / 4000)
    assert abs(sum(map(float, scores)) / 4000 - 0.25) < 4 * error  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in METRICS if name != "judge"])
def test_evaluates_interface_gives_the_mean_and_the_scores(name: str, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")
    said, ended = ["a red ball", "dogs sleep", "no", "狗"], [True, False, True, True]
    metric = METRICS[name].metric()
    assert metric.name == name
    extra = {"ended": ended} if name == "unended" else {}
    result = metric.compute(predictions=said, references=REFERENCES, **extra)
    assert result["scores"] == score(name, said, REFERENCES, answers=answers(ended))
    assert result[name] == pytest.approx(sum(result["scores"]) / 4)
    metric.add(prediction="yes", reference=["yes"]) if name == "exact_match" else None
    if name == "exact_match":
        assert metric.compute()["exact_match"] == 1
    assert list(tmp_path.iterdir()) == []  # nothing in the user's cache


def test_the_judge_speaks_evaluates_interface_too() -> None:
    class Half(ReferenceJudge):
        def score(self, predictions, references, questions):  # type: ignore[no-untyped-def]
            assert questions == ["q", "q"]
            return [None, 0.5]

    result = JudgeScore(Half()).compute(predictions=["x", "y"], references=[["x"], ["y"]], questions=["q", "q"])  # type: ignore[arg-type]
    assert result == {"judge": 0.5, "scores": [None, 0.5], "failed": 1}


def test_no_samples_have_no_mean() -> None:
    assert score("token_f1", [], []) == []
    assert math.isnan(METRICS["token_f1"].metric().compute(predictions=[], references=[])["token_f1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("token_f1", ["x"], []), "1 predictions but 0 references"),
        (("token_f1", ["x"], [[]]), "at least one"),
        (("token_f1", ["x"], ["x"]), "must be a list"),
        (("unended", ["x"], [["x"]]), "answers="),
        (("judge", ["x"], [["x"]]), "judge="),
    ],
)
def test_what_is_missing_is_named(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(*arguments)


def test_unknown_metric_lists_those_there_are() -> None:
    with pytest.raises(KeyError, match="token_f1, exact_match"):
        score("f1", [], [])


@pytest.mark.parametrize(("name", "module"), [("rouge_l", "rouge_score.rouge_scorer"), ("bleu", "sacrebleu.metrics")])
def test_a_missing_library_names_the_extra(name: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from video2lora.evaluation import metrics

    metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'pip install "video2lora\[evaluation\]"'):
        score(name, ["x"], [["x"]])


def test_metrics_names_are_their_columns() -> None:
    assert {name: spec.name for name, spec in METRICS.items()} == {name: name for name in METRICS}
    assert [name for name, spec in METRICS.items() if not spec.higher_is_better] == ["repetition", "empty", "unended"]
