"""An adapter directory means to PEFT and transformers, without video2lora, what the adapter means in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from video2lora.adapters import compose_adapters, extract_text_model

from ..processes import run_code

# job name -> how it is loaded, which base and which adapter
JOBS = {
    "PeftModel": ("PeftModel", "smolvlm", "vlm"),
    "AutoPeftModel": ("AutoPeftModel", "smolvlm", "vlm"),
    "load_adapter": ("load_adapter", "smolvlm", "vlm"),
    "AutoModel": ("AutoModel", "smolvlm", "vlm"),
    "text": ("text", "text", "text"),
    "text, load_adapter": ("text, load_adapter", "text", "text"),
    "text, full paths": ("text", "text", "text_subset"),
    "bfloat16": ("PeftModel", "smolvlm", "bfloat16"),
    "layers subset": ("PeftModel", "smolvlm", "subset"),
    "layers subset, load_adapter": ("load_adapter", "smolvlm", "subset"),
    "several modules": ("PeftModel", "smolvlm", "modules"),
    "composed": ("PeftModel", "smolvlm", "composed"),
    "truncated": ("PeftModel", "smolvlm", "truncated"),
    "Qwen2.5-VL": ("PeftModel", "qwen", "qwen"),
    "Qwen2.5-VL, load_adapter": ("load_adapter", "qwen", "qwen"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory, vlm, qwen, make_adapter, merged, logits):
    """For each job: logits through PEFT, logits in memory, logits of the base, adapted modules."""
    from video2lora.adapters import VideoAdapter

    tmp = tmp_path_factory.mktemp("through-peft")
    subset = make_adapter(1, layers=[1, 3])
    adapters = {
        "vlm": make_adapter(),
        "text": make_adapter(),
        "text_subset": subset,
        "bfloat16": make_adapter(2),
        "subset": subset,
        "modules": make_adapter(3, modules=("q_proj", "down_proj")),
        "composed": compose_adapters([make_adapter(4), make_adapter(5)]),
        "truncated": make_adapter(6).truncate(4)[0],
        "qwen": make_adapter(7, base=qwen),
    }
    for name, adapter in adapters.items():
        layout = "text" if name.startswith("text") else "vlm"
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        adapter.save_pretrained(tmp / name, layout=layout, dtype=dtype)
    adapters["bfloat16"] = VideoAdapter.from_pretrained(tmp / "bfloat16")
    extract_text_model(vlm).save_pretrained(tmp / "text-model")
    bases = {"smolvlm": vlm.name_or_path, "qwen": qwen.name_or_path, "text": str(tmp / "text-model")}
    jobs = {
        name: {"how": how, "base": bases[base], "adapter": str(tmp / adapter)}
        for name, (how, base, adapter) in JOBS.items()
    }
    (tmp / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("peft_only.py")
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = run_code(code, tmp / "jobs.json", tmp / "logits.safetensors")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job"')]
    adapted = {line["job"]: line["adapted"] for line in lines}
    loaded = load_file(tmp / "logits.safetensors")
    results = {}
    for name, (_, base, key) in JOBS.items():
        model = qwen if base == "qwen" else vlm
        results[name] = loaded[name], logits(merged(model, adapters[key])), logits(model), adapted[name]
    return results


@pytest.mark.parametrize("job", JOBS)
def test_logits_are_those_in_memory(results, job):
    found, in_memory, base, _ = results[job]
    torch.testing.assert_close(found, in_memory, rtol=0, atol=1e-5)
    assert (found - base).abs().max() > 0.1


@pytest.mark.parametrize("job", JOBS)
def test_only_the_wanted_modules_are_adapted(results, job):
    adapted = results[job][3]
    layers = 2 if JOBS[job][2].endswith("subset") else 4
    assert len(adapted) == layers * (2 if job == "several modules" else 1)
    assert not any("vision" in path or "visual" in path for path in adapted)
