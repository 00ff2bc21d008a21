"""Evaluation: the metrics by name, on the `evaluate` library's interface, computed here without any download."""

from __future__ import annotations

import math
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import evaluate

from . import metrics_text
from .samples import Answer

if TYPE_CHECKING:
    from .judge import Judge

__all__ = [
    "METRICS",
    "Bleu",
    "Empty",
    "ExactMatch",
    "JudgeScore",
    "MetricSpec",
    "Repetition",
    "RougeL",
    "SampleMetric",
    "TokenF1",
    "Unended",
    "score",
]

_TEXT = datasets.Value("string")
_PAIRS = datasets.Features({"predictions": _TEXT, "references": datasets.Sequence(_TEXT)})
_PREDICTIONS = datasets.Features({"predictions": _TEXT})


class SampleMetric(evaluate.Metric):
    """A metric with a score for every sample, and their mean.

    `compute(predictions=["..."], references=[["...", "..."]])` returns `{name: mean, "scores": [one per sample]}`; the
    mean of no samples is NaN. Metrics that look at the answer alone ignore `references`. Nothing is downloaded, and
    unless `keep_in_memory=False` asks for it (distributed use needs it) nothing is written either.

    Raises:
        ValueError: other numbers of predictions and references, or a sample without a reference.
    """

    label: ClassVar[str]  # evaluate has taken `name`
    features_in: ClassVar[datasets.Features] = _PAIRS

    def __init__(
        self,
        config_name: str | None = None,
        *,
        keep_in_memory: bool = True,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not keep_in_memory or cache_dir is not None:
            super().__init__(config_name, keep_in_memory=keep_in_memory, cache_dir=cache_dir, **kwargs)
            return
        # evaluate makes a folder in the user's cache in any case, but in memory never looks at it again
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(config_name, keep_in_memory=True, cache_dir=folder, **kwargs)

    @abstractmethod
    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> Sequence[float | None]:
        """Return one score for each prediction; None where there is none."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=METRICS[self.label].definition,
            citation="",
            inputs_description="predictions: list of str. references: a list of str for each, any of which counts.",
            features=self.features_in,
        )

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]] = (), **details: Any
    ) -> dict[str, Any]:
        if "references" in self.features_in:
            _check_references(predictions, references)
        scores = list(self.per_sample(predictions, references, **details))
        return {self.label: _mean(scores), "scores": scores}


class TokenF1(SampleMetric):
    """Token-F1 of SQuAD; `metrics_text.words` states the normalisation."""

    label = "token_f1"

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        return list(map(metrics_text.token_f1, predictions, references))


class ExactMatch(SampleMetric):
    """Equality with a reference after token-F1's normalisation."""

    label = "exact_match"

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        return list(map(metrics_text.exact_match, predictions, references))


class RougeL(SampleMetric):
    """ROUGE-L of rouge-score: F-measure of the longest common subsequence, no stemmer, best over references.

    rouge-score's own tokenizer deletes whatever is not ASCII; ours gives the same words on ASCII, but keeps letters
    and digits of every script (after NFKC; each Chinese or Japanese character is a word). Without any word in one of
    the texts, or in both, it is 0.
    """

    label = "rouge_l"

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        scorer = _rouge_scorer()
        pairs = zip(predictions, references, strict=True)
        return [float(scorer.score_multi(list(right), said)["rougeL"].fmeasure) for said, right in pairs]


class Bleu(SampleMetric):
    """BLEU of sacrebleu, divided by 100: sentence BLEU per sample, and as `corpus_bleu` that of all samples together.

    sacrebleu's defaults: mixed case, tokenizer 13a, exponential smoothing. Sentences use the effective order, so that
    a right answer of fewer than four words has 1. References count together, as BLEU has it. `signature` and
    `corpus_signature` are sacrebleu's. 13a splits no Chinese or Japanese.
    """

    label = "bleu"

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        bleu = _bleu(effective_order=True)
        pairs = zip(predictions, references, strict=True)
        # rounding makes sacrebleu's 100 a little more
        return [min(bleu.sentence_score(said, list(right)).score / 100, 1.0) for said, right in pairs]

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]] = (), **details: Any
    ) -> dict[str, Any]:
        result = super()._compute(predictions, references, **details)
        sentence, corpus = _bleu(effective_order=True), _bleu(effective_order=False)
        if not len(predictions):
            return {**result, "corpus_bleu": math.nan}
        most = max(map(len, references))
        streams = [[right[k] if k < len(right) else None for right in references] for k in range(most)]
        corpus_bleu = min(corpus.corpus_score(list(predictions), streams).score / 100, 1.0)
        sentence.corpus_score(list(predictions), streams)  # only a corpus tells its signature the number of references
        return {
            **result,
            "corpus_bleu": corpus_bleu,
            "signature": str(sentence.get_signature()),
            "corpus_signature": str(corpus.get_signature()),
        }


class Repetition(SampleMetric):
    """Share of an answer's 4-grams that occurred in it before."""

    label = "repetition"
    features_in = _PREDICTIONS

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        return list(map(metrics_text.repetition, predictions))


class Empty(SampleMetric):
    """Whether an answer has no word."""

    label = "empty"
    features_in = _PREDICTIONS

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        return list(map(metrics_text.is_empty, predictions))


class Unended(SampleMetric):
    """Whether the model was cut off at the limit of new tokens: `compute(predictions=..., ended=[True, ...])`."""

    label = "unended"
    features_in = _PREDICTIONS

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float]:
        ended = details.get("ended")
        if ended is None:
            raise ValueError("unended cannot be seen in a text: pass ended=[...], or to `score` answers=[...].")
        _check_length("ended", ended, predictions)
        return [float(not done) for done in ended]


