"""Checkpoints: what is saved is what is loaded, light and bundled, and a damaged or foreign one is refused by name."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from video2lora.modeling import BaseModelError, CheckpointError, Video2LoraConfig, Video2LoraModel
from video2lora.testing import save_tiny_vlm, tiny_smolvlm

from .helpers import SMALL, assert_same_lora, assert_unchanged, awaken, snapshot, text_batch

FAMILIES = ["smolvlm", "idefics3", "qwen2_5_vl"]
KINDS = pytest.mark.parametrize("bundle", [False, True], ids=["light", "bundled"])


def states() -> torch.Tensor:
    return torch.randn(2, 4, 6, 64, generator=torch.Generator().manual_seed(3))


def assert_same_model(ours: Video2LoraModel, theirs: Video2LoraModel) -> None:
    """Equal parameters and buffers (those that are not saved too), adapters, answers and settings."""
    assert_unchanged(ours, snapshot(theirs))
    with torch.no_grad():
        adapters = ours.hypernetwork(states())
        assert_same_lora(adapters, theirs.hypernetwork(states()))
        ids = text_batch(2)
        assert torch.equal(ours(ids, adapters=adapters).logits, theirs(ids, adapters=adapters).logits)
    assert not ours.training and not any(p.requires_grad for p in ours.vlm.parameters())
    assert all(p.requires_grad for p in ours.hypernetwork.parameters())
    ignored = {"_name_or_path", "dtype", "architectures", "bundle_base", "transformers_version"}
    kept = [{k: v for k, v in m.config.to_dict().items() if k not in {*ignored, "vlm_config"}} for m in (ours, theirs)]
    assert kept[0] == kept[1]


@pytest.fixture(scope="module")
def model(smolvlm) -> Video2LoraModel:
    """A small model on the tiny SmolVLM, loaded by path; never change it."""
    built = Video2LoraModel.from_vlm(smolvlm.path, **SMALL)
    awaken(built.hypernetwork)
    return built


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> dict[bool, Path]:
    """Its light (False) and bundled (True) checkpoint; copy before you change them."""
    folder = tmp_path_factory.mktemp("saved")
    for bundle in (False, True):
        model.save_pretrained(folder / str(bundle), bundle_base=bundle)
    return {bundle: folder / str(bundle) for bundle in (False, True)}


@pytest.fixture
def copied(saved, tmp_path):
    def make(bundle: bool) -> Path:
        return Path(shutil.copytree(saved[bundle], tmp_path / "copy"))

    return make


# What is saved is what is loaded


@KINDS
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(families, name, bundle, tmp_path):
    built = Video2LoraModel.from_vlm(families(name).path, **SMALL, layers_to_transform=[1, 2, 3])
    awaken(built.hypernetwork)
    built.save_pretrained(tmp_path, bundle_base=bundle)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert any(key.startswith("vlm.") for key in keys) == bundle
    assert {key for key in keys if key.startswith("hypernetwork.")} == {
        f"hypernetwork.{key}" for key in built.hypernetwork.state_dict()
    }
    loaded = Video2LoraModel.from_pretrained(tmp_path)
    assert loaded.config.bundle_base == bundle and not built.config.bundle_base
    adapters = [m.hypernetwork(states()[:, 1:]) for m in (loaded, built)]
    assert_same_lora(*adapters)
    assert_unchanged(loaded, snapshot(built))
    with torch.no_grad():
        ids = text_batch(2)
        assert torch.equal(loaded(ids, adapters=adapters[0]).logits, built(ids, adapters=adapters[0]).logits)
    if bundle:
        assert loaded.config.base_model_name_or_path == str(families(name).path), "where it came from is still known"


@KINDS
def test_auto_classes(model, saved, bundle):
    assert_same_model(AutoModel.from_pretrained(saved[bundle]), model)
    config = AutoConfig.from_pretrained(saved[bundle])
    assert type(config) is Video2LoraConfig
    assert_same_model(Video2LoraModel.from_pretrained(saved[bundle], config=config), model)


@KINDS
def test_a_second_generation_is_the_first(model, saved, bundle, tmp_path):
    """Light to bundled and back, and again."""
    loaded = Video2LoraModel.from_pretrained(saved[bundle])
    loaded.save_pretrained(tmp_path / "a", bundle_base=not bundle)
    again = Video2LoraModel.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b", bundle_base=bundle)
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path / "b"), model)
    ours, theirs = load_file(tmp_path / "b" / "model.safetensors"), load_file(saved[bundle] / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@KINDS
def test_sampling_defaults_and_scale_survive(smolvlm, bundle, tmp_path):
    fields = {"num_frames": 7, "longest_edge": None, "internalization_prompt": "Läs.", "prompt_timestamps": "file"}
    fields |= {"lora_scaling": 3.5, "use_static_lora": False}
    Video2LoraModel.from_vlm(smolvlm.path, **SMALL | fields).save_pretrained(tmp_path, bundle_base=bundle)
    loaded = Video2LoraModel.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in fields} == fields
    assert loaded.hypernetwork.scaling == 3.5 and not loaded.hypernetwork.use_static_lora


@KINDS
def test_dtype_is_the_bases(saved, bundle):
    for dtype in (torch.bfloat16, "bfloat16"):
        loaded = Video2LoraModel.from_pretrained(saved[bundle], dtype=dtype)
        assert {p.dtype for p in loaded.hypernetwork.parameters()} == {torch.float32}
        assert {p.dtype for p in loaded.vlm.parameters()} == {torch.bfloat16}
        ours, stored = loaded.hypernetwork.state_dict(), load_file(saved[bundle] / "model.safetensors")
        assert all(torch.equal(ours[name], stored[f"hypernetwork.{name}"]) for name in ours)


@KINDS
def test_a_bfloat16_base_comes_back_as_one(smolvlm, bundle, tmp_path):
    built = Video2LoraModel.from_vlm(smolvlm.path, dtype=torch.bfloat16, **SMALL)
    awaken(built.hypernetwork)
    built.save_pretrained(tmp_path / "model", bundle_base=bundle)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    kinds = {
        key.split(".")[0]: {t.dtype for k, t in stored.items() if k.startswith(key.split(".")[0])} for key in stored
    }
    assert kinds == {"hypernetwork": {torch.float32}} | ({"vlm": {torch.bfloat16}} if bundle else {})
    if bundle:  # a light checkpoint's base has the dtype of its own files
        loaded = Video2LoraModel.from_pretrained(tmp_path / "model")
        assert {p.dtype for p in loaded.vlm.parameters()} == {torch.bfloat16}
        assert_unchanged(loaded, snapshot(built))


@KINDS
def test_shards_and_overwriting_leave_nothing_stale(model, bundle, tmp_path):
    model.save_pretrained(tmp_path, bundle_base=bundle, max_shard_size="40KB")
    files = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files and len(files) > 3
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path), model)
    (tmp_path / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path, bundle_base=bundle)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path, bundle_base=bundle, max_shard_size="40KB")
    assert {path.name for path in tmp_path.iterdir()} == files | {"notes.txt"}
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path), model)
    model.save_pretrained(tmp_path, bundle_base=bundle, max_shard_size="90KB")  # other numbers of shards
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == set(index["weight_map"].values())


def test_a_variant_stands_beside_the_usual_weights(model, tmp_path):
    other = copy.deepcopy(model)
    awaken(other.hypernetwork, seed=5)
    model.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="trained", max_shard_size="40KB")
    other.save_pretrained(tmp_path, variant="trained")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "model.trained.safetensors"}
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path), model)
    assert_same_model(Video2LoraModel.from_pretrained(tmp_path, variant="trained"), other)


@KINDS
@pytest.mark.parametrize("shards", [False, True], ids=["one_file", "shards"])
def test_a_save_that_fails_leaves_the_old_checkpoint(model, saved, copied, bundle, shards, monkeypatch):
    from transformers import modeling_utils

    folder = copied(bundle)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other, calls, real = copy.deepcopy(model), [], modeling_utils.safe_save_file
    awaken(other.hypernetwork, seed=9)

    def fail(*args, **kwargs):
        calls.append(1)
        if not shards or len(calls) == 3:
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(folder, bundle_base=not bundle, **({"max_shard_size": "20KB"} if shards else {}))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not other.config.bundle_base
    assert_same_model(Video2LoraModel.from_pretrained(folder), model)


def test_a_given_state_dict_is_what_is_saved(model, tmp_path):
    """The Trainer and FSDP gather one and pass it."""
    given = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {key for key in given if key.startswith("hypernetwork.")}
    assert all(torch.equal(stored[key], given[key]) for key in stored)
    only = {key: tensor for key, tensor in given.items() if key.startswith("hypernetwork.")}
    model.save_pretrained(tmp_path, state_dict=only)
    assert all(torch.equal(tensor, given[key]) for key, tensor in load_file(tmp_path / "model.safetensors").items())
    assert all(torch.equal(tensor + 1, given[key]) for key, tensor in model.state_dict().items())


def test_only_the_main_process_writes(model, tmp_path):
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_files_have_ordinary_permissions(model, tmp_path):
    (tmp_path / "plain").touch()
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, path.name


def test_a_file_in_the_way(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file; expected a directory"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_light_checkpoint_needs_a_named_base(tmp_path):
    built = Video2LoraModel.from_vlm(tiny_smolvlm()[0], **SMALL)
    with pytest.raises(ValueError, match="bundle_base=True"):
        built.save_pretrained(tmp_path / "light")
    assert not (tmp_path / "light").exists()
    built.save_pretrained(tmp_path / "bundled", bundle_base=True)
    loaded = Video2LoraModel.from_pretrained(tmp_path / "bundled")
    assert_unchanged(loaded, snapshot(built))
    loaded.save_pretrained(tmp_path / "again")  # with its base, which is nowhere else
    assert_unchanged(Video2LoraModel.from_pretrained(tmp_path / "again"), snapshot(built))
    own = {name: tensor for name, tensor in loaded.state_dict().items() if name.startswith("hypernetwork.")}
    loaded.save_pretrained(tmp_path / "sharded", state_dict=own)  # as a trainer has it that shards no base
    assert_unchanged(Video2LoraModel.from_pretrained(tmp_path / "sharded"), snapshot(built))
    with pytest.raises(ValueError, match="bundle_base=True"):
        loaded.save_pretrained(tmp_path / "light", bundle_base=False)


@KINDS
def test_tied_embeddings(tmp_path, bundle):
    path = save_tiny_vlm("smolvlm", tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    head = next(key for key in weights if key.endswith("lm_head.weight"))
    del weights[head]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    base = AutoModelForImageTextToText.from_pretrained(path)
    assert base.lm_head.weight is base.get_input_embeddings().weight

    built = Video2LoraModel.from_vlm(path, **SMALL)
    awaken(built.hypernetwork)
    built.save_pretrained(tmp_path / "a", bundle_base=bundle)
    loaded = Video2LoraModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b", bundle_base=True)  # of a model that was itself loaded
    assert not any(key.endswith("lm_head.weight") for key in load_file(tmp_path / "b" / "model.safetensors"))
    for model in (loaded, Video2LoraModel.from_pretrained(tmp_path / "b")):
        assert model.vlm.lm_head.weight is model.vlm.get_input_embeddings().weight
        assert_unchanged(model.vlm, snapshot(base))
        assert_unchanged(model.hypernetwork, snapshot(built.hypernetwork))


# Loading arguments


@KINDS
def test_output_loading_info(model, saved, bundle):
    loaded, info = Video2LoraModel.from_pretrained(saved[bundle], output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["missing_keys"]
    assert_same_model(loaded, model)


@KINDS
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(model, saved, bundle, device_map):
    loaded = Video2LoraModel.from_pretrained(saved[bundle], device_map=device_map)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert_same_model(loaded, model)
    # a hypernetwork spread over devices would have to move its own activations
    assert "Hypernetwork" in loaded._no_split_modules


@KINDS
def test_attn_implementation_is_the_bases(saved, bundle):
    loaded = Video2LoraModel.from_pretrained(saved[bundle], attn_implementation="eager")
    assert loaded.vlm.config.get_text_config()._attn_implementation == "eager"
    assert loaded.vlm.get_decoder().config._attn_implementation == "eager"


def test_a_base_handed_in_is_shared(model, saved):
    base = AutoModelForImageTextToText.from_pretrained(model.config.base_model_name_or_path)
    before, pointers = snapshot(base), {name: p.data_ptr() for name, p in base.named_parameters()}
    loaded = Video2LoraModel.from_pretrained(saved[False], vlm=base)
    assert loaded.vlm is base
    assert_unchanged(base, before)
    assert {name: p.data_ptr() for name, p in base.named_parameters()} == pointers
    assert_same_model(loaded, model)
    again = Video2LoraModel.from_pretrained(saved[False], vlm=base)  # two hypernetworks on one base
    assert again.vlm is loaded.vlm and again.hypernetwork is not loaded.hypernetwork
    assert_same_model(again, model)


def test_a_base_handed_to_a_bundled_checkpoint_is_refused(smolvlm, saved):
    """It has a base of its own; ignoring the one given in silence would be worse."""
    for arguments in ({"vlm": smolvlm.vlm}, {"base_model_name_or_path": smolvlm.path}):
        with pytest.raises(ValueError, match="holds its base itself"):
            Video2LoraModel.from_pretrained(saved[True], **arguments)


def test_the_base_from_elsewhere(model, saved, tmp_path):
    moved = Path(shutil.copytree(model.config.base_model_name_or_path, tmp_path / "moved"))
    loaded = Video2LoraModel.from_pretrained(saved[False], base_model_name_or_path=moved)
    assert loaded.config.base_model_name_or_path == str(moved) and loaded.config.base_model_revision is None
    assert_unchanged(loaded, snapshot(model))
    loaded.save_pretrained(tmp_path / "again")
    assert Video2LoraConfig.from_pretrained(tmp_path / "again").base_model_name_or_path == str(moved)


# Refused


def damage(folder: Path, how: str) -> str:
    """Damage the hypernetwork in `folder`; returns what the error must name."""
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "hypernetwork.scaler_B.down_proj"
    if how == "deleted":
        del tensors[name]
    elif how == "added":
        name = "hypernetwork.scaler_B.extra_proj"
        tensors[name] = torch.zeros(3)
    elif how == "reshaped":
        tensors[name] = tensors[name].flatten()[:-1].clone()
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "model.safetensors"
    elif how == "not_safetensors":
        file.write_bytes(b"PK\x03\x04 a pickle, say")
        return "model.safetensors"
    elif how == "missing_file":
        file.unlink()
        return "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@KINDS
@pytest.mark.parametrize("how", ["deleted", "added", "reshaped"])
def test_a_damaged_hypernetwork_is_refused(copied, bundle, how):
    folder = copied(bundle)
    name = damage(folder, how)
    for load in (Video2LoraModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=name) as caught:
            load(folder)
        assert str(folder) in str(caught.value)
    with pytest.raises(CheckpointError, match=name):
        Video2LoraModel.from_pretrained(folder, ignore_mismatched_sizes=True)


@KINDS
@pytest.mark.parametrize("how", ["truncated", "not_safetensors"])
def test_a_damaged_file_is_refused(copied, bundle, how):
    folder = copied(bundle)
    damage(folder, how)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        Video2LoraModel.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@KINDS
def test_a_missing_file_is_refused(copied, bundle):
    folder = copied(bundle)
    damage(folder, "missing_file")
    with pytest.raises(OSError, match="model.safetensors"):
        Video2LoraModel.from_pretrained(folder)


def test_a_missing_weight_of_a_bundled_base_is_refused(copied):
    folder = copied(True)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layers.1.mlp.down_proj.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        Video2LoraModel.from_pretrained(folder)


def test_a_light_file_whose_config_says_bundled_is_refused(copied):
    """Its base would be random."""
    folder = copied(False)
    config = json.loads((folder / "config.json").read_text()) | {"bundle_base": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing: vlm."):
        Video2LoraModel.from_pretrained(folder)


@KINDS
def test_newer_formats_and_unknown_fields(copied, model, bundle):
    folder = copied(bundle)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"field_of_tomorrow": [1]}))
    assert_unchanged(Video2LoraModel.from_pretrained(folder), snapshot(model))
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99.*upgrade"):
        Video2LoraModel.from_pretrained(folder)


@pytest.mark.parametrize("how", ["vlm", "base_model_name_or_path", "replaced"])
def test_another_base_is_refused(saved, copied, families, tmp_path, how):
    """Another size or architecture: both named."""
    wider = save_tiny_vlm("smolvlm", tmp_path / "wider", intermediate_size=96)
    for path, words in (
        (wider, r"intermediate_size 128 \(got 96\)"),
        (families("idefics3").path, "model_type smolvlm"),
    ):
        folder = saved[False]
        if how == "vlm":
            arguments = {"vlm": AutoModelForImageTextToText.from_pretrained(path)}
        elif how == "base_model_name_or_path":
            arguments = {"base_model_name_or_path": path}
        else:
            arguments, folder = {}, tmp_path / f"light-{path.name}"
            shutil.copytree(saved[False], folder)
            config = json.loads((folder / "config.json").read_text()) | {"base_model_name_or_path": str(path)}
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(BaseModelError, match=words) as caught:
            Video2LoraModel.from_pretrained(folder, **arguments)
        assert path.name in str(caught.value)


def test_a_base_of_the_same_name_with_fewer_key_value_heads_is_refused(saved, tmp_path):
    """Every shape the hypernetwork sees is the same; it is another model all the same."""
    other = save_tiny_vlm("smolvlm", tmp_path / "other", num_key_value_heads=4)
    with pytest.raises(BaseModelError, match=r"num_key_value_heads 2 \(got 4\)"):
        Video2LoraModel.from_pretrained(saved[False], base_model_name_or_path=other)


def test_a_base_directory_that_is_gone(copied, tmp_path):
    folder = copied(False)
    config = json.loads((folder / "config.json").read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="gone.*could not be loaded"):
        Video2LoraModel.from_pretrained(folder)
    with pytest.raises(BaseModelError, match="could not be loaded"):
        Video2LoraModel.from_vlm(tmp_path / "gone")


def test_a_checkpoint_that_is_no_checkpoint(smolvlm, tmp_path):
    with pytest.raises(ValueError, match="'smolvlm' model, not a 'video2lora' one.*from_vlm"):
        Video2LoraModel.from_pretrained(smolvlm.path)
    with pytest.raises(OSError, match="config.json"):
        Video2LoraModel.from_pretrained(tmp_path)
    with pytest.raises(OSError):
        Video2LoraModel.from_pretrained("owner/not-cached")


def test_no_network_for_a_hub_name():
    with pytest.raises(BaseModelError, match="'owner/base'.*cannot be reached.*local directory") as caught:
        Video2LoraModel.from_vlm("owner/base", **SMALL)
    assert "\n" not in str(caught.value)
