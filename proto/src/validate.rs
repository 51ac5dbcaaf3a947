//! The shape of requests on the data plane, checked before anything reads them.
//!
//! What needs no knowledge of the job is checked here: numbers are given, lists strictly increase, tensors hold whole elements. Whether an
//! update fits its variable is the shard's to say, since that answer is part of the log.

use downpour_core::clocks::CLOCK_MAX;
use downpour_core::tensor_bytes::FLOAT_BYTES;

use crate::tensor::Keys;
use crate::{Invalid, v1};

/// Most variables in one part of a request.
pub const UPDATES_MAX: usize = 65_536;

/// Checks a [`v1::PushRequest`].
///
/// # Errors
/// Names the first field that is wrong.
pub fn push_request(request: &v1::PushRequest) -> Result<(), Invalid> {
    given("job", request.job)?;
    given("session", request.session)?;
    given("incarnation", request.incarnation)?;
    if request.clock > CLOCK_MAX {
        return Err(Invalid::new("clock", format!("is {}, at most {CLOCK_MAX}", request.clock)));
    }
    increasing("parts.shard", request.parts.iter().map(|part| part.shard))?;
    for part in &request.parts {
        given("parts.epoch", part.epoch)?;
        given("parts.sequence", part.sequence)?;
        updates(&part.updates)?;
    }
    Ok(())
}

/// Checks the updates of a push or of a log record.
///
/// # Errors
/// Names the first field that is wrong.
pub fn updates(updates: &[v1::Update]) -> Result<(), Invalid> {
    at_most("updates", updates.len(), UPDATES_MAX)?;
    increasing("updates.variable", updates.iter().map(|update| update.variable))?;
    updates.iter().try_for_each(update)
}

/// Checks the updates of several pushes, one after the other: a variable may come again.
///
/// # Errors
/// Names the first field that is wrong.
pub fn updates_in_order(updates: &[v1::Update]) -> Result<(), Invalid> {
    at_most("updates", updates.len(), UPDATES_MAX)?;
    updates.iter().try_for_each(update)
}

/// Checks one update.
///
/// # Errors
/// Names the first field that is wrong.
pub fn update(update: &v1::Update) -> Result<(), Invalid> {
    given("updates.variable", update.variable)?;
    match &update.body {
        Some(v1::update::Body::Rows(rows)) => row_gradients(rows),
        Some(v1::update::Body::Gradients(dense)) => blocks("updates.gradients", dense),
        Some(v1::update::Body::Values(dense)) => blocks("updates.values", dense),
        Some(v1::update::Body::Contribution(contribution)) => {
            if contribution.round == 0 || contribution.round > CLOCK_MAX {
                return Err(Invalid::new("updates.contribution.round", "is out of range"));
            }
            match &contribution.body {
                Some(v1::contribution::Body::Rows(rows)) => row_gradients(rows),
                Some(v1::contribution::Body::Gradients(dense)) => {
                    blocks("updates.gradients", dense)
                }
                None => Err(Invalid::new("updates.contribution.body", "is not given")),
            }
        }
        None => Err(Invalid::new("updates.body", "is not given")),
    }
}

fn row_gradients(rows: &v1::RowGradients) -> Result<(), Invalid> {
    let keys = Keys::new("updates.rows.keys", &rows.keys)?;
    // What a float is only the table's definition tells: at least two bytes.
    elements("updates.rows.gradients", &rows.gradients, 2, keys.len())
}

/// Checks a [`v1::PullRequest`].
///
/// # Errors
/// Names the first field that is wrong.
pub fn pull_request(request: &v1::PullRequest) -> Result<(), Invalid> {
    given("job", request.job)?;
    given("incarnation", request.incarnation)?;
    increasing("parts.shard", request.parts.iter().map(|part| part.shard))?;
    for part in &request.parts {
        given("parts.epoch", part.epoch)?;
        at_most("parts.rows", part.rows.len(), UPDATES_MAX)?;
        at_most("parts.dense", part.dense.len(), UPDATES_MAX)?;
        increasing("parts.rows.variable", part.rows.iter().map(|rows| rows.variable))?;
        increasing("parts.dense.variable", part.dense.iter().map(|dense| dense.variable))?;
        for rows in &part.rows {
            given("parts.rows.variable", rows.variable)?;
            Keys::new("parts.rows.keys", &rows.keys)?;
        }
        for dense in &part.dense {
            given("parts.dense.variable", dense.variable)?;
        }
    }
    Ok(())
}

fn blocks(field: &'static str, dense: &v1::DenseBlocks) -> Result<(), Invalid> {
    increasing(field, dense.blocks.iter().copied())?;
    elements(field, &dense.values, FLOAT_BYTES, dense.blocks.len())
}

