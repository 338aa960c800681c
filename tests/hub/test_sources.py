"""The Hub on loopback through the real client: what the tests of pushing and loading rest on."""

import hashlib
import http.client
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.hub import Hub

START = """
import json, time
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
api = HfApi()
REPO = "someone/adapter"
slept = []
time.sleep = slept.append  # the client waits between its tries

def refused(function, *arguments, **named):
    try:
        function(*arguments, **named)
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response is not None and response.status_code]

def read(revision, repo_id=REPO, **named):
    folder = Path(snapshot_download(repo_id, revision=revision, **named))
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
"""

PUSH = """
found = {"name": api.whoami()["name"]}
url = api.create_repo(REPO, private=True)
found["again"] = [refused(api.create_repo, REPO), api.create_repo(REPO, exist_ok=True) == url, url.repo_id]
one = api.upload_folder(repo_id=REPO, folder_path="one", commit_message="one").oid
found["unchanged"] = api.upload_folder(repo_id=REPO, folder_path="one").oid == one
two = api.upload_folder(repo_id=REPO, folder_path="two", commit_message="two").oid
api.create_branch(REPO, branch="with/slash", revision=one)
found["branch again"] = refused(api.create_branch, REPO, branch="with/slash")
text = {"path_or_fileobj": b"branch", "path_in_repo": "branch.txt"}
on_branch = api.upload_file(repo_id=REPO, revision="with/slash", commit_message="three", **text).oid
pull = api.upload_folder(repo_id=REPO, folder_path="one", path_in_repo="pull", create_pr=True)
found["pull"] = [pull.pr_revision, pull.pr_url.removeprefix(api.endpoint)]
api.upload_file(repo_id=REPO, revision="refs/pr/1", **text)
found["stale"] = refused(api.upload_file, repo_id=REPO, parent_commit=one, **text)
api.delete_file("sub/note.txt", REPO)
found["gone"] = refused(api.delete_file, "sub/note.txt", REPO)
api.upload_file(repo_id=REPO, revision=api.model_info(REPO).sha, **text)
api.delete_folder("sub", REPO, revision="with/slash")
revisions = {"one": one, "two": two, "on_branch": on_branch, "with/slash": "with/slash", "main": "main",
             "refs/pr/1": "refs/pr/1"}
found["read"] = {name: read(revision) for name, revision in revisions.items()}
found["hashes"] = revisions
found["missing"] = [refused(read, "none"), refused(api.hf_hub_download, REPO, "none"),
                    refused(api.model_info, "someone/none"), refused(list, api.list_repo_tree(REPO, "none"))]
listed = api.list_repo_tree(REPO, revision=two, expand=True)
found["tree"] = {entry.path: [type(entry).__name__, entry.last_commit.title] for entry in listed}
found["deep"] = [entry.path for entry in api.list_repo_tree(REPO, "sub", revision=two, recursive=True)]
found["paths"] = [[entry.path, getattr(entry, "size", None), bool(getattr(entry, "lfs", None))] for entry in
                  api.get_paths_info(REPO, ["model.safetensors", "sub", "none"], revision=two)]
refs = api.list_repo_refs(REPO, include_pull_requests=True)
found["refs"] = [{ref.name: ref.target_commit for ref in refs.branches}, [ref.ref for ref in refs.pull_requests]]
found["private"] = api.model_info(REPO).private
api.create_repo("someone/data", repo_type="dataset")
api.upload_file(repo_id="someone/data", repo_type="dataset", path_or_fileobj=b"PAR1", path_in_repo="a.parquet")
found["public"] = api.dataset_info("someone/data").private
print(json.dumps(found))
"""

DROPPED = """
api.create_repo(REPO)
push = refused(api.upload_folder, repo_id=REPO, folder_path="one")
print(json.dumps({"push": push, "slept": slept, "files": api.list_repo_files(REPO)}))
"""

FAULTS = """
push = dict(repo_id=REPO, folder_path="one")
found = {"push": refused(api.upload_folder, **push), "pushed": refused(api.upload_folder, **push), "read": read("main")}
found["expired"] = refused(api.whoami)
print(json.dumps(found | {"slept": slept}))
"""

TOKENS = """
note = {"path_or_fileobj": b"x", "path_in_repo": "x.txt"}
found = {"read": [read("main", token=False), read("refs/pr/1", token=False)]}
found["wrong"] = refused(api.model_info, REPO, token="hf_other")
secret = "someone/secret"
found["private"] = [refused(api.model_info, secret, token=False), refused(snapshot_download, secret, token=False),
                    refused(api.hf_hub_download, secret, "config.json", token=False),
                    refused(api.model_info, "someone/none", token=False)]
found["writes"] = [refused(api.upload_file, repo_id=REPO, token=False, **note),
                   refused(api.create_repo, "someone/new", token=False),
                   refused(api.create_branch, REPO, branch="new", token=False)]
found["with"] = read("main", repo_id=secret)
print(json.dumps(found))
"""

