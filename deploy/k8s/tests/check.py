"""Checks manifests without a cluster: schemas of two Kubernetes versions, and what no schema says.

    check.py KUBECTL
"""

import copy
import sys
import tomllib

import kubernetes_validate

from manifests import OVERLAYS, Objects, quantity, render

# The oldest that the README promises and the newest that there is.
VERSIONS = ("1.29", "1.37")
LABELS = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "version", "component", "part-of", "managed-by")}
MEMORY_SHARE = 0.9


def main():
    kubectl, = sys.argv[1:]
    for overlay in OVERLAYS:
        objects = Objects(render(kubectl, overlay))
        schemas(overlay, objects)
        problems = list(rules(objects))
        if problems:
            sys.exit(f"{overlay}:\n  " + "\n  ".join(problems))
        print(f"{overlay}: {len(objects.documents)} objects are right for Kubernetes {' and '.join(VERSIONS)}")


def schemas(overlay, objects):
    for version in VERSIONS:
        for document in objects.documents:
            name = f"{overlay}: {document['kind']} {document['metadata']['name']}, Kubernetes {version}"
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                sys.exit(f"{name}: {'.'.join(map(str, error.path))}: {error.message}")
    # Strict is what finds a misspelt field: make sure that it does.
    misspelt = copy.deepcopy(objects.of("StatefulSet")[0])
    misspelt["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 1
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(misspelt, version, strict=True)
        except kubernetes_validate.ValidationError:
            continue
        sys.exit(f"the schemas of Kubernetes {version} let a misspelt field pass")


def rules(objects):
    names = {one["metadata"]["namespace"] for one in objects.documents if "namespace" in one["metadata"]}
    if names != {one["metadata"]["name"] for one in objects.of("Namespace")}:
        yield f"objects are in namespaces {names}"
    for policy in objects.of("NetworkPolicy") + objects.of("PodDisruptionBudget") + objects.of("Service"):
        yield from selects_somebody(policy, objects)
    for role in objects.of("Role"):
        for rule in role["rules"]:
            for name in rule["resourceNames"]:
                objects.get("StatefulSet", name)
    for pod in objects.pods():
        yield from (f"{pod.name}: {problem}" for problem in rules_of(pod, objects))
    for job in objects.of("Job"):
        spec = job["spec"]
        numbers = {spec["completions"], spec["parallelism"]}
        if len(numbers) != 1:
            yield f"{job['metadata']['name']}: completions and parallelism are {numbers}"
        ignored = [rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
        if ignored != [[option(spec, "--stopped-status")]]:
            yield f"{job['metadata']['name']}: a worker that is stopped is taken for one that failed"


def option(spec, name):
    found, = [arg for arg in spec["template"]["spec"]["containers"][0]["args"] if arg.startswith(name + "=")]
    return int(found.removeprefix(name + "="))


def selects_somebody(chooser, objects):
    spec = chooser["spec"]
    selector = spec.get("podSelector") or spec.get("selector")
    if chooser["kind"] == "Service":
        selector = {"matchLabels": selector}
    chosen = [pod for pod in objects.pods() if matches(selector, pod.labels)]
    if not chosen:
        yield f"{chooser['kind']} {chooser['metadata']['name']} selects no pod"
    named = [port["port"] for rule in spec.get("ingress", []) for port in rule["ports"]]
    named += [port["targetPort"] for port in spec.get("ports", [])]
    for pod in chosen:
        missing = set(named) - {port["name"] for port in pod.spec["containers"][0].get("ports", [])}
        if missing:
            yield f"{chooser['kind']} {chooser['metadata']['name']}: {pod.name} has no ports {missing}"


def matches(selector, labels):
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exact and all(labels.get(one["key"]) in one["values"] for one in selector.get("matchExpressions", []))


def rules_of(pod, objects):
    if not LABELS <= set(pod.labels):
        yield f"labels {LABELS - set(pod.labels)} are missing"
    objects.get("ServiceAccount", pod.spec["serviceAccountName"])
    if pod.spec["automountServiceAccountToken"]:
        yield "has a token that it does not need"
    if not pod.spec["securityContext"]["runAsNonRoot"]:
        yield "may run as root"
    for container in pod.spec.get("initContainers", []) + pod.spec["containers"]:
        security, resources = container["securityContext"], container["resources"]
        if security["allowPrivilegeEscalation"] or not security["readOnlyRootFilesystem"]:
            yield f"{container['name']} may do more than it needs"
        if "cpu" in resources["limits"]:
            yield f"{container['name']}: a CPU limit stalls heartbeats"
        if quantity(resources["requests"]["memory"]) > quantity(resources["limits"]["memory"]):
            yield f"{container['name']} requests more memory than its limit"
    for volume in pod.spec["volumes"]:
        if "configMap" in volume:
            objects.get("ConfigMap", volume["configMap"]["name"])
    if pod.is_server:
        yield from rules_of_server(pod, objects)


def rules_of_server(pod, objects):
    container, = pod.spec["containers"]
    service = objects.get("Service", pod.owner["spec"]["serviceName"])["spec"]
    if service["clusterIP"] != "None" or not service["publishNotReadyAddresses"]:
        yield "its name is not known before it is ready"
    config, = [volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume]
    (_, text), = objects.get("ConfigMap", config)["data"].items()
    settings = tomllib.loads(text)
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
    drain = int(hook.rsplit("--wait ", 1)[1].removesuffix("s")) if hook else 0
    if pod.spec["terminationGracePeriodSeconds"] < drain + settings["shutdown_ms"] / 1000 + 10:
        yield "the grace period is shorter than a drain and the shutdown"
    resources = container["resources"]
    if "memory_limit" in settings:
        share = settings["memory_limit"] / quantity(resources["limits"]["memory"])
        if not MEMORY_SHARE - 0.01 < share <= MEMORY_SHARE:
            yield f"memory_limit is {share:.3f} of the container's limit"
        if resources["requests"]["memory"] != resources["limits"]["memory"]:
            yield "its memory is not its own"
        if settings["data_threads"] != max(1, int(quantity(resources["requests"]["cpu"]))):
            yield "data_threads is not the CPU request"
    peers = settings.get("peers", [])
    members = pod.owner["spec"]["replicas"]
    if "coordinator" in pod.labels["app.kubernetes.io/component"] and max(1, len(peers)) != members:
        yield f"there are {members} members and {len(peers)} peers"


if __name__ == "__main__":
    main()
