"""Models and processors on a Hub: what is pushed is what comes back, and every way a base can be out of reach."""

from __future__ import annotations

import json
import shutil
from uuid import uuid4

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, BertConfig

from video2lora.modeling import BaseModelError, Video2LoraConfig, Video2LoraModel, Video2LoraProcessor
from video2lora.modeling.base import load_base, resolve_commit

from .helpers import SMALL, assert_same_lora, assert_unchanged, awaken, snapshot, text_batch

BASE, REPO = "owner/base", "owner/video-to-lora"


@pytest.fixture
def base_commit(patched_hub, smolvlm) -> str:
    """The tiny SmolVLM on the Hub; a later commit holds another one."""
    api = HfApi()
    api.create_repo(BASE)
    first = api.upload_folder(repo_id=BASE, folder_path=smolvlm.path).oid
    from video2lora.testing import tiny_smolvlm

    tiny_smolvlm(seed=5)[0].push_to_hub(BASE)
    assert api.model_info(BASE).sha != first
    return first


def build(commit: str | None, seed: int = 0, **fields) -> Video2LoraModel:
    model = Video2LoraModel.from_vlm(BASE, revision=commit, **SMALL | fields)
    awaken(model.hypernetwork, seed)
    return model


def assert_same(ours: Video2LoraModel, theirs: Video2LoraModel) -> None:
    assert_unchanged(ours, snapshot(theirs))
    states = torch.randn(2, 4, 5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapters = ours.hypernetwork(states)
        assert_same_lora(adapters, theirs.hypernetwork(states))
        assert torch.equal(
            ours(text_batch(2), adapters=adapters).logits, theirs(text_batch(2), adapters=adapters).logits
        )


def test_the_base_is_pinned_to_the_commit_that_was_loaded(patched_hub, base_commit, smolvlm):
    newest = HfApi().model_info(BASE).sha
    assert build(None).config.base_model_revision == newest
    assert build("main").config.base_model_revision == newest
    HfApi().create_tag(BASE, tag="v1", revision=base_commit)
    for revision in (base_commit, "v1"):
        model = build(revision)
        assert (model.config.base_model_name_or_path, model.config.base_model_revision) == (BASE, base_commit)
        assert_unchanged(model.vlm, snapshot(smolvlm.vlm))
    loaded = AutoModelForImageTextToText.from_pretrained(BASE, revision="v1")
    assert Video2LoraModel.from_vlm(loaded, **SMALL, revision=base_commit).config.base_model_revision == base_commit
    assert resolve_commit(BASE, "v1") == base_commit and resolve_commit("owner/nothing") is None


def test_a_push_while_loading_does_not_change_what_is_loaded_or_pinned(patched_hub, base_commit, monkeypatch):
    newest = HfApi().model_info(BASE).sha
    build(base_commit).push_to_hub(REPO)
    from_pretrained = AutoModelForImageTextToText.from_pretrained

    def push_first(*args, **kwargs):
        for repo in (BASE, REPO):
            HfApi().upload_file(repo_id=repo, path_or_fileobj=uuid4().bytes, path_in_repo="notes")
        return from_pretrained(*args, **kwargs)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", push_first)
    assert build(None).config.base_model_revision == newest != HfApi().model_info(BASE).sha
    commit = HfApi().model_info(REPO).sha
    assert Video2LoraModel.from_pretrained(REPO).checkpoint_commit == commit != HfApi().model_info(REPO).sha


@pytest.mark.parametrize("bundle", [False, True], ids=["light", "bundled"])
def test_what_is_pushed_comes_back(patched_hub, base_commit, bundle):
    first, second = build(base_commit, seed=1), build(base_commit, seed=2)
    commits = [model.push_to_hub(REPO, bundle_base=bundle).oid for model in (first, second)]
    assert len(set(commits)) == 2 and not first.config.bundle_base
    files = set(HfApi().list_repo_files(REPO)) - {".gitattributes"}
    assert files == {"README.md", "config.json", "model.safetensors"}
    for model, revision in ((first, commits[0]), (second, commits[1]), (second, None)):
        for load in (Video2LoraModel.from_pretrained, AutoModel.from_pretrained):
            loaded = load(REPO, revision=revision)
            assert_same(loaded, model)
            assert loaded.config.base_model_revision == base_commit and loaded.config.bundle_base == bundle
    assert loaded.hypernetwork_identity()["hypernetwork_revision"] == commits[1]
    loaded.train()
    trained = loaded.hypernetwork_identity()
    assert trained["hypernetwork_revision"] is None and len(trained["hypernetwork_sha256"]) == 64
    with patched_hub.patch(offline=True):
        assert_same(Video2LoraModel.from_pretrained(REPO), second)
        assert_same(Video2LoraModel.from_pretrained(REPO, local_files_only=True, revision=commits[0]), first)


def test_a_bundled_push_needs_no_base(patched_hub, base_commit):
    model = build(base_commit)
    model.push_to_hub(REPO, bundle_base=True)
    del patched_hub.server.repos[BASE]
    assert_same(Video2LoraModel.from_pretrained(REPO, cache_dir=patched_hub.home / "empty"), model)


def test_a_push_leaves_no_stale_weights(patched_hub, base_commit):
    """transformers prefers `model.safetensors` to shards: one that stays behind would be loaded."""
    first, second = build(base_commit, seed=1), build(base_commit, seed=2)
    first.push_to_hub(REPO)
    second.push_to_hub(REPO, max_shard_size="40KB")
    files = set(HfApi().list_repo_files(REPO))
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert_same(Video2LoraModel.from_pretrained(REPO), second)
    first.push_to_hub(REPO, bundle_base=True)
    files = {name for name in HfApi().list_repo_files(REPO) if name.startswith("model")}
    assert files == {"model.safetensors"}
    assert_same(Video2LoraModel.from_pretrained(REPO), first)


def test_card_branch_and_privacy(patched_hub, base_commit):
    model = build(base_commit)
    model.push_to_hub(REPO, private=True, revision="next")
    assert HfApi().model_info(REPO).private
    assert_same(Video2LoraModel.from_pretrained(REPO, revision="next"), model)
    with pytest.raises(OSError):
        Video2LoraModel.from_pretrained(REPO)  # the main branch is empty
    model.push_to_hub("owner/other")
    card = ModelCard.load("owner/other")
    assert card.data.library_name == "video2lora" and card.data.base_model == BASE and "owner/other" in card.content
    HfApi().upload_file(path_or_fileobj=b"# mine", path_in_repo="README.md", repo_id="owner/other")
    model.push_to_hub("owner/other")
    assert ModelCard.load("owner/other", ignore_metadata_errors=True).text.strip() == "# mine"


def test_the_card_knows_whether_the_base_is_inside(patched_hub, base_commit):
    model = build(base_commit)
    model.push_to_hub("owner/light")
    model.push_to_hub("owner/bundled", bundle_base=True)
    light, bundled = (ModelCard.load(f"owner/{name}").content.replace(name, "X") for name in ("light", "bundled"))
    assert light != bundled


def test_save_pretrained_pushes_too(patched_hub, base_commit, tmp_path):
    model = build(base_commit)
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id=REPO, bundle_base=True)
    assert_same(Video2LoraModel.from_pretrained(REPO), model)
    assert_same(Video2LoraModel.from_pretrained(tmp_path / "folder"), model)


