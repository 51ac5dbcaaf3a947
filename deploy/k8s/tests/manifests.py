"""Manifests as `kubectl kustomize` renders them, and the pods that controllers would make of them."""

import copy
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent.parent
OVERLAYS = ("dev", "prod")


def render(kubectl, overlay):
    """All objects of an overlay."""
    command = [kubectl, "kustomize", str(FOLDER / "overlays" / overlay)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [document for document in yaml.safe_load_all(text) if document]


@dataclass
class Objects:
    documents: list

    def of(self, kind):
        return [one for one in self.documents if one["kind"] == kind]

    def get(self, kind, name):
        found = [one for one in self.of(kind) if one["metadata"]["name"] == name]
        if not found:
            raise KeyError(f"there is no {kind} {name}")
        return found[0]

    def pods(self):
        """The pods of every StatefulSet and Job, by their stable names."""
        for workload in self.of("StatefulSet"):
            for ordinal in range(workload["spec"]["replicas"]):
                yield Pod.of(workload, ordinal)
        for workload in self.of("Job"):
            for index in range(workload["spec"]["completions"]):
                yield Pod.of(workload, index)


@dataclass
class Pod:
    name: str
    owner: dict
    index: int
    labels: dict
    spec: dict
    claims: dict = field(default_factory=dict)

    @staticmethod
    def of(workload, index):
        template = workload["spec"]["template"]
        name = f"{workload['metadata']['name']}-{index}"
        claims = workload["spec"].get("volumeClaimTemplates", [])
        claims = {claim["metadata"]["name"]: f"{claim['metadata']['name']}-{name}" for claim in claims}
        labels = dict(template["metadata"]["labels"])
        return Pod(name, workload, index, labels, copy.deepcopy(template["spec"]), claims)

    @property
    def is_server(self):
        return self.owner["kind"] == "StatefulSet"

    @property
    def host(self):
        """Its name in its namespace; a Job's pod has none."""
        return f"{self.name}.{self.owner['spec']['serviceName']}" if self.is_server else None

    def field_of(self, path):
        """What the downward API says; a label that is not there is empty."""
        label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
        if label:
            return self.labels.get(label[1], "")
        if path == "metadata.name":
            return self.name
        raise ValueError(f"{self.name}: field {path} is not known to this test")

    def environment(self, container, objects):
        """As the kubelet makes it: later ones may use earlier ones as $(NAME)."""
        environment = {}
        for source in container.get("envFrom", []):
            if not source.get("secretRef", {}).get("optional"):
                raise ValueError(f"{self.name}: {source} is needed, and this test has none")
        for entry in container.get("env", []):
            source = entry.get("valueFrom", {})
            if "fieldRef" in source:
                value = self.field_of(source["fieldRef"]["fieldPath"])
            elif "configMapKeyRef" in source:
                reference = source["configMapKeyRef"]
                value = objects.get("ConfigMap", reference["name"])["data"][reference["key"]]
            elif "value" in entry:
                value = expand(entry["value"], environment)
            else:
                raise ValueError(f"{self.name}: {entry} is not known to this test")
            environment[entry["name"]] = value
        if self.owner["kind"] == "Job":
            environment["JOB_COMPLETION_INDEX"] = str(self.index)
        return environment


def expand(text, environment):
    """$(NAME) where it is known, $$ for a dollar."""
    known = lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0])
    return re.sub(r"\$\$|\$\((\w+)\)", known, text)


def quantity(text):
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    units = {"": 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * units[unit]
