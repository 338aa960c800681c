"""A read-only Hugging Face Hub on loopback: one dataset repository, served from a folder to the real client."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


class StaticHub:
    """`with StaticHub("user/name", folder) as url:` — set HF_ENDPOINT to `url` before huggingface_hub is imported."""

    def __init__(self, repo: str, folder: Path) -> None:
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(repo, folder, self.requests))

    def __enter__(self) -> str:
        Thread(target=self.server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


def _handler(repo: str, folder: Path, requests: list[str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            for prefix, answer in (
                (f"/api/datasets/{repo}/tree/", self.tree),
                (f"/datasets/{repo}/resolve/", self.file),
                (f"/api/datasets/{repo}/revision/", self.info),
            ):
                if path.startswith(prefix):
                    revision, _, rest = path.removeprefix(prefix).partition("/")
                    return answer(rest) if revision in ("main", COMMIT) else self.reply(404)
            return self.info("") if path == f"/api/datasets/{repo}" else self.reply(404)

        do_HEAD = do_GET  # noqa: N815 (http.server names it)

        def info(self, _: str) -> None:
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            self.reply(200, json.dumps({"id": repo, "sha": COMMIT, "private": False, "siblings": files}).encode())

        def tree(self, below: str) -> None:
            if not (folder / below).is_dir():
                return self.reply(404)
            listed = []
            for path in sorted((folder / below).iterdir()):
                entry = {"path": str(path.relative_to(folder)), "oid": COMMIT, "size": path.stat().st_size}
                listed.append(entry | {"type": "directory" if path.is_dir() else "file"})
            return self.reply(200, json.dumps(listed).encode())

        def file(self, name: str) -> None:
            path = folder / name
            if not path.is_file():
                return self.reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            body = path.read_bytes()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            return self.reply(200, body, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

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
