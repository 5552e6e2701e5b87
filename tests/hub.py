"""The Hugging Face Hub's endpoints, as far as they are used, on a scripted origin."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.origin import Origin, Reply
from tests.weights import sha256

COMMIT = "c0ffee" + "0" * 34


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def serve_repository(
    origin: Origin,
    files: dict[str, bytes],
    lfs: dict[str, str],
    *,
    repo: str = "acme/tiny",
    commit: str = COMMIT,
) -> None:
    """A repository at main; ``lfs`` are the sha256 that the Hub states, of its large files."""
    siblings: list[dict[str, Any]] = []
    for name, body in files.items():
        entry: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": git_hash(body)}
        if name in lfs:
            entry["lfs"] = {"sha256": lfs[name], "size": len(body), "pointerSize": 134}
        siblings.append(entry)
        headers, etag = {"X-Repo-Commit": commit}, f'"{sha256(body)[:40]}"'
        path = f"/{repo}/resolve/{commit}/{name}"
        origin.serve(path, Reply(body=body, headers=headers, etag=etag))
    info = {"id": repo, "sha": commit, "siblings": siblings}
    origin.serve(f"/api/models/{repo}/revision/main", Reply(body=json.dumps(info).encode()))


def serve_folder(origin: Origin, repo: str, folder: Path) -> None:
    """A repository with the files of a folder."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    lfs = {name: sha256(body) for name, body in files.items() if name.endswith(".safetensors")}
    serve_repository(origin, files, lfs, repo=repo)
