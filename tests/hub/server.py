"""A small Hub on loopback: the calls of huggingface_hub over real HTTP, kept in memory, files in LFS mode.

Model and dataset repositories with commits, cards and access tokens, as much as pushing, reading cards, downloading and
`load_dataset` need. Clients run with HF_ENDPOINT=<hub.url> and HF_HUB_DISABLE_XET=1. Nothing here is persistent.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import parse_qs, unquote

import yaml  # comes with huggingface_hub

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".gguf", ".gz", ".zip")
LFS_BYTES = 10 * 1000**2
DAY = datetime(2026, 1, 1, tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `authorized` says whether there was an Authorization header."""

    method: str
    path: str
    authorized: bool


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with to find out whether its file changed."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, File]
    parent: str

    @property
    def oid(self) -> str:
        listing = "".join(f"{path} {file.oid}\n" for path, file in sorted(self.files.items()))
        return hashlib.sha1(f"{self.parent} {self.title}\n{listing}".encode()).hexdigest()


@dataclass
class Repo:
    kind: str  # "models" or "datasets", as in the API's paths
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("initial commit", {}, "")])

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", "refs/heads/main", commit.oid):
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class Refusal(Exception):
    """An answer other than success: HTTP status, X-Error-Code, message and, where it is not the usual one, the body."""

    def __init__(self, status: int, code: str, message: str, body: dict | None = None):
        self.status, self.code, self.message = status, code, message
        self.body = {"error": message} if body is None else body


class Hub:
    """`with Hub({"hf_token": "me"}) as hub: ...` serves on hub.url; the tests look into repos, requests and objects."""

    def __init__(self, users: dict[str, str], chunk_bytes: int | None = None, faults: dict[str, int] | None = None):
        self.users = users  # token -> name
        self.chunk_bytes = chunk_bytes  # LFS files beyond this size are uploaded in parts
        self.faults = faults or {}  # pattern of paths -> HTTP status that they get
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS store, sha256 -> content
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, kind: str = "models") -> dict[str, bytes]:
        """What the main branch of a repository holds."""
        commit = self.repos[kind, repo_id].commit("main")
        return {path: file.content for path, file in commit.files.items()}

    def stored(self) -> Iterator[bytes]:
        """Every content the server ever kept: all commits, the LFS store, parts of unfinished uploads."""
        for repo in self.repos.values():
            for commit in repo.commits:
                yield commit.title.encode()
                for path, file in commit.files.items():
                    yield path.encode()
                    yield file.content
        yield from self.objects.values()
        yield from self.parts.values()


def front_matter(text: str) -> dict:
    """The metadata block on top of a card; ValueError where it is not a YAML mapping."""
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("The metadata should be a mapping")
    return metadata or {}