ONE = {
    "config.json": "{}",
    "model.safetensors": "weights " * 40_000,
    "sub/note.txt": "a note",
    "README.md": "---\n---\n",
}
TWO = ONE | {"config.json": '{"two": 2}', "more.safetensors": "more weights"}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path):
    for folder, files in {"one": ONE, "two": TWO}.items():
        for path, text in files.items():
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path).write_text(text)

    def run(script):
        environment = os.environ | hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", START + script]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def text_of(hub, *arguments, **named):
    return {path: content.decode() for path, content in hub.files(*arguments, **named).items()}


def test_what_is_pushed_is_what_is_there_and_what_is_read(hub, client):
    found = client(PUSH)
    attributes = {".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
    branch, note = {"branch.txt": "branch"}, "sub/note.txt"
    expected = {
        "one": ONE | attributes,
        "two": TWO | attributes,
        "on_branch": ONE | attributes | branch,
        "with/slash": {path: text for path, text in (ONE | attributes | branch).items() if path != note},
        "main": {path: text for path, text in (TWO | attributes | branch).items() if path != note},
        "refs/pr/1": TWO | attributes | branch | {f"pull/{path}": text for path, text in ONE.items()},
    }
    hashes = found.pop("hashes")
    assert found["read"] == {name: text_of(hub, "someone/adapter", hashes[name]) for name in expected} == expected
    repo = hub.repos["someone/adapter"]
    assert found["private"] is repo.private is True
    assert found["public"] is hub.repos["datasets/someone/data"].private is False
    assert text_of(hub, "someone/data", kind="dataset") == attributes | {"a.parquet": "PAR1"}
    assert len(repo.commits) == 9 and repo.commits[hashes["on_branch"]].parent.title == "one"
    assert found["name"] == "user" and found["again"] == [["HfHubHTTPError", 409], True, "someone/adapter"]
    assert found["unchanged"] and found["branch again"] == ["HfHubHTTPError", 409]
    assert found["pull"] == ["refs/pr/1", "/someone/adapter/discussions/1"]
    assert found["stale"] == ["HfHubHTTPError", 412] and found["gone"] == ["RemoteEntryNotFoundError", 404]
    missing = ["RevisionNotFoundError", "RemoteEntryNotFoundError", "RepositoryNotFoundError"]
    assert found["missing"] == [[name, 404] for name in [*missing, "RemoteEntryNotFoundError"]]
    files = {"config.json": "two", "more.safetensors": "two", "model.safetensors": "one", "README.md": "one"}
    tree = {path: ["RepoFile", title] for path, title in ({".gitattributes": "initial commit"} | files).items()}
    assert found["tree"] == tree | {"sub": ["RepoFolder", "one"]} and found["deep"] == ["sub/note.txt"]
    assert found["paths"] == [["model.safetensors", len(ONE["model.safetensors"]), True], ["sub", None, False]]
    heads = {name: repo.heads[name].oid for name in ("main", "with/slash")}
    assert found["refs"] == [heads, ["refs/pr/1"]]
    assert set(hub.tokens) == {"Bearer hf_test_token", None} and len(hub.tokens) == len(hub.requests)
    anonymous = {line[:-64] for line, token in zip(hub.requests, hub.tokens, strict=True) if token is None}
    assert anonymous == {"PUT /someone/adapter/upload/", "PUT /datasets/someone/data/upload/"}


def test_faults(hub, client):
    hub.fail("PUT /someone/adapter/upload", "drop", times=6)  # as often as the client tries
    found = client(DROPPED)
    assert found == {"push": ["RuntimeError", False], "slept": [1, 2, 4, 8, 8], "files": [".gitattributes"]}
    assert len(hub.repos["someone/adapter"].commits) == 1 and not hub.faults
    hub.fail("PUT /someone/adapter/upload", "drop")
    hub.fail("/info/lfs/objects/batch", 503, times=2)
    hub.fail("POST /api/models/someone/adapter/commit/main", 500)
    hub.fail("GET /someone/adapter/resolve", "drop")
    found = client(FAULTS)
    assert found.pop("read") == text_of(hub, "someone/adapter") and not hub.faults
    once = ["HfHubHTTPError", 500]  # a commit is not tried again: it may have been made
    assert found == {"push": once, "pushed": None, "slept": [1, 2, 1, 1], "expired": None}
    hub.fail("preupload", 401)
    assert client("print(json.dumps(refused(api.upload_folder, repo_id=REPO, folder_path='one')))") == [
        "HfHubHTTPError",
        401,
    ]


def test_tokens(hub, client, tmp_path):
    hub.seed("someone/adapter", {"main": tmp_path / "one", "refs/pr/1": tmp_path / "two"})
    hub.seed("someone/secret", tmp_path / "two", private=True)
    before = hub.files("someone/adapter")
    assert text_of(hub, "someone/adapter") == ONE and text_of(hub, "someone/adapter", "refs/pr/1") == TWO
    found = client(TOKENS)
    assert found["read"] == [ONE, TWO]
    assert found["wrong"] == ["HfHubHTTPError", 401]
    assert found["private"] == [["RepositoryNotFoundError", 401]] * 4
    assert found["with"] == TWO
    assert found["writes"] == [
        ["RepositoryNotFoundError", 401],
        ["HfHubHTTPError", 401],
        ["RepositoryNotFoundError", 401],
    ]
    assert list(hub.repos) == ["someone/adapter", "someone/secret"] and hub.files("someone/adapter") == before


def ask(hub, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"))
    connection.request(method, path, body, {"Authorization": f"Bearer {hub.token}"} | headers)
    with connection.getresponse() as response:
        found = response.status, response.headers, response.read()
    connection.close()
    return found


def commit(hub, *operations):
    lines = [{"key": "header", "value": {"summary": "x"}}, *({"key": key, "value": value} for key, value in operations)]
    body = "\n".join(map(json.dumps, lines))
    return ask(hub, "POST", "/api/models/someone/adapter/commit/main", body)[0]


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "a//x", "./x", "", "a/.git/config", ".."])
def test_a_commit_stays_inside_the_repository(hub, tmp_path, path):
    hub.seed("someone/adapter", tmp_path)
    content = {"content": "eA==", "encoding": "base64"}
    assert commit(hub, ("file", {"path": "good", **content}), ("file", {"path": path, **content})) == 400
    assert commit(hub, ("deletedFolder", {"path": path})) == 400
    assert hub.files("someone/adapter") == {}
    assert commit(hub, ("file", {"path": "a/good..", **content})) == 200
    assert hub.files("someone/adapter") == {"a/good..": b"x"}


