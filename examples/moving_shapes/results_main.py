"""Moving shapes, stage 3: the results at 12 frames: accuracy, controls, captions, never-trained questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from proof_numbers import Claim, Numbers, after_holm, mean
from proof_runs import LEARNT, MARGIN
from results_text import difference, pretty, score, table, task_name
from train_hypernetwork import HELD_OUT_TASKS

WRONG_SHOWN = 2
DAGGER = "† Questions that the hypernetwork was never trained on."


def learnt_claim(run: Numbers, title: str) -> Claim:
    """The VLM with the video in its context answers each type of question; captions count by their facts."""
    found = {task: run.mean("video", task) for task in run.tasks}
    if "caption" in found:
        found["caption"] = run.facts("video")["recall"]
    low = {task: value for task, value in found.items() if not value >= LEARNT}
    worst = min(found, key=lambda task: found[task])
    failures = [f"{task_name(task)}: {value:.3f}" for task, value in low.items()]
    what = f"{title}: the VLM answers {LEARNT:.0%} of each type of question in context (captions: of their facts)"
    return Claim(what, not low, f"least {found[worst]:.3f} ({task_name(worst)})", failures)


def kinds_of_task(run: Numbers) -> dict[str, list[str]]:
    """The tasks that the hypernetwork was trained on, and the others: what is claimed together."""
    kinds = {"every task it was trained on": False, "every task it was never trained on": True}
    found = {kind: [t for t in run.tasks if (t in HELD_OUT_TASKS) == unseen] for kind, unseen in kinds.items()}
    return {kind: tasks for kind, tasks in found.items() if tasks}


def inferiority_claims(run: Numbers, title: str) -> list[Claim]:
    """The adapter against the video in context on every task; those never trained on apart."""
    effects, claims = run.by_task("adapter", "video"), []
    for kind, tasks in kinds_of_task(run).items():
        shown = after_holm({task: effects[task] for task in tasks})
        failures = [f"{task_name(t)}: {difference(effects[t])}" for t in tasks if "non-inferior" not in shown[t]]
        counts = {verdict: sum(verdict in found for found in shown.values()) for verdict in ("equivalent", "superior")}
        worst = min(tasks, key=lambda task: effects[task].effect)
        told = (
            f"non-inferior on {len(tasks) - len(failures)} of {len(tasks)} tasks, equivalent on "
            f"{counts['equivalent']}, superior on {counts['superior']}; worst {difference(effects[worst])} "
            f"({task_name(worst)})"
        )
        what = f"{title}: adapter non-inferior to video in context at {MARGIN} on {kind}"
        refuted = any(effects[task].interval[1] < -MARGIN for task in tasks)
        claims.append(Claim(what, not failures, told, failures, refuted))
    return claims


def control_claims(run: Numbers) -> list[Claim]:
    """What cannot know the video knows nothing of it; a caption as text does."""
    claims = []
    if "no_adapter" in run.conditions:
        claims.append(_not_above(run, "no_adapter", {"the answer prior": run.guesses}))
    if "other_adapter" in run.conditions:
        references = {"agreement": run.agreement, "the answer prior": run.guesses}
        claims.append(_not_above(run, "other_adapter", references))
    return claims


def _not_above(run: Numbers, condition: str, references: dict[str, np.ndarray]) -> Claim:
    """A condition is nowhere better than the better of its references by the margin or more."""
    failures, largest, refuted = [], -np.inf, False
    for task in run.tasks:
        kept = run.of_task(task)
        name = max(references, key=lambda name: np.nan_to_num(mean(references[name][kept]), nan=-1.0))
        effect = run.against(run.scores(condition), references[name], kept)
        largest, refuted = max(largest, effect.effect), refuted or effect.interval[0] > MARGIN
        if not effect.interval[1] < MARGIN:
            failures.append(f"{task_name(task)}: {effect.candidate_mean:.3f}, {name} {effect.baseline_mean:.3f}, "
                            f"difference {difference(effect)}")  # fmt: skip
    what = f"12 frames: {pretty(condition)} not better than {' or '.join(references)} by {MARGIN} on any task"
    return Claim(what, not failures, f"{largest:+.3f} at most", failures, refuted)


def caption_claims(run: Numbers) -> list[Claim]:
    """Facts of captions."""
    video, adapter = run.facts("video"), run.facts("adapter")
    told = (
        f"facts stated {adapter['recall']:.3f} (video {video['recall']:.3f}), whole captions {adapter['exact']:.3f} "
    )
    told += f"(video {video['exact']:.3f})"
    holds = adapter["recall"] >= video["recall"] - MARGIN and adapter["precision"] >= video["precision"] - MARGIN
    return [Claim(f"12 frames: the adapter's captions state as many facts, as truly, within {MARGIN}", holds, told)]


def main_section(run: Numbers, plot: Path) -> list[str]:
    """Every condition, by task, at the number of frames that the VLM was trained on."""
    rows = []
    for task in run.tasks:
        kept = run.of_task(task)
        accuracy = [score(run.mean(condition, task)) for condition in run.conditions]
        agreement = [score(mean(run.agreement[kept]))] if "other_adapter" in run.conditions else ["-"]
        rows.append(
            [task_name(task), f"{kept.sum():,}", *accuracy, score(float(run.guesses[kept].mean())), *agreement]
        )
    header = ["task", "clips", *map(pretty, run.conditions), "prior", "agreement"]
    facts = [[pretty(name), *(score(v) for v in run.facts(name).values())] for name in run.conditions]
    return [
        f"## 12 frames: exact match, {run.num_clips:,} clips",
        f"![Accuracy of every condition]({plot.name})",
        table(header, rows),
        f"{DAGGER} Prior: the commonest answer to such a question among training scenes, given here. Agreement: how "
        "often the true answer of the video whose adapter was put on, to its own question of the task, is the true "
        "answer here; questions about what only this video shows have answers of their own, and then the prior of the "
        "question is what counts. *Own caption as text* is the VLM's caption of the video in place of the video; its "
        "training included such questions.",
        "### Facts of captions",
        table(["condition", "recall", "precision", "exact to the letter"], facts),
        *against_section(run, "Adapter against the video in context", "###"),
        "### Degeneration",
        degeneration_table(run),
    ]


def against_section(run: Numbers, title: str, level: str = "##") -> list[str]:
    """Paired differences of the adapter to the video in context, with what they show; and both kinds of task."""
    effects, shown = run.by_task("adapter", "video"), dict[str, list[str]]()
    for tasks in kinds_of_task(run).values():
        shown |= after_holm({task: effects[task] for task in tasks})
    rows = [
        [task_name(task), f"{e.n:,}", score(e.baseline_mean), score(e.candidate_mean), difference(e),
         ", ".join(shown[task]) or "nothing"]
        for task, e in effects.items()
    ]  # fmt: skip
    for name, chosen in (("all never trained on", HELD_OUT_TASKS), ("all others", None)):
        kept = np.array([(a.task in HELD_OUT_TASKS) == (chosen is not None) for a in run.asked])
        if kept.any():
            e = run.against(run.scores("adapter"), run.scores("video"), kept)
            rows.append([f"*{name}*", f"{e.n:,}", score(e.baseline_mean), score(e.candidate_mean), difference(e), ""])
    header = ["task", "questions", "video in context", "adapter", "difference, 95 %", "shown, after Holm"]
    return [f"{level} {title}", table(header, rows, 1, 1)]


def degeneration_table(run: Numbers) -> str:
    """How often answers repeat themselves, are empty or do not end."""
    metrics = ("repetition", "empty", "unended")
    rows = [[pretty(name), *(score(run.mean(name, metric=m), 4) for m in metrics)] for name in run.conditions]
    return table(["condition", "repeated 4-grams", "empty", "not ended"], rows)


def captions_only_section(run: Numbers, other: Numbers) -> list[str]:
    """A hypernetwork trained on captions only, beside the one trained with questions."""
    theirs, rows = run.aligned(other, "adapter"), []
    for task in run.tasks:
        e = run.against(run.scores("adapter"), theirs, run.of_task(task))
        video = score(run.mean("video", task))
        rows.append(
            [task_name(task), f"{e.n:,}", video, score(e.baseline_mean), score(e.candidate_mean), difference(e)]
        )
    header = ["task", "clips", "video in context", "captions only", "with questions", "difference, 95 %"]
    facts = [
        f"{name} {found['recall']:.3f} (whole captions {found['exact']:.3f})"
        for name, found in (("captions only", other.facts("adapter")), ("with questions", run.facts("adapter")))
    ]
    return [
        "## Trained on captions only, against with questions",
        table(header, rows),
        f"{DAGGER} (Trained on captions only, all but captions.) Facts stated in captions: {', '.join(facts)}.",
    ]


def wrong_answers(run: Numbers) -> list[str]:
    """The first wrong answers of the adapter in each task, and what the VLM that saw the video said."""
    scores = run.scores("adapter")
    answers = {name: run.column("answer", name) for name in ("video", "adapter")}
    rows = []
    for task in run.tasks:
        places = [p for p in np.flatnonzero(run.of_task(task)).tolist() if scores[p] == 0]
        for place in places[:WRONG_SHOWN]:
            asked = run.asked[place]
            said = [str(answers[name][place]) for name in ("adapter", "video")]
            rows.append([asked.sample.removeprefix("moving-shapes-"), asked.prompt, asked.references[0], *said])
    if not rows:
        return ["At 12 frames the adapter gave no wrong answer."]
    header = ["clip", "question", "true", "adapter", "video in context"]
    return [f"The adapter's first wrong answers at 12 frames, at most {WRONG_SHOWN} a task:", table(header, rows, 5)]
