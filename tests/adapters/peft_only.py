"""Loads adapters with PEFT and transformers alone and writes the logits; run by test_through_peft.py in a process.

Usage: `python peft_only.py jobs.json logits.safetensors`, a job being {"how", "base", "adapter"}.
"""

import json
import sys

import torch
from peft import AutoPeftModel, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


def load(how: str, base: str, adapter: str) -> torch.nn.Module:
    if how == "PeftModel":
        return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    if how == "AutoPeftModel":
        return AutoPeftModel.from_pretrained(adapter)
    if how == "load_adapter":
        model = AutoModelForImageTextToText.from_pretrained(base)
        model.load_adapter(adapter)
        return model
    if how == "AutoModel":
        return AutoModelForImageTextToText.from_pretrained(adapter)
    if how == "text":
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    if how == "text, load_adapter":
        model = AutoModelForCausalLM.from_pretrained(base)
        model.load_adapter(adapter)
        return model
    raise ValueError(how)


def main() -> None:
    jobs = json.load(open(sys.argv[1]))
    torch.set_num_threads(1)
    logits = {}
    for name, job in jobs.items():
        model = load(**job).eval()
        with torch.no_grad():
            logits[name] = model(input_ids=torch.arange(20, 32)[None]).logits[0].clone()
        adapted = sorted({n.partition(".lora_A.")[0] for n, _ in model.named_parameters() if ".lora_A." in n})
        print(json.dumps({"job": name, "adapted": adapted}))
    save_file(logits, sys.argv[2])
    assert "video2lora" not in sys.modules


if __name__ == "__main__":
    main()
