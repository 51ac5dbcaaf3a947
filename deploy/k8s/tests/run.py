"""Starts what the manifests say as processes of this machine, uses it, and stops it as Kubernetes would.

    run.py KUBECTL BINARIES

Each pod is given a loopback address of its own, so that the ports are those of the manifests. Commands, arguments, environment, files of
ConfigMaps, probes, hooks and grace periods are taken to the letter, but for three substitutions: a pod's DNS name becomes its address, the
address 0.0.0.0 (all of the pod's) its own, and the path of a mount a folder. Images, users, limits and network policies are not played.
"""

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from api import Api
from manifests import OVERLAYS, Objects, Pod, expand, render

DEADLINE_S = 120
PAUSE_S = 0.1


class Failure(Exception):
    pass


class Node:
    """This machine as the node of all pods of an overlay."""

    def __init__(self, overlay, objects, binaries, folder):
        self.objects, self.binaries, self.folder = objects, binaries, folder
        # Somebody else may run the same test at the same time.
        self.network = f"127.{64 + os.getpid() % 128}.{OVERLAYS.index(overlay)}"
        self.pods = {}
        for pod in objects.pods():
            self.add(pod)

    def add(self, pod):
        self.pods[pod.name] = Running(pod, self, f"{self.network}.{10 + len(self.pods)}")
        return self.pods[pod.name]

    def hosts(self):
        return {running.pod.host: running.address for running in self.pods.values() if running.pod.host}

    def shared_mounts(self):
        """Where checkpoints go: a worker names the folder, and servers write there."""
        servers = self.of("StatefulSet")
        mounts = [mount for server in servers for mount in server.mounts(server.container).items()]
        return {path: folder for path, folder in mounts if folder == self.folder / "claims" / "downpour-checkpoints"}

    def of(self, kind):
        return [running for running in self.pods.values() if running.pod.owner["kind"] == kind]

    def client(self):
        """The environment of a pod that talks to the cluster."""
        addresses = next(one for one in self.objects.of("ConfigMap") if one["metadata"]["name"].startswith("downpour-addresses"))
        return {"DOWNPOUR_COORDINATORS": self.localized(addresses["data"]["coordinators"])} | self.path()

    def path(self):
        return {"PATH": f"{self.binaries}:/usr/bin:/bin"}

    def localized(self, text, address=None, mounts=()):
        for host, own in self.hosts().items():
            text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])", own, text)
        if left := re.search(r"[\w-]+\.downpour-\w+:\d+", text):
            raise Failure(f"{left[0]} is the name of no pod")
        if address:
            text = re.sub(r"(?<![\d.])0\.0\.0\.0(?![\d.])", address, text)
        for path, folder in mounts:
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w-])", str(folder), text)
        return text

    def psctl(self, *arguments, **environment):
        command = [self.binaries / "psctl", *arguments]
        done = subprocess.run(command, env=self.client() | environment, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S)
        if done.returncode:
            raise Failure(f"psctl {' '.join(arguments)}: status {done.returncode}")
        return done.stdout