class JudgeScore(SampleMetric):
    """A language model's grade: `JudgeScore(judge).compute(predictions=..., references=..., questions=...)`.

    An answer that could not be judged has the score None; the mean is over the others and `failed` counts it.
    """

    label = "judge"

    def __init__(self, judge: Judge, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.judge = judge

    def per_sample(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], **details: Any
    ) -> list[float | None]:
        return self.judge.score(predictions, references, details.get("questions"))

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]] = (), **details: Any
    ) -> dict[str, Any]:
        result = super()._compute(predictions, references, **details)
        return {**result, "failed": result["scores"].count(None)}


@dataclass(frozen=True)
class MetricSpec:
    """What a metric is.

    Attributes:
        name: of its column in the records.
        metric: its class.
        higher_is_better: else lower is.
        range: lowest and highest score.
        definition: one line for a report.
        needs: what `score` needs besides predictions: "references", "answers", "judge".
    """

    name: str
    metric: type[SampleMetric]
    higher_is_better: bool
    range: tuple[float, float]
    definition: str
    needs: tuple[str, ...] = ()


def _spec(metric: type[SampleMetric], better: bool, definition: str, *needs: str) -> MetricSpec:
    return MetricSpec(metric.label, metric, better, (0.0, 1.0), definition, needs)


METRICS: Mapping[str, MetricSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _spec(
                TokenF1,
                True,
                "harmonic mean of precision and recall over bags of words (as in SQuAD: NFKC, lower case, without "
                "punctuation, symbols and articles), best over the references",
                "references",
            ),
            _spec(
                ExactMatch,
                True,
                "1 when the answer is a reference after token-F1's normalisation, else 0",
                "references",
            ),
            _spec(
                RougeL,
                True,
                "F-measure of the longest common subsequence of words (rouge-score, no stemmer), best over references",
                "references",
            ),
            _spec(
                Bleu,
                True,
                "sentence BLEU of sacrebleu / 100 (13a, mixed case, exponential smoothing, effective order)",
                "references",
            ),
            _spec(
                JudgeScore,
                True,
                "grade of a language model that reads question, references and answer, 0 to 5 rescaled to 0 to 1",
                "references",
                "judge",
            ),
            _spec(
                Repetition,
                False,
                f"share of the answer's {metrics_text.REPETITION_N}-grams of words that occurred in it before",
            ),
            _spec(Empty, False, "1 when the answer has no letter and no digit, else 0"),
            _spec(Unended, False, "1 when the answer was cut off at the limit of new tokens, else 0", "answers"),
        )
    }
)


def score(
    metric: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    questions: Sequence[str | None] | None = None,
    answers: Sequence[Answer] | None = None,
    judge: Judge | None = None,
) -> list[float | None]:
    """Score every prediction by one metric of `METRICS`.

    Args:
        metric: its name.
        predictions: answers of a model.
        references: for each prediction the right answers, any of which counts.
        questions: what was asked; for "judge".
        answers: what the predictions are the texts of; for "unended".
        judge: for "judge".

    Returns:
        One score for each prediction, from 0 to 1; None only where a judge gave no grade.

    Raises:
        KeyError: no such metric.
        ValueError: sequences of different lengths, a sample without a reference, or what a metric needs is missing.
        ImportError: a library of the extra "evaluation" is missing.
        JudgeError: the judge cannot be reached; what it has judged is kept.
    """
    if metric not in METRICS:
        raise KeyError(f"no metric {metric!r}: there are {', '.join(METRICS)}.")
    spec = METRICS[metric]
    if "references" in spec.needs:
        _check_references(predictions, references)
    if "answers" in spec.needs:
        if answers is None:
            raise ValueError(f"{metric} needs answers=[...]: it cannot be seen in the text.")
        _check_length("answers", answers, predictions)
    if "judge" in spec.needs:
        if judge is None:
            raise ValueError(f"{metric} needs judge=Judge(...): a model and its endpoint.")
        return judge.score(predictions, references, questions)
    ended = None if answers is None else [answer.ended for answer in answers]
    return list(_instance(metric).per_sample(predictions, references, ended=ended))


@cache
def _instance(metric: str) -> SampleMetric:
    return METRICS[metric].metric()


def _check_references(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    _check_length("references", references, predictions)
    for number, right in enumerate(references):
        if isinstance(right, str) or not len(right):
            raise ValueError(f"references[{number}] must be a list of at least one right answer, got {right!r}.")


def _check_length(name: str, values: Sequence[Any], predictions: Sequence[str]) -> None:
    if len(values) != len(predictions):
        raise ValueError(f"there are {len(predictions)} predictions but {len(values)} {name}: one each is needed.")


def _mean(scores: Sequence[float | None]) -> float:
    known = [value for value in scores if value is not None]
    return math.fsum(known) / len(known) if known else math.nan


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
        from rouge_score.tokenizers import Tokenizer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError('rouge_l needs rouge-score: pip install "video2lora[evaluation]"') from error

    class Words(Tokenizer):  # an interface of a library that may be missing
        def tokenize(self, text: str) -> list[str]:
            return metrics_text.rouge_words(text)

    return RougeScorer(["rougeL"], tokenizer=Words())


def _bleu(*, effective_order: bool) -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ImportError('bleu needs sacrebleu: pip install "video2lora[evaluation]"') from error
    return BLEU(effective_order=effective_order)
