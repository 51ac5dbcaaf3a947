//! Rules about the text of the repository that no compiler checks.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use crate::Result;

const FILE_BYTES_MAX: usize = 5_000_000;
const SOURCE_LINES_MAX: usize = 900;
const SOURCES: [&str; 5] = ["rs", "py", "proto", "sh", "js"];

/// A source file longer than the limit says why with this, in a comment.
const LONG_MARK: &str = concat!("tidy: ", "long because ");

/// Taken apart here, so that this file keeps its own rules.
const FORBIDDEN: [(&str, &str); 6] = [
    (concat!("FIX", "ME"), "do it, or open an issue"),
    (concat!("dbg", "!("), "use tracing, or remove it"),
    (concat!("todo", "!("), "do it"),
    (concat!("unimplemented", "!("), "do it"),
    (concat!("/wo", "rk/"), "a path of one machine"),
    (concat!("../sh", "ared"), "a path outside the repository"),
];

/// What a simulation runs (docs/simulation.md): what these crates ask of the network and of threads goes through `downpour_proto`, which replaces both there. Else what is
/// simulated is not what is shipped, and one seed no longer gives the same bytes.
const SIMULATED: [&str; 5] =
    ["checkpoint/src", "client/src", "coordinator/src", "proto/src", "ps/src"];
const UNSIMULATED: [(&str, &str); 5] = [
    (concat!("tokio::", "net"), "use downpour_proto::net"),
    (concat!("std::net::", "Tcp"), "use downpour_proto::net"),
    (concat!("spawn_", "blocking("), "use downpour_proto::threads::blocking"),
    (concat!("thread::", "spawn("), "use downpour_proto::threads"),
    (concat!("thread::", "Builder"), "use downpour_proto::threads"),
];
/// A file that no simulation runs, or where it has something else in its place, says so with this, in a comment.
const UNSIMULATED_MARK: &str = concat!("tidy: ", "not simulated: ");
/// What follows is compiled for tests alone.
const TESTS: &str = "#[cfg(test)]";

pub(crate) fn check(root: &Path) -> Result<()> {
    let files = files(root)?;
    let mut problems = Vec::new();
    for path in &files {
        match fs::read(root.join(path)) {
            Ok(content) => problems.extend(
                problems_of(path, &content).map(|problem| format!("{}{problem}", path.display())),
            ),
            // Deleted and not committed yet.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => problems.push(format!("{}: {error}", path.display())),
        }
    }
    if problems.is_empty() {
        eprintln!("{} files are tidy", files.len());
        return Ok(());
    }
    Err(format!("{} untidy places:\n  {}", problems.len(), problems.join("\n  ")))
}

/// What git tracks or would add; in a tree without git, everything but build output and caches.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root);
    if let Ok(output) = git.output()
        && output.status.success()
    {
        let names = String::from_utf8_lossy(&output.stdout);
        return Ok(names.split_terminator('\0').map(PathBuf::from).collect());
    }
    let mut files = Vec::new();
    walk(root, Path::new(""), &mut files).map_err(|error| format!("walk the tree: {error}"))?;
    Ok(files)
}

fn walk(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(root.join(folder))? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        if !entry.file_type()?.is_dir() {
            files.push(path);
        } else if ![".git", ".cache", "target", "__pycache__"]
            .iter()
            .any(|name| path.ends_with(name))
        {
            walk(root, &path, files)?;
        }
    }
    Ok(())
}

/// Each problem starts with its place in the file, to be put behind the path.
fn problems_of<'a>(path: &'a Path, content: &'a [u8]) -> impl Iterator<Item = String> + 'a {
    let size = (content.len() > FILE_BYTES_MAX).then(|| {
        format!(": {} bytes; at most {FILE_BYTES_MAX}: fetch it, or make it smaller", content.len())
    });
    // What is not text has no words in it.
    let text = std::str::from_utf8(content).unwrap_or_default();
    let is_source = path.extension().is_some_and(|ending| SOURCES.iter().any(|s| ending == *s));
    let lines = text.lines().count();
    let length = (is_source && lines > SOURCE_LINES_MAX && !text.contains(LONG_MARK)).then(|| {
        format!(": {lines} lines; above {SOURCE_LINES_MAX} split it, or write `{LONG_MARK}…`")
    });
    let is_root = path.ends_with("src/lib.rs") || path.ends_with("src/main.rs");
    let map = (is_root && !text.starts_with("//!"))
        .then(|| ":1: a crate's root starts with its map, in `//!`".to_owned());
    let words = text.lines().enumerate().flat_map(|(index, line)| {
        let found = FORBIDDEN.iter().filter(move |(word, _)| has_word(line, word));
        found.map(move |(word, advice)| format!(":{}: `{word}`: {advice}", index + 1))
    });
    size.into_iter().chain(length).chain(map).chain(words).chain(unsimulated(path, text))
}

