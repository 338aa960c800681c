"""A read-only Hugging Face Hub on loopback: one repository, served from folders to the real client."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class StaticHub:
    """`with StaticHub("user/name", folder) as url:` — set HF_ENDPOINT to `url` before huggingface_hub is imported.

    Args:
        folder: what the repository holds, or {branch: what it holds}.
        kind: `"datasets"` or `"models"`.
    """

    def __init__(self, repo: str, folder: Path | dict[str, Path], kind: str = "datasets") -> None:
        self.requests: list[str] = []
        branches = folder if isinstance(folder, dict) else {"main": folder}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repo, branches, kind, self.requests))

    def __enter__(self) -> str:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(repo: str, branches: dict[str, Path], kind: str, requests: list[str]) -> type[BaseHTTPRequestHandler]:
    commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in branches}
    folders = {key: folder for name, folder in branches.items() for key in (name, commits[name])}
    files_of = f"/{repo}" if kind == "models" else f"/{kind}/{repo}"  # a model's files have no prefix

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            requests.append(f"{self.command} {unquote(path)}")
            for prefix, answer in (
                (f"/api/{kind}/{repo}/tree/", self.tree),
                (f"{files_of}/resolve/", self.file),
                (f"/api/{kind}/{repo}/revision/", self.info),
            ):
                if path.startswith(prefix):
                    revision, _, rest = path.removeprefix(prefix).partition("/")
                    revision, rest = unquote(revision), unquote(rest)
                    if revision not in folders:
                        return self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
                    return answer(revision, rest)
            if path == f"/api/{kind}/{repo}":
                return self.info("main", "")
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815 (http.server names it)

        def info(self, revision: str, _: str) -> None:
            folder, commit = folders[revision], commits.get(revision, revision)
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            self.reply(200, json.dumps({"id": repo, "sha": commit, "private": False, "siblings": files}).encode())

        def tree(self, revision: str, below: str) -> None:
            folder = folders[revision]
            if not (folder / below).is_dir():
                return self.reply(404)
            listed = []
            recursive = "recursive=true" in urlsplit(self.path).query.lower()
            for path in sorted((folder / below).glob("**/*" if recursive else "*")):
                oid = hashlib.sha1(path.read_bytes() if path.is_file() else b"").hexdigest()
                entry = {"path": str(path.relative_to(folder)), "oid": oid, "size": path.stat().st_size}
                listed.append(entry | {"type": "directory" if path.is_dir() else "file"})
            return self.reply(200, json.dumps(listed).encode())

        def file(self, revision: str, name: str) -> None:
            path, commit = folders[revision] / name, commits.get(revision, revision)
            if not path.is_file():
                return self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            body = path.read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.reply(200, body, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})

        def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    return Handler