def test_what_cannot_be_saved_makes_no_repository(patched_hub, base_commit):
    model = build(base_commit)
    model.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="no name or path"):
        model.push_to_hub(REPO)
    assert not HfApi().repo_exists(REPO)


def test_processor_and_model_share_a_repository(patched_hub, base_commit, clips):
    model, base = build(base_commit), AutoProcessor.from_pretrained(BASE, revision=base_commit)
    processor = Video2LoraProcessor(base, num_frames=2, prompt_timestamps="file")
    model.push_to_hub(REPO)
    commit = processor.push_to_hub(REPO).oid
    names = set(HfApi().list_repo_files(REPO))
    assert {"config.json", "model.safetensors", "processor_config.json"} <= names
    assert any(name.startswith("vlm_processor/") for name in names)
    for load in (Video2LoraProcessor.from_pretrained, AutoProcessor.from_pretrained):
        for arguments in ({}, {"revision": commit}):
            loaded = load(REPO, **arguments)
            assert type(loaded) is Video2LoraProcessor
            assert (loaded.num_frames, loaded.prompt_timestamps) == (2, "file")
            ours, theirs = loaded(videos=clips), processor(videos=clips)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_same(AutoModel.from_pretrained(REPO), model)
    with patched_hub.patch(offline=True):
        assert AutoProcessor.from_pretrained(REPO).num_frames == 2


