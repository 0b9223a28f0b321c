"""A small stand-in for the hub: it serves folders under ids on this machine, for tests of what is fetched."""

import http.server
import json
import os
import re
import threading

SHA = "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """`folders` are {id: folder}; of the ids in `gated` everyone may see the list of files and nobody a file."""

    def __init__(self, folders, gated=()):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders, self.gated, self.sent = folders, gated, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home):
        """What a program needs to see this hub, with an empty cache in `home`."""
        return dict(os.environ, HF_ENDPOINT=f"http://127.0.0.1:{self.server_port}", HF_HOME=str(home), HF_HUB_OFFLINE="0",
                    HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = re.fullmatch(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(/revision/\w+|/tree/\w+|/resolve/\w+/(.+?))?(\?.*)?", self.path)
        if self.path == "/":
            return self.answer(200, b"")
        folder = self.server.folders.get(found[1]) if found else None
        if not folder:
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        names = sorted(os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names)
        if self.path.startswith("/api/models"):
            files = [dict(type="file", path=name, rfilename=name, oid=SHA, size=os.path.getsize(os.path.join(folder, name))) for name in names]
            about = dict(_id="1", id=found[1], sha=SHA, siblings=files, private=False, gated=False, disabled=False, downloads=0, likes=0, tags=[])
            return self.answer(200, json.dumps(files if "/tree/" in self.path else about).encode(), {"Content-Type": "application/json"})
        if found[1] in self.server.gated:
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if found[3] not in names:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.sent.append(found[3])
        with open(os.path.join(folder, found[3]), "rb") as file:
            self.answer(200, file.read(), {"ETag": f'"{abs(hash(found[3])):040x}"'})

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": SHA, "Content-Length": str(len(content))} | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass
