"""A Hugging Face Hub on loopback, held in memory: the real client makes repositories there, fills and reads them."""

import base64
import hashlib
import json
import re
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet")  # other files are committed as they are, in base64
WRITES = ("create", "branch", "preupload", "lfs", "verify", "commit")  # "lfs" gives the address of an "upload"
KEY = r"(?:/api/models|/api(?=/datasets/))?/((?:datasets/)?[^/]+/[^/]+?)(?:\.git/info)?"  # the path of its page
ASKED = re.compile(rf"{KEY}(?:/([\w-]+)(?:/([^/]+)(?:/(.+))?)?)?")  # and what is asked of it, a revision, a path


class HubError(Exception):
    """HubError(status, message), and with some a code that the client goes by: a request that fails."""


class File(NamedTuple):
    content: bytes
    lfs: bool = False

    @property
    def etag(self) -> str:
        """The SHA-256 of an LFS file, the Git blob hash of another: the client compares it with its own file's."""
        git = hashlib.sha1(b"blob %d\0" % len(self.content) + self.content)
        return (hashlib.sha256(self.content) if self.lfs else git).hexdigest()


class Commit(NamedTuple):
    oid: str
    title: str
    files: dict[str, File]
    parent: "Commit | None"

    def below(self, path: str) -> dict[str, File]:
        """The file of this path, or the files of the folder."""
        return {name: file for name, file in self.files.items() if f"{name}/".startswith(f"{path}/")}

    def entry(self, path: str, expand: bool) -> dict[str, Any]:
        """A file or a folder as the Hub lists it; `expand` adds the commit that changed it last."""
        held, last = self.below(path), self
        found: dict[str, Any] = {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
        if path in held:
            etag, size = held[path].etag, len(held[path].content)
            lfs = {"lfs": {"oid": etag, "size": size, "pointerSize": 130}} if held[path].lfs else {}
            found |= {"type": "file", "oid": etag[:40], "size": size} | lfs
        while last.parent and last.parent.below(path) == held:
            last = last.parent
        commit = {"id": last.oid, "title": last.title, "date": "2026-01-01T00:00:00.000Z"}
        return found | ({"lastCommit": commit} if expand else {})


class Repo:
    """What is asked of it is answered by the method of that name, with JSON or (status, bytes, headers)."""

    def __init__(self, url: str, private: bool) -> None:
        self.url, self.private = url, private  # the URL of its page
        self.heads: dict[str, Commit] = {}  # of the branches and of refs/pr/N
        self.commits: dict[str, Commit] = {}
        self.stored: dict[str, bytes | None] = {}  # LFS, by SHA-256; None: announced, not uploaded yet
        attributes = File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.add("main", "initial commit", {".gitattributes": attributes}, None)

    def add(self, branch: str, title: str, files: dict[str, File], parent: Commit | None) -> Commit:
        oid = hashlib.sha1(f"{self.url} {len(self.commits)}".encode()).hexdigest()
        self.heads[branch] = self.commits[oid] = Commit(oid, title, files, parent)
        return self.heads[branch]

    def at(self, revision: str) -> Commit:
        if revision not in self.heads | self.commits:
            raise HubError(404, f"Invalid rev id: {revision!a}", "RevisionNotFound")
        return (self.heads | self.commits)[revision]

    def answer_revision(self, revision: str, **_: Any) -> Any:
        commit, name = self.at(revision or "main"), "/".join(self.url.split("/")[-2:])
        described = {"id": name, "sha": commit.oid, "private": self.private, "tags": [], "downloads": 0, "likes": 0}
        return described | {"siblings": [{"rfilename": path} for path in sorted(commit.files)]}

    def answer_refs(self, **_: Any) -> Any:
        refs = [{"name": name, "ref": name, "targetCommit": commit.oid} for name, commit in self.heads.items()]
        pulls = [ref for ref in refs if ref["name"].startswith("refs/")]
        branches = [ref | {"ref": f"refs/heads/{ref['name']}"} for ref in refs if ref not in pulls]
        return {"branches": branches, "pullRequests": pulls, "tags": [], "converts": []}

    def answer_tree(self, revision: str, path: str, flags: set[str], **_: Any) -> Any:
        commit, start = self.at(revision), f"{path}/" if path else ""
        below = [name.removeprefix(start).split("/") for name in commit.files if name.startswith(start)]
        if start and not below:
            raise HubError(404, f"{path!a} does not exist on {revision!a}", "EntryNotFound")
        depths = [range(1, len(parts) + 1 if "recursive" in flags else 2) for parts in below]
        names = {start + "/".join(parts[:end]) for parts, ends in zip(below, depths, strict=True) for end in ends}
        return [commit.entry(name, "expand" in flags) for name in sorted(names)]

    def answer_paths_info(self, revision: str, flags: set[str], form: dict[str, list[str]], **_: Any) -> Any:
        commit = self.at(revision)
        return [commit.entry(path, "expand" in flags) for path in form["paths"] if commit.below(path)]

    def answer_resolve(self, revision: str, path: str, span: str, **_: Any) -> Any:
        commit = self.at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            return 404, b"", headers | {"X-Error-Code": "EntryNotFound"}
        file, size = commit.files[path], len(commit.files[path].content)
        headers |= {"ETag": f'"{file.etag}"'} | ({"X-Linked-Size": str(size)} if file.lfs else {})
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
        if part is None:
            return 200, file.content, headers
        start, end = int(part[1]), min(int(part[2] or size), size - 1)
        return 206, file.content[start : end + 1], headers | {"Content-Range": f"bytes {start}-{end}/{size}"}

    def answer_branch(self, revision: str, body: bytes, **_: Any) -> Any:
        if revision in self.heads:
            raise HubError(409, f"Reference already exists: {revision!a}")
        self.heads[revision] = self.at(json.loads(body).get("startingPoint", "main"))
        return {}

    def answer_preupload(self, revision: str, body: bytes, **_: Any) -> Any:
        held, files = self.at(revision).files, [{"path": file["path"]} for file in json.loads(body)["files"]]
        for file in files:
            file |= {"uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False}
            file["oid"] = held[file["path"]].etag if file["path"] in held else None
        return {"files": files}

    def answer_lfs(self, body: bytes, **_: Any) -> Any:
        objects = [{"oid": file["oid"], "size": file["size"]} for file in json.loads(body)["objects"]]
        for file in objects:
            if self.stored.setdefault(file["oid"], None) is None:
                file["actions"] = {name: {"href": f"{self.url}/{name}/{file['oid']}"} for name in ("upload", "verify")}
        return {"transfer": "basic", "objects": objects}

    def answer_upload(self, revision: str, body: bytes, **_: Any) -> Any:
        if revision not in self.stored or hashlib.sha256(body).hexdigest() != revision:
            raise HubError(400, "this was not announced, or the content does not have this SHA-256")
        self.stored[revision] = body
        return {}

    def answer_verify(self, revision: str, body: bytes, **_: Any) -> Any:
        if len(self.stored.get(revision) or b"") != json.loads(body)["size"]:
            raise HubError(404, "the upload is not there", "EntryNotFound")
        return {}

    def answer_commit(self, revision: str, body: bytes, flags: set[str], **_: Any) -> Any:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        base, expected = self.at(revision), header["value"].get("parentCommit")
        pull: dict[str, str] = {}
        branch = next((name for name, head in self.heads.items() if revision in (name, head.oid)), "")
        if "create_pr" in flags:
            number = 1 + sum(name.startswith("refs/pr/") for name in self.heads)
            base, branch = self.at(expected or revision), f"refs/pr/{number}"
            pull = {"pullRequestUrl": f"{self.url}/discussions/{number}"}
        elif not branch or expected not in (None, base.oid):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        oid = self.add(branch, header["value"]["summary"], files, base).oid
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/commit/{oid}"} | pull

    def _apply(self, operation: str, value: dict[str, Any], files: dict[str, File]) -> None:
        path = value["path"].removesuffix("/")
        if any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"the path {value['path']!a} leaves the repository")
        if operation == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif operation == "lfsFile":
            if (content := self.stored.get(value["oid"])) is None:
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path!a}")
            files[path] = File(content, lfs=True)
        else:
            folder = {"deletedFile": False, "deletedFolder": True}[operation]
            gone = [name for name in files if (name.startswith(f"{path}/") if folder else name == path)]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]


class Hub:
    """`with Hub() as hub:` — run a client in a process with `os.environ | hub.environment(tmp_path)`; no Xet.

    `token` alone may write, and read what is private. `requests` are "METHOD path", `tokens` the Authorization header
    of each (or None), `repos` by `user/name`, of a dataset `datasets/user/name`.
    """

    def __init__(self, token: str = "hf_test_token") -> None:
        self.token = token
        self.requests: list[str] = []
        self.tokens: list[str | None] = []
        self.repos: dict[str, Repo] = {}
        self.faults: list[tuple[str, Any]] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HandlerOfHub", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": self.token, "HF_HOME": str(home)} | switches

    def seed(self, repo: str, folder: Path | dict[str, Path], kind: str = "model", private: bool = False) -> None:
        """One commit on `main`, or on each branch of {branch: folder}, which then holds what its folder holds."""
        key = f"datasets/{repo}" if kind == "dataset" else repo
        held = self.repos.setdefault(key, Repo(f"{self.url}/{key}", private))
        for branch, source in (folder if isinstance(folder, dict) else {"main": folder}).items():
            found = {path.relative_to(source).as_posix(): path for path in source.rglob("*") if path.is_file()}
            files = {name: File(path.read_bytes(), name.endswith(LFS_SUFFIXES)) for name, path in found.items()}
            held.stored |= {file.etag: file.content for file in files.values() if file.lfs}
            held.add(branch, "seed", files, held.heads.get(branch))

    def files(self, repo: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        commit = self.repos[f"datasets/{repo}" if kind == "dataset" else repo].at(revision)
        return {path: file.content for path, file in commit.files.items()}

    def fail(self, match: str, how: int | str, times: int = 1) -> None:
        """Requests with `match` in their "METHOD path" get this status; `"drop"` reads half, then closes."""
        self.faults += [(match, how)] * times

    def answer(self, path: str, form: dict[str, list[str]], headers: Any, body: bytes) -> Any:
        token, known = headers["Authorization"], headers["Authorization"] == f"Bearer {self.token}"
        if token and not known:
            raise HubError(401, "Invalid credentials in Authorization header")
        key, what, revision, below = (unquote(group or "") for group in ASKED.fullmatch(path).groups())
        if not known and (what in WRITES or key == "api/whoami-v2"):
            raise HubError(401, "Invalid username or password.", "" if key.startswith("api/") else "RepoNotFound")
        if key == "api/whoami-v2":
            return {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        if key == "api/validate-yaml":
            return {"errors": [], "warnings": []}
        if (key, what) == ("api/repos", "create"):
            return self._create(json.loads(body))
        repo = self.repos.get(key)
        if repo is None or (repo.private and not known and what != "upload"):  # which of the two is not said
            raise HubError(404 if known else 401, "Repository not found", "RepoNotFound")
        method = getattr(repo, f"answer_{what or 'revision'}".replace("-", "_"))
        flags = {name for name, values in form.items() if values[0].lower() in ("1", "true")}
        return method(revision=revision, path=below, flags=flags, form=form, body=body, span=headers.get("Range", ""))

    def _create(self, asked: dict[str, Any]) -> Any:
        key = f"{'datasets/' * (asked.get('type') == 'dataset')}{asked.get('organization') or 'user'}/{asked['name']}"
        answer = {"url": f"{self.url}/{key}", "name": key}
        if key in self.repos:
            return 409, answer | {"error": "You already created this repo"}, {}
        self.repos[key] = Repo(answer["url"], asked.get("visibility") == "private" or bool(asked.get("private")))
        return answer


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes

    def do_GET(self) -> None:
        url, length = urlsplit(self.path), int(self.headers["Content-Length"] or 0)
        line = f"{self.command} {unquote(url.path)}"
        with self.hub.lock:
            self.hub.requests.append(line)
            self.hub.tokens.append(self.headers["Authorization"])
            match, how = next((fault for fault in self.hub.faults if fault[0] in line), ("", None))
            if match:
                self.hub.faults.remove((match, how))
        body = self.rfile.read(length // 2 if how == "drop" else length)
        if how == "drop":
            self.close_connection = True
            return
        form = body.decode() if self.headers.get_content_type() == "application/x-www-form-urlencoded" else ""
        try:
            if how:
                raise HubError(how, "Invalid credentials in Authorization header" if how == 401 else "a fault")
            with self.hub.lock:
                reply = self.hub.answer(url.path, parse_qs(f"{url.query}&{form}"), self.headers, body)
        except HubError as error:
            status, message, *code = error.args
            reply = status, {"error": message}, {"X-Error-Code": "".join(code), "X-Error-Message": message}
        except Exception:  # not implemented, or a mistake here: the client shows it and does not try again
            reply = 501, {"error": traceback.format_exc()}, {}
        status, answer, headers = reply if isinstance(reply, tuple) else (200, reply, {})
        answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(answer))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (http.server names them)

    def log_message(self, *_: object) -> None: ...
