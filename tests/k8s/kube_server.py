"""The few paths of the Kubernetes API that the starter of a night uses, on loopback over TLS."""

import datetime
import ipaddress
import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BASE = "/apis/ray.io/v1/namespaces/qbatch"

FINE, CUT = 200, 0
"""Among the troubles: no trouble; and a request that is carried out without an answer."""


class KubeServer:
    """A server's state: what it stores, how jobs go on, and what goes wrong on the way."""

    def __init__(self, credentials: Path) -> None:
        self.credentials = credentials
        self.token = "first-token"
        self.templates: dict[str, dict] = {}
        self.jobs: dict[str, dict] = {}
        self.statuses: list[dict | None] = [{"jobDeploymentStatus": "Complete",
                                             "jobStatus": "SUCCEEDED"}]  # fmt: skip
        """What each look at a job finds, the last one for ever; None: the job is gone."""
        self.troubles: list[int] = []
        """HTTP status of the next answers, or FINE, or CUT."""
        self.new_tokens: list[str] = []
        """From each answer on, another token is the good one, and lies in the file."""
        self.seen: list[str] = []
        self.lock = Lock()
        self.port = 0
        credentials.mkdir()
        (credentials / "namespace").write_text("qbatch")
        (credentials / "token").write_text(self.token + "\n")

    @property
    def environment(self) -> dict[str, str]:
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def answer(
        self, method: str, path: str, token: str | None, body: bytes
    ) -> tuple[int, dict] | None:
        """Carry out one request; None when its answer gets lost."""
        with self.lock:
            path = path.removeprefix(BASE)
            self.seen.append(f"{method} {path}")
            if token != f"Bearer {self.token}":
                return _status(401, "Unauthorized")
            trouble = self.troubles.pop(0) if self.troubles else FINE
            if trouble not in (FINE, CUT):
                return _status(trouble, "no")
            answer = self._stored(method, path, body)
            if self.new_tokens:
                self.token = self.new_tokens.pop(0)
                (self.credentials / "token").write_text(self.token)
            return answer if trouble == FINE else None

    def _stored(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        _, kind, *name = path.split("/")
        if (method, kind, name) == ("POST", "rayjobs", []):
            job = json.loads(body)
            if job["metadata"]["name"] in self.jobs:
                return _status(409, "already exists")
            self.jobs[job["metadata"]["name"]] = job
            return 201, job
        if method == "GET" and kind == "raycronjobs" and name[0] in self.templates:
            return 200, self.templates[name[0]]
        if method == "GET" and kind == "rayjobs" and name[0] in self.jobs:
            status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
            if status is not None:
                return 200, self.jobs[name[0]] | {"status": status}
            del self.jobs[name[0]]
        return _status(404, "not found")


def _status(code: int, message: str) -> tuple[int, dict]:
    return code, {"kind": "Status", "status": "Failure", "code": code, "message": message}


@contextmanager
def kube_server(root: Path) -> Iterator[KubeServer]:
    """Serve on a free port; a pod's credentials for it lie in ``root``."""
    kube = KubeServer(root / "serviceaccount")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(kube))
    kube.port = server.server_address[1]
    key_and_certificate = root / "server.pem"
    write_certificate(key_and_certificate, kube.credentials / "ca.crt")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(key_and_certificate)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield kube
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _handler(kube: KubeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            token = self.headers.get("Authorization")
            answer = kube.answer(self.command, self.path, token, body)
            if answer is None:
                return
            payload = json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = answer  # noqa: N815 - named by http.server

        def log_message(self, *_: object) -> None:
            """Keep the output of tests clean."""

    return Handler


def write_certificate(key_and_certificate: Path, authority: Path) -> None:
    """Write a new self-signed certificate for 127.0.0.1, with its key and alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    key_and_certificate.write_bytes(private + certificate)
    authority.write_bytes(certificate)
