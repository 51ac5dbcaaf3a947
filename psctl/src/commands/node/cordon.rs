//! `psctl node cordon` and `psctl node uncordon`

use downpour_core::view::Admission;

use crate::cli::Named;
use crate::output::Format;

pub(crate) const CORDON_HELP: &str = "\
Examples:
  psctl node cordon ps-1             it is given no more copies; what it holds stays
  psctl node cordon ps-1 --dry-run

Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.";

pub(crate) const UNCORDON_HELP: &str = "\
Examples:
  psctl node uncordon ps-1           it is given copies again; a drain that goes on is called off
  psctl node uncordon ps-1 --dry-run

Exit status: 0 done, also where it was so before; 1 failed; 2 wrong usage.";

pub(crate) async fn run(args: Named, cordon: bool, format: Format) -> anyhow::Result<()> {
    let Named { name, dry_run, connection } = args;
    let coordinators = connection.coordinators()?;
    let node = super::find(&connection.cluster().await?, &name)?;
    let (admission, verb, now) = match cordon {
        true => (Admission::Cordoned, "cordon", "no more copies; what it holds stays"),
        false => (Admission::Open, "uncordon", "copies again"),
    };
    if dry_run {
        eprintln!("{name} would be {verb}ed");
    } else {
        coordinators.admit_node(node, admission).await?;
        eprintln!("{name} is given {now}");
    }
    super::changed(format, name, verb, dry_run)
}
