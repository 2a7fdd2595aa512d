"""A strict Hub on the loopback interface: the endpoints that publishing and loading a model use, and nothing else.

It keeps repositories in memory and looks at everything the client sends. What a real Hub would not be sent (an unknown
endpoint, a write without a token, bytes that do not match their announced digest or size, a commit of a file that was
not uploaded) is answered by an error and kept in `problems`, which a test then finds not to be empty.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx", ".gguf")
MULTIPART_ABOVE = 20_000
CHUNK = 8_192
ID = r"(?P<id>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class File:
    oid: str  # git SHA-1 of a regular file, SHA-256 of a large one
    size: int
    large: bool


@dataclass
class Commit:
    title: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repository:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    announced: dict[str, dict] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def history(self, revision: str = "main") -> list[Commit]:
        commits, sha = [], self.refs[revision]
        while sha is not None:
            commits.append(self.commits[sha])
            sha = self.commits[sha].parent
        return commits


@dataclass
class Fault:
    """Answer matching requests by a status, or break the connection (status 0)."""

    method: str
    pattern: str
    status: int
    after: int = 0
    times: int = 1_000_000


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, problem: bool = False) -> None:
        super().__init__(message)
        self.status, self.code, self.problem = status, code, problem


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # by oid: regular files
        self.objects: dict[str, bytes] = {}  # by SHA-256: large files
        self.parts: dict[str, dict[int, bytes]] = {}
        self.expected_sizes: dict[str, int] = {}
        self.log: list[str] = []
        self.problems: list[str] = []
        self.faults: list[Fault] = []
        self.received = 0  # bytes of large files
        self.hold: threading.Event | None = None  # large files wait for it
        self.waiting = threading.Event()
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host to the client, as on the real Hub, where large files are elsewhere and the token must not go.
        self.cdn_url = f"http://localhost:{port}/cdn"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, pattern: str, status: int, **options: int) -> None:
        self.faults.append(Fault(method, pattern, status, **options))

    def content(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        repository = self.repositories[repo_id]
        file = repository.commits[repository.refs[revision]].files[path]
        return self.objects[file.oid] if file.large else self.blobs[file.oid]

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        repository = self.repositories[repo_id]
        return set(repository.commits[repository.refs[revision]].files)

    def requested(self, repo_id: str) -> set[str]:
        """Files of a repository that were asked for, their headers or their content."""
        found = (re.match(rf"(?:GET|HEAD) /{re.escape(repo_id)}/resolve/[^/]+/(\S+)", line) for line in self.log)
        return {match.group(1) for match in found if match} & self.files(repo_id)

    # --- what the endpoints do -------------------------------------------------------------------------------

    def repository(self, repo_id: str, request: _Handler) -> Repository:
        found = self.repositories.get(repo_id)
        if found is None or (found.private and not request.logged_in):
            raise Refused(404 if request.logged_in else 401, "Repository not found", "RepoNotFound")
        return found

    def commit_of(self, repository: Repository, revision: str) -> tuple[str, Commit]:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    def registry(self, request: _Handler) -> dict:
        raise Refused(404, "asked by newer clients for their own user agent, and not needed")

    def whoami(self, request: _Handler) -> dict:
        request.need_token()
        return {"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}}

    def create(self, request: _Handler) -> dict:
        request.need_token()
        body = request.json()
        request.check(set(body) <= {"name", "organization", "type", "visibility", "private"}, f"create: {body}")
        request.check(body.get("type", "model") == "model", f"create: type {body.get('type')}")
        repo_id = f"{body['organization'] or 'org'}/{body['name']}"
        if not repo_id.startswith("org/"):
            raise Refused(403, f"You don't have the rights to create a model under {body['organization']}")
        if repo_id in self.repositories:
            raise Refused(409, "You already created this model repo")
        private = body.get("visibility") == "private" or body.get("private") is True
        self.repositories[repo_id] = Repository(private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.blobs[git_sha1(attributes)] = attributes
        first = {".gitattributes": File(git_sha1(attributes), len(attributes), large=False)}
        self.add_commit(self.repositories[repo_id], "main", Commit("initial commit", first, None))
        return {"url": f"{self.url}/{repo_id}"}

    def add_commit(self, repository: Repository, ref: str, commit: Commit) -> str:
        text = json.dumps([commit.title, commit.parent, sorted(commit.files), len(repository.commits)])
        sha = hashlib.sha1(text.encode()).hexdigest()
        repository.commits[sha] = commit
        repository.refs[ref] = sha
        return sha

    def branch(self, request: _Handler, id: str, name: str) -> dict:
        request.need_token()
        repository = self.repository(id, request)
        request.check(not name.startswith("refs/"), f"branch {name}")
        if name in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[name] = repository.refs["main"]
        return {}

    def info(self, request: _Handler, id: str, revision: str = "main") -> dict:
        repository = self.repository(id, request)
        sha, commit = self.commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {
            "_id": "0",
            "id": id,
            "modelId": id,
            "sha": sha,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def tree(self, request: _Handler, id: str, revision: str, folder: str = "") -> list[dict]:
        commit = self.commit_of(self.repository(id, request), revision)[1]
        prefix = f"{folder}/" if folder else ""
        inside = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            inside = {path: file for path, file in inside.items() if "/" not in path.removeprefix(prefix)}
        listed = []
        for path, file in sorted(inside.items()):
            entry: dict = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
            if file.large:
                entry["oid"] = git_sha1(file.oid.encode())
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 134}
            listed.append(entry)
        return listed

    def validate_card(self, request: _Handler) -> dict:
        body = request.json()
        request.check(set(body) == {"content", "repoType"}, f"validate-yaml: {sorted(body)}")
        if "license: nonsense" in body["content"]:
            request.reply(400, {"errors": [{"message": '"license" must be one of a list'}], "warnings": []})
            return {}
        return {"errors": [], "warnings": []}

    def preupload(self, request: _Handler, id: str, revision: str) -> dict:
        request.need_token()
        repository = self.repository(id, request)
        commit = self.commit_of(repository, revision)[1]
        answer = []
        for file in request.json()["files"]:
            request.check(set(file) == {"path", "sample", "size"}, f"preupload: {sorted(file)}")
            sample = base64.b64decode(file["sample"], validate=True)
            request.check(len(sample) == min(512, file["size"]), f"preupload: sample of {file['path']}")
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10_000_000 else "regular"
            repository.announced[file["path"]] = {**file, "sample": sample, "mode": mode}
            there = commit.files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            answer.append({**entry, **({"oid": there.oid} if there else {})})
        return {"files": answer, "commitOid": repository.resolve(revision)}

    def batch(self, request: _Handler, id: str) -> dict:
        request.need_token()
        repository = self.repository(id, request)
        body = request.json()
        request.check(body["operation"] == "upload" and body["hash_algo"] == "sha256", f"batch: {body}")
        request.check("multipart" in body["transfers"] and "basic" in body["transfers"], f"batch: {body['transfers']}")
        sizes = {file["size"] for file in repository.announced.values() if file["mode"] == "lfs"}
        oids = [entry["oid"] for entry in body["objects"]]
        request.check(len(oids) == len(set(oids)), "batch: the same object twice")
        objects = []
        for entry in body["objects"]:
            oid, size = entry["oid"], entry["size"]
            request.check(re.fullmatch("[0-9a-f]{64}", oid) is not None and size in sizes, f"batch: {entry}")
            if oid in self.objects:
                request.check(size == len(self.objects[oid]), f"batch: size of {oid}")
                objects.append({"oid": oid, "size": size})
                continue
            self.expected_sizes[oid] = size
            verify = {"href": f"{self.url}/lfs/{oid}/verify"}
            if size > MULTIPART_ABOVE:
                count = -(-size // CHUNK)
                parts = {str(part): f"{self.url}/lfs/{oid}/part/{part}" for part in range(1, count + 1)}
                upload = {"href": f"{self.url}/lfs/{oid}/complete", "header": {"chunk_size": str(CHUNK), **parts}}
            else:
                upload = {"href": f"{self.url}/lfs/{oid}"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return {"transfer": "multipart", "objects": objects}

    def store(self, request: _Handler, oid: str, content: bytes) -> None:
        expected = self.expected_sizes.get(oid)
        request.check(expected == len(content), f"upload: {len(content)} bytes of {oid}, {expected} were announced")
        request.check(hashlib.sha256(content).hexdigest() == oid, f"upload: content is not {oid}")
        self.objects[oid] = content

    def put(self, request: _Handler, oid: str) -> dict:
        request.check(oid in self.expected_sizes, f"upload of {oid}, which was not announced")
        self.store(request, oid, request.body)
        self.received += len(request.body)
        return {}

    def put_part(self, request: _Handler, oid: str, part: str) -> dict:
        request.check(oid in self.expected_sizes, f"upload of {oid}, which was not announced")
        with self.lock:
            self.parts.setdefault(oid, {})[int(part)] = request.body
            self.received += len(request.body)
        request.extra_headers["ETag"] = f'"{hashlib.md5(request.body).hexdigest()}"'
        return {}

    def complete(self, request: _Handler, oid: str) -> dict:
        body = request.json()
        stored = self.parts.get(oid, {})
        request.check(body["oid"] == oid, f"complete: {body['oid']} for {oid}")
        etags = {entry["partNumber"]: entry["etag"].strip('"') for entry in body["parts"]}
        own = {number: hashlib.md5(content).hexdigest() for number, content in stored.items()}
        request.check(etags == own, f"complete: parts of {oid} differ")
        self.store(request, oid, b"".join(stored[number] for number in sorted(stored)))
        return {}

    def verify(self, request: _Handler, oid: str) -> dict:
        request.need_token()
        body = request.json()
        known = self.objects.get(oid)
        request.check(known is not None and body == {"oid": oid, "size": len(known)}, f"verify: {body}")
        return {}

    def commit(self, request: _Handler, id: str, revision: str) -> dict:
        request.need_token()
        repository = self.repository(id, request)
        head, parent = self.commit_of(repository, revision)
        request.check(request.headers["Content-Type"] == "application/x-ndjson", "commit: not ndjson")
        lines = [json.loads(line) for line in request.body.splitlines()]
        request.check([line["key"] for line in lines].count("header") == 1, "commit: one header expected")
        header = lines[0]["value"]
        request.check(lines[0]["key"] == "header" and bool(header["summary"]), f"commit: {header}")
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files, written = dict(parent.files), set()
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            request.check(path not in written and ".." not in path.split("/") and path[0] != "/", f"commit: {path}")
            written.add(path)
            if line["key"] == "deletedFile":
                request.check(path in files, f"commit: {path} to be deleted is not there")
                del files[path]
                continue
            announced = repository.announced.get(path)
            request.check(announced is not None, f"commit: {path} was not announced")
            if line["key"] == "file":
                request.check(value["encoding"] == "base64", f"commit: encoding of {path}")
                content = base64.b64decode(value["content"], validate=True)
                self.blobs[git_sha1(content)] = content
                files[path] = File(git_sha1(content), len(content), large=False)
            else:
                request.check(line["key"] == "lfsFile" and value["algo"] == "sha256", f"commit: {line}")
                request.check(value["oid"] in self.objects, f"commit: {path} was not uploaded")
                content = self.objects[value["oid"]]
                request.check(value["size"] == len(content), f"commit: size of {path}")
                files[path] = File(value["oid"], len(content), large=True)
            fits = len(content) == announced["size"] and content.startswith(announced["sample"])
            request.check(fits, f"commit: {path} is not what was announced")
            request.check((announced["mode"] == "lfs") == (line["key"] == "lfsFile"), f"commit: mode of {path}")
        request.check(files != parent.files, "commit: nothing changes")
        repository.announced.clear()
        answer: dict = {"success": True}
        ref = revision
        if request.query.get("create_pr") == ["1"]:
            number = len(repository.pull_requests) + 1
            repository.pull_requests[number] = revision
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{id}/discussions/{number}"
        sha = self.add_commit(repository, ref, Commit(header["summary"], files, head))
        return {**answer, "commitOid": sha, "commitUrl": f"{self.url}/{id}/commit/{sha}"}

    def resolve(self, request: _Handler, id: str, revision: str, path: str) -> None:
        sha, commit = self.commit_of(self.repository(id, request), revision)
        request.extra_headers["X-Repo-Commit"] = sha
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, f"{path} is not in {revision}", "EntryNotFound")
        if file.large:
            headers = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
            request.extra_headers |= {**headers, "Location": f"{self.cdn_url}/{file.oid}"}
            request.reply(302, {})
            return
        request.extra_headers["ETag"] = f'"{file.oid}"'
        request.reply(200, self.blobs[file.oid])

    def cdn(self, request: _Handler, oid: str) -> None:
        request.check("Authorization" not in request.headers, "the token was sent to another host")
        request.extra_headers["ETag"] = f'"{oid}"'
        request.reply(200, self.objects[oid])


ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", LoopbackHub.whoami),
    ("GET", "/api/agent-harnesses", LoopbackHub.registry),
    ("POST", "/api/repos/create", LoopbackHub.create),
    ("POST", "/api/validate-yaml", LoopbackHub.validate_card),
    ("GET", f"/api/models/{ID}", LoopbackHub.info),
    ("GET", f"/api/models/{ID}/revision/(?P<revision>[^/]+)", LoopbackHub.info),
    ("GET", f"/api/models/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", LoopbackHub.tree),
    ("POST", f"/api/models/{ID}/branch/(?P<name>[^/]+)", LoopbackHub.branch),
    ("POST", f"/api/models/{ID}/preupload/(?P<revision>[^/]+)", LoopbackHub.preupload),
    ("POST", f"/api/models/{ID}/commit/(?P<revision>[^/]+)", LoopbackHub.commit),
    ("POST", f"/{ID}\\.git/info/lfs/objects/batch", LoopbackHub.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", LoopbackHub.put),
    ("PUT", r"/lfs/(?P<oid>\w+)/part/(?P<part>\d+)", LoopbackHub.put_part),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", LoopbackHub.complete),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", LoopbackHub.verify),
    ("HEAD", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", LoopbackHub.resolve),
    ("GET", f"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", LoopbackHub.resolve),
    ("HEAD", r"/cdn/(?P<oid>\w+)", LoopbackHub.cdn),
    ("GET", r"/cdn/(?P<oid>\w+)", LoopbackHub.cdn),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: LoopbackHub

    def handle_request(self) -> None:
        hub, url = self.server_hub, urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.extra_headers: dict[str, str] = {}
        self.replied = False
        self.body = self.read_body()
        if len(self.body) < int(self.headers.get("Content-Length") or 0):
            self.close_connection = True  # the client is gone, and what it had sent is nobody's
            return
        # Segments are quoted one by one: a `/` inside a branch name arrives as %2F.
        path = url.path
        with hub.lock:
            hub.log.append(f"{self.command} {unquote(path)}")
            fault = next((f for f in hub.faults if f.method == self.command and re.search(f.pattern, path)), None)
            if fault is not None and fault.after > 0:
                fault.after -= 1
                fault = None
            elif fault is not None:
                fault.times -= 1
                if fault.times <= 0:
                    hub.faults.remove(fault)
        if fault is not None:
            if fault.status == 0:
                self.close_connection = True
                self.connection.close()
            else:
                self.reply(fault.status, {"error": "out of order"})
            return
        if self.command == "PUT" and hub.hold is not None:
            hub.waiting.set()
            hub.hold.wait(60)
        self.answer(path)

    def answer(self, path: str) -> None:
        hub = self.server_hub
        try:
            self.check_token()
            for method, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    groups = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                    with hub.lock:
                        result = action(hub, self, **groups)
                    if not self.replied:
                        self.reply(200, result)
                    return
            raise Refused(501, f"unknown endpoint {self.command} {self.path}", problem=True)
        except Refused as refusal:
            if refusal.problem:
                hub.problems.append(str(refusal))
            self.extra_headers["X-Error-Message"] = str(refusal)
            if refusal.code:
                self.extra_headers["X-Error-Code"] = refusal.code
            self.reply(refusal.status, {"error": str(refusal)})
        except (KeyError, ValueError, TypeError) as error:
            hub.problems.append(f"{self.command} {self.path}: {error!r}")
            self.reply(400, {"error": repr(error)})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def json(self) -> dict:
        return json.loads(self.body)

    @property
    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def check_token(self) -> None:
        if self.headers.get("Authorization") is not None and not self.logged_in:
            raise Refused(401, "Invalid credentials in Authorization header")

    def need_token(self) -> None:
        if not self.logged_in:
            raise Refused(401, f"{self.command} {self.path} without a token", problem=True)

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise Refused(400, what, problem=True)

    def reply(self, status: int, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.replied = True
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.extra_headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
