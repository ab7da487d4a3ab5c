"""A Hugging Face hub on loopback: serves a folder to `huggingface_hub` through `HF_ENDPOINT`.

    ROOT/models/OWNER/NAME/...         a model repository, revision "main"
    ROOT/datasets/OWNER/NAME/...       a dataset repository
    ROOT/models/OWNER/NAME@REV/...     the same repository at another branch or tag
    ROOT/objects/SHA256                large files that were uploaded

    with fake_hub(root) as hub, client_of(hub, tmp_path / "home"):
        huggingface_hub.snapshot_download("owner/name")
    assert "GET /owner/name/resolve/main/config.json" in hub.log

Answers repository info, tree listings and files (HEAD, GET, ranges). A revision's commit is a hash of its content, so a
changed file is a new commit. Repositories in `hub.gated` give files only to `hub.tokens`; a file name in `hub.cuts` is
broken off halfway once. Uploads go to branch "main", large files through git's protocol for them (Xet is switched
off), and need one of `hub.tokens`; `hub.refuse_commits` makes each fail at its last request. To serve more, subclass
`Handler`, add to `ROUTES`, and pass it to `fake_hub`. For another process use `environment(hub, home)`.
"""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock
from urllib.parse import unquote, urlsplit

REPO = r"(?P<owner>[^/]+)/(?P<name>[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPO}"


class NotServed(Exception):
    """A request that is answered with an error: status and the hub's error code."""