def test_uploads_are_asked_for_and_checked(hub, tmp_path):
    hub.seed("someone/adapter", tmp_path)
    oid = hashlib.sha256(b"weights").hexdigest()
    address, lfs = f"/someone/adapter/upload/{oid}", ("lfsFile", {"path": "a.bin", "oid": oid, "size": 7})
    assert ask(hub, "PUT", address, b"weights")[0] == 400  # not announced
    batch = json.dumps({"objects": [{"oid": oid, "size": 7}]})
    answer = json.loads(ask(hub, "POST", "/someone/adapter.git/info/lfs/objects/batch", batch)[2])
    assert answer["objects"][0]["actions"]["upload"]["href"] == hub.url + address
    verify = ("POST", f"/someone/adapter/verify/{oid}", '{"size": 7}')
    assert [ask(hub, "PUT", address, b"weight")[0], ask(hub, *verify)[0], commit(hub, lfs)] == [400, 404, 400]
    assert [ask(hub, "PUT", address, b"weights")[0], ask(hub, *verify)[0], commit(hub, lfs)] == [200, 200, 200]
    assert hub.files("someone/adapter") == {"a.bin": b"weights"}
    assert "actions" not in json.loads(ask(hub, "POST", "/someone/adapter.git/info/lfs/objects/batch", batch)[2])


@pytest.mark.parametrize("name", ["a.bin", "a.txt"])
def test_parts_of_files(hub, tmp_path, name):
    (tmp_path / name).write_bytes(b"0123456789")
    hub.seed("someone/data", tmp_path, kind="dataset")
    path = f"/datasets/someone/data/resolve/main/{name}"
    for part, content in {"2-4": b"234", "7-": b"789", "8-20": b"89"}.items():
        status, headers, body = ask(hub, "GET", path, Range=f"bytes={part}")
        assert (status, body, headers["Content-Length"]) == (206, content, str(len(content)))
        assert headers["Content-Range"] == f"bytes {part[0]}-{int(part[0]) + len(content) - 1}/10"
    status, headers, body = ask(hub, "HEAD", path)
    assert (status, headers["Content-Length"], body) == (200, "10", b"")
    assert headers["X-Linked-Size"] == ("10" if name == "a.bin" else None)
    assert len(headers["ETag"]) == (66 if name == "a.bin" else 42)
    assert headers["X-Repo-Commit"] == hub.repos["datasets/someone/data"].heads["main"].oid
    assert ask(hub, "GET", "/datasets/someone/data/resolve/main/none")[1]["X-Error-Code"] == "EntryNotFound"
    assert hub.requests[-1] == "GET /datasets/someone/data/resolve/main/none"
