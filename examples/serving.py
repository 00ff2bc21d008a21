"""Example: answer questions about many videos from their adapters, without a visual token and without a hypernetwork.

    python examples/serving.py HuggingFaceTB/SmolVLM2-500M-Video-Instruct kitchen-lora garden-lora \\
        -q "What happens first?" -q "Who is there?"

Every question is asked of every video, all in one batch in which each row has its own adapter. With `--merged` one
video after the other is asked, its adapter in the base's own weights: the fastest for many questions about one video.
`--static` takes a static cache, whose decoding transformers compiles on a GPU: slow to start, then fast. It prints
JSON lines.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from video2lora import VideoAdapter, inject_lora
from video2lora.modeling import stack_lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="Hub id or directory of the base the adapters were made for")
    parser.add_argument("adapters", nargs="+", help="adapter directories or Hub ids")
    parser.add_argument("-q", "--question", action="append", required=True)
    parser.add_argument("--merged", action="store_true", help="one video after the other, merged")
    parser.add_argument("--static", action="store_true", help="static cache, compiled on a GPU")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    vlm: Any = AutoModelForImageTextToText.from_pretrained(options.base, dtype=dtype).to(device).eval()
    processor: Any = AutoProcessor.from_pretrained(options.base)
    processor.tokenizer.padding_side = "left"  # as for any batch that is to be continued
    adapters = [VideoAdapter.from_pretrained(name) for name in options.adapters]

    def answer(questions: list[str]) -> list[str]:
        turns = [[{"role": "user", "content": [{"type": "text", "text": question}]}] for question in questions]
        prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        inputs = processor(text=prompts, padding=True, return_tensors="pt").to(device)
        kwargs: dict[str, Any] = {"pad_token_id": processor.tokenizer.pad_token_id}
        if options.static:  # one length for all, for another would be compiled anew
            kwargs |= {"cache_implementation": "static", "max_cache_len": 256 + options.max_new_tokens}
        output = vlm.generate(**inputs, max_new_tokens=options.max_new_tokens, **kwargs)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    if options.merged:
        answers = []
        for adapter in adapters:
            with adapter.merged(vlm):
                answers += answer(options.question)
    else:
        # kept where they are needed, in the base's dtype: not moved again for every batch
        weights = stack_lora([adapter.weights for adapter in adapters]).to(device, dtype)
        with inject_lora(vlm, adapters[0].targets, weights, queries_per_adapter=len(options.question)):
            answers = answer(options.question * len(adapters))
    for row, text in enumerate(answers):
        video, question = divmod(row, len(options.question))
        line = {"video": options.adapters[video], "question": options.question[question], "answer": text.strip()}
        print(json.dumps(line, ensure_ascii=False))


if __name__ == "__main__":
    main()