REPO = "/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
FILES = "/((?P<kind>datasets)/)?(?P<id>[^/]+/[^/]+)"


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    # ---- from bytes to a route and back

    def _serve(self) -> None:
        self.body = self._read_body()  # before any answer, or the connection is out of step
        path, _, query = self.path.partition("?")
        self.query = parse_qs(query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append(Request(self.command, self.path, bool(self.token)))
        try:
            for pattern, status in self.hub.faults.items():
                if re.fullmatch(pattern, path):
                    raise Refusal(status, "", "Out of order")
            if self.token and self.token not in self.hub.users:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            for methods, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path) if self.command in methods else None
                if match:
                    values = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                    return answer(self, **values)
            raise Refusal(404, "", f"Not found: {self.command} {path}")
        except Refusal as refusal:
            # The Hub's HTTP statuses are what the client goes by; the code tells repository, revision and file apart.
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self._json(refusal.body, refusal.status, {name: value for name, value in headers.items() if value})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def log_message(self, format: str, *args: object) -> None:
        pass

    # ---- who may do what

    @property
    def user(self) -> str:
        if not self.token:
            raise Refusal(401, "", "Invalid username or password.")
        return self.hub.users[self.token]

    def _readable(self, kind: str, id: str) -> Repo:
        repo = self.hub.repos.get((kind, id))
        if repo is None or (repo.private and self.hub.users.get(self.token) != repo.owner):
            # A private repository looks like a missing one; without a token both might be there.
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _writable(self, kind: str, id: str) -> Repo:
        repo = self._readable(kind, id)
        if self.user != repo.owner:
            raise Refusal(403, "", f"You are not allowed to write to {id}")
        return repo

    # ---- accounts and repositories

    def whoami(self) -> None:
        self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind = wanted.get("type", "model") + "s"
        id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if id.split("/")[0] != self.user:
            raise Refusal(403, "", f"You don't have the rights to create a {kind[:-1]} under this namespace")
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{id}"
        with self.hub.lock:
            if (kind, id) in self.hub.repos:
                message = f"You already created this {kind[:-1]} repo"
                raise Refusal(409, "", message, {"error": message, "url": url})
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repos[kind, id] = Repo(kind, id, bool(private))
        self._json({"url": url, "name": id, "id": id})

    def delete(self) -> None:
        wanted = json.loads(self.body)
        id = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        repo = self._writable(wanted.get("type", "model") + "s", id)
        del self.hub.repos[repo.kind, repo.id]
        self._json({})

    def settings(self, kind: str, id: str) -> None:
        repo, wanted = self._writable(kind, id), json.loads(self.body)
        repo.private = wanted.get("private", wanted.get("visibility") == "private")
        self._json({"private": repo.private})

    # ---- uploads

    def validate_yaml(self) -> None:
        try:
            metadata = front_matter(json.loads(self.body)["content"])
        except ValueError as error:
            raise Refusal(400, "", "Invalid metadata", {"errors": [{"message": str(error)}], "warnings": []}) from None
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": warnings})

    def preupload(self, kind: str, id: str, revision: str) -> None:
        present = self._writable(kind, id).commit(revision).files
        answers = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_BYTES or b"\0" in sample
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in present:
                answer["oid"] = present[file["path"]].oid
            answers.append(answer)
        self._json({"files": answers})

    def lfs_batch(self, id: str, kind: str = "models") -> None:
        self._writable(kind, id)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{oid}"
                header = {}
                if self.hub.chunk_bytes and size > self.hub.chunk_bytes:
                    count = -(-size // self.hub.chunk_bytes)
                    header = {f"{part:05d}": f"{href}/{part}" for part in range(1, count + 1)}
                    header["chunk_size"] = str(self.hub.chunk_bytes)
                answer["actions"] = {"upload": {"href": href, "header": header}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self._json({"transfer": "multipart" if self.hub.chunk_bytes else "basic", "objects": answers})

    def lfs_put(self, oid: str, part: str | None = None) -> None:
        if part is None:
            self._keep(oid, self.body)
        else:
            self.hub.parts[oid, int(part)] = self.body
        self._answer(b"", headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        contents = []
        for part in json.loads(self.body)["parts"]:
            content = self.hub.parts.pop((oid, part["partNumber"]))
            if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                raise Refusal(400, "", f"Wrong ETag for part {part['partNumber']}")
            contents.append(content)
        self._keep(oid, b"".join(contents))
        self._json({})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "", "The content does not match its SHA-256")
        self.hub.objects[oid] = content

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refusal(404, "", "Object not found")
        self._json({})

    def commit(self, kind: str, id: str, revision: str) -> None:
        repo = self._writable(kind, id)
        header, *operations = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        with self.hub.lock:
            head = repo.commit(revision)
            if header["value"].get("parentCommit", head.oid) != head.oid:
                raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                elif operation["key"] == "lfsFile" and value["oid"] in self.hub.objects:
                    files[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
                elif operation["key"] == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                else:
                    raise Refusal(400, "", f"Cannot apply {operation['key']} to {value['path']}")
            repo.commits.append(Commit(header["value"]["summary"], files, head.oid))
        oid = repo.commits[-1].oid
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}"})

    # ---- reading

    def info(self, kind: str, id: str, revision: str = "main") -> None:
        repo = self._readable(kind, id)
        commit = repo.commit(revision)
        readme = commit.files.get("README.md")
        try:
            card = front_matter(readme.content.decode()) if readme else None
        except ValueError:
            card = None
        described = {
            name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if card and name in card
        }
        self._json(
            {
                "id": id,
                "author": repo.owner,
                "sha": commit.oid,
                "lastModified": DAY,
                "createdAt": DAY,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": list((card or {}).get("tags") or []),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
                **described,
            }
        )

    def _entry(self, path: str, commit: Commit) -> dict | None:
        file = commit.files.get(path)
        if file is None:
            inside = any(name.startswith(path + "/") for name in commit.files)
            return (
                {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
                if inside
                else None
            )
        entry = {"type": "file", "oid": file.git_oid, "size": len(file.content), "path": path}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        return entry

    def tree(self, kind: str, id: str, revision: str, path: str = "") -> None:
        commit = self._readable(kind, id).commit(revision)
        prefix = f"{path}/" if path else ""
        below = [name.removeprefix(prefix).split("/") for name in commit.files if name.startswith(prefix)]
        if path and not below:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        depth = max((len(parts) for parts in below), default=0) if recursive else 1
        names = {prefix + "/".join(parts[: level + 1]) for parts in below for level in range(min(depth, len(parts)))}
        self._json([self._entry(name, commit) for name in sorted(names)])

    def paths_info(self, kind: str, id: str, revision: str) -> None:
        commit = self._readable(kind, id).commit(revision)
        if "json" in self.headers.get("Content-Type", ""):
            wanted = json.loads(self.body)["paths"]
        else:
            wanted = parse_qs(self.body.decode()).get("paths", [])
        entries = [self._entry(path.strip("/"), commit) for path in wanted]
        self._json([entry for entry in entries if entry])

    def refs(self, kind: str, id: str) -> None:
        head = self._readable(kind, id).commit("main").oid
        branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": head}
        self._json({"branches": [branch], "converts": [], "tags": [], "pullRequests": []})

    def commits(self, kind: str, id: str, revision: str) -> None:
        repo = self._readable(kind, id)
        last = repo.commits.index(repo.commit(revision))
        entry = {"authors": [{"user": repo.owner}], "date": DAY, "message": ""}
        self._json([{**entry, "id": commit.oid, "title": commit.title} for commit in repo.commits[last::-1]])

    def resolve(self, id: str, revision: str, path: str, kind: str = "models") -> None:
        commit = self._readable(kind, id).commit(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        headers["ETag"] = f'"{file.oid}"'
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(file.content, headers=headers)
        first, size = int(wanted[1]), len(file.content)
        last = min(int(wanted[2] or size), size - 1)
        if first > last:
            raise Refusal(416, "", "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._answer(file.content[first : last + 1], 206, headers)


ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create),
    (("DELETE",), "/api/repos/delete", Handler.delete),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("PUT",), f"{REPO}/settings", Handler.settings),
    (("POST",), f"{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), f"{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST",), f"{REPO}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (("GET",), f"{REPO}(/revision/(?P<revision>[^/]+))?", Handler.info),
    (("GET",), f"{REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", Handler.tree),
    (("GET",), f"{REPO}/commits/(?P<revision>[^/]+)", Handler.commits),
    (("GET",), f"{REPO}/refs", Handler.refs),
    (("POST",), f"{FILES}\\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})(/(?P<part>[0-9]+))?", Handler.lfs_put),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.lfs_verify),
    (("POST",), "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_complete),
    (("GET", "HEAD"), f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
