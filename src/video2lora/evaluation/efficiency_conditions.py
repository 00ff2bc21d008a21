"""Efficiency: the ways to answer a question about a video, each timed on one device."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, StoppingCriteriaList

from ..adapters import VideoAdapter
from ..modeling import LoraWeights, Video2LoraModel, merge_lora
from ..modeling.vision import embed_frames
from .efficiency_measure import Clock, PeakMemory, TokenMarks, measure, timing
from .efficiency_prompts import Case

OK, OUT_OF_MEMORY = "ok", "out of memory"
VIDEO_CONDITIONS = ("video_cold", "video_cached", "kv_cache", "internalize")
"""Measured for each case: the video in the context; the same with its visual tokens at hand; with the keys and values
of the whole video at hand, so that only the question is read; and making an adapter of it."""
QUERY_CONDITIONS = ("text_only", "adapter_attached", "adapter_merged")
"""Measured once: nothing of the video is in their context. The base by itself; with an adapter on it as hooks; with an
adapter added to its weights."""
OWN_RUNS_BELOW = 0.3
"""Seconds of a cold answer from which `video_cached` is read off its runs rather than run by itself: the device is
then busy all the time, so that what is spared without the vision tower is what it takes."""

Row = dict[str, Any]


class Bench:
    """A model on its device, and what measuring it needs.

    Args:
        model: the model.
        image_token_id: the token that stands for pixels.
        tile: pixels a side of a tile.
        max_tiles: of all cases.
        repeats: runs of each measurement, at most.
        new_tokens: tokens of an answer after the first, for the time per token.
    """

    def __init__(
        self, model: Video2LoraModel, image_token_id: int, tile: int, max_tiles: int, repeats: int, new_tokens: int
    ) -> None:
        self.model, self.vlm = model, model.vlm
        self.device, self.image_token_id = model.vlm.device, image_token_id
        self.repeats, self.new_tokens = repeats, new_tokens
        self.peak = PeakMemory(self.device)
        # noise, for speed does not depend on what is seen; held once for all cases, each takes its first tiles
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, max_tiles, 3, tile, tile)
        self.pixels = torch.randn(shape, device=self.device, dtype=model.vlm.dtype, generator=generator)
        self.mask = torch.ones((1, max_tiles, tile, tile), device=self.device, dtype=torch.bool)

    def inputs(self, case: Case, text_tokens: int) -> dict[str, Any]:
        """The prompt of a case with `text_tokens` behind the video, and its pixels."""
        tiles = case.frames * case.tiles
        tokens = self.tokens(case.ids(self.image_token_id, text_tokens))
        return tokens | {"pixel_values": self.pixels[:, :tiles], "pixel_attention_mask": self.mask[:, :tiles]}

    def tokens(self, ids: list[int]) -> dict[str, Any]:
        """A prompt of these tokens."""
        input_ids = torch.tensor([ids], device=self.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def generate(
        self, clock: Clock, inputs: dict[str, Any], new_tokens: int, adapters: LoraWeights | None = None, **kwargs: Any
    ) -> Any:
        """Greedy tokens by the base's own `generate`, a mark after each; the end of a turn does not stop it."""
        generate: Any = self.vlm.generate if adapters is None else partial(self.model.generate, adapters=adapters)
        return generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([TokenMarks(clock)]),
            **kwargs,
        )

    def answer_times(self, answer: Callable[[Clock, int], Any]) -> Row:
        """Time to the first token, and time per token after it, of `answer(clock, new_tokens)`."""

        def run(clock: Clock) -> None:
            clock.mark()
            answer(clock, 1)

        first = measure(run, self.device, self.repeats).timing()
        # every token makes the cache longer, and cuDNN plans attention anew for a length it has not met: tens of
        # milliseconds that would fall on whichever condition is measured first
        answer(Clock(self.device), 1 + self.new_tokens)
        clock = Clock(self.device)
        answer(clock, 1 + self.new_tokens)
        return {"first_token": first, "per_token": timing(clock.seconds())}


@torch.no_grad()
def measure_case(bench: Bench, case: Case, wanted: tuple[str, ...] = VIDEO_CONDITIONS) -> Iterator[Row]:
    """Measure the conditions of a case; what does not fit into memory says so.

    Yields:
        A row for each condition in `wanted`, with `status`, times in seconds and memory in bytes. Memory is the peak
        above the weights and the pixels; that of `kv_cache` includes the cache.
    """
    counts = {"context_tokens": case.context_tokens, "visual_tokens": case.visual_tokens}
    context: dict[str, Any] = {}
    if set(wanted) - {"internalize"}:
        cold = attempt(lambda: _cold(bench, case, context))
        cached = cold.pop("video_cached", {"status": cold["status"]})
        if "video_cold" in wanted:
            yield {"condition": "video_cold"} | counts | cold
        if "video_cached" in wanted:
            yield {"condition": "video_cached"} | counts | cached
        if "kv_cache" in wanted:
            reused = attempt(lambda: _reused(bench, case, context)) if context else {"status": cold["status"]}
            yield {"condition": "kv_cache"} | counts | reused
        context.clear()
    if "internalize" in wanted:
        tokens = case.prefix_tokens + case.internalization_tokens
        yield (
            {"condition": "internalize"}
            | counts
            | {"context_tokens": tokens}
            | attempt(lambda: _internalize(bench, case))
        )


def attempt(work: Callable[[], Row]) -> Row:
    """What `work` measured, or that there was not enough memory for it."""
    try:
        return {"status": OK} | work()
    except torch.OutOfMemoryError:
        pass
    gc.collect()  # outside the handler, whose traceback keeps the tensors alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"status": OUT_OF_MEMORY}


