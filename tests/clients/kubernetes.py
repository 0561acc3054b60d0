"""What of Kubernetes' API the registry of that type uses: an imitation, in memory, over TLS.

Usage: kubernetes.py ADDRESS PORT TOKEN CERTIFICATE KEY. Services, EndpointSlices and Nodes are listed in pages and watched from
a version on, with bookmarks and 410 where history is gone, as Kubernetes documents them. The test leads it by PUT:
/objects (an object, which has its kind), /delete (the same), /compact (history up to now), /bookmark (to all watches), /end (all
watches, as they do end), /garbage (into all watches), /token (another one instead of the one that there was).
"""

import json
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

address, port, token, certificate, key = sys.argv[1:]
changed = threading.Condition()
version, oldest = 100, 100
objects, history = {}, []
# Of what all watches are told: how often it was.
told = {"bookmark": 0, "end": 0, "garbage": 0}

PATHS = {
    "Service": ("api/v1", "services"),
    "EndpointSlice": ("apis/discovery.k8s.io/v1", "endpointslices"),
    "Node": ("api/v1", "nodes"),
}


def status(code, reason, message):
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}


def selected(path):
    """The kind of a path, its namespace, and the object's name."""
    for kind, (group, plural) in PATHS.items():
        parts = path.strip("/").removeprefix(group + "/").split("/")
        namespace = None
        if parts[0] == "namespaces" and len(parts) > 2:
            namespace, parts = parts[1], parts[2:]
        if path.startswith(f"/{group}/") and parts[0] == plural:
            return kind, namespace, parts[1] if len(parts) > 1 else None
    return None, None, None


def change(body, gone):
    """Also the change that a deletion is has a version."""
    global version
    version += 1
    metadata = body["metadata"]
    place = (body["kind"], metadata.get("namespace"), metadata["name"])
    kind = "DELETED" if gone else "MODIFIED" if place in objects else "ADDED"
    one = {**(objects.pop(place) if gone else body)}
    one["metadata"] = {**one["metadata"], "resourceVersion": str(version)}
    if not gone:
        objects[place] = one
    history.append((version, place, {"type": kind, "object": one}))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, code, body):
        body = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/livez":
            return self.say(200, "ok")
        if self.headers.get("Authorization") != f"Bearer {token}":
            return self.say(401, status(401, "Unauthorized", "Unauthorized"))
        kind, namespace, name = selected(url.path)
        if kind is None:
            return self.say(404, status(404, "NotFound", "the server could not find the requested resource"))

        def is_meant(place):
            return place[0] == kind and namespace in (None, place[1])

        if query.get("watch") == "true":
            return self.watch(is_meant, kind, int(query["resourceVersion"]), float(query["timeoutSeconds"]))
        with changed:
            if name is not None:
                found = objects.get((kind, namespace, name))
                return self.say(200, found) if found else self.say(404, status(404, "NotFound", f"{name} not found"))
            found = sorted(place for place in objects if is_meant(place))
            # A token is the version that is listed, and where to go on.
            at, start = map(int, query.get("continue", f"{version}-0").split("-"))
            if at < oldest:
                return self.say(410, status(410, "Expired", "The provided continue parameter is too old"))
            end = start + int(query.get("limit", len(found) + 1))
            metadata = {"resourceVersion": str(at)}
            if end < len(found):
                metadata["continue"] = f"{at}-{end}"
            self.say(200, {"kind": kind + "List", "metadata": metadata, "items": [objects[place] for place in found[start:end]]})

    def watch(self, is_meant, kind, since, seconds):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        end, known = time.monotonic() + seconds, dict(told)
        while True:
            with changed:
                changed.wait_for(lambda: version > since or told != known, end - time.monotonic())
                events = [event for at, place, event in history if at > since and is_meant(place)]
                gone, news, known = since < oldest, {what for what in told if told[what] != known[what]}, dict(told)
                if not gone:
                    since = version
            if gone:
                events = [{"type": "ERROR", "object": status(410, "Expired", f"too old resource version: {since}")}]
            if "bookmark" in news:
                metadata = {"resourceVersion": str(since), "creationTimestamp": None}
                events.append({"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": "v1", "metadata": metadata}})
            lines = [json.dumps(event) + "\n" for event in events] + ["{\x00\n"] * ("garbage" in news)
            if lines:
                chunk = "".join(lines).encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            if gone or "end" in news or time.monotonic() >= end:
                self.wfile.write(b"0\r\n\r\n")
                return

    def do_PUT(self):
        global oldest, token
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with changed:
            what = self.path.strip("/")
            if what == "objects":
                change(body, False)
            elif what == "delete":
                change(body, True)
            elif what == "compact":
                oldest = version
                history.clear()
            elif what == "token":
                token = body
            else:
                told[what] += 1
            changed.notify_all()
            self.say(200, version)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def finish_request(self, request, client_address):
        """In the thread of this connection: a client that says nothing is nobody else's business."""
        with context.wrap_socket(request, server_side=True) as secure:
            self.RequestHandlerClass(secure, client_address, self)

    def handle_error(self, *_):
        pass


context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(certificate, key)
Server((address, int(port)), Handler).serve_forever()
