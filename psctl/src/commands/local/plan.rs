//! What the workers are to do: the arguments that the user gave them, and those that psctl adds.

use std::path::Path;

use super::Args;
use crate::cli::Exit;

/// What trains and evaluates.
pub(super) const BINARY: &str = "downpour-worker";

/// One training.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) workers: usize,
    pub(super) dataset: String,
    pub(super) model: String,
    /// Of `evaluate`, where there is something to evaluate on.
    pub(super) evaluation: Option<Vec<String>>,
    /// Of `train`.
    train: Vec<String>,
}

impl Plan {
    pub(super) fn new(args: &Args) -> Result<Self, Exit> {
        let Some((_, train)) = args.command.split_first().filter(|(verb, _)| *verb == "train")
        else {
            return Err(Exit::Usage("after `--` comes `train` and its arguments".into()));
        };
        let mut train = Given(train.to_vec());
        for own in ["--coordinators", "--worker-index", "--out"] {
            if train.value(own)?.is_some() {
                return Err(Exit::Usage(format!(
                    "{own} is set by psctl: it cannot stand after `--`"
                )));
            }
        }
        if train.value("--job")?.is_none() {
            train.push("--job", "local");
        }
        if train.value("--replicas")?.is_none() {
            train.push("--replicas", &args.replicas.to_string());
        }
        let dataset = args.dataset.clone().or_else(|| dataset_of(&train.value("--train").ok()??));
        let model = train.value("--model-file")?.or(train.value("--model")?);
        // `evaluate` takes all that `train` does, and measures on what `--test` names.
        let evaluation = train.clone();
        let evaluates = train.remove("--test")?;
        Ok(Self {
            workers: args.workers.into(),
            dataset: dataset.unwrap_or_else(|| "unnamed".into()),
            model: model.unwrap_or_else(|| "default".into()),
            evaluation: evaluates.then_some(evaluation.0),
            train: train.0,
        })
    }

    pub(super) fn worker_args(&self, coordinators: &str, index: usize, out: &Path) -> Vec<String> {
        let mut args = Given(vec!["train".into()]);
        args.push("--coordinators", coordinators);
        args.push("--worker-index", &index.to_string());
        args.push("--out", &out.to_string_lossy());
        args.0.extend(self.train.iter().cloned());
        args.0
    }
}

pub(super) fn evaluate_args(
    evaluation: &[String],
    coordinators: &str,
    report: &Path,
) -> Vec<String> {
    let mut args = Given(vec!["evaluate".into()]);
    args.push("--coordinators", coordinators);
    args.push("--report", &report.to_string_lossy());
    args.0.extend(evaluation.iter().cloned());
    args.0
}

/// The folder that the data lies in, which is how data sets are named where nobody names them.
fn dataset_of(data: &str) -> Option<String> {
    let path = Path::new(data);
    let folder = if path.extension().is_some() { path.parent()? } else { path };
    Some(folder.file_name()?.to_string_lossy().into_owned())
}

/// Arguments as they were given: `--name value ...` or `--name=value`.
#[derive(Clone)]
struct Given(Vec<String>);

impl Given {
    /// Where the option is, its first value, and how many arguments it and its values are.
    fn find(&self, name: &str) -> Result<Option<(usize, String, usize)>, Exit> {
        for (at, argument) in self.0.iter().enumerate() {
            if argument == name {
                let values = self.0[at + 1..].iter().take_while(|value| !value.starts_with("--"));
                let length = 1 + values.count();
                let value = self.0[at..at + length].get(1);
                let value = value.ok_or_else(|| Exit::Usage(format!("{name} has no value")))?;
                return Ok(Some((at, value.clone(), length)));
            }
            if let Some(value) = argument.strip_prefix(name).and_then(|rest| rest.strip_prefix('='))
            {
                return Ok(Some((at, value.to_owned(), 1)));
            }
        }
        Ok(None)
    }

    fn value(&self, name: &str) -> Result<Option<String>, Exit> {
        Ok(self.find(name)?.map(|(_, value, _)| value))
    }

    /// Whether there was anything to remove.
    fn remove(&mut self, name: &str) -> Result<bool, Exit> {
        let mut found = false;
        while let Some((at, _, length)) = self.find(name)? {
            self.0.drain(at..at + length);
            found = true;
        }
        Ok(found)
    }

    fn push(&mut self, name: &str, value: &str) {
        self.0.extend([name.to_owned(), value.to_owned()]);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn plan(line: &str) -> Result<Plan, Exit> {
        Plan::new(&Line::parse_from(format!("local {line}").split_whitespace()).args)
    }

    #[test]
    fn workers_get_their_number_and_the_users_arguments() {
        let plan =
            plan("--workers 3 -- train --model lr --train data/census/train.parquet --epochs 2")
                .expect("valid");
        let args = plan.worker_args("a:1,b:2", 1, Path::new("out")).join(" ");
        assert_eq!(
            args,
            "train --coordinators a:1,b:2 --worker-index 1 --out out \
             --model lr --train data/census/train.parquet --epochs 2 --job local --replicas 2"
        );
        assert_eq!((plan.dataset.as_str(), plan.model.as_str()), ("census", "lr"));
        assert_eq!(plan.evaluation, None);
    }

    #[test]
    fn test_files_go_to_the_evaluation_alone() {
        let plan = plan("-- train --schema=s.toml --test t1.csv t2.csv --model lr --job j")
            .expect("valid");
        assert_eq!(
            plan.worker_args("a:1", 0, Path::new("out"))[7..].join(" "),
            "--schema=s.toml --model lr --job j --replicas 2"
        );
        let args = evaluate_args(&plan.evaluation.expect("test files"), "a:1", Path::new("r.json"))
            .join(" ");
        assert_eq!(
            args,
            "evaluate --coordinators a:1 --report r.json \
             --schema=s.toml --test t1.csv t2.csv --model lr --job j --replicas 2"
        );
    }

    #[test]
    fn a_data_set_is_named_after_its_folder() {
        for data in
            ["data/census/train.parquet", "data/census/*.parquet", "data/census", "/data/census/"]
        {
            assert_eq!(dataset_of(data).as_deref(), Some("census"), "{data}");
        }
        assert_eq!(dataset_of("train.parquet"), None);
    }

    #[test]
    fn what_psctl_sets_and_what_it_cannot_run_is_refused() {
        for line in [
            "-- evaluate",
            "-- train --worker-index 2",
            "-- train --coordinators=a:1",
            "-- train --test",
        ] {
            assert!(matches!(plan(line), Err(Exit::Usage(_))), "{line}");
        }
    }
}