/// Ways around what a simulation replaces, in shipped code.
fn unsimulated<'a>(path: &Path, text: &'a str) -> impl Iterator<Item = String> + 'a {
    let is_test = path.components().any(|part| {
        let part = part.as_os_str().to_string_lossy();
        part == "tests" || part == "tests.rs"
    });
    let simulated = SIMULATED.iter().any(|folder| path.starts_with(folder));
    let looked_at = simulated && !is_test && !text.contains(UNSIMULATED_MARK);
    let shipped = text.lines().take_while(|line| *line != TESTS).filter(move |_| looked_at);
    shipped.enumerate().flat_map(|(index, line)| {
        let code = line.split("//").next().unwrap_or_default();
        let found = UNSIMULATED.iter().filter(move |(way, _)| code.contains(way));
        found.map(move |(way, advice)| {
            let line = index + 1;
            format!(":{line}: `{way}`: {advice}, or a simulation runs something else; or write `{UNSIMULATED_MARK}…`")
        })
    })
}

/// Whether `word` is there and is not the end of a longer one.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || "_-.".contains(before))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, content: &str) -> Vec<String> {
        problems_of(Path::new(path), content.as_bytes()).collect()
    }

    #[test]
    fn each_forbidden_word_is_found_with_its_line() {
        for (word, _) in FORBIDDEN {
            let found = problems("a/b.md", &format!("first\n  let x = {word}y\n"));
            assert!(matches!(&found[..], [one] if one.starts_with(":2: ")), "{word}: {found:?}");
        }
    }

    #[test]
    fn the_end_of_a_longer_word_is_not_the_word() {
        let url = concat!("https://example.org/home", "/wo", "rk/a");
        assert_eq!(problems("a.md", &format!("my_{} {url}", FORBIDDEN[1].0)), [""; 0]);
    }

    #[test]
    fn shipped_code_that_is_simulated_goes_around_neither_the_network_nor_the_threads() {
        for (way, _) in UNSIMULATED {
            let code = format!("fn f() {{\n    {way}x);\n}}\n");
            for folder in SIMULATED {
                let found = problems(&format!("{folder}/a.rs"), &code);
                assert!(matches!(&found[..], [one] if one.starts_with(":2: ")), "{way}: {found:?}");
            }
            let nobody = [""; 0];
            assert_eq!(problems("worker/src/a.rs", &code), nobody);
            assert_eq!(problems("ps/tests/a.rs", &code), nobody);
            assert_eq!(problems("ps/src/a/tests.rs", &code), nobody);
            assert_eq!(
                problems("ps/src/a.rs", &format!("{TESTS}\nmod tests {{\n{code}}}\n")),
                nobody
            );
            assert_eq!(
                problems("ps/src/a.rs", &format!("// {UNSIMULATED_MARK}a reason\n{code}")),
                nobody
            );
            assert_eq!(problems("ps/src/a.rs", &format!("/// Not {way}.\n")), nobody);
        }
    }

    #[test]
    fn a_long_source_file_gives_a_reason() {
        let long = "x\n".repeat(SOURCE_LINES_MAX + 1);
        assert_eq!(problems("a.rs", &long).len(), 1);
        assert_eq!(problems("a.rs", &format!("{long}// {LONG_MARK}it is one table")), [""; 0]);
        assert_eq!(problems("a.csv", &long), [""; 0]);
    }

    #[test]
    fn a_big_file_is_refused_text_or_not() {
        let big = vec![0xff; FILE_BYTES_MAX + 1];
        assert_eq!(problems_of(Path::new("a.parquet"), &big).count(), 1);
        assert_eq!(problems_of(Path::new("a.parquet"), &big[1..]).count(), 0);
    }

    #[test]
    fn a_crate_root_starts_with_its_map() {
        assert_eq!(problems("core/src/lib.rs", "pub mod id;\n").len(), 1);
        assert_eq!(problems("core/src/lib.rs", "//! The domain.\n"), [""; 0]);
        assert_eq!(problems("core/src/id.rs", "pub struct Id;\n"), [""; 0]);
    }
}
