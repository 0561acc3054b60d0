"""Passes calls of AWS's API on, where they are signed with a certain access key, and refuses the others as AWS does.

Usage: keys.py ADDRESS PORT UPSTREAM. PUT / ({"key", "error"}) says which key it is from now on, and what others are told. Signatures are not checked.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

address, port, upstream = sys.argv[1:]
rule = {"key": "", "error": ""}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body):
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body = self.body()
        if f"Credential={rule['key']}/" not in self.headers.get("Authorization", ""):
            refused = {"__type": rule["error"], "message": "The security token included in the request is not valid"}
            return self.say(400, json.dumps(refused).encode())
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
        try:
            with urlopen(Request(upstream, body, headers)) as answer:
                self.say(answer.status, answer.read())
        except HTTPError as refused:
            self.say(refused.code, refused.read())

    def do_PUT(self):
        rule.update(json.loads(self.body()))
        self.say(200, b"{}")


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that has gone is its own affair."""


Server((address, int(port)), Handler).serve_forever()