def _cold(bench: Bench, case: Case, context: dict[str, Any]) -> Row:
    """The video in the context, from pixels; leaves the cache, and the memory held before it, in `context`."""
    inputs = bench.inputs(case, case.question_tokens)
    peaks: list[int | None] = []
    state: dict[str, Any] = {}

    def run(clock: Clock) -> None:
        state.clear()
        bench.peak.start()
        held = bench.peak.held
        clock.mark()
        embedded = embed_frames(bench.vlm, inputs)
        clock.mark()
        encoding = bench.peak.above()
        bench.peak.start()
        output = bench.generate(clock, embedded, 1, return_dict_in_generate=True)
        peaks[:] = [encoding, bench.peak.above(held)]
        state.update(cache=output.past_key_values, held=held)

    runs = measure(run, bench.device, bench.repeats)
    context |= state
    row: Row = {"first_token": runs.timing(), "encode": runs.timing(0, 1), "prefill": runs.timing(1)}
    row["peak_bytes"] = None if None in peaks else max(p for p in peaks if p is not None)
    row["video_cached"] = _cached(bench, inputs, context, row, peaks[1])
    return row


def _cached(bench: Bench, inputs: dict[str, Any], context: dict[str, Any], cold: Row, peak: int | None) -> Row:
    if cold["first_token"]["median"] >= OWN_RUNS_BELOW:
        return {"status": OK, "first_token": cold["prefill"], "peak_bytes": peak, "part_of_cold": True}
    embedded = embed_frames(bench.vlm, inputs)

    def run(clock: Clock) -> None:
        clock.mark()
        bench.generate(clock, embedded, 1)

    own = measure(run, bench.device, bench.repeats).timing()
    return {"status": OK, "first_token": own, "peak_bytes": peak, "part_of_cold": False}


def _reused(bench: Bench, case: Case, context: dict[str, Any]) -> Row:
    """The question alone, behind the keys and values of the video that `_cold` left; and what a token costs there."""
    cache: Cache = context["cache"]
    inputs = bench.tokens(case.ids(bench.image_token_id, case.question_tokens))
    cache.crop(min(case.prefix_tokens - cache.get_seq_length(), 0))
    row: Row = {
        "kv_cache_bytes": cache_bytes(cache),
        "kv_cache_bytes_by_config": kv_bytes(bench.vlm.config, bench.vlm.dtype, case.prefix_tokens),
    }
    bench.peak.start()

    def answer(clock: Clock, new_tokens: int) -> None:
        # negative: so many tokens are taken off; those of the last answer
        cache.crop(min(case.prefix_tokens - cache.get_seq_length(), 0))
        bench.generate(clock, inputs, new_tokens, past_key_values=cache)

    row |= bench.answer_times(answer)
    return row | {"peak_bytes": bench.peak.above(context["held"])}


def _internalize(bench: Bench, case: Case) -> Row:
    inputs = bench.inputs(case, case.internalization_tokens)

    def run(clock: Clock) -> None:
        bench.peak.start()
        clock.mark()
        bench.model.internalize(**inputs)
        clock.mark()

    runs = measure(run, bench.device, bench.repeats)
    return {"seconds": runs.timing(), "peak_bytes": bench.peak.above()}


@torch.no_grad()
def measure_queries(bench: Bench, case: Case, text_tokens: int) -> Iterator[Row]:
    """Measure the conditions without a video in their context, with the adapter of `case`.

    Args:
        bench: the model.
        case: a small one.
        text_tokens: of the question.

    Yields:
        A row for each of `QUERY_CONDITIONS`.
    """
    model = bench.model
    made = attempt(lambda: {"lora": model.internalize(**bench.inputs(case, case.internalization_tokens)).fold()})
    lora: Any = made.get("lora")
    inputs = bench.tokens([1 + n % 97 for n in range(text_tokens)])
    counts = {"context_tokens": text_tokens, "visual_tokens": 0}

    def answers(adapters: LoraWeights | None = None) -> Row:
        bench.peak.start()
        row = bench.answer_times(lambda clock, tokens: bench.generate(clock, inputs, tokens, adapters))
        return row | {"peak_bytes": bench.peak.above()}

    def attached() -> Row:
        return answers(lora) | {"adapter_bytes": adapter_file_bytes(model, lora)}

    def merged() -> Row:
        def merge(clock: Clock) -> None:
            clock.mark()
            with merge_lora(bench.vlm, model.targets, lora):
                clock.mark()

        seconds = measure(merge, bench.device, bench.repeats).timing()
        with merge_lora(bench.vlm, model.targets, lora):
            return answers() | {"merge": seconds}

    for name, work in zip(QUERY_CONDITIONS, (answers, attached, merged), strict=True):
        possible = lora is not None or name == "text_only"
        yield {"condition": name} | counts | (attempt(work) if possible else made)


def kv_bytes(config: PreTrainedConfig, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens in every decoder layer.

    Args:
        config: the base's.
        dtype: of keys and values.
        tokens: their number.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * dtype.itemsize * tokens


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache."""
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def adapter_file_bytes(model: Video2LoraModel, lora: LoraWeights) -> int:
    """Bytes of the adapter's weight file in bfloat16, by writing it."""
    adapter = VideoAdapter.from_weights(lora, vlm=model.vlm, targets=model.targets)
    with tempfile.TemporaryDirectory() as folder:
        directory = adapter.save_pretrained(Path(folder) / "adapter", dtype=torch.bfloat16)
        return (directory / "adapter_model.safetensors").stat().st_size
