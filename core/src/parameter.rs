//! What is wrong with a number that a user gave in the definition of a variable.

/// A parameter of an optimizer or of an initial value that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{field} is {value}, but must be {rule}")]
pub struct InvalidParameter {
    /// Path of the field as its user knows it, for example `adam.beta1`.
    pub field: &'static str,
    /// What was given.
    pub value: f64,
    /// What is accepted, in words that follow "must be".
    pub rule: &'static str,
}

pub(crate) fn require(
    holds: bool,
    field: &'static str,
    value: impl Into<f64>,
    rule: &'static str,
) -> Result<(), InvalidParameter> {
    if holds { Ok(()) } else { Err(InvalidParameter { field, value: value.into(), rule }) }
}
