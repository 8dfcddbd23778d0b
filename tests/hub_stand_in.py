"""A stand-in of the Hugging Face Hub on this machine: as much of its API as its client speaks to share and to load."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

LICENCES = ("mit", "apache-2.0", "cc-by-4.0", "unknown")
TOKEN, USER = "hf_a_token_of_the_tests", "user"


class Hub(ThreadingHTTPServer):
    """repos: {name: {"private", "commits": [(id, message, {path: bytes})]}}. seen: (method, path) of every request.

    lies: {path in a repository: size that is announced}. broken: a part of a path whose requests end in 500.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.blobs, self.seen, self.lies, self.broken = {}, {}, [], {}, None
        self.default_private = False
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.store = f"http://localhost:{self.server_address[1]}/store"  # another host, as of the real one

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        commits = self.repos[repo]["commits"]
        chosen = [c for c in commits if revision in ("main", c[0])]
        return chosen[-1][2]

    def commit(self, repo: str, files: dict[str, bytes], message: str = "") -> str:
        commits = self.repos.setdefault(repo, {"private": False, "commits": []})["commits"]
        name = hashlib.sha1(f"{repo}{len(commits)}".encode()).hexdigest()
        commits.append((name, message, files))
        return name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        headers.setdefault("Content_Length", len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "", message: str = "no"):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_any(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b""
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.server.seen.append((self.command, path))
        if self.server.broken and self.server.broken in path:
            return self.refuse(500)
        given = self.headers.get("Authorization")
        self.known = given == f"Bearer {TOKEN}"
        if given and not self.known:
            return self.refuse(401, message="Invalid credentials in Authorization header")
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return method(self, **found.groupdict())
        return self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any  # noqa: N815 - names of http.server

    def create(self):
        said = json.loads(self.body)
        if not self.known:
            return self.refuse(401, message="Invalid username or password.")
        if said["organization"] not in (None, USER):
            return self.refuse(403, message="You don't have the rights to create a model under this namespace")
        repo = f"{USER}/{said['name']}"
        if repo in self.server.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": self.url(repo)})
        private = said.get("private", said.get("visibility", "") == "private") or self.server.default_private
        self.server.repos[repo] = {"private": private, "commits": []}
        self.server.commit(repo, {".gitattributes": b""}, "initial commit")
        return self.answer(200, {"url": self.url(repo)})

    def url(self, repo):
        return f"{self.server.address}/{repo}"

    def there(self, repo, revision="main") -> bool:
        """Whether the repository and the revision are there to be seen. Answers where they are not."""
        found = self.server.repos.get(repo)
        if found is None or (found["private"] and not self.known):
            self.refuse(401 if not self.known else 404, "RepoNotFound", "Repository not found")
            return False
        if revision not in ("main", *(commit[0] for commit in found["commits"])):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return False
        return True

    def may_write(self, repo) -> bool:
        if not self.there(repo):
            return False
        if not self.known or not repo.startswith(f"{USER}/"):
            self.refuse(403, message="Authorization error.")
            return False
        return True

    def info(self, repo):
        if self.there(repo):
            found = self.server.repos[repo]
            sha = found["commits"][-1][0]
            self.answer(200, {"id": repo, "modelId": repo, "sha": sha, "private": found["private"], "siblings": []})

    def tree(self, repo):
        if self.there(repo):
            files = self.server.files(repo)
            self.answer(200, [{"type": "file", "path": p, "size": len(b), "oid": git_id(b)} for p, b in files.items()])

    def check_card(self):
        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        licence = re.search(r'^license: "(.*)"$', front[1] if front else "", re.MULTILINE)
        if not front or not licence or licence[1] not in LICENCES:
            errors = [{"message": f'"license" must be one of [{", ".join(LICENCES)}]'}]
            return self.answer(400, {"errors": errors, "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo):
        if not self.may_write(repo):
            return
        there, answers = self.server.files(repo), []
        for file in json.loads(self.body)["files"]:
            large = not file["path"].endswith((".md", ".json"))
            old = there.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_id(old)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": answers})

    def batch(self, repo):
        if not self.may_write(repo):
            return
        objects = []
        for one in json.loads(self.body)["objects"]:
            href = f"{self.server.store}/{one['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(one | ({} if one["oid"] in self.server.blobs else {"actions": actions}))
        self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400)
        self.server.blobs[oid] = self.body
        return self.answer(200)

    def verify(self, oid):
        said = json.loads(self.body)
        fits = said["oid"] == oid and len(self.server.blobs.get(oid, b"")) == said["size"]
        return self.answer(200) if fits else self.refuse(404)

    def commit(self, repo):
        if not self.may_write(repo):
            return
        files, message = dict(self.server.files(repo)), ""
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        name = self.server.commit(repo, files, message)
        self.answer(200, {"commitUrl": f"{self.url(repo)}/commit/{name}", "commitOid": name, "pullRequestUrl": None})

    def resolve(self, repo, revision, path):
        if not self.there(repo, revision):
            return
        files = self.server.files(repo, revision)
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = files[path]
        commits = [c[0] for c in self.server.repos[repo]["commits"]]
        about = {"X_Repo_Commit": revision if revision in commits else commits[-1]}
        size = self.server.lies.get(path, len(content))
        if path.endswith((".md", ".json")):
            return self.answer(200, content, ETag=f'"{git_id(content)}"', Content_Length=size, **about)
        oid = hashlib.sha256(content).hexdigest()
        self.server.blobs[oid] = content
        about |= {"X_Linked_Size": size, "X_Linked_Etag": f'"{oid}"', "Location": f"{self.server.store}/{oid}"}
        return self.answer(302, **about)

    def stored(self, oid):
        self.answer(200, self.server.blobs[oid])


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.check_card),
    (rf"GET /api/models/{REPO}(/revision/main)?", Handler.info),
    (rf"GET /api/models/{REPO}/tree/main", Handler.tree),
    (rf"POST /api/models/{REPO}/preupload/main", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/main", Handler.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /store/(?P<oid>\w+)", Handler.store),
    (r"POST /store/(?P<oid>\w+)/verify", Handler.verify),
    (r"GET /store/(?P<oid>\w+)", Handler.stored),
    (rf"(?:GET|HEAD) /{REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", Handler.resolve),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `Hub` that huggingface_hub takes for the real one, with a token and no cache; skips without the client."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet has a store of its own, which no one stands in for
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
