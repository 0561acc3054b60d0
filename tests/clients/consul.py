"""What of Consul's HTTP API the registry of that type uses: an imitation, in memory, with blocking queries.

Usage: consul.py ADDRESS PORT TOKEN [CERTIFICATE KEY]: with a certificate over TLS. Indexes, waiting and answers are as Consul documents them; registering is
PUT /v1/catalog/register and /v1/catalog/deregister. PUT /restore/INDEX sets the index, as a restored snapshot does. PUT /token
(another token) ends the one that there was, also for those who wait.
"""

import json
import ssl
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

address, port, token, *certificate = sys.argv[1:]
changed = threading.Condition()
index, registered, expired = 10, {}, set()


def services():
    names = {}
    for entry in registered.values():
        names.setdefault(entry["Service"]["Service"], set()).update(entry["Service"].get("Tags", []))
    return {name: sorted(tags) for name, tags in names.items()}


def health(name, tag):
    found = [entry for entry in registered.values() if entry["Service"]["Service"] == name]
    return [entry for entry in found if not tag or tag in entry["Service"].get("Tags", [])]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Consul-Index", str(index))
        self.end_headers()
        self.wfile.write(body)

    def refusal(self):
        shown = self.headers.get("X-Consul-Token")
        if shown == token:
            return None
        return "ACL not found" if shown in expired else "Permission denied"

    def do_GET(self):
        if self.refusal():
            return self.say(403, self.refusal())
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with changed:
            known = int(query.get("index", 0))
            if known == index:
                news = lambda: index != known or self.refusal()
                changed.wait_for(news, float(query.get("wait", "300s")[:-1]))
            if self.refusal():
                return self.say(403, self.refusal())
            if url.path == "/v1/catalog/services":
                return self.say(200, services())
            return self.say(200, health(url.path.rsplit("/", 1)[1], query.get("tag")))

    def do_PUT(self):
        global index, token
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        with changed:
            index += 1
            if self.path == "/v1/catalog/register":
                service = {"Weights": {"Passing": 1, "Warning": 1}, "CreateIndex": index, **body["Service"]}
                node = {"Node": body["Node"], "Address": body["Address"]}
                checks = [body["Check"]] if "Check" in body else []
                registered[service["ID"]] = {"Node": node, "Service": service, "Checks": checks}
            elif self.path == "/v1/catalog/deregister":
                registered.pop(body["ServiceID"])
            elif self.path == "/token":
                expired.add(token)
                token = body
            else:
                index = int(self.path.rsplit("/", 1)[1])
            changed.notify_all()
            self.say(200, True)


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that has gone is its own affair."""


server = Server((address, int(port)), Handler)
if certificate:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