class Running:
    """A pod, and the process of its one container."""

    def __init__(self, pod, node, address):
        self.pod, self.node, self.address = pod, node, address
        self.container, = pod.spec["containers"]
        self.folders = {volume["name"]: self.folder_of(volume) for volume in pod.spec["volumes"]}
        self.folders |= {name: node.folder / "claims" / claim for name, claim in pod.claims.items()}
        for folder in self.folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self.log = node.folder / f"{pod.name}.log"
        self.process = None

    def folder_of(self, volume):
        claim = volume.get("persistentVolumeClaim")
        if claim:
            return self.node.folder / "claims" / claim["claimName"]
        if not {"configMap", "emptyDir"} & set(volume):
            raise Failure(f"{self.pod.name}: volume {volume} is not known to this test")
        return self.node.folder / self.pod.name / volume["name"]

    def localized(self, text, container):
        mounts = self.node.shared_mounts() | self.mounts(container)
        # Only TMPDIR names it, and the folders of this test may be in it.
        mounts.pop("/tmp", None)
        return self.node.localized(text, self.address, sorted(mounts.items(), key=lambda mount: -len(mount[0])))

    def mounts(self, container):
        return {mount["mountPath"]: self.folders[mount["name"]] for mount in container["volumeMounts"]}

    def environment(self, container):
        environment = self.pod.environment(container, self.node.objects)
        return {name: self.localized(value, container) for name, value in environment.items()}

    def spawn(self, container, command=None):
        environment = self.environment(container)
        # Kubernetes does not expand the commands of hooks.
        words = command or [expand(word, environment) for word in container["command"] + container["args"]]
        words = [self.localized(word, container) for word in words]
        log = open(self.log, "a")
        print("$", *words, file=log, flush=True)
        folder = self.node.folder / self.pod.name
        folder.mkdir(exist_ok=True)
        environment |= self.node.path()
        # Nothing else can be written to where the root is read-only.
        environment["TMPDIR"] = str(self.mounts(container).get("/tmp", folder / "read-only"))
        return subprocess.Popen(words, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def start(self):
        for volume in self.pod.spec["volumes"]:
            if "configMap" in volume:
                files = self.node.objects.get("ConfigMap", volume["configMap"]["name"])["data"]
                for name, text in files.items():
                    (self.folders[volume["name"]] / name).write_text(self.localized(text, self.container))
        for container in self.pod.spec.get("initContainers", []):
            if status := self.spawn(container).wait(DEADLINE_S):
                raise Failure(f"{self.pod.name}: {container['name']} ended with status {status}")
        self.process = self.spawn(self.container)

    def probe(self, kind):
        request = self.container[kind]["httpGet"]
        url = f"http://{self.address}:{self.port(request['port'])}{request['path']}"
        try:
            with urllib.request.urlopen(url, timeout=self.container[kind]["timeoutSeconds"]) as reply:
                return None if 200 <= reply.status < 400 else f"{url}: {reply.status}"
        except urllib.error.HTTPError as error:
            return f"{url}: {error.code} {error.read().decode().strip()}"
        except OSError as error:
            return f"{url}: {error}"

    def port(self, name):
        return next(port["containerPort"] for port in self.container["ports"] if port["name"] == name)

    def until_ready(self):
        end = time.monotonic() + DEADLINE_S
        while problem := self.probe("readinessProbe"):
            if self.process.poll() is not None:
                raise Failure(f"{self.pod.name} ended with status {self.process.returncode}")
            if time.monotonic() > end:
                raise Failure(f"{self.pod.name} did not become ready: {problem}")
            time.sleep(PAUSE_S)
        if problem := self.probe("livenessProbe"):
            raise Failure(f"{self.pod.name} is ready and not alive: {problem}")
        for port in self.container["ports"]:
            socket.create_connection((self.address, port["containerPort"]), timeout=5).close()

    def stop(self):
        """The hook, SIGTERM, and no more time than the grace period. Returns the hook's status."""
        end = time.monotonic() + self.pod.spec["terminationGracePeriodSeconds"]
        hook = self.container.get("lifecycle", {}).get("preStop")
        status = None
        try:
            if hook:
                status = self.spawn(self.container, hook["exec"]["command"]).wait(end - time.monotonic())
            self.process.send_signal(signal.SIGTERM)
            ended = self.process.wait(end - time.monotonic())
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.pod.name} did not stop within its grace period") from None
        if ended:
            raise Failure(f"{self.pod.name} stopped with status {ended}")
        return status

    def resident_mib(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) // 1024

    def kill(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(overlay, node):
    servers = node.of("StatefulSet")
    for server in servers:
        server.start()
    for server in servers:
        server.until_ready()
    print(f"{overlay}: {len(servers)} pods are ready", flush=True)
    verdict = json.loads(node.psctl("verify", "--seconds", "3", "-o", "json"))
    print(f"{overlay}: psctl verify: {verdict['pushes_acked']} pushes, lost {verdict['lost']}, applied twice {verdict['duplicated']}", flush=True)

    workers = node.of("Job")
    fill_training_data(node, workers)
    for worker in workers:
        worker.start()
    for worker in workers:
        if status := worker.process.wait(DEADLINE_S):
            raise Failure(f"{worker.pod.name} ended with status {status}")
    rows = sum(shard["rows"] for shard in json.loads(node.psctl("shard", "list", "--job", "clicks", "-o", "json")))
    if not rows:
        raise Failure("the workers ended and no server has a row")
    print(f"{overlay}: {len(workers)} workers trained {rows} rows", flush=True)

    checkpoints = node.shared_mounts().popitem()[1]
    if not list(checkpoints.rglob("*.safetensors")):
        raise Failure(f"there is no checkpoint in {checkpoints}")
    replace_one(overlay, node)
    scale(overlay, node)
    # As the README says: what is left to hold nothing has nothing to drain.
    node.psctl("job", "delete", "clicks", "--yes")
    print(f"{overlay}: resident at most: {', '.join(f'{server.pod.name} {server.resident_mib()} MiB' for server in servers)}", flush=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        stopping = [pool.submit(server.stop) for server in servers]
        [one.result() for one in stopping]
    print(f"{overlay}: all pods stopped within their grace periods", flush=True)


def fill_training_data(node, workers):
    """Where a volume of somebody else's has the data, made as the other overlay makes it."""
    folder = workers[0].folders["data"]
    if workers[0].pod.spec.get("initContainers"):
        return
    command = [node.binaries / "downpour-gen", "clicks", "--rows=20000", "--test-rows=1000", "--ids-per-field=1000", f"--out={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def replace_one(overlay, node):
    """A rolling update in small: the last server is replaced while clients push."""
    last = [running for running in node.of("StatefulSet") if running.pod.labels["app.kubernetes.io/component"] == "parameter-server"][-1]
    command = [node.binaries / "psctl", "verify", "--seconds", "10", "-o", "json"]
    with subprocess.Popen(command, env=node.client(), stdout=subprocess.PIPE, text=True) as verifying:
        drained = last.stop()
        last.start()
        last.until_ready()
        verdict = json.loads(verifying.communicate(timeout=DEADLINE_S)[0])
    if verifying.returncode or verdict["lost"] or verdict["duplicated"]:
        raise Failure(f"psctl verify while {last.pod.name} was replaced: {verdict}")
    # With as many servers as copies nobody could take its copies.
    servers = last.pod.owner["spec"]["replicas"]
    if servers > 2 and drained != 0:
        raise Failure(f"the preStop hook of {last.pod.name} ended with status {drained}")
    end = time.monotonic() + DEADLINE_S
    while "open" != (found := next(one["admission"] for one in json.loads(node.psctl("node", "list", "-o", "json")) if one["name"] == last.pod.name)):
        if time.monotonic() > end:
            raise Failure(f"{last.pod.name} is {found} after its return")
        time.sleep(PAUSE_S)
    print(f"{overlay}: {last.pod.name} was replaced: {verdict['pushes_acked']} pushes, lost 0, applied twice 0, longest pause {verdict['longest_ack_gap_ms']} ms", flush=True)


def scale(overlay, node):
    """One server more and back again, by psctl with the service account of the manifests."""
    workload = node.objects.get("StatefulSet", "downpour-ps")
    count, namespace = workload["spec"]["replicas"], workload["metadata"]["namespace"]
    extra = Pod.of(workload, count)

    def controller(replicas):
        if replicas > count:
            node.add(extra).start()
        elif extra.name in node.pods:
            hook = node.pods[extra.name].stop()
            del node.pods[extra.name]
            if hook != 0:
                raise Failure(f"{extra.name} was not empty")

    account = node.folder / "service-account"
    command = [node.binaries / "psctl", "verify", "--seconds", "8", "-o", "json"]
    with Api(node.objects, account, namespace, "downpour-psctl", controller) as api:
        with subprocess.Popen(command, env=node.client(), stdout=subprocess.PIPE, text=True) as verifying:
            for replicas in (count + 1, count):
                node.psctl("scale", "ps", str(replicas), "--yes", f"--service-account={account}", **api.environment)
                api.settle()
                names = [one["name"] for one in json.loads(node.psctl("node", "list", "-o", "json"))]
                if len(names) != replicas:
                    raise Failure(f"{replicas} servers were asked for, and there are {names}")
            verdict = json.loads(verifying.communicate(timeout=DEADLINE_S)[0])
    if verifying.returncode or verdict["lost"] or verdict["duplicated"]:
        raise Failure(f"psctl verify while servers came and went: {verdict}")
    print(f"{overlay}: psctl scale: {count} servers, {count + 1}, {count}: {verdict['pushes_acked']} pushes, lost 0, applied twice 0", flush=True)


def main():
    kubectl, binaries = sys.argv[1], Path(sys.argv[2]).resolve()
    for overlay in OVERLAYS:
        with tempfile.TemporaryDirectory(prefix="downpour-k8s-") as folder:
            node = Node(overlay, Objects(render(kubectl, overlay)), binaries, Path(folder))
            try:
                run(overlay, node)
            except (Failure, subprocess.SubprocessError, OSError) as failure:
                for running in node.pods.values():
                    text = running.log.read_text() if running.log.exists() else ""
                    print(f"--- {running.pod.name}", *text.splitlines()[-10:], sep="\n", file=sys.stderr)
                sys.exit(f"{overlay}: {failure}")
            finally:
                for running in node.pods.values():
                    running.kill()


if __name__ == "__main__":
    main()
