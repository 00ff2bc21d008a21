"""The package itself: what importing it does, and what it promises."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import video2lora


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", [name for name in video2lora.__all__ if name != "__version__"])
def test_every_export_exists(name):
    assert getattr(video2lora, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = video2lora.no_such_thing


def test_import_registers_and_leaves_datasets_and_evaluate_alone():
    code = (
        "import sys, json, video2lora\n"
        "from transformers import AutoConfig\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "print(json.dumps(['video-to-lora' in PIPELINE_REGISTRY.supported_tasks,"
        " AutoConfig.for_model('video2lora').rank, 'datasets' in sys.modules, 'evaluate' in sys.modules]))"
    )
    assert json.loads(run(code)) == [True, 16, False, False]


def test_the_command_line_does_not_import_torch():
    assert run("import sys, _video2lora_cli; print('torch' in sys.modules, 'transformers' in sys.modules)") == (
        "False False\n"
    )
