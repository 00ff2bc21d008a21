"""Adapter directories: what is written is what comes back, and anything else is refused by name."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video2lora.adapters import (
    AdapterError,
    AdapterFormatError,
    AdapterKeyError,
    AdapterNotFoundError,
    ForeignAdapterError,
    NonFiniteAdapterError,
    OutputExistsError,
    VideoAdapter,
    compose_adapters,
    directories,
    storage,
)

FIRST_KEY = "base_model.model.model.text_model.layers.0.mlp.down_proj.lora_A.weight"


def read(directory: Path, file: str) -> dict:
    return json.loads((directory / file).read_text())


@pytest.mark.parametrize("layout", ["vlm", "text"])
def test_what_is_saved_comes_back(tmp_path, adapter, layout):
    assert adapter.save_pretrained(tmp_path / "out", layout=layout) == tmp_path / "out"
    loaded = VideoAdapter.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.weights.lora_A["down_proj"], adapter.weights.lora_A["down_proj"])
    assert torch.equal(loaded.weights.lora_B["down_proj"], adapter.weights.lora_B["down_proj"])
    assert loaded.weights.ranks == adapter.weights.ranks and loaded.static_rank == adapter.static_rank
    assert loaded.targets == adapter.targets and loaded.base == adapter.base
    assert loaded.provenance == adapter.provenance
    assert loaded.content_hash == adapter.content_hash == read(tmp_path / "out", "video2lora.json")["content_hash"]


def test_layouts_hold_the_same_tensors(tmp_path, adapter):
    adapter.save_pretrained(tmp_path / "vlm")
    VideoAdapter.from_pretrained(tmp_path / "vlm").save_pretrained(tmp_path / "text", layout="text")
    VideoAdapter.from_pretrained(tmp_path / "text").save_pretrained(tmp_path / "again")
    vlm, text, again = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("vlm", "text", "again"))
    renamed = {key.replace("model.text_model.layers", "model.layers"): tensor for key, tensor in vlm.items()}
    assert renamed.keys() == text.keys() and all(torch.equal(renamed[key], text[key]) for key in text)
    assert "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight" in text
    for file in storage.FILES:
        if file != "README.md":  # it names its directory
            assert (tmp_path / "vlm" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert vlm.keys() == again.keys()


def test_loaded_adapters_compose_and_truncate(tmp_path, make_adapter):
    first, second = make_adapter(1), make_adapter(2)
    for name, adapter in {"first": first, "second": second}.items():
        adapter.save_pretrained(tmp_path / name, layout="text")
    loaded = [VideoAdapter.from_pretrained(tmp_path / name) for name in ("first", "second")]
    composed = compose_adapters(loaded)
    assert composed.content_hash == compose_adapters([first, second]).content_hash
    truncated, _ = composed.truncate(4)
    truncated.save_pretrained(tmp_path / "truncated")
    again = VideoAdapter.from_pretrained(tmp_path / "truncated")
    assert again.provenance == truncated.provenance and again.provenance.static_part_folded


def test_the_peft_config_is_plain(tmp_path, vlm, qwen, make_adapter):
    from peft import LoraConfig

    cases = {
        "vlm": (make_adapter(modules=("up_proj", "down_proj")), "vlm", ["down_proj", "up_proj"]),
        "text": (make_adapter(), "text", ["down_proj"]),
        "vision too": (make_adapter(modules=("q_proj",)), "vlm", None),
        "vision not": (make_adapter(modules=("q_proj",)), "text", ["q_proj"]),
        "subset": (make_adapter(layers=[2]), "vlm", ["model.text_model.layers.2.mlp.down_proj"]),
        "text subset": (make_adapter(layers=[2]), "text", ["model.layers.2.mlp.down_proj"]),
        "qwen": (make_adapter(base=qwen), "vlm", None),
    }
    for name, (adapter, layout, target_modules) in cases.items():
        config = read(adapter.save_pretrained(tmp_path / name, layout=layout), "adapter_config.json")
        assert config["target_modules"] == (target_modules or sorted(adapter.targets.all_paths()))
        assert config.keys() == LoraConfig().to_dict().keys()
        assert config["r"] == config["lora_alpha"] == 6 and isinstance(config["lora_alpha"], int)
        assert config["use_rslora"] is False and config["inference_mode"] is True
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        if layout == "text":
            assert config["task_type"] == "CAUSAL_LM" and config["auto_mapping"] is None
        else:
            base = qwen if name == "qwen" else vlm
            expected = {"base_model_class": type(base).__name__, "parent_library": "transformers"}
            assert config["task_type"] is None and config["auto_mapping"] == expected
            assert config["base_model_name_or_path"] == base.name_or_path


def test_the_revision_of_the_base_is_pinned(tmp_path, vlm, random_weights, adapter):
    from dataclasses import replace

    pinned = replace(adapter, provenance=replace(adapter.provenance, base_model="u/base", base_revision="c" * 40))
    directory = pinned.save_pretrained(tmp_path / "out")
    config = read(directory, "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("u/base", "c" * 40)
    card = ModelCard.load(directory / "README.md")
    assert card.data.base_model == "u/base" and card.data.base_model_relation == "adapter"
    assert f'revision="{"c" * 40}"' in card.content
    assert VideoAdapter.from_pretrained(directory).provenance.base_revision == "c" * 40


@pytest.mark.parametrize("layout", ["vlm", "text"])
def test_the_card_is_valid_and_tells_no_paths(tmp_path, make_adapter, layout):
    adapter = compose_adapters([make_adapter(1), make_adapter(2)], weights=[1.0, 0.5]).truncate(5)[0]
    directory = adapter.save_pretrained(tmp_path / "my-clip", layout=layout)
    card = ModelCard.load(directory / "README.md")
    assert card.data.library_name == "peft" and {"video2lora", "lora"} <= set(card.data.tags)
    assert card.data.pipeline_tag and card.data.base_model is None  # a directory is no Hub id
    for fact in ("clip-1.mp4", "20.00 s to 30.00 s", "rank 9 to 5", "0.5", adapter.content_hash, "user/hypernetwork"):
        assert fact in card.content
    assert f"{adapter.num_parameters:,}" in card.content
    for file in ("README.md", "video2lora.json"):
        text = (directory / file).read_text()
        assert str(tmp_path) not in text and "/home/" not in text and adapter.provenance.base_model not in text
    code = [block.partition("```")[0] for block in card.content.split("```python\n")[1:]]
    for block in code:
        compile(block, "README.md", "exec")
    assert f'"{directory.name}"' in code[-1]


def test_a_name_cannot_break_the_card(tmp_path, make_adapter):
    from dataclasses import replace

    adapter = make_adapter(1)
    segment = replace(adapter.segments[0], source='x`|"\n---\n# y', prompt="{{ 1 + 1 }} | a")
    adapter = replace(adapter, provenance=replace(adapter.provenance, segments=(segment,)))
    directory = adapter.save_pretrained(tmp_path / "out")
    content = ModelCard.load(directory / "README.md").content
    assert "\n# y" not in content and "{{ 1 + 1 }} / a" in content
    assert VideoAdapter.from_pretrained(directory).segments == (segment,)


# --- dtypes and values


def test_bfloat16_halves_the_file_and_round_trips(tmp_path, adapter):
    adapter.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    loaded = VideoAdapter.from_pretrained(tmp_path / "half")
    assert loaded.weights.lora_A["down_proj"].dtype == torch.float32
    assert torch.equal(loaded.weights.lora_A["down_proj"], adapter.weights.lora_A["down_proj"].bfloat16().float())
    loaded.save_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    weights = [(tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("half", "again")]
    assert weights[0] == weights[1]
    with safe_open(tmp_path / "half" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and file.get_tensor(FIRST_KEY).dtype == torch.bfloat16


def test_float16_only_without_overflow(tmp_path, adapter):
    adapter.save_pretrained(tmp_path / "fine", dtype=torch.float16)
    adapter.weights.lora_B["down_proj"][0, 1, 0, 0] = 1e5
    with pytest.raises(NonFiniteAdapterError, match=r"layers\.1\.mlp\.down_proj\.lora_B.*too large for float16"):
        adapter.save_pretrained(tmp_path / "out", dtype=torch.float16)
    with pytest.raises(AdapterError, match="dtype"):
        adapter.save_pretrained(tmp_path / "out", dtype=torch.float64)
    with pytest.raises(AdapterError, match="layout"):
        adapter.save_pretrained(tmp_path / "out", layout="gguf")
    assert os.listdir(tmp_path) == ["fine"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_on_save_and_load(tmp_path, adapter, value):
    directory = adapter.save_pretrained(tmp_path / "out")
    change_tensors(directory, lambda tensors: tensors[FIRST_KEY][0].__setitem__(0, value))
    with pytest.raises(NonFiniteAdapterError, match=FIRST_KEY):
        VideoAdapter.from_pretrained(directory)
    adapter.weights.lora_A["down_proj"][0, 0, 0, 0] = value
    with pytest.raises(NonFiniteAdapterError, match=FIRST_KEY):
        adapter.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# --- files that are not what they should be


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def change_json(directory: Path, file: str, **values) -> None:
    (directory / file).write_text(json.dumps(read(directory, file) | values))


TENSOR_CHANGES = {
    "renamed": (lambda t: t.__setitem__("renamed", t.pop(FIRST_KEY)), f"missing {FIRST_KEY}.*unexpected renamed"),
    "missing": (lambda t: t.pop(FIRST_KEY), f"missing {FIRST_KEY}"),
    "extra": (lambda t: t.__setitem__("extra", torch.zeros(1)), "unexpected extra"),
    "mis-shaped": (
        lambda t: t.__setitem__(FIRST_KEY, t[FIRST_KEY][:2].clone()),
        r"shape \[2, 128\], expected \[6, 128\]",
    ),
}


@pytest.mark.parametrize("change", TENSOR_CHANGES)
def test_a_key_that_does_not_fit_is_named(tmp_path, adapter, change):
    edit, reason = TENSOR_CHANGES[change]
    directory = adapter.save_pretrained(tmp_path / "out")
    change_tensors(directory, edit)
    with pytest.raises(AdapterKeyError, match=reason):
        VideoAdapter.from_pretrained(directory)


def test_files_that_do_not_fit_each_other_are_refused(tmp_path, adapter):
    def edited(name: str, edit) -> Path:
        directory = adapter.save_pretrained(tmp_path / name)
        edit(directory)
        return directory

    config, provenance, weights = "adapter_config.json", "video2lora.json", "adapter_model.safetensors"
    cases = {
        "alpha": (lambda d: change_json(d, config, lora_alpha=12), "lora_alpha = 12.*says 6"),
        "rslora": (lambda d: change_json(d, config, use_rslora=True), "use_rslora = True"),
        "targets": (lambda d: change_json(d, config, target_modules=["up_proj"]), "target_modules"),
        "pattern": (lambda d: change_json(d, config, rank_pattern={"down_proj": 2}), "rank_pattern"),
        "newer": (lambda d: change_json(d, provenance, format_version=2), "upgrade"),
        "static part first": (lambda d: change_json(d, provenance, static_ranks=[0, 3]), "static_ranks .*last of 6"),
        "static part too large": (lambda d: change_json(d, provenance, static_ranks=[-2, 6]), "static_ranks"),
        "no targets": (lambda d: change_json(d, provenance, targets={}), "damaged"),
        "other values": (lambda d: change_tensors(d, lambda t: t[FIRST_KEY].mul_(2)), "hashes differ"),
        "not JSON": (lambda d: (d / config).write_text("{"), "not valid JSON"),
        "a list": (lambda d: (d / provenance).write_text("[]"), "JSON object"),
        "cut short": (lambda d: os.truncate(d / weights, 100), "is damaged"),
        "no weights": (lambda d: (d / weights).unlink(), "incomplete"),
    }
    for name, (edit, reason) in cases.items():
        with pytest.raises(AdapterFormatError, match=reason):
            VideoAdapter.from_pretrained(edited(name, edit))


def test_what_is_no_adapter_of_ours_is_said_so(tmp_path, vlm, adapter, clip):
    import copy

    adapter.attach(copy.deepcopy(vlm)).save_pretrained(tmp_path / "foreign")
    with pytest.raises(ForeignAdapterError, match="PeftModel.from_pretrained"):
        VideoAdapter.from_pretrained(tmp_path / "foreign")
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "empty": "no adapter_config.json",
        tmp_path / "nowhere": "neither a directory nor a Hub id",
        clip: "is a file",
        "somebody/adapter": "neither in the Hub cache nor",
    }
    for name, reason in cases.items():
        with pytest.raises(AdapterNotFoundError, match=reason):
            VideoAdapter.from_pretrained(name)


# --- writing


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_existing_directory_is_only_replaced_when_told(tmp_path, make_adapter):
    first, second = make_adapter(1), make_adapter(2)
    directory = first.save_pretrained(tmp_path / "out")
    before = snapshot(directory)
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        second.save_pretrained(directory)
    assert snapshot(directory) == before
    second.save_pretrained(directory, overwrite=True)
    assert VideoAdapter.from_pretrained(directory).content_hash == second.content_hash
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_no_adapter_is_never_deleted(tmp_path, adapter):
    directory = adapter.save_pretrained(tmp_path / "out")
    (directory / "notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "other", "file"):
        with pytest.raises(OutputExistsError, match="Choose another"):
            adapter.save_pretrained(tmp_path / name, overwrite=True)
    assert (directory / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    adapter.save_pretrained(tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_while_writing_leaves_the_old_or_nothing(tmp_path, make_adapter, monkeypatch, existing, exchange):
    directory = tmp_path / "out"
    if existing:
        make_adapter(1).save_pretrained(directory)
    before = snapshot(directory) if existing else None
    if not exchange:  # as on a system without it
        monkeypatch.setattr(directories, "_exchange", lambda first, second: False)

    def fail(path: Path, values, sort_keys: bool) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write_json", fail)
        with pytest.raises(OSError, match="disk full"):
            make_adapter(2).save_pretrained(directory, overwrite=True)
    assert os.listdir(tmp_path) == (["out"] if existing else [])
    assert not existing or snapshot(directory) == before
    make_adapter(2).save_pretrained(directory, overwrite=True)
    assert VideoAdapter.from_pretrained(directory).content_hash == make_adapter(2).content_hash
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_directory_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, make_adapter, monkeypatch):
    directory = make_adapter(1).save_pretrained(tmp_path / "out")
    before = snapshot(directory)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(directories, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        make_adapter(2).save_pretrained(directory, overwrite=True)
    assert snapshot(directory) == before and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("existing", [True, False])
def test_a_killed_process_leaves_the_old_or_nothing(tmp_path, make_adapter, existing):
    directory = tmp_path / "out"
    if existing:
        make_adapter(1).save_pretrained(directory)
    before = snapshot(directory) if existing else None
    child = os.fork()
    if child == 0:
        with directories.new_directory(directory, overwrite=True, replaceable=storage.is_replaceable) as temporary:
            (temporary / "adapter_config.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert directory.exists() == existing
    assert not existing or snapshot(directory) == before
    make_adapter(2).save_pretrained(directory, overwrite=True)
    assert VideoAdapter.from_pretrained(directory).content_hash == make_adapter(2).content_hash


def test_directories_and_files_have_ordinary_permissions(tmp_path, adapter):
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").touch()
    directory = adapter.save_pretrained(tmp_path / "new" / "out")
    assert directory.stat().st_mode == (tmp_path / "plain").stat().st_mode
    for path in directory.iterdir():  # a server that runs as somebody else must be able to read them all
        assert path.stat().st_mode == (tmp_path / "file").stat().st_mode, path.name
