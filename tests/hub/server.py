"""The local Hub's HTTP side: what huggingface_hub's real client asks for, answered on a free port of 127.0.0.1.

Only what model, tokenizer and adapter pushes and pulls need: accounts, repositories with commits, branches and tags,
regular and LFS uploads, downloads, private and gated repositories. The error headers are those that the client's
`hf_raise_for_status` reads. Not served: Xet storage (switch it off in the client), datasets and Spaces, pull
requests, search, pagination.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .store import LFS_SUFFIXES, HubError, Repo, StoredFile, apply_operation

OWNER, OWNER_TOKEN = "owner", "hf_owner"
STRANGER, STRANGER_TOKEN = "stranger", "hf_stranger"
LFS_SIZE = 10 * 1024 * 1024


class Request(NamedTuple):
    """One answered request, for tests that count them; `path` is decoded and without the query."""

    method: str
    path: str
    status: int


class Call(NamedTuple):
    """What a handler gets: the account (None without a token), the decoded parts of the path, query, headers, body."""

    user: str | None
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


Handler = Callable[["HubServer", Call], Any]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
REPO, REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
API = f"/api/models/{REPO}"


def route(methods: str, pattern: str) -> Callable[[Handler], Handler]:
    """Register a handler for these methods and paths; it returns JSON data or an `Answer`."""

    def register(handler: Handler) -> Handler:
        ROUTES.extend((method, re.compile(pattern), handler) for method in methods.split())
        return handler

    return register


class HubServer:
    """A Hub that serves while its context is open.

    `OWNER_TOKEN` may create and write `owner/...`, `STRANGER_TOKEN` is somebody else's; `requests` is what was asked.
    """

    def __init__(self) -> None:
        self.users = {OWNER_TOKEN: OWNER, STRANGER_TOKEN: STRANGER}
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_RequestHandler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def count(self, method: str, part: str = "") -> int:
        """How many requests of `method` had `part` in their path."""
        return sum(request.method == method and part in request.path for request in self.requests)

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        """Route one request; a `HubError` becomes the Hub's error answer."""
        url = urlsplit(target)
        with self._lock:
            try:
                answer = self._dispatch(method, url.path, parse_qs(url.query), headers, body)
            except HubError as error:
                named = {"X-Error-Code": error.code} if error.code else {}
                answer = _json({"error": error.message, **error.body}, error.status)
                answer.headers.update({"X-Error-Message": error.message, **named})
            except Exception as error:  # a bug of ours; not a 500, which the client would retry for half a minute
                answer = _json({"error": f"the test Hub failed on {method} {target}: {error!r}"}, 400)
            self.requests.append(Request(method, unquote(url.path), answer.status))
            return answer

    def _dispatch(self, method: str, path: str, query: dict[str, list[str]], headers: Any, body: bytes) -> Answer:
        token = (headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        for route_method, pattern, handler in ROUTES:
            if route_method == method and (match := pattern.fullmatch(path)):
                parts = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                result = handler(self, Call(self.users.get(token), parts, query, headers, body))
                return result if isinstance(result, Answer) else _json(result)
        raise HubError(404, f"the test Hub does not serve {method} {path}")

    def readable(self, call: Call, content: bool = False) -> Repo:
        """The call's repository, or the error the Hub gives this account; `content` asks for gated files too."""
        repo = self.repos.get(call.parts["repo"])
        if repo is None or (repo.private and call.user != repo.owner):
            # Like the real Hub, no account learns whether somebody else's private repository exists.
            if call.user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and call.user not in repo.granted | {repo.owner}:
            raise HubError(403 if call.user else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        return repo

    def writable(self, call: Call) -> Repo:
        """The call's repository if the account owns it."""
        repo = self.readable(call)
        _require_owner(call.user, repo.owner)
        return repo


def _json(data: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"})


def _require_owner(user: str | None, owner: str) -> None:
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user != owner:
        raise HubError(403, f"You don't have the rights to write to the namespace {owner!r}")


class _RequestHandler(BaseHTTPRequestHandler):
    # HTTP/1.0: every connection ends with its answer, so none outlives its server to meet the next one's client.
    hub: HubServer

    def _serve(self) -> None:
        answer = self.hub.answer(self.command, self.path, self.headers, self._read_body())
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:  # stderr belongs to the tests
        pass


# Accounts, repositories, revisions


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, call: Call) -> Any:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return {"type": "user", "id": call.user, "name": call.user, "fullname": call.user, "orgs": [], "auth": auth}


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, call: Call) -> Any:
    if (kind := call.json.get("type", "model")) != "model":
        raise HubError(400, f"the test Hub has models only, not a {kind}")
    owner = call.json.get("organization") or call.user or ""
    _require_owner(call.user, owner)
    repo_id = f"{owner}/{call.json['name']}"
    answer = {"name": repo_id, "id": repo_id, "url": f"{hub.url}/{repo_id}"}
    if repo_id in hub.repos:
        raise HubError(409, "You already created this model repo", **answer)
    hub.repos[repo_id] = Repo(repo_id, private=call.json.get("visibility") == "private")
    return answer


@route("GET", f"{API}(?:/revision/{REVISION})?")
def repo_info(hub: HubServer, call: Call) -> Any:
    repo = hub.readable(call)
    commit = repo.at(call.parts.get("revision", "main"))
    return {
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.sha,
        "lastModified": commit.date,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "tags": [],
        "siblings": [{"rfilename": path} for path in sorted(commit.files)],
    }


@route("POST", f"{API}/branch/(?P<branch>[^/]+)")
def create_branch(hub: HubServer, call: Call) -> Any:
    repo = hub.writable(call)
    return _create_ref(repo, repo.branches, call.parts["branch"], call.json.get("startingPoint", "main"))


@route("POST", f"{API}/tag/{REVISION}")
def create_tag(hub: HubServer, call: Call) -> Any:
    repo = hub.writable(call)
    return _create_ref(repo, repo.tags, call.json["tag"], call.parts["revision"])


def _create_ref(repo: Repo, refs: dict[str, str], name: str, revision: str) -> Any:
    if name in refs:
        raise HubError(409, f"Reference already exists: {name}")
    refs[name] = repo.at(revision).sha
    return {}


# Listings and downloads


def _entries(files: dict[str, StoredFile]) -> list[dict[str, Any]]:
    folders = sorted({path[: slash.start()] for path in files for slash in re.finditer("/", path)})
    oids = [hashlib.sha1(folder.encode()).hexdigest() for folder in folders]
    entries = [{"type": "directory", "path": f, "size": 0, "oid": oid} for f, oid in zip(folders, oids, strict=True)]
    return entries + [file.tree_entry(path) for path, file in sorted(files.items())]


@route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
def list_tree(hub: HubServer, call: Call) -> Any:
    prefix = call.parts["path"].rstrip("/") + "/" if "path" in call.parts else ""
    entries = _entries(hub.readable(call).at(call.parts["revision"]).files)
    below = [entry for entry in entries if entry["path"].startswith(prefix)]
    if prefix and not below:
        raise HubError(404, f"{prefix[:-1]} does not exist on {call.parts['revision']!r}", "EntryNotFound")
    recursive = call.query.get("recursive", ["false"])[0].lower() == "true"
    return [entry for entry in below if recursive or "/" not in entry["path"][len(prefix) :]]


@route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(hub: HubServer, call: Call) -> Any:
    wanted = {path.rstrip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
    return [e for e in _entries(hub.readable(call).at(call.parts["revision"]).files) if e["path"] in wanted]


@route("GET HEAD", f"/{REPO}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: HubServer, call: Call) -> Any:
    """A file's bytes, or a range of them; LFS files too, where the real Hub redirects to a storage host."""
    commit = hub.readable(call, content=True).at(call.parts["revision"])
    file = commit.files.get(call.parts["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    size = len(file.content)
    headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if asked is None or asked.groups() == ("", ""):
        return Answer(200, file.content, headers)
    first, last = asked.groups()
    start, end = (int(first), min(int(last or size), size - 1)) if first else (max(size - int(last), 0), size - 1)
    if start > end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
    return Answer(206, file.content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


# Uploads: preupload says how each file travels, LFS content goes ahead, the commit names it


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, call: Call) -> Any:
    """Only whether there is metadata and its block is closed; the real Hub checks the fields too."""
    first, *rest = call.json["content"].splitlines() or [""]
    if first == "---" and "---" not in rest:
        raise HubError(400, "Invalid YAML", errors=[{"message": "the metadata block is not closed"}], warnings=[])
    warnings = [] if first == "---" else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@route("POST", f"{API}/preupload/{REVISION}")
def preupload(hub: HubServer, call: Call) -> Any:
    if "create_pr" in call.query:
        raise HubError(400, "the test Hub has no pull requests")
    commit, answers = hub.writable(call).at(call.parts["revision"]), []
    for file in call.json["files"]:
        lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
        old = commit.files.get(file["path"])  # the client drops a file from its commit when `oid` shows it unchanged
        info = {"uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": old.etag if old else None}
        answers.append({"path": file["path"], **info})
    return {"files": answers, "commitOid": commit.sha}


@route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, call: Call) -> Any:
    repo, objects = hub.writable(call), []
    for item in call.json["objects"]:
        upload, verify = f"{hub.url}/lfs-storage/{item['oid']}", f"{hub.url}/api/models/{repo.id}/lfs-verify"
        actions = {"upload": {"href": upload}, "verify": {"href": verify}}
        there = item["oid"] in hub.lfs_objects
        objects.append({"oid": item["oid"], "size": item["size"], **({} if there else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs-storage/(?P<oid>[0-9a-f]{64})")
def lfs_upload(hub: HubServer, call: Call) -> Any:
    """Without an account, like the real Hub's signed addresses; the content must be what its name says."""
    if hashlib.sha256(call.body).hexdigest() != call.parts["oid"]:
        raise HubError(400, f"the uploaded bytes are not those of {call.parts['oid']}")
    hub.lfs_objects[call.parts["oid"]] = call.body
    return {}


@route("POST", f"{API}/lfs-verify")
def lfs_verify(hub: HubServer, call: Call) -> Any:
    hub.writable(call)
    if len(hub.lfs_objects.get(call.json["oid"], b"")) != call.json["size"]:
        raise HubError(404, f"LFS object {call.json['oid']} was not uploaded whole")
    return {}


@route("POST", f"{API}/commit/{REVISION}")
def create_commit(hub: HubServer, call: Call) -> Any:
    repo, branch = hub.writable(call), call.parts["revision"]
    head = repo.at(branch)
    if branch not in repo.branches:
        raise HubError(400, f"Commits go to a branch, and {branch!r} is none")
    header, *operations = (json.loads(line) for line in call.body.splitlines())
    if header["value"].get("parentCommit", head.sha) != head.sha:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        apply_operation(files, operation["key"], operation["value"], hub.lfs_objects)
    commit = repo.commit(branch, header["value"]["summary"], files)
    return {"success": True, "commitOid": commit.sha, "commitUrl": f"{hub.url}/{repo.id}/commit/{commit.sha}"}
