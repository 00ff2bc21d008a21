"""What the local Hub keeps: files with the Hub's two kinds of id, commits, repositories with branches and tags."""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".model", ".mp4", ".parquet", ".arrow")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubError(Exception):
    """An HTTP error answer; `code` becomes X-Error-Code, from which the client picks its exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class StoredFile:
    """One version of a file, stored in git or (`lfs`) as a git pointer to an object named by its sha256."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_content(self) -> bytes:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.lfs else self.content

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.git_content) + self.git_content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def tree_entry(self, path: str) -> dict[str, Any]:
        """The file as `/tree` and `/paths-info` list it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.git_content)}
        return entry


@dataclass(frozen=True)
class Commit:
    """An immutable state of a repository; `files` is never changed after the commit."""

    sha: str
    title: str
    date: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    """A repository: every commit stays readable, branches and tags are names for commits.

    Set `private` or `gated` on it to close it; accounts in `granted` may read a gated one.
    """

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {".gitattributes": StoredFile(GITATTRIBUTES)})

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def at(self, revision: str) -> Commit:
        """The commit a branch, a tag or a full commit hash names."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]

    def commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        """Put `branch` on a new commit that holds exactly `files`."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        new = self.commits.setdefault(sha := secrets.token_hex(20), Commit(sha, title, date, files))
        self.branches[branch] = new.sha
        return new


def apply_operation(
    files: dict[str, StoredFile], key: str, value: dict[str, Any], lfs_objects: dict[str, bytes]
) -> None:
    """Apply one line of a commit's NDJSON to `files`, the new commit's own dict."""
    path = value["path"]
    if key == "file":
        files[path] = StoredFile(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in lfs_objects:
            raise HubError(400, f"LFS object {value['oid']} of {path} was not uploaded")
        files[path] = StoredFile(lfs_objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(400, f"the test Hub does not know the commit operation {key!r}")
