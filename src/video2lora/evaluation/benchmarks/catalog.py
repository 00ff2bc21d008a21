"""The benchmarks, declared: those of arXiv 2606.04351 and moving shapes.

None of these repositories was downloaded when this was written; `columns_source` says for each where its column names
are from. Prompts for captions are those of the training recipe; where the paper names a style or prompt but not its
wording, the wording is ours. What the paper does not state (which split, which subset, how regions are given) is
chosen here and stands in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...data.finevideo import PROMPTS
from .spec import ANY_TASK, QA_PROMPT, BenchmarkSpec, Download, size_text

_SCENE, _WHOLE = PROMPTS["scene"][0], PROMPTS["whole"][0]
_PLM = "facebook/PLM-VideoBench"
_ESTIMATED = "size estimated"
_LMMS_EVAL = "read from the task's code in lmms-eval"
_SA_V = Download(
    "videos",
    None,
    url="https://ai.meta.com/datasets/segment-anything-video-downloads",
    note="accept Meta's licence there, download only videos_fps_6.tar and unpack it into the folder",
)
_REGION = (
    "The region is one subject's masklet in an SA-V video. Task 'plain' gives it in no way: the model sees the span "
    "and the recipe's prompt, so it may describe another subject (both conditions alike). Task 'marked' draws the "
    "subject's box as a red rectangle 4 pixels wide into the frames and names it in the prompt, as lmms-eval does; it "
    "needs metadata/metadata_<split>.jsonl of the repository."
)
_MARKED = "Describe what the subject marked by the red rectangle is doing in this scene."
_REGION_COLUMNS = {
    "id": ("uid",),
    "video": ("video",),
    "region": ("masklet_id",),
    "captions": ("dense_captions",),
    "caption": ("caption",),
    "start_frame": ("start_frame",),
    "end_frame": ("end_frame",),
}
_REGION_NOTES = (
    "The paper does not say how it gave the region; 'plain' is the default because its manifests hold only a video "
    "and a prompt.",
    "Spans are written in frames at 6 a second (from lmms-eval): start_frame / 6 to (end_frame + 1) / 6 seconds.",
)


def _plm(config: str, *splits: str, regions: bool = False) -> dict[str, Any]:
    """What the parts of PLM-VideoBench share."""
    files = (f"{config}/*",) + (("metadata/*",) if regions else ())
    return {
        "dataset": _PLM,
        "config": config,
        "splits": {one: (f"plm_{config}_{one}*.parquet", f"plm_{config}_{one}.jsonl") for one in splits},
        "license": "CC-BY-4.0 (annotations)",
        "downloads": (Download("annotations", _PLM, files),),
    }


_ALL = [
    BenchmarkSpec(
        name="activitynet_captions",
        version=1,
        title="ActivityNet Captions",
        schema="activitynet_captions",
        dataset="friedrichor/ActivityNet_Captions",
        split="val_1",
        splits={
            one: (f"raw_data/{one}.json", f"{one}.json", f"*{one.replace('_', '')}*.json", f"*{one}*.parquet")
            for one in ("val_1", "val_2", "train")
        },
        columns={
            "video": ("video_id", "_key", "video"),
            "sentences": ("sentences", "en_captions"),
            "timestamps": ("timestamps",),
        },
        columns_source="read from public code that loads raw_data/val_*.json and the rows of this repository",
        prompts={"paragraph": _WHOLE, "event": _SCENE},
        tasks=("paragraph",),
        optional_tasks=("event",),
        unit="video",
        num_questions=4917,
        num_videos=4917,
        license="not stated in the repository; ActivityNet's terms and those of the videos' owners",
        access="open; read https://activity-net.org/download.html first",
        downloads=(
            Download(
                "annotations", "friedrichor/ActivityNet_Captions", ("raw_data/*.json",), 40_000_000, note=_ESTIMATED
            ),
            Download(
                "videos",
                "friedrichor/ActivityNet_Captions",
                ("ActivityNet_Videos.tar.part-*",),
                41_982_156_800,
                note="8 parts of one tar",
            ),
        ),
        notes=(
            "'paragraph': the whole video against its event sentences joined in order. 'event': each annotated span "
            "against its sentence. The paper does not say which it used, nor which split.",
        ),
    ),
    BenchmarkSpec(
        name="plm_rcap",
        version=1,
        title="PLM-RCap (region captioning)",
        schema="plm_rcap",
        columns=_REGION_COLUMNS,
        columns_source=f"dataset card, and {_LMMS_EVAL}",
        prompts={"plain": _SCENE, "marked": _MARKED},
        tasks=("plain",),
        optional_tasks=("marked",),
        num_questions=10_060,
        access="annotations open; videos after accepting SA-V's licence at Meta",
        region=_REGION,
        annotation_fps=6.0,
        notes=_REGION_NOTES,
        **(
            _plm("rcap", "test", "val", regions=True)
            | {"downloads": (*_plm("rcap", regions=True)["downloads"], _SA_V)}
        ),
    ),
    BenchmarkSpec(
        name="plm_rdcap",
        version=1,
        title="PLM-RDCap (region dense captioning)",
        schema="plm_rdcap",
        columns=_REGION_COLUMNS,
        columns_source=f"dataset card, and {_LMMS_EVAL}",
        prompts={"plain": _SCENE, "marked": _MARKED},
        tasks=("plain",),
        optional_tasks=("marked",),
        num_questions=None,
        access="annotations open; videos after accepting SA-V's licence at Meta",
        region=_REGION,
        annotation_fps=6.0,
        notes=(
            *_REGION_NOTES,
            "Each dense caption is one question about its span (2,620 rows in the test split); captions that only say "
            "that the subject is out of frame are left out and counted. PLM's own metric (SODA over predicted spans) "
            "is another task.",
        ),
        **(
            _plm("rdcap", "test", "val", regions=True)
            | {"downloads": (*_plm("rdcap", regions=True)["downloads"], _SA_V)}
        ),
    ),
    BenchmarkSpec(
        name="vdc",
        version=1,
        title="VDC (Video Detailed Captions)",
        schema="styled",
        dataset="wchai/Video-Detailed-Caption",
        splits={"test": ("VDC_1k.jsonl",)},
        columns={
            "video": ("video_name", "video_id"),
            "short": ("short_caption",),
            "detailed": ("detailed_caption",),
            "camera": ("camera_caption",),
            "background": ("background_caption",),
            "main_object": ("main_object_caption",),
        },
        columns_source="read from public code that loads VDC_1k.jsonl",
        prompts={
            "short": "Describe this video in one sentence.",
            "detailed": "Describe this video in detail.",
            "camera": "Describe the camera in this video: its shots, angles and movement.",
            "background": "Describe the background of this video: the place, objects, weather and time.",
            "main_object": "Describe the main subject of this video: how it looks, what it does, where and how it "
            "moves.",
        },
        tasks=("short", "detailed", "camera", "background", "main_object"),
        unit="video",
        num_questions=5 * 1027,
        num_videos=1027,
        license="Apache-2.0",
        access="open",
        downloads=(
            Download("annotations", "wchai/Video-Detailed-Caption", ("*VDC_1k.jsonl",), 5_600_000),
            Download("videos", "wchai/lmms_VDC_test", ("*.zip",), 80_200_000_000, note="2 zip files, 42 + 38 GB"),
        ),
        notes=(
            "500 videos are drawn, the same for all styles, so each is encoded once. The wording of the prompts is "
            "ours: lmms-eval draws one of many at random.",
        ),
    ),
    BenchmarkSpec(
        name="carebench",
        version=1,
        title="CaReBench",
        schema="styled",
        dataset="MCG-NJU/CaReBench",
        splits={"test": ("json/metadata.json", "metadata.json", "metadata.jsonl")},
        columns={
            "video": ("video", "video_path", "video_name", "video_id", "path", "file_name"),
            "caption": ("caption", "general_caption", "captions", "text"),
            "events": ("events", "event", "action_list", "actions"),
            "objects": ("objects", "object", "object_list"),
            "spatial": ("spatial_caption", "spatial", "spatial_description", "static_caption"),
            "temporal": ("temporal_caption", "temporal", "temporal_description", "dynamic_caption"),
        },
        columns_source="not verified: the names that the paper's prompts and common usage suggest",
        prompts={
            "caption": "Describe this video in detail.",
            "events": "List the events in this video in the order in which they happen.",
            "objects": "List the people and objects in this video.",
            "spatial": "Describe what is to be seen in this video: people, objects, how they look and where they are.",
            "temporal": "Describe the actions in this video in the order in which they happen.",
        },
        tasks=("caption", "events", "objects", "spatial", "temporal"),
        unit="video",
        num_questions=5 * 1000,
        num_videos=1000,
        license="MIT",
        access="open",
        downloads=(
            Download("annotations", "MCG-NJU/CaReBench", ("json/*",), 10_000_000, note=_ESTIMATED),
            Download("videos", "MCG-NJU/CaReBench", ("videos/*", "*.zip"), 3_900_000_000),
        ),
        notes=(
            "500 videos are drawn, the same for all prompts. Lists of events and objects become one reference, joined "
            "by '; '. The wording of the prompts is ours.",
        ),
    ),
    BenchmarkSpec(
        name="nextqa",
        version=1,
        title="NExT-QA (open-ended)",
        schema="qa",
        dataset="lmms-eval/NExTQA",
        config="OE",
        splits={
            "test": ("OE/test*.parquet",),
            "validation": ("OE/validation*.parquet", "OE/val*.parquet"),
        },
        columns={
            "id": ("qid",),
            "video": ("video",),
            "question": ("question",),
            "answer": ("answer",),
            "more_answers": ("additional_ref_answer",),
            "task": ("type",),
        },
        columns_source=_LMMS_EVAL,
        prompts={ANY_TASK: QA_PROMPT},
        ids_per_video=True,
        license="see the repository's card",
        access="open",
        downloads=(
            Download("annotations", "lmms-eval/NExTQA", ("OE/*",), 4_000_000, note=_ESTIMATED),
            Download("videos", "lmms-eval/NExTQA", ("videos.zip",), 6_490_000_000, note="one zip file"),
        ),
        notes=("Types: C causal (W why, H how), T temporal (N next, C present, P previous), D descriptive.",),
    ),
    BenchmarkSpec(
        name="activitynet_qa",
        version=1,
        title="ActivityNet-QA",
        schema="qa",
        dataset="lmms-eval/ActivityNetQA",
        splits={"test": ("data/test*.parquet",)},
        columns={
            "id": ("question_id",),
            "video": ("video_name",),
            "question": ("question",),
            "answer": ("answer",),
            "task": ("type",),
        },
        columns_source=_LMMS_EVAL,
        prompts={ANY_TASK: QA_PROMPT},
        video_prefix="v_",
        question_mark=True,
        num_questions=8000,
        num_videos=800,
        license="none stated on the Hub; its authors: academic purposes only",
        access="open",
        downloads=(
            Download("annotations", "lmms-eval/ActivityNetQA", ("data/*",), 326_000),
            Download(
                "videos", "lmms-eval/ActivityNetQA", ("*.zip",), 140_000_000_000, note="28 zip files of up to 5.3 GB"
            ),
        ),
        notes=(
            "Types, by number: 0 motion, 1 spatial, 2 temporal, 3 yes/no, 4 colour, 5 object, 6 location, 7 number, "
            "8 other. Questions are written without a question mark and get one, as in lmms-eval.",
        ),
    ),
    BenchmarkSpec(
        name="plm_sgqa",
        version=1,
        title="PLM-SGQA (smart glasses)",
        schema="qa",
        columns={
            "id": ("uid",),
            "video": ("video",),
            "question": ("question",),
            "answer": ("answer",),
            "task": ("domain",),
        },
        columns_source=f"dataset card, and {_LMMS_EVAL}",
        prompts={ANY_TASK: QA_PROMPT},
        num_questions=665,
        access="open",
        **(
            _plm("sgqa", "test")
            | {
                "license": "CC-BY-4.0",
                "downloads": (
                    *_plm("sgqa")["downloads"],
                    Download("videos", _PLM, ("videos/sgqa/*",), note="in the repository, unpacked"),
                ),
            }
        ),
    ),
    BenchmarkSpec(
        name="vidcapbench",
        version=1,
        title="VidCapBench",
        schema="vidcapbench",
        dataset="VidCapBench/VidCapBench",
        splits={"test": ("VidCapBench-[AH]E_QA.jsonl", "*VidCapBench*QA*.jsonl", "*QA*.json")},
        columns={
            "video": ("video_dir", "video", "video_path", "video_name"),
            "pairs": ("QA_pairs", "QAPairs"),
            "question": ("question",),
            "answer": ("answer",),
            "task": ("sub_category", "category"),
        },
        columns_source="read from the evaluation script of its GitHub repository; the -HE file is taken to be alike",
        prompts={ANY_TASK: QA_PROMPT},
        unit="video",
        num_samples=100,
        num_questions=10_644,
        num_videos=643,
        license="academic use only",
        access="not verified whether it is gated",
        downloads=(
            Download("annotations", "VidCapBench/VidCapBench", ("*.json*",), 5_000_000, note=_ESTIMATED),
            Download("videos", "VidCapBench/VidCapBench", ("*.mp4", "*.zip", "*.tar*"), note="in the repository"),
        ),
        notes=(
            "100 videos with all their questions. The paper's 15.2 questions a video fit the -AE and -HE files "
            "together (16.6), not -AE alone.",
        ),
    ),
    BenchmarkSpec(
        name="moving_shapes",
        version=1,
        title="Moving shapes",
        schema="moving_shapes",
        splits={"test": (), "validation": (), "combinations": (), "phrasings": ()},
        columns_source="made by video2lora.data.moving_shapes",
        prompts={ANY_TASK: "{question}"},
        tasks=(
            "caption",
            "summary",
            "colour",
            "shape",
            "size",
            "count",
            "motion",
            "position",
            "order",
            "existence",
            "how_often",
        ),
        metrics=("exact_match", "token_f1", "repetition", "empty", "unended"),
        margins={"exact_match": 0.05, "token_f1": 0.05},
        max_new_tokens=96,
        unit="video",
        seed=0,
        license="Apache-2.0, as this package",
        access="made on the spot",
        notes=(
            "'combinations': pairs of colour and shape that training never shows; 'phrasings': the test clips with "
            "wordings that training never uses. Questions that 12 uniform frames do not decide are left out.",
        ),
    ),
]

BENCHMARKS: dict[str, BenchmarkSpec] = {spec.name: spec for spec in _ALL}


def describe_benchmarks(specs: Mapping[str, BenchmarkSpec] | None = None) -> list[dict[str, str]]:
    """Rows of a table of the benchmarks: name, title, questions, videos, size of the downloads, licence and access."""
    rows = []
    for spec in (BENCHMARKS if specs is None else specs).values():
        known = [download.bytes for download in spec.downloads if download.bytes is not None]
        unknown = any(download.bytes is None for download in spec.downloads)
        size = size_text(sum(known) if known else None) + (" and parts of unknown size" if known and unknown else "")
        rows.append(
            {
                "name": spec.name,
                "title": spec.title,
                "version": str(spec.version),
                "questions": _count(spec.num_questions),
                "videos": _count(spec.num_videos),
                "drawn": "all" if spec.num_samples is None else f"{spec.num_samples} {spec.unit}s",
                "size": size if spec.downloads else "nothing to download",
                "license": spec.license or "not stated",
                "access": spec.access or "open",
            }
        )
    return rows


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"
