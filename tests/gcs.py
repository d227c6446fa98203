"""A stand-in for Google Cloud Storage in a process of its own, with what a run in a bucket depends on.

Objects with generations and conditions on them, listings in pages, byte ranges, media, multipart and resumable
uploads, copies, deletions alone and in batches. Faults are ordered by PUT /faults with a JSON object:

  stop_at:     refuse every write from the number stop_at on, counted from the order (a process that was killed then)
  lose_at:     carry out the write number lose_at and answer 503
  deny_at:     answer 403 to every write from the number deny_at on, and then to those of leases too
  stop_from, deny_from: the same from the first name on that matches this regular expression as a whole

GET /writes gives the names that were written or deleted, in order. Started as `python -m tests.gcs PORT_FILE BUCKET`.
"""

from __future__ import annotations

import base64
import contextlib
import email
import hashlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

PAGE = 7
"""objects per page of a listing at most: few, so that listings have pages"""


class Objects:
    """The objects of one bucket."""

    def __init__(self, bucket: str):
        self.bucket = bucket
        self.lock = threading.RLock()
        self.data: dict[str, tuple[int, bytes]] = {}
        self.generations = itertools.count(1_000)
        self.uploads: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self.writes: list[str] = []
        self.faults: dict[str, int | str] = {}
        self.counted = 0

    def resource(self, name: str) -> dict:
        generation, content = self.data[name]
        crc = google_crc32c.value(content)
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{name}/{generation}",
            "name": name,
            "bucket": self.bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "contentType": "application/octet-stream",
            "crc32c": base64.b64encode(struct.pack(">I", crc)).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "etag": str(generation),
            "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def condition(self, name: str, query: dict[str, str]) -> int | None:
        """Returns the status of a condition that does not hold."""
        generation = self.data[name][0] if name in self.data else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == generation:
            return 304
        return None

    def fault(self, name: str) -> int | None:
        """Counts a write; returns the status with which it is refused."""
        lease = name.endswith(".lease")  # when it is renewed depends on the time
        self.counted += not lease
        for order in ("stop", "deny"):
            if re.fullmatch(self.faults.get(f"{order}_from", "(?!)"), name):
                self.faults.setdefault(f"{order}_at", self.counted)
        if self.faults.get("deny_at") and self.counted + lease >= self.faults["deny_at"]:
            return 403
        if lease:
            return None
        if self.faults.get("stop_at") and self.counted >= self.faults["stop_at"]:
            return 400
        self.writes.append(name)
        return None

    def lost(self) -> bool:
        return self.counted == self.faults.get("lose_at")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    objects: Objects

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that was killed
            super().handle()

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if isinstance(content, dict):
            content = json.dumps(content).encode()
            headers.setdefault("content-type", "application/json")
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int) -> None:
        self.answer(status, {"error": {"code": status, "message": f"refused with {status}"}})

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_all(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        body = self.body()
        if parts[0] == "faults":
            with self.objects.lock:
                if body:
                    self.objects.faults, self.objects.counted = json.loads(body), 0
            return self.answer(200, json.dumps(self.objects.faults).encode())
        if parts[0] == "writes":
            return self.answer(200, json.dumps(self.objects.writes).encode())
        if parts[0] == "put":
            with self.objects.lock:
                self.objects.data["/".join(parts[1:])] = (next(self.objects.generations), body)
            return self.answer(200)
        if parts[0] == "clear":
            with self.objects.lock:
                self.objects.data.clear()
            return self.answer(200)
        if parts[0] == "objects":
            content = {name: base64.b64encode(data).decode() for name, (_, data) in self.objects.data.items()}
            return self.answer(200, content)
        if parts[0] == "batch":
            return self.batch(body)
        with self.objects.lock:
            self.route(parts, query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_all

    def route(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        kind = parts.pop(0) if parts[0] in ("upload", "download") else ""
        if parts[:3] != ["storage", "v1", "b"] or len(parts) < 4 or parts[3] != self.objects.bucket:
            return self.error(404)
        rest = parts[4:]
        if not rest:
            return self.answer(200, {"kind": "storage#bucket", "name": parts[3], "id": parts[3], "location": "US"})
        if kind == "upload":
            return self.upload(query, body)
        if rest == ["o"]:
            return self.listing(query) if self.command == "GET" else self.error(400)
        name = "/".join(rest[1:])
        if "rewriteTo" in rest or "copyTo" in rest:
            return self.copy(rest, query)
        if self.command == "DELETE":
            return self.delete(name, query)
        return self.read(name, query, kind == "download" or query.get("alt") == "media")

    def read(self, name: str, query: dict[str, str], media: bool) -> None:
        if name not in self.objects.data:
            return self.error(412 if int(query.get("ifGenerationMatch") or 0) else 404)
        if status := self.objects.condition(name, query):
            return self.error(status)
        if not media:
            return self.answer(200, self.objects.resource(name))
        generation, content = self.objects.data[name]
        crc = self.objects.resource(name)["crc32c"]
        headers = {
            "x_goog_generation": str(generation),
            "x_goog_metageneration": "1",
            "x_goog_stored_content_length": str(len(content)),
            "x_goog_hash": f"crc32c={crc}",
            "content_type": "application/octet-stream",
            "etag": str(generation),
        }
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("range", "")):
            total = len(content)
            if not match[1]:
                start, end = max(total - int(match[2]), 0), total
            else:
                start, end = int(match[1]), min(int(match[2] or total) + 1, total)
            if start >= total:
                return self.error(416)
            return self.answer(206, content[start:end], content_range=f"bytes {start}-{end - 1}/{total}", **headers)
        return self.answer(200, content, **headers)

    def listing(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        after = base64.b64decode(query["pageToken"]).decode() if query.get("pageToken") else ""
        entries: dict[str, bool] = {}
        for name in sorted(self.objects.data):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                entries[prefix + rest.split(delimiter)[0] + delimiter] = True
            else:
                entries[name] = False
        names = [name for name in sorted(entries) if name > after]
        page = names[: min(int(query.get("maxResults") or PAGE), PAGE)]
        content = {
            "kind": "storage#objects",
            "items": [self.objects.resource(name) for name in page if not entries[name]],
            "prefixes": [name for name in page if entries[name]],
        }
        if len(page) < len(names):
            content["nextPageToken"] = base64.b64encode(page[-1].encode()).decode()
        self.answer(200, content)

    def write(self, name: str, query: dict[str, str], content: bytes) -> None:
        if status := self.objects.condition(name, query) or self.objects.fault(name):
            return self.error(status)
        self.objects.data[name] = (next(self.objects.generations), content)
        if self.objects.lost():
            return self.error(503)
        self.answer(200, self.objects.resource(name))

    def upload(self, query: dict[str, str], body: bytes) -> None:
        kind = query["uploadType"]
        if kind == "media":
            return self.write(query["name"], query, body)
        if kind == "multipart":
            head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
            described, content = email.message_from_bytes(head + body).get_payload()
            name = json.loads(described.get_payload(decode=True)).get("name") or query["name"]
            # The parser takes line ends of bytes for its own: the content is cut out by hand.
            boundary = re.search(r'boundary="?([^";]+)', self.headers["content-type"])[1].encode()
            part = body.split(b"--" + boundary)[2]
            return self.write(
                name,
                query,
                part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1][
                    : -2 if part.endswith(b"\r\n") else -1
                ],
            )
        if "upload_id" not in query:
            described = json.loads(body or b"{}")
            number = str(len(self.objects.uploads))
            self.objects.uploads[number] = (described.get("name") or query["name"], query, bytearray())
            host = self.headers["host"]
            place = f"http://{host}{urlsplit(self.path).path}?uploadType=resumable&upload_id={number}"
            return self.answer(200, location=place)
        name, first, gathered = self.objects.uploads[query["upload_id"]]
        gathered += body
        total = re.fullmatch(
            r"bytes (?:[\d*]+-?\d*)/(\d+|\*)", self.headers.get("content-range", f"bytes */{len(body)}")
        )
        if total and total[1] != "*" and len(gathered) >= int(total[1]):
            return self.write(name, first, bytes(gathered))
        self.answer(308, range=f"bytes=0-{len(gathered) - 1}")

    def copy(self, rest: list[str], query: dict[str, str]) -> None:
        at = next(i for i, part in enumerate(rest) if part in ("rewriteTo", "copyTo"))
        source, target = "/".join(rest[1:at]), "/".join(rest[at + 4 :])
        if source not in self.objects.data:
            return self.error(404)
        if status := self.objects.condition(target, query) or self.objects.fault(target):
            return self.error(status)
        self.objects.data[target] = (next(self.objects.generations), self.objects.data[source][1])
        self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": self.objects.resource(target)})

    def delete(self, name: str, query: dict[str, str]) -> None:
        if name not in self.objects.data:
            return self.error(412 if int(query.get("ifGenerationMatch") or 0) else 404)
        if status := self.objects.condition(name, query) or self.objects.fault(name):
            return self.error(status)
        del self.objects.data[name]
        if self.objects.lost():
            return self.error(503)
        self.answer(204)

    def batch(self, body: bytes) -> None:
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        answers = []
        for part in email.message_from_bytes(head + body).get_payload():
            method, path, *_ = part.get_payload().split()
            name = "/".join(unquote(p) for p in urlsplit(path).path.strip("/").split("/")[5:])
            with self.objects.lock:
                status = 405 if method != "DELETE" else 404 if name not in self.objects.data else 204
                status = (status == 204 and self.objects.fault(name)) or status
                if status == 204:
                    del self.objects.data[name]
            answers.append(
                f"--batch\r\nContent-Type: application/http\r\nContent-ID: <response-{part['Content-ID'][1:-1]}>\r\n\r\n"
                f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.answer(200, ("".join(answers) + "--batch--").encode(), content_type="multipart/mixed; boundary=batch")


class Bucket:
    """A started stand-in, as tests use it.

    Attributes:
      environment: variables that point the clients of a process to it.
    """

    def __init__(self, folder: Path, name: str = "stand-in"):
        self.name = name
        port = folder / "port"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gcs", str(port), name], cwd=Path(__file__).parents[1]
        )
        end = time.monotonic() + 30
        while not port.exists() or not port.read_text():
            if time.monotonic() > end:
                raise TimeoutError("the stand-in did not start")
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{port.read_text()}"
        self.environment = {
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "STORAGE_EMULATOR_HOST": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "EPATH_USE_TF": "false",
            "FSSPEC_GCS": '{"use_listings_cache": false}',
        }

    def faults(self, **faults: int | str) -> None:
        """Orders faults in the place of those that were ordered before."""
        self._ask("/faults", json.dumps(faults).encode())

    def met(self) -> bool:
        """Says whether the faults of an order that names objects have begun."""
        return not {"stop_at", "deny_at"}.isdisjoint(json.loads(self._ask("/faults")))

    def clear(self) -> None:
        """Removes all objects."""
        self._ask("/clear", b"{}")

    def writes(self) -> list[str]:
        """Lists the names that were written or deleted, in order."""
        return json.loads(self._ask("/writes"))

    def objects(self) -> dict[str, bytes]:
        """Returns what is there."""
        return {name: base64.b64decode(text) for name, text in json.loads(self._ask("/objects")).items()}

    def put(self, name: str, content: bytes) -> None:
        """Puts an object there, which is no write that counts."""
        self._ask(f"/put/{name}", content)

    def copy(self, prefix: str, folder: Path) -> Path:
        """Writes the objects of a prefix into a folder."""
        for name, content in self.objects().items():
            if name.startswith(f"{prefix}/"):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        return folder / prefix

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.url + path, data=body, method="PUT" if body is not None else "GET")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return answer.read()

    def close(self) -> None:
        """Ends the stand-in's process."""
        self._process.terminate()
        self._process.wait()


if __name__ == "__main__":
    Handler.objects = Objects(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    partial = Path(sys.argv[1] + ".partial")
    partial.write_text(str(server.server_address[1]))
    os.replace(partial, sys.argv[1])
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