class Hub(ThreadingHTTPServer):
    """The server; tests read `log` and set `gated`, `tokens` and `cuts`."""

    daemon_threads = True
    request_queue_size = 256  # loader workers connect with all their threads at once

    def __init__(self, root: Path, handler: type["Handler"]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.root = root
        self.log: list[str] = []  # "METHOD PATH" or "METHOD PATH RANGE", in order
        self.gated: set[str] = set()  # "OWNER/NAME"
        self.tokens: set[str] = set()  # that have been granted access to gated repositories, and may upload
        self.created: dict[str, Any] = {}  # "OWNER/NAME" -> what the client asked for
        self.refuse_commits = False
        self.cuts: list[str] = []  # names of files whose next GET ends in the middle

    @property
    def url(self) -> str:
        """The value for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_port}"

    def folder(self, kind: str, repo: str, revision: str) -> Path:
        """The folder of a repository at a branch, tag or commit."""
        main = self.root / kind / repo
        if not main.is_dir():
            raise NotServed(404, "RepoNotFound")
        revisions = {path.name.partition("@")[2]: path for path in main.parent.glob(f"{main.name}@*")} | {"main": main}
        known = revisions | {commit(path): path for path in revisions.values()}
        if revision not in known:
            raise NotServed(404, "RevisionNotFound")
        return known[revision]


def files(folder: Path) -> list[str]:
    """Paths of a repository's files."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def etag(path: Path) -> str:
    """The content's hash, as the hub gives it for large files."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit(folder: Path) -> str:
    """40 characters that stand for the content of a repository."""
    return hashlib.sha1("".join(f"{name} {etag(folder / name)}\n" for name in files(folder)).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One connection: the first of `ROUTES` whose method and whole path match answers."""

    protocol_version = "HTTP/1.1"
    server: Hub
    ROUTES: ClassVar[list[tuple[str, str, str]]] = [
        ("GET", rf"{API}(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?", "tree"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"{API}/preupload/main", "preupload"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "put"),
        ("POST", rf"{API}/commit/main", "commit"),
        ("GET|HEAD", rf"(/(?P<kind>datasets))?/{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
    ]

    def log_message(self, *_: object) -> None:
        """Nothing on the screen: `Hub.log` has the requests."""

    def answer(self) -> None:
        """Find the route; errors as the hub words them."""
        path = urlsplit(self.path).path
        self.server.log.append(f"{self.command} {unquote(path)} {self.headers.get('Range', '')}".strip())
        try:
            for methods, pattern, name in self.ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in methods.split("|"):
                    values = {key: unquote(value or "") for key, value in found.groupdict().items()}
                    return getattr(self, name)(**values)
            raise NotServed(404, "NoSuchRoute")
        except NotServed as error:
            status, code = error.args
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send(status, b"" if self.command == "HEAD" else b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        except OSError:  # a client that gave up
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """A whole answer; `headers` may give the length of a body that is not sent."""
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def send_json(self, value: Any, status: int = 200) -> None:
        """A JSON answer."""
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def info(self, kind: str, owner: str, name: str, revision: str = "") -> None:
        """A repository's commit and files."""
        repo = f"{owner}/{name}"
        folder = self.server.folder(kind, repo, revision or "main")
        facts = {"id": repo, "_id": repo, "sha": commit(folder), "private": False, "disabled": False, "tags": []}
        gated = "manual" if repo in self.server.gated else False
        siblings = [{"rfilename": file} for file in files(folder)]
        self.send_json({**facts, "downloads": 0, "likes": 0, "gated": gated, "siblings": siblings})

    def tree(self, kind: str, owner: str, name: str, revision: str, folder: str = "") -> None:
        """All files below a folder of the repository, with sizes; always recursive."""
        root = self.server.folder(kind, f"{owner}/{name}", revision)
        listed = [
            {"type": "file", "path": file, "size": (root / file).stat().st_size, "oid": etag(root / file)[:40]}
            for file in files(root)
            if file.startswith(f"{folder}/" if folder else "")
        ]
        self.send_json(listed)

    def check_access(self, repo: str) -> None:
        """Gated repositories ask for a token, and for one that was granted access."""
        if repo not in self.server.gated:
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.server.tokens:
            raise NotServed(403 if token else 401, "GatedRepo")

    def body(self) -> bytes:
        """What the client sent, chunked or with its length ahead."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def written(self) -> bytes:
        """The body of a request that only `tokens` may send."""
        body = self.body()
        if self.headers.get("Authorization", "").removeprefix("Bearer ") not in self.server.tokens:
            self.send(403, b'{"error": "this token may not write"}')
            raise OSError("refused")  # answered already; the client comes back on another connection
        return body

    def create(self) -> None:
        """A new, empty repository; 409 when it is there."""
        wanted = json.loads(self.written())
        repo = f"{wanted['organization']}/{wanted['name']}"
        folder = self.server.root / f"{wanted.get('type') or 'model'}s" / repo
        there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.server.created.setdefault(repo, wanted)
        self.send_json({"url": f"{self.server.url}/{repo}", "name": repo}, 409 if there else 200)

    def validate(self) -> None:
        """The head of a card: YAML between two lines of dashes."""
        content = json.loads(self.body())["content"]
        whole = re.match(r"---\n.*?\n---\n", content, re.DOTALL)
        self.send_json({"errors": [] if whole else [{"message": "no metadata"}], "warnings": []}, 200 if whole else 400)

    def preupload(self, kind: str, owner: str, name: str) -> None:
        """Which files are large."""
        self.server.folder(kind, f"{owner}/{name}", "main")
        asked = json.loads(self.written())["files"]
        modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in asked]
        self.send_json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def batch(self, owner: str, name: str) -> None:
        """Where large files go; nowhere when they are here."""
        objects = json.loads(self.written())["objects"]
        for item in objects:
            if not (self.server.root / "objects" / item["oid"]).exists():
                item["actions"] = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
        self.send_json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        """A large file."""
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.send_json({"error": "another content than announced"}, 400)
        (self.server.root / "objects").mkdir(exist_ok=True)
        (self.server.root / "objects" / oid).write_bytes(data)
        self.send(200, b"")

    def commit(self, kind: str, owner: str, name: str) -> None:
        """Files added and deleted, all at once."""
        folder = self.server.folder(kind, f"{owner}/{name}", "main")
        operations = [json.loads(line) for line in self.written().splitlines()]
        if self.server.refuse_commits:
            return self.send_json({"error": "no room left"}, 400)
        for operation in operations:
            value = operation["value"]
            path = folder / value.get("path", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            if operation["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                shutil.copyfile(self.server.root / "objects" / value["oid"], path)
            elif operation["key"] == "deletedFile":
                path.unlink()
        oid = commit(folder)
        self.send_json({"commitUrl": f"{self.server.url}/{owner}/{name}/commit/{oid}", "commitOid": oid})

    def resolve(self, owner: str, name: str, revision: str, file: str, kind: str = "") -> None:
        """A file, or the part of it that is asked for."""
        root = self.server.folder(kind or "models", f"{owner}/{name}", revision)
        self.check_access(f"{owner}/{name}")
        if file not in files(root):
            raise NotServed(404, "EntryNotFound")
        data, tag = (root / file).read_bytes(), f'"{etag(root / file)}"'
        facts = {"ETag": tag, "X-Repo-Commit": commit(root), "Accept-Ranges": "bytes"}
        facts |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": tag}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, first, last = 200, 0, len(data) - 1
        if wanted:
            status, first, last = 206, int(wanted[1]), min(int(wanted[2] or last), last)
            if first >= len(data):
                raise NotServed(416, "RangeNotSatisfiable")
            facts["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        body = data[first : last + 1]
        facts["Content-Length"] = str(len(body))
        if self.command == "HEAD":
            self.send(status, b"", facts)
        elif file in self.server.cuts:
            self.server.cuts.remove(file)
            self.send(status, body[: len(body) // 2], facts)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.send(status, body, facts)


@contextlib.contextmanager
def fake_hub(root: Path, handler: type[Handler] = Handler) -> Iterator[Hub]:
    """A hub that runs while the block does."""
    hub = Hub(root, handler)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """Variables with which another process uses the hub; `home` is its cache."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    variables |= {"HF_HUB_DISABLE_XET": "1"}
    return variables | ({"HF_TOKEN": token} if token else {})


@contextlib.contextmanager
def client_of(hub: Hub, home: Path, token: str | None = None) -> Iterator[None]:
    """Point `huggingface_hub` in this process at the hub; it reads its variables only when it is imported."""
    from huggingface_hub import constants, hf_api

    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(constants, **values))
        stack.enter_context(mock.patch.object(hf_api.api, "endpoint", hub.url))  # of the module's functions
        stack.enter_context(mock.patch.dict("os.environ", environment(hub, home, token)))
        yield
