"""A server for W&B's own client and `wandb sync`: it keeps what it receives, or hangs, or refuses."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from typing import Any

KEY = "0123456789" * 4


class Server(http.server.ThreadingHTTPServer):
    """Serves in a thread.

    Args:
        behaviour: "keeps", "hangs" (accepts connections and never answers), "forbids" (lets users log in but not write
            runs), or the status of every answer.
    """

    daemon_threads = True

    def __init__(self, behaviour: str | int = "keeps") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.requests = 0
        self.history: dict[str, dict[int, dict]] = {}
        """Run id → line → row, with the client's line numbers."""
        self.files: set[str] = set()
        self.artifacts: set[str] = set()
        """Names; the server answers that it already has each of them."""
        self.alerts: list[str] = []
        self.exit_codes: list[int] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send W&B's client to this server."""
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def steps(self, run_id: str) -> list[int]:
        rows = self.history.get(run_id, {})
        return [rows[line]["_step"] for line in sorted(rows)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a killed client

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: object, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _handle(self) -> None:
        self.server.requests += 1
        while self.server.behaviour == "hangs":
            time.sleep(0.2)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(self.server.behaviour, int):
            self._answer({}, self.server.behaviour)
        elif self.path.endswith("/file_stream"):
            self._stream(json.loads(body))
        elif self.path == "/graphql":
            self._graphql(json.loads(body))
        else:
            if self.command == "PUT":
                self.server.files.add(self.path.removeprefix("/upload/"))
            self._answer({})

    do_GET = do_POST = do_PUT = _handle  # noqa: N815 - http.server's names

    def _stream(self, body: dict) -> None:
        rows = self.server.history.setdefault(self.path.split("/")[-2], {})
        for name, part in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                rows.update({part["offset"] + i: json.loads(line) for i, line in enumerate(part["content"])})
        if body.get("complete"):
            self.server.exit_codes.append(body["exitcode"])
        self._answer({})

    def _graphql(self, body: dict) -> None:
        values = body.get("variables") or {}
        names = re.findall(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        if names == ["UpsertBucket"] and self.server.behaviour == "forbids":
            self._answer({"errors": [{"message": "permission denied"}]}, 403)
            return
        answer = getattr(self, f"_{names[0]}", None) if names else None
        self._answer({"data": answer(values) if answer else {}})

    def _Viewer(self, values: dict) -> dict:  # noqa: N802 - the query's name
        return {"viewer": {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _project(self, values: dict) -> dict:
        return {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "me"}}

    def _RunResumeStatus(self, values: dict) -> dict:  # noqa: N802
        rows = self.server.history.get(values["name"])
        if rows is None:
            return {"model": None}
        tail = [json.dumps(rows[line]) for line in sorted(rows)[-1:]]
        run = {
            "id": "r", "name": values["name"], "displayName": "", "config": "{}", "summaryMetrics": "{}", "tags": [],
            "historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {"model": self._project(values) | {"bucket": run}}

    def _UpsertBucket(self, values: dict) -> dict:  # noqa: N802
        self.server.history.setdefault(values["name"], {})
        run = {"id": "r", "name": values["name"], "displayName": "", "config": "{}", "project": self._project(values)}
        return {"upsertBucket": {"bucket": run, "inserted": True}}

    def _CreateRunFiles(self, values: dict) -> dict:  # noqa: N802
        base = self.server.environment["WANDB_BASE_URL"]
        files = [{"name": name, "uploadUrl": f"{base}/upload/{name}"} for name in values["files"]]
        return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}

    def _NotifyScriptableRunAlert(self, values: dict) -> dict:  # noqa: N802
        self.server.alerts.append(values["title"])
        return {"notifyScriptableRunAlert": {"success": True}}

    def _CreateArtifact(self, values: dict) -> dict:  # noqa: N802
        self.server.artifacts.add(values["input"]["artifactCollectionName"])
        sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
        return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}

    def _ArtifactType(self, values: dict) -> dict:  # noqa: N802
        return {"project": {"artifact": {"artifactType": {"name": "run_table"}}}}
