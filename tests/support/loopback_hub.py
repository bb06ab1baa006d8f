"""A model Hub on 127.0.0.1 for the real client libraries: repositories with commits and branches that can be moved.

Models and data sets can be pushed with the token `TOKEN`, as its owner, in the protocol of clients without Xet.

Only the standard library. `Hub.environment` is for subprocesses: the clients read it when Python starts.
"""

import base64
import contextlib
import email.utils
import hashlib
import json
import os
import re
import urllib.parse
from pathlib import Path

from tests.support.http_server import BackgroundServer, Handler

TOKEN, OWNER = "hf_loopback", "writer"
EPOCH = "2024-01-01T00:00:00.000Z"


class Repository:
    """Commits (40 hex digits, each all files by path) and branches of one model or data set."""

    def __init__(self):
        self.commits, self.branches, self.gated, self.private = {}, {}, False, False

    def commit(self, files, branch="main"):
        """Add a commit of these files (bytes by path) and move the branch there; gives the commit."""
        parts = [f"{path}:{hashlib.sha1(data).hexdigest()}" for path, data in sorted(files.items())]
        commit = hashlib.sha1("\n".join([*parts, self.branches.get(branch, "")]).encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def commit_folder(self, folder, branch="main"):
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
        return self.commit(files, branch)


class Hub(BackgroundServer):
    """The server; `models` and `datasets` hold the repositories by `owner/name`, `requests` what was asked for."""

    def __init__(self, host="127.0.0.1"):
        self.models, self.datasets, self.requests, self.lfs_objects = {}, {}, [], {}
        super().__init__(_Handler, host)
        self.endpoint = self.url

    def environment(self, home, **more):
        """The environment of a client process with its own `HF_HOME`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,10.77.0.1",
            **more,
        }


class _Handler(Handler):
    API = re.compile(
        r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)(/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?"
    )
    PUSH = re.compile(
        r"/api/repos/create|/api/validate-yaml|/(?:datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch"
        r"|/lfs/(?P<oid>[0-9a-f]{64})"
        r"|/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)/(?P<verb>preupload|commit|branch)/(?P<branch>[^/]+)"
    )
    RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path)
        body = self._body()
        self.state.requests.append((self.command, urllib.parse.unquote(path.path)))
        if self.command in ("POST", "PUT") and (found := self.PUSH.fullmatch(path.path)):
            self._push(found, path.path, body)
        elif found := self.API.fullmatch(path.path):
            self._api(found, urllib.parse.parse_qs(path.query), body.decode())
        elif found := self.RESOLVE.fullmatch(path.path):
            self._file(found)
        else:
            self._fail(404, "EntryNotFound")

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.do_GET()

    def do_PUT(self):
        self.do_GET()

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _push(self, found, path, body):
        """What creating a repository and uploading a folder ask for."""
        if found["oid"]:  # the storage that the batch named, which asks for no token
            if hashlib.sha256(body).hexdigest() != found["oid"]:
                return self._fail(400, "BadObject")
            self.state.lfs_objects[found["oid"]] = body
            return self._send(200, b"", {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._fail(401, "Unauthorized")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != OWNER:
                return self._fail(403, "Forbidden")
            is_dataset = asked.get("type") == "dataset"
            repositories = self.state.datasets if is_dataset else self.state.models
            url = {"url": f"{self.state.endpoint}/{'datasets/' if is_dataset else ''}{name}"}
            if name in repositories:
                return self._json(url, 409)
            repositories[name] = Repository()
            repositories[name].commit({".gitattributes": b""})
            repositories[name].private = asked.get("visibility") == "private"
            return self._json(url)
        if found["id"]:
            objects = [
                each
                if each["oid"] in self.state.lfs_objects
                else {**each, "actions": {"upload": {"href": f"{self.state.endpoint}/lfs/{each['oid']}", "header": {}}}}
                for each in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if found["verb"] == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".h5")) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        repository = (self.state.models if found["kind"] == "models" else self.state.datasets)[found["repo"]]
        branch = found["branch"]
        if found["verb"] == "branch":
            if branch in repository.branches:
                return self._json({}, 409)
            repository.branches[branch] = repository.branches["main"]
            return self._json({})
        head = repository.branches[branch]
        files = dict(repository.commits[head])
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header" and line["value"].get("parentCommit", head) != head:
                return self._fail(412, "PreconditionFailed")
            if line["key"] == "deletedFile":
                del files[line["value"]["path"]]
            elif line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.state.lfs_objects[line["value"]["oid"]]
        commit = repository.commit(files, branch)
        self._json({"commitOid": commit, "commitUrl": f"{self.state.endpoint}/{found['repo']}/commit/{commit}"})

    def _find(self, kind, name, revision):
        """The repository, the commit's id and its files; None where the answer was an error."""
        repository = (self.state.datasets if kind else self.state.models).get(name)
        if repository is None:
            return self._fail(404, "RepoNotFound")
        commit = repository.branches.get(urllib.parse.unquote(revision), revision)
        if commit not in repository.commits:
            return self._fail(404, "RevisionNotFound")
        return repository, commit, repository.commits[commit]

    def _api(self, found, query, body):
        verb, rest = found["verb"], (found["rest"] or "main").partition("/")
        answer = self._find(
            found["kind"] == "datasets", found["id"], found["rest"] or "main" if verb == "revision" else rest[0]
        )
        if answer is None:
            return
        repository, commit, files = answer
        if verb == "tree":
            self._json(
                _tree(files, urllib.parse.unquote(rest[2]), recursive=query.get("recursive") in (["true"], ["True"]))
            )
        elif verb == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith("{") else urllib.parse.parse_qs(body).get("paths", [])
            entries = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            self._json([entries[path] for path in wanted if path in entries])
        else:
            info = {
                "id": found["id"],
                "sha": commit,
                "lastModified": EPOCH,
                "private": repository.private,
                "disabled": False,
            }
            info |= {"gated": "manual" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0}
            self._json(info | {"siblings": [{"rfilename": path} for path in sorted(files)]})

    def _file(self, found):
        answer = self._find(found["kind"], found["id"], found["revision"])
        if answer is None:
            return
        repository, commit, files = answer
        path = urllib.parse.unquote(found["path"])
        if repository.gated:
            self._fail(401, "GatedRepo", commit)
        elif path not in files:
            self._fail(404, "EntryNotFound", commit)
        else:
            data, size, status = files[path], len(files[path]), 200
            headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, stop = int(span[1]), min(int(span[2] or size - 1) + 1, size)
                data, status = data[start:stop], 206
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._send(status, data, headers)

    def _fail(self, status, code, commit=None):
        self._send(
            status, b"", {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        )

    def _json(self, value, status=200):
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(data)), "Date": email.utils.formatdate(usegmt=True)} | headers
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data)


def _oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _tree(files, folder, *, recursive):
    """The entries below a folder, as the Hub's `/tree/` lists them."""
    prefix, entries = f"{folder}/" if folder else "", {}
    for path, data in sorted(files.items()):
        if path.startswith(prefix):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                name = prefix + "/".join(parts[:depth])
                entries[name] = {
                    "type": "directory",
                    "path": name,
                    "size": 0,
                    "oid": hashlib.sha1(name.encode()).hexdigest(),
                }
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}
                if path.endswith(".h5"):
                    digest = hashlib.sha256(data).hexdigest()
                    entries[path]["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
    return list(entries.values())
