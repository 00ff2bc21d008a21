"""The local Hub under the real clients: what transformers, PEFT and huggingface_hub push is what they get back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .fixtures import Hub
from .server import OWNER, STRANGER, STRANGER_TOKEN


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2
    )
    return LlamaForCausalLM(config).eval()


def push(model: Any, repo: str, **kwargs: Any) -> str:
    """`push_to_hub`; returns the new commit's hash."""
    return model.push_to_hub(repo, **kwargs).oid


def same_weights(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Bit-identical, tensor by tensor, under the same names."""
    left, right = model.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def commit_file(api: HfApi, repo: str, name: str, content: bytes, **kwargs: Any) -> str:
    commit = api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo, **kwargs)
    assert commit.oid is not None
    return commit.oid


@pytest.fixture
def repo(patched_hub: Hub) -> str:
    """A repository with a regular file, a nested one and an LFS file."""
    api, repo_id = HfApi(), f"{OWNER}/files"
    api.create_repo(repo_id)
    for name in ("config.json", "nested/deep/notes.txt", "weights.safetensors"):
        commit_file(api, repo_id, name, f"content of {name}".encode())
    return repo_id


# What was pushed is what comes back


def test_model_round_trip_at_every_revision(patched_hub: Hub) -> None:
    first, second = tiny_llama(1), tiny_llama(2)
    old = push(first, f"{OWNER}/llama")
    new = push(second, f"{OWNER}/llama")
    assert len({old, new}) == 2 and len(old) == len(new) == 40

    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama", revision=old), first)
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama"), second)
    assert same_weights(LlamaForCausalLM.from_pretrained(f"{OWNER}/llama", revision=new), second)
    assert not same_weights(first, second)
    assert HfApi().model_info(f"{OWNER}/llama").sha == new  # what a pinned reference to a base is made of


def test_push_to_a_branch_leaves_main_alone(patched_hub: Hub) -> None:
    push(tiny_llama(1), f"{OWNER}/llama")
    push(tiny_llama(2), f"{OWNER}/llama", revision="next")
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama", revision="next"), tiny_llama(2))
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama", revision="main"), tiny_llama(1))


def test_sharded_model_round_trip(patched_hub: Hub) -> None:
    push(tiny_llama(1), f"{OWNER}/llama", max_shard_size="8KB")
    files = HfApi().list_repo_files(f"{OWNER}/llama")
    assert "model.safetensors.index.json" in files and "model.safetensors" not in files
    assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama"), tiny_llama(1))


def test_tokenizer_round_trip(patched_hub: Hub) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "a", "video", "becomes", "an", "adapter"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    push(tokenizer, f"{OWNER}/words")

    loaded = AutoTokenizer.from_pretrained(f"{OWNER}/words")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("a video becomes an unheard adapter").input_ids == [1, 2, 3, 4, 0, 5]
    assert loaded.chat_template == tokenizer.chat_template


def test_adapter_round_trip_on_a_pushed_base(patched_hub: Hub) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    push(tiny_llama(1), f"{OWNER}/base")
    base = AutoModelForCausalLM.from_pretrained(f"{OWNER}/base")
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config).eval()
    commit = push(tuned, f"{OWNER}/adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, plain = tuned(ids).logits, tiny_llama(1)(ids).logits

    for revision in (None, commit):
        loaded = PeftModel.from_pretrained(tiny_llama(1), f"{OWNER}/adapter", revision=revision).eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, expected)
    assert not torch.allclose(expected, plain)
    assert loaded.peft_config["default"].base_model_name_or_path == f"{OWNER}/base"


def test_folder_round_trip(patched_hub: Hub, tmp_path: Path) -> None:
    contents = {"README.md": b"---\ntags: [x]\n---\n# Card\n", "a/b/c d.txt": b"\xc3\xa4", "empty.txt": b"",
                "w.safetensors": bytes(range(256)) * 40, "same.bin": b"same", "a/same.bin": b"same"}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    api = HfApi()
    api.create_repo(f"{OWNER}/folder")
    sha = api.upload_folder(repo_id=f"{OWNER}/folder", folder_path=tmp_path / "in").oid

    for destination in (Path(snapshot_download(f"{OWNER}/folder", revision=sha)),
                        Path(snapshot_download(f"{OWNER}/folder", local_dir=tmp_path / "out"))):  # fmt: skip
        for name, content in contents.items():
            assert (destination / name).read_bytes() == content
    again = api.upload_folder(repo_id=f"{OWNER}/folder", folder_path=tmp_path / "in")
    assert again.oid == sha  # unchanged files make no commit


def test_delete_and_listings(repo: str) -> None:
    api = HfApi()
    api.delete_file("config.json", repo)
    api.delete_folder("nested", repo)
    assert set(api.list_repo_files(repo)) == {".gitattributes", "weights.safetensors"}
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("config.json", repo)


def test_tree_and_paths_info_tell_regular_from_lfs_files(repo: str) -> None:
    api = HfApi()
    top = {entry.path for entry in api.list_repo_tree(repo)}
    assert top == {".gitattributes", "config.json", "nested", "weights.safetensors"}
    assert [entry.path for entry in api.list_repo_tree(repo, "nested/deep")] == ["nested/deep/notes.txt"]
    regular, folder, lfs = sorted(
        api.get_paths_info(repo, ["config.json", "nested", "weights.safetensors", "absent"]), key=lambda e: e.path
    )
    assert isinstance(folder, huggingface_hub.hf_api.RepoFolder)
    assert isinstance(regular, huggingface_hub.hf_api.RepoFile) and isinstance(lfs, huggingface_hub.hf_api.RepoFile)
    content = b"content of config.json"
    assert regular.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() and regular.lfs is None
    assert lfs.lfs is not None and lfs.lfs.sha256 == hashlib.sha256(b"content of weights.safetensors").hexdigest()
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "absent"))


def test_tag_and_branch_names_are_revisions(repo: str, patched_hub: Hub) -> None:
    api = HfApi()
    api.create_tag(repo, tag="v1/final")
    before = api.model_info(repo).sha
    commit_file(api, repo, "config.json", b"new")
    api.create_branch(repo, branch="old", revision=before)
    for revision in ("v1/final", "old", before):
        info = api.model_info(repo, revision=revision)
        assert info.sha == before
        assert Path(hf_hub_download(repo, "config.json", revision=revision)).read_bytes() == b"content of config.json"
    assert Path(hf_hub_download(repo, "config.json")).read_bytes() == b"new"
    api.create_tag(repo, tag="v1/final", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(repo, branch="old")


def test_a_commit_on_an_outdated_parent_is_refused(repo: str) -> None:
    api = HfApi()
    before = api.model_info(repo).sha
    commit_file(api, repo, "config.json", b"mine", parent_commit=before)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        commit_file(api, repo, "config.json", b"theirs", parent_commit=before)


def test_ranges(repo: str, patched_hub: Hub) -> None:
    from huggingface_hub.utils import get_session

    content = b"content of weights.safetensors"
    url = huggingface_hub.hf_hub_url(repo, "weights.safetensors")
    for asked, expected in {"bytes=3-7": content[3:8], "bytes=20-": content[20:], "bytes=-5": content[-5:]}.items():
        response = get_session().get(url, headers={"Range": asked})
        assert (response.status_code, response.content) == (206, expected)
        assert response.headers["Content-Range"].endswith(f"/{len(content)}")
    assert get_session().get(url, headers={"Range": "bytes=1000-"}).status_code == 416


# The cache


def test_the_second_download_comes_from_the_cache(patched_hub: Hub) -> None:
    sha = push(tiny_llama(), f"{OWNER}/llama")
    server = patched_hub.server
    AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama")
    downloads = server.count("GET", "/resolve/")
    assert server.count("GET", "/model.safetensors") == 1
    assert (patched_hub.cache / f"models--{OWNER}--llama" / "snapshots" / sha / "model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama")
    assert server.count("GET", "/resolve/") == downloads

    asked = len(server.requests)
    hf_hub_download(f"{OWNER}/llama", "model.safetensors", revision=sha)
    assert len(server.requests) == asked  # a commit hash needs no request at all


def test_unchanged_content_travels_once(repo: str, patched_hub: Hub) -> None:
    assert patched_hub.server.count("PUT", "/lfs-storage/") == 1
    commit_file(HfApi(), repo, "copy.safetensors", b"content of weights.safetensors")
    assert patched_hub.server.count("PUT", "/lfs-storage/") == 1
    hf_hub_download(repo, "weights.safetensors")
    hf_hub_download(repo, "copy.safetensors")
    assert patched_hub.server.count("GET", ".safetensors") == 1


def test_offline_gives_the_cached_and_names_the_rest(repo: str, patched_hub: Hub) -> None:
    cached = hf_hub_download(repo, "config.json")
    asked = len(patched_hub.server.requests)
    with patched_hub.patch(offline=True):
        assert hf_hub_download(repo, "config.json") == cached
        with pytest.raises(LocalEntryNotFoundError):
            hf_hub_download(repo, "weights.safetensors")
        with pytest.raises(OfflineModeIsEnabled):
            HfApi().model_info(repo)
    assert len(patched_hub.server.requests) == asked
    assert HfApi().model_info(repo).id == repo


# Who may do what


def test_missing_things_have_their_own_errors(repo: str) -> None:
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download(f"{OWNER}/absent", "config.json")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info(f"{OWNER}/absent")
    for revision in ("absent", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(repo, "config.json", revision=revision)
        with pytest.raises(RevisionNotFoundError):
            HfApi().model_info(repo, revision=revision)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "absent.json")
    with pytest.raises(OSError, match="not a valid git identifier"):
        AutoModelForCausalLM.from_pretrained(repo, revision="absent")
    with pytest.raises(OSError, match="is not a local folder and is not a valid model identifier"):
        AutoModelForCausalLM.from_pretrained(f"{OWNER}/absent")


def test_a_gated_repository_shows_its_page_but_not_its_files(repo: str, patched_hub: Hub) -> None:
    patched_hub.server.repos[repo].gated = True
    for token in (STRANGER_TOKEN, None):
        with patched_hub.patch(token=token):
            assert HfApi().model_info(repo).gated == "auto"
            with pytest.raises(GatedRepoError, match="restricted") as error:
                hf_hub_download(repo, "config.json")
            assert error.value.response.status_code == (403 if token else 401)
            with pytest.raises(OSError, match="gated repo"):
                AutoModelForCausalLM.from_pretrained(repo)
    patched_hub.server.repos[repo].granted.add(STRANGER)
    with patched_hub.patch(token=STRANGER_TOKEN):
        assert Path(hf_hub_download(repo, "config.json")).is_file()


def test_a_private_repository_does_not_exist_for_others(patched_hub: Hub) -> None:
    HfApi().create_repo(f"{OWNER}/secret", private=True)
    commit_file(HfApi(), f"{OWNER}/secret", "config.json", b"{}")
    for token in (STRANGER_TOKEN, None):
        with patched_hub.patch(token=token):
            for call in (lambda: HfApi().model_info(f"{OWNER}/secret"),
                         lambda: hf_hub_download(f"{OWNER}/secret", "config.json")):  # fmt: skip
                with pytest.raises(RepositoryNotFoundError, match="make sure you are authenticated"):
                    call()
    assert Path(hf_hub_download(f"{OWNER}/secret", "config.json")).read_bytes() == b"{}"


def test_writing_needs_the_owner(repo: str, patched_hub: Hub) -> None:
    with patched_hub.patch(token=STRANGER_TOKEN):
        assert HfApi().whoami()["name"] == STRANGER
        with pytest.raises(HfHubHTTPError, match="don't have the rights"):
            commit_file(HfApi(), repo, "config.json", b"mine now")
        with pytest.raises(HfHubHTTPError, match="don't have the rights"):
            HfApi().create_repo(f"{OWNER}/new")
    with patched_hub.patch(token=None):
        with pytest.raises(LocalTokenNotFoundError):
            HfApi().whoami()
        with pytest.raises(HfHubHTTPError, match="Invalid username or password"):
            push(tiny_llama(), f"{OWNER}/new")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(token="hf_wrong").create_repo(f"{OWNER}/new")
    assert list(patched_hub.server.repos) == [repo]
    assert Path(hf_hub_download(repo, "config.json")).read_bytes() == b"content of config.json"


def test_creating_a_repository_twice(repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="already created"):
        HfApi().create_repo(repo)
    assert HfApi().create_repo(repo, exist_ok=True).repo_id == repo
    assert HfApi().create_repo("nameless-owner").repo_id == f"{OWNER}/nameless-owner"


def test_a_card_without_closed_metadata_is_refused_before_the_upload(repo: str, patched_hub: Hub) -> None:
    before = HfApi().model_info(repo).sha
    with pytest.raises(ValueError, match="metadata block is not closed"):
        commit_file(HfApi(), repo, "README.md", b"---\ntags: [x]\n# Card\n")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        commit_file(HfApi(), repo, "README.md", b"# Card\n")
    assert HfApi().model_info(repo).sha != before


def test_what_is_not_served_says_so(repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="test Hub does not serve GET /api/models"):
        list(HfApi().list_models())
    with pytest.raises(BadRequestError, match="no pull requests"):
        commit_file(HfApi(), repo, "config.json", b"x", create_pr=True)


# The two ways to point a client here


def test_patch_leaves_the_process_as_it_was(hub: Hub) -> None:
    import transformers.utils.hub as transformers_hub

    def state() -> tuple[Any, ...]:
        api = huggingface_hub.create_repo.__self__  # type: ignore[attr-defined]  # the instance behind the functions
        return {name: value for name, value in vars(constants).items() if name.isupper()}, api.endpoint

    before = state()
    with pytest.raises(RuntimeError, match="inside"), hub.patch():
        assert state() != before
        push(tiny_llama(), f"{OWNER}/llama")  # makes transformers build its own HfApi
        raise RuntimeError("inside")
    assert state() == before
    assert transformers_hub.hf_api().endpoint == constants.ENDPOINT == HfApi().endpoint


def test_two_hubs_in_turn_do_not_mix(hub: Hub, tmp_path: Path) -> None:
    from .server import HubServer

    with hub.patch():
        sha = push(tiny_llama(1), f"{OWNER}/llama")
    with HubServer() as server:
        other = Hub(server, tmp_path / "other")
        with other.patch():
            with pytest.raises(RepositoryNotFoundError):
                HfApi().model_info(f"{OWNER}/llama")
            assert push(tiny_llama(2), f"{OWNER}/llama") != sha
            assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama"), tiny_llama(2))
    with hub.patch():
        assert same_weights(AutoModelForCausalLM.from_pretrained(f"{OWNER}/llama"), tiny_llama(1))


def test_run_uses_the_hub_in_a_new_process(hub: Hub) -> None:
    write = """
import json, sys
from huggingface_hub import HfApi, constants
api = HfApi()
api.create_repo(sys.argv[1])
commit = api.upload_file(path_or_fileobj=b"{}", path_in_repo="w.safetensors", repo_id=sys.argv[1])
print(json.dumps({"sha": commit.oid, "user": api.whoami()["name"], "cache": constants.HF_HUB_CACHE}))
"""
    read = """
import json, sys
from huggingface_hub import hf_hub_download
print(json.dumps(open(hf_hub_download(sys.argv[1], sys.argv[2])).read()))
"""
    wrote = hub.run(write, f"{OWNER}/process")
    assert wrote["user"] == OWNER and wrote["cache"] == str(hub.cache)
    assert hub.server.repos[f"{OWNER}/process"].at("main").sha == wrote["sha"]
    assert json.loads(hub.run(read, f"{OWNER}/process", "w.safetensors")) == {}
    asked = len(hub.server.requests)
    assert json.loads(hub.run(read, f"{OWNER}/process", "w.safetensors", env=hub.offline_env)) == {}
    assert len(hub.server.requests) == asked
    with pytest.raises(AssertionError, match="LocalEntryNotFoundError"):
        hub.run(read, f"{OWNER}/process", "absent", env=hub.offline_env)
    with pytest.raises(AssertionError, match="stdout is not JSON"):
        hub.run("print('hello')")
