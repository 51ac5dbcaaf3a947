use std::io::Write as _;

use clap::ArgAction;
use serde::Deserialize;

use super::*;

#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
#[serde(default)]
struct Example {
    /// Stable name
    #[arg(long)]
    name: String,
    /// How often
    #[arg(long)]
    heartbeat_ms: u64,
    /// Members
    #[arg(long, value_delimiter = ',')]
    peers: Vec<String>,
    /// Sure
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    strict: bool,
    #[command(flatten)]
    #[serde(flatten)]
    common: Common,
}

impl Default for Example {
    fn default() -> Self {
        let common = Common { listen: "127.0.0.1:7170".into(), ..Common::default() };
        Self { name: "none".into(), heartbeat_ms: 100, peers: vec![], strict: false, common }
    }
}

impl Options for Example {
    fn problems(&self) -> Vec<Problem> {
        let mut problems = self.common.problems();
        if self.heartbeat_ms == 0 {
            problems.push(Problem::new("heartbeat_ms", "must not be 0"));
        }
        problems
    }
}

const PROGRAM: Program = Program { name: "example", about: "An example" };

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().expect("temporary file");
    file.write_all(text.as_bytes()).expect("write");
    file
}

fn outcome(args: &[&str], environment: &[(&str, &str)]) -> Result<Outcome<Example>, Error> {
    let args = std::iter::once("example").chain(args.iter().copied()).map(OsString::from);
    parse(PROGRAM, args, |name| {
        environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into())
    })
}

fn options(args: &[&str], environment: &[(&str, &str)]) -> Example {
    match outcome(args, environment).expect("valid") {
        Outcome::Run(options) => options,
        Outcome::Dump(_) => panic!("nobody asked for a dump"),
    }
}

fn errors(args: &[&str], environment: &[(&str, &str)]) -> String {
    outcome(args, environment).expect_err("invalid").to_string()
}

#[test]
fn each_layer_overrides_the_one_below_it() {
    let file = file("name = \"file\"\nheartbeat_ms = 1\nlog_level = \"warn\"\nstrict = true\n");
    let path = file.path().to_str().expect("UTF-8");
    let environment = [
        ("DOWNPOUR_HEARTBEAT_MS", "2"),
        ("DOWNPOUR_PEERS", "a,b"),
        ("DOWNPOUR_LOG_LEVEL", "debug"),
    ];
    let given = options(&["--config", path, "--log-level", "error"], &environment);
    assert_eq!((given.name.as_str(), given.heartbeat_ms, given.strict), ("file", 2, true));
    assert_eq!(given.peers, ["a", "b"]);
    assert_eq!(given.common.log_level, "error");
    assert_eq!(
        given.common.listen, "127.0.0.1:7170",
        "a default of the binary survives a file that does not name it"
    );
}

#[test]
fn a_bool_can_be_turned_on_and_off_in_each_layer() {
    let file = file("strict = true");
    let path = file.path().to_str().expect("UTF-8");
    assert!(options(&["--strict"], &[]).strict);
    assert!(options(&[], &[("DOWNPOUR_STRICT", "true")]).strict);
    assert!(!options(&["--strict=false"], &[("DOWNPOUR_CONFIG", path)]).strict);
}

#[test]
fn every_problem_of_a_file_is_named_with_file_and_field() {
    let file = file("heartbeat_ms = \"often\"\nlisten = 7\nlisen = \"x\"\n");
    let path = file.path().to_str().expect("UTF-8");
    let text = errors(&["--config", path], &[]);
    assert_eq!(text.lines().count(), 3, "{text}");
    for part in [path, "heartbeat_ms: invalid type", "listen: invalid type", "unknown option lisen"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
    let text = errors(&["--config", "/nowhere.toml"], &[]);
    assert!(text.starts_with("file /nowhere.toml: No such file"), "{text}");
}

#[test]
fn an_error_names_the_variable_or_the_flag() {
    let text = errors(&[], &[("DOWNPOUR_HEARTBEAT_MS", "often")]);
    assert!(
        text.starts_with("environment variable DOWNPOUR_HEARTBEAT_MS: invalid value 'often'"),
        "{text}"
    );
    let text = errors(&["--heartbeat-ms", "often"], &[]);
    assert!(text.contains("--heartbeat-ms"), "{text}");
}

#[test]
fn validation_returns_every_problem_with_its_source() {
    let text = errors(
        &["--heartbeat-ms", "0"],
        &[("DOWNPOUR_LISTEN", "nonsense"), ("DOWNPOUR_HTTP", "h:70000")],
    );
    assert_eq!(text.lines().count(), 3, "{text}");
    assert!(
        text.contains(
            "listen must be host:port, not \"nonsense\" (environment variable DOWNPOUR_LISTEN;"
        ),
        "{text}"
    );
    assert!(text.contains("heartbeat_ms must not be 0 (flag --heartbeat-ms;"), "{text}");
}

#[test]
fn a_dump_is_a_file_that_gives_the_same_options() {
    let Outcome::Dump(text) =
        outcome(&["--dump-config", "--peers", "a,b", "--http", "127.0.0.1:1"], &[]).expect("valid")
    else {
        panic!("a dump was asked for");
    };
    let file = file(&text);
    let given = options(&["--config", file.path().to_str().expect("UTF-8")], &[]);
    assert_eq!(toml::to_string(&table(&given)).expect("TOML"), text);
    assert_eq!(given.peers, ["a", "b"]);
    assert_eq!(given.common.http.as_deref(), Some("127.0.0.1:1"));
}

#[test]
fn help_names_variable_and_default() {
    let help = outcome(&["--help"], &[]).expect_err("help").to_string();
    assert!(
        help.contains("[env: DOWNPOUR_HEARTBEAT_MS]") && help.contains("[default: 100]"),
        "{help}"
    );
}

#[test]
fn an_empty_variable_counts_as_absent() {
    assert_eq!(options(&[], &[("DOWNPOUR_HTTP", "")]).common.http, None);
}

#[test]
fn addresses_are_host_and_port() {
    for good in ["127.0.0.1:7070", "ps-0.ps:7170", "[::1]:80"] {
        assert_eq!(check_host_port("listen", good), None, "{good}");
    }
    for bad in ["", ":80", "host", "host:", "host:x", "http://host:80", "::1:80", "host:65536"] {
        assert!(check_host_port("listen", bad).is_some(), "{bad}");
    }
}
