//! What the workers are to do: the arguments that the user gave them, and those that psctl adds.

use std::path::Path;

use super::Args;
use crate::cli::Exit;

/// What trains and evaluates.
pub(super) const BINARY: &str = "downpour-worker";

/// Options of `train` that describe the model and its input, which `evaluate` needs as well.
const SHARED: &[&str] =
    &["--job", "--model", "--model-file", "--schema", "--dim", "--hidden", "--device", "--seed"];

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
        for own in ["--coordinators", "--worker-index", "--workers", "--out"] {
            if train.value(own)?.is_some() {
                return Err(Exit::Usage(format!(
                    "{own} is set by psctl: it cannot stand after `--`"
                )));
            }
        }
        let test = train.take("--test")?;
        if train.value("--job")?.is_none() {
            train.push("--job", "local");
        }
        if train.value("--replicas")?.is_none() {
            train.push("--replicas", &args.replicas.to_string());
        }
        let dataset = args.dataset.clone().or_else(|| {
            let data = train.value("--train").ok()??;
            let folder = Path::new(&data).parent()?.file_name()?;
            Some(folder.to_string_lossy().into_owned())
        });
        let model = train.value("--model-file")?.or(train.value("--model")?);
        let evaluation = test.map(|test| train.evaluation(&test)).transpose()?;
        Ok(Self {
            workers: args.workers.into(),
            dataset: dataset.unwrap_or_else(|| "unnamed".into()),
            model: model.unwrap_or_else(|| "default".into()),
            evaluation,
            train: train.0,
        })
    }

    pub(super) fn worker_args(&self, coordinators: &str, index: usize, out: &Path) -> Vec<String> {
        let mut args = Given(vec!["train".into()]);
        args.push("--coordinators", coordinators);
        args.push("--worker-index", &index.to_string());
        args.push("--workers", &self.workers.to_string());
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

/// Arguments as they were given: `--name value` or `--name=value`.
struct Given(Vec<String>);

impl Given {
    /// Where the option is, its value, and how many arguments that takes.
    fn find(&self, name: &str) -> Result<Option<(usize, String, usize)>, Exit> {
        for (at, argument) in self.0.iter().enumerate() {
            if argument == name {
                let value = self
                    .0
                    .get(at + 1)
                    .ok_or_else(|| Exit::Usage(format!("{name} has no value")))?;
                return Ok(Some((at, value.clone(), 2)));
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

    fn take(&mut self, name: &str) -> Result<Option<String>, Exit> {
        let Some((at, value, length)) = self.find(name)? else { return Ok(None) };
        self.0.drain(at..at + length);
        Ok(Some(value))
    }

    fn push(&mut self, name: &str, value: &str) {
        self.0.extend([name.to_owned(), value.to_owned()]);
    }

    /// Arguments of `evaluate` on `test` for what these train.
    fn evaluation(&self, test: &str) -> Result<Vec<String>, Exit> {
        let mut args = Given(Vec::new());
        args.push("--data", test);
        for name in SHARED {
            if let Some(value) = self.value(name)? {
                args.push(name, &value);
            }
        }
        Ok(args.0)
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
            "train --coordinators a:1,b:2 --worker-index 1 --workers 3 --out out \
             --model lr --train data/census/train.parquet --epochs 2 --job local --replicas 2"
        );
        assert_eq!((plan.dataset.as_str(), plan.model.as_str()), ("census", "lr"));
        assert_eq!(plan.evaluation, None);
    }

    #[test]
    fn the_test_file_goes_to_the_evaluation_with_what_describes_the_model() {
        let plan = plan("-- train --schema=s.toml --test t.csv --model lr --job j --epochs 2")
            .expect("valid");
        assert!(!plan.worker_args("a:1", 0, Path::new("out")).contains(&"--test".to_owned()));
        let args =
            evaluate_args(&plan.evaluation.expect("a test file"), "a:1", Path::new("r.json"))
                .join(" ");
        assert_eq!(
            args,
            "evaluate --coordinators a:1 --report r.json --data t.csv --job j --model lr --schema s.toml"
        );
    }

    #[test]
    fn what_psctl_sets_and_what_it_cannot_run_is_refused() {
        for line in [
            "-- evaluate",
            "-- train --workers 2",
            "-- train --coordinators=a:1",
            "-- train --test",
        ] {
            assert!(matches!(plan(line), Err(Exit::Usage(_))), "{line}");
        }
    }
}