def test_the_processor_of_a_model_alone_is_that_of_its_pinned_base(patched_hub, base_commit, clips):
    """The newest commit of the base has no processor at all."""
    build(base_commit, num_frames=2).push_to_hub(REPO)
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        if HfApi().file_exists(BASE, name):
            HfApi().delete_file(name, BASE)
    for load in (Video2LoraProcessor.from_pretrained, AutoProcessor.from_pretrained):
        loaded = load(REPO)
        assert type(loaded) is Video2LoraProcessor and loaded.num_frames == 2
        assert loaded(videos=clips[0])["input_ids"].shape[0] == 1


# A base that cannot be had


@pytest.fixture
def light(patched_hub, base_commit, tmp_path):
    """A light checkpoint in a directory, whose config can be changed, and a client with an empty cache."""
    build(base_commit).save_pretrained(tmp_path / "light")
    shutil.rmtree(patched_hub.cache)

    def make(**changes):
        file = tmp_path / "light" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return tmp_path / "light"

    return make


def refused(folder, words: str, **arguments) -> None:
    with pytest.raises(BaseModelError, match=words) as caught:
        Video2LoraModel.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value) and "'owner/" in str(caught.value)


def test_it_loads_where_the_base_can_be_had(light, base_commit):
    assert Video2LoraModel.from_pretrained(light()).config.base_model_revision == base_commit


def test_missing(light):
    refused(light(base_model_name_or_path="owner/nothing"), "'owner/nothing'.*no such repository")


def test_wrong_revision(light):
    refused(light(base_model_revision="ab" * 20), f"'{BASE}' at revision '{'ab' * 20}'.*no such revision")


def test_private(light, patched_hub):
    folder = light()
    patched_hub.server.repos[BASE].private = True
    with patched_hub.patch(token="hf_stranger"):
        refused(folder, "private.*hf auth login")
    assert Video2LoraModel.from_pretrained(folder) is not None


def test_gated(light, patched_hub):
    folder = light()
    patched_hub.server.repos[BASE].gated = True
    with patched_hub.patch(token="hf_stranger"):
        refused(folder, "gated: accept its terms")
    with patched_hub.patch(token=None):
        refused(folder, "gated: accept its terms")


def test_offline(light, patched_hub, smolvlm):
    folder = light()
    with patched_hub.patch(offline=True):
        refused(folder, "not in the local cache.*local directory")
        loaded = Video2LoraModel.from_pretrained(folder, base_model_name_or_path=smolvlm.path)
        assert_unchanged(loaded.vlm, snapshot(smolvlm.vlm))
        assert Video2LoraModel.from_pretrained(folder, vlm=smolvlm.vlm).vlm is smolvlm.vlm
    refused(folder, "not in the local cache", local_files_only=True)


def test_no_server(light, patched_hub, monkeypatch):
    """The network is there, the Hub is not (the client waits between its attempts: not here)."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    folder = light()
    patched_hub.server.__exit__()
    refused(folder, "cannot be reached")


def test_another_base_under_the_same_name(light, patched_hub):
    from video2lora.testing import tiny_smolvlm

    tiny_smolvlm(intermediate_size=96)[0].push_to_hub(BASE)
    refused(light(base_model_revision="main"), r"intermediate_size 128 \(got 96\)")


def test_a_model_of_another_kind_is_no_base(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="no vision-language model.*BertConfig") as caught:
        load_base(str(tmp_path))
    assert len(str(caught.value)) < 300  # transformers names every class it knows


def test_load_base_passes_what_it_is_given(patched_hub, base_commit):
    loaded = load_base(BASE, base_commit, dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16 and loaded.config.get_text_config()._attn_implementation == "eager"
    assert Video2LoraConfig(vlm_config=loaded.config).get_text_config().hidden_size == 64


def test_a_light_push_of_a_local_base_warns(smolvlm, make_model, patched_hub, tmp_path):
    model = make_model(smolvlm.vlm)
    model.config.base_model_name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match="nobody else can load"):
        model.push_to_hub("owner/light")