/// `count` things of one or more whole floats each (none when there is nothing).
fn elements(
    field: &'static str,
    bytes: &[u8],
    float_bytes: usize,
    count: usize,
) -> Result<(), Invalid> {
    if !bytes.len().is_multiple_of(float_bytes) {
        return Err(Invalid::new(field, format!("must hold whole floats of {float_bytes} bytes")));
    }
    if bytes.len() / float_bytes < count || (count == 0 && !bytes.is_empty()) {
        return Err(Invalid::new(
            field,
            format!("holds {} bytes for {count} elements", bytes.len()),
        ));
    }
    Ok(())
}

fn given(field: &'static str, number: impl Into<u64>) -> Result<(), Invalid> {
    if number.into() == 0 { Err(Invalid::new(field, "is not given")) } else { Ok(()) }
}

fn at_most(field: &'static str, count: usize, max: usize) -> Result<(), Invalid> {
    if count > max {
        return Err(Invalid::new(
            field,
            format!("has {count} elements, at most {max} are allowed"),
        ));
    }
    Ok(())
}

fn increasing(field: &'static str, mut numbers: impl Iterator<Item = u32>) -> Result<(), Invalid> {
    let Some(mut previous) = numbers.next() else { return Ok(()) };
    for number in numbers {
        if number <= previous {
            return Err(Invalid::new(field, format!("must strictly increase, at {number}")));
        }
        previous = number;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn push() -> v1::PushRequest {
        let rows = v1::RowGradients {
            keys: [1u64, 2].iter().flat_map(|key| key.to_le_bytes()).collect::<Vec<_>>().into(),
            gradients: vec![0; 16].into(),
        };
        let update = v1::Update { variable: 1, body: Some(v1::update::Body::Rows(rows)) };
        let updates = vec![update];
        let part =
            v1::PushPart { shard: 0, epoch: 1, sequence: 1, updates, numbering: 0, read: None };
        v1::PushRequest {
            request: 1,
            job: 1,
            session: 1,
            incarnation: 1,
            parts: vec![part],
            ..Default::default()
        }
    }

    fn refused(change: impl FnOnce(&mut v1::PushRequest)) -> &'static str {
        let mut request = push();
        change(&mut request);
        push_request(&request).unwrap_err().field
    }

    fn rows(request: &mut v1::PushRequest) -> &mut v1::RowGradients {
        match &mut request.parts[0].updates[0].body {
            Some(v1::update::Body::Rows(rows)) => rows,
            _ => unreachable!("made with rows"),
        }
    }

    #[test]
    fn a_malformed_push_is_refused_by_field() {
        assert_eq!(push_request(&push()), Ok(()));
        assert_eq!(refused(|push| push.session = 0), "session");
        assert_eq!(refused(|push| push.incarnation = 0), "incarnation");
        assert_eq!(refused(|push| push.clock = CLOCK_MAX + 1), "clock");
        assert_eq!(refused(|push| push.parts[0].sequence = 0), "parts.sequence");
        assert_eq!(refused(|push| push.parts.push(push.parts[0].clone())), "parts.shard");
        assert_eq!(refused(|push| push.parts[0].updates[0].body = None), "updates.body");
        assert_eq!(refused(|push| rows(push).keys = vec![0; 16].into()), "updates.rows.keys");
        assert_eq!(refused(|push| rows(push).keys = vec![0; 9].into()), "updates.rows.keys");
        assert_eq!(
            refused(|push| rows(push).gradients = vec![0; 2].into()),
            "updates.rows.gradients"
        );
        let contribution = |round, keys: usize| v1::Contribution {
            round,
            body: Some(v1::contribution::Body::Rows(v1::RowGradients {
                keys: vec![0; keys].into(),
                gradients: vec![0; 8].into(),
            })),
        };
        let refused = |contribution| {
            refused(|push| {
                push.parts[0].updates[0].body = Some(v1::update::Body::Contribution(contribution));
            })
        };
        assert_eq!(refused(contribution(0, 8)), "updates.contribution.round");
        assert_eq!(refused(contribution(u64::MAX, 8)), "updates.contribution.round");
        assert_eq!(refused(contribution(1, 9)), "updates.rows.keys");
        let empty = v1::Contribution { round: 1, body: None };
        assert_eq!(refused(empty), "updates.contribution.body");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(bytes: Vec<u8>) {
            if let Ok(request) = v1::PushRequest::decode(bytes.as_slice()) {
                let _ = push_request(&request);
            }
            if let Ok(request) = v1::PullRequest::decode(bytes.as_slice()) {
                let _ = pull_request(&request);
            }
        }
    }
}
