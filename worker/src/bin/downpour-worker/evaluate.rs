//! Measuring a trained model.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::options::Options;
use crate::setup::{Purpose, Setup};

pub(crate) fn run(
    options: &Options,
    data: &[String],
    report: Option<&Path>,
    scores: Option<&Path>,
) -> anyhow::Result<()> {
    let data = match (data, &options.test) {
        ([], Some(test)) => test,
        ([], None) => bail!("--data is needed: the files to measure on"),
        (data, _) => &data.to_vec(),
    };
    let setup = Setup::new(options, Purpose::Evaluate, data)?;
    if let Some(path) = scores {
        let file = File::create(path).with_context(|| format!("--scores {}", path.display()))?;
        setup.scores(data, BufWriter::new(file))?;
        return Ok(setup.job.finish()?);
    }
    let mut result = setup.evaluate(data)?;
    result["model"] = options.model.as_deref().unwrap_or("script").into();
    writeln!(std::io::stdout(), "{result}").context("write to stdout")?;
    if let Some(path) = report {
        std::fs::write(path, format!("{result}\n"))
            .with_context(|| format!("--report {}", path.display()))?;
    }
    setup.job.finish()?;
    Ok(())
}
