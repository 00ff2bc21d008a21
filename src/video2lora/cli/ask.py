"""Command line: `video2lora ask`, questions to an adapter, with no visual token in the context."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._errors import CommandError, check_is_there
from ._options import Device, Json
from ._output import print_json
from ._terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..modeling import Video2LoraProcessor


def ask(
    adapter: Annotated[str, typer.Argument(help="Adapter: directory or Hub id.", show_default=False)],
    questions: Annotated[
        list[str] | None, typer.Argument(help="Questions; `-` reads one a line from stdin.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, or a checkpoint that holds it: Hub id or directory; by default its own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    device: Device = None,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Ask question after question.")] = False,
    json: Json = False,
) -> None:
    """Ask the base model questions about a video that is in an adapter.

    The adapter is attached with PEFT and merged; the context holds the question alone.
    """
    if interactive and json:
        raise CommandError("--interactive and --json do not go together: give the questions as arguments, or `-`.")
    if not questions and not interactive:
        raise CommandError("there is no question: give one or more, `-` to read them from stdin, or --interactive.")
    if max_new_tokens < 1:
        raise CommandError(f"--max-new-tokens must be at least 1, got {max_new_tokens}.")
    check_is_there(adapter, "the adapter ")  # before the seconds that importing torch takes
    if base is not None:
        check_is_there(base, "the base model ")
    from ..adapters import VideoAdapter
    from ._models import load_base_of

    loaded = VideoAdapter.from_pretrained(adapter)
    found = load_base_of(loaded, base, device)
    model: Any = loaded.attach(found.vlm).merge_and_unload()
    several = len(questions or []) > 1 or "-" in (questions or [])
    answers = []
    for question in _all_questions(questions or [], interactive):
        answer = generate_answer(model, found.processor, question, max_new_tokens)
        answers.append(answer)
        if json:
            continue
        if several:
            typer.echo(printable(f"> {question}"))
        typer.echo(printable(answer["answer"]))
        if not answer["ended"]:
            typer.echo(f"(cut after {max_new_tokens} tokens: --max-new-tokens takes more)", err=True)
    if json:
        print_json({"adapter": adapter, "base": found.name, "visual_tokens_in_context": 0, "answers": answers})


def generate_answer(
    model: PreTrainedModel, processor: Video2LoraProcessor, question: str, max_new_tokens: int
) -> dict[str, Any]:
    """Answer one question greedily; the answer with its tokens and seconds."""
    import torch

    started = time.perf_counter()
    inputs = processor(text=[question]).to(model.device)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        generate: Any = model.generate
        tokens = generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.pad_token_id
        )[0, length:]
    answer = processor.decode(tokens, skip_special_tokens=True).strip()
    ended = len(tokens) < max_new_tokens or int(tokens[-1]) in processor.end_token_ids
    seconds = round(time.perf_counter() - started, 3)
    return {
        "question": question,
        "answer": answer,
        "ended": ended,
        "context_tokens": length,
        "new_tokens": len(tokens),
        "seconds": seconds,
    }


def _all_questions(questions: list[str], interactive: bool) -> Iterator[str]:
    """The questions given, those of stdin where `-` stands, then those typed in."""
    for question in questions:
        if question == "-":
            yield from filter(None, map(str.strip, sys.stdin))
        else:
            yield question
    if not interactive:
        return
    if sys.stdin.isatty():
        typer.echo("Ask about the video; an empty line ends.", err=True)
    while True:
        typer.echo("? ", nl=False, err=True)
        question = sys.stdin.readline().strip()
        if not question:
            typer.echo(err=True)
            return
        yield question
