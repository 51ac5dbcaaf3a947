"""As much of an API server as `psctl scale` asks: the scale of StatefulSets, behind TLS, with the rights that the manifests give."""

import concurrent.futures
import datetime
import http.server
import ipaddress
import json
import ssl
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

TOKEN = "the token of the service account"
VERBS = {"GET": "get", "PATCH": "patch"}


class Api:
    """Serves until the block ends. `controller` is called with each new number of replicas, beside the server."""

    def __init__(self, objects, account, namespace, name, controller):
        self.objects, self.namespace, self.account_name, self.controller = objects, namespace, name, controller
        self.replicas = {one["metadata"]["name"]: one["spec"]["replicas"] for one in objects.of("StatefulSet")}
        self.work = concurrent.futures.ThreadPoolExecutor(1)
        self.works = []
        account.mkdir()
        (account / "token").write_text(TOKEN + "\n")
        (account / "namespace").write_text(namespace)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(account))
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                length = int(self.headers.get("content-length", 0))
                status, reply = api.answer(self.command, self.path, self.headers, self.rfile.read(length))
                reply = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            do_PATCH = do_GET

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.server.server_port)}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.work.shutdown()

    def settle(self):
        """Until the controller has done all that it was told."""
        while self.works:
            self.works.pop(0).result()

    def answer(self, method, path, headers, body):
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"message": "Unauthorized"}
        for name in self.replicas:
            if path == f"/apis/apps/v1/namespaces/{self.namespace}/statefulsets/{name}/scale":
                if not self.may(VERBS[method], name):
                    return 403, {"message": f"{self.account_name} may not {VERBS[method]} statefulsets/scale {name}"}
                if method == "PATCH":
                    if headers.get("content-type") != "application/merge-patch+json":
                        return 415, {"message": "no merge patch"}
                    self.replicas[name] = json.loads(body)["spec"]["replicas"]
                    self.works.append(self.work.submit(self.controller, self.replicas[name]))
                return 200, {"kind": "Scale", "apiVersion": "autoscaling/v1", "spec": {"replicas": self.replicas[name]}}
        return 404, {"message": f"there is no {path}"}

    def may(self, verb, name):
        """What the Roles that are bound to the account say."""
        bindings = [one for one in self.objects.of("RoleBinding") if any(subject["name"] == self.account_name for subject in one["subjects"])]
        rules = [rule for binding in bindings for rule in self.objects.get("Role", binding["roleRef"]["name"])["rules"]]
        return any(
            "apps" in rule["apiGroups"]
            and "statefulsets/scale" in rule["resources"]
            and verb in rule["verbs"]
            and name in rule.get("resourceNames", [name])
            for rule in rules
        )


def certificate(folder):
    """Of an authority that is nowhere else, for 127.0.0.1. Returns the files of the server's certificate and key."""
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)

    def signed(name, key, issuer, issuer_key, *extensions):
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(issuer).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - day).not_valid_after(now + day)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(issuer_key, hashes.SHA256())

    def named(name):
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority, name = named("authority"), named("api server")
    root = signed(authority, authority_key, authority, authority_key, (x509.BasicConstraints(ca=True, path_length=None), True))
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    leaf = signed(name, key, authority, authority_key, (addresses, False), (x509.BasicConstraints(ca=False, path_length=None), True))
    (folder / "ca.crt").write_bytes(root.public_bytes(serialization.Encoding.PEM))
    certificate, private = folder / "server.crt", folder / "server.key"
    certificate.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))
    return certificate, private
