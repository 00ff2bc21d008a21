"""The room's front door: every name it promises, and nothing heavy before one is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from video2lora import evaluation

LIGHT = """
import sys, _video2lora_cli
import video2lora.evaluation
heavy = {"torch", "transformers", "datasets", "evaluate", "scipy", "numpy", "pyarrow", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_export_exists(name: str) -> None:
    assert getattr(evaluation, name) is not None
    assert name in dir(evaluation)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = evaluation.no_such_thing


def test_importing_it_is_cheap() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
