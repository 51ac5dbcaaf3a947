//! One Arrow column as what the schema asks of it: bytes to hash, numbers, raw keys, lists.

use std::borrow::Cow;
use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::types::{self, ArrowPrimitiveType};
use arrow_array::{Array, ArrayRef};
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;

/// What is wrong with a value, without its place.
pub(crate) type Fault = String;

pub(crate) struct Column<'a> {
    nulls: Option<&'a NullBuffer>,
    values: Values<'a>,
    missing: &'a [String],
}

enum Values<'a> {
    Bytes(Box<dyn Fn(usize) -> &'a [u8] + 'a>),
    Signed(Cow<'a, [i64]>),
    Unsigned(Cow<'a, [u64]>),
    Float(Cow<'a, [f64]>),
    Dictionary { keys: Vec<usize>, values: Box<Column<'a>> },
    List { offsets: Vec<usize>, items: Box<Column<'a>> },
}

impl<'a> Column<'a> {
    /// `missing` are the strings that mean "no value".
    pub(crate) fn new(array: &'a ArrayRef, missing: &'a [String]) -> Result<Self, Fault> {
        let nested = |array: &'a ArrayRef| Column::new(array, missing).map(Box::new);
        let values = match array.data_type() {
            DataType::Utf8 => bytes(array.as_string::<i32>(), |a, i| a.value(i).as_bytes()),
            DataType::LargeUtf8 => bytes(array.as_string::<i64>(), |a, i| a.value(i).as_bytes()),
            DataType::Utf8View => bytes(array.as_string_view(), |a, i| a.value(i).as_bytes()),
            DataType::Binary => bytes(array.as_binary::<i32>(), |a, i| a.value(i)),
            DataType::LargeBinary => bytes(array.as_binary::<i64>(), |a, i| a.value(i)),
            DataType::BinaryView => bytes(array.as_binary_view(), |a, i| a.value(i)),
            DataType::FixedSizeBinary(_) => bytes(array.as_fixed_size_binary(), |a, i| a.value(i)),
            DataType::Boolean => {
                let array = array.as_boolean();
                Values::Signed((0..array.len()).map(|i| i64::from(array.value(i))).collect())
            }
            DataType::Int8 => signed::<types::Int8Type>(array),
            DataType::Int16 => signed::<types::Int16Type>(array),
            DataType::Int32 => signed::<types::Int32Type>(array),
            DataType::Int64 => {
                Values::Signed(Cow::Borrowed(array.as_primitive::<types::Int64Type>().values()))
            }
            DataType::UInt8 => unsigned::<types::UInt8Type>(array),
            DataType::UInt16 => unsigned::<types::UInt16Type>(array),
            DataType::UInt32 => unsigned::<types::UInt32Type>(array),
            DataType::UInt64 => {
                Values::Unsigned(Cow::Borrowed(array.as_primitive::<types::UInt64Type>().values()))
            }
            DataType::Float16 => {
                let values = array.as_primitive::<types::Float16Type>().values();
                Values::Float(values.iter().map(|x| x.to_f64()).collect())
            }
            DataType::Float32 => {
                let values = array.as_primitive::<types::Float32Type>().values();
                Values::Float(values.iter().map(|x| f64::from(*x)).collect())
            }
            DataType::Float64 => {
                Values::Float(Cow::Borrowed(array.as_primitive::<types::Float64Type>().values()))
            }
            DataType::Date32 => signed::<types::Date32Type>(array),
            DataType::Date64 => signed::<types::Date64Type>(array),
            DataType::Timestamp(unit, _) => {
                use arrow_schema::TimeUnit::{Microsecond, Millisecond, Nanosecond, Second};
                match unit {
                    Second => signed::<types::TimestampSecondType>(array),
                    Millisecond => signed::<types::TimestampMillisecondType>(array),
                    Microsecond => signed::<types::TimestampMicrosecondType>(array),
                    Nanosecond => signed::<types::TimestampNanosecondType>(array),
                }
            }
            DataType::Dictionary(..) => {
                let dictionary = array.as_any_dictionary();
                Values::Dictionary {
                    keys: dictionary.normalized_keys(),
                    values: nested(dictionary.values())?,
                }
            }
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                let offsets = list.value_offsets().iter().map(|offset| *offset as usize).collect();
                Values::List { offsets, items: nested(list.values())? }
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                let offsets = list.value_offsets().iter().map(|offset| *offset as usize).collect();
                Values::List { offsets, items: nested(list.values())? }
            }
            DataType::FixedSizeList(_, len) => {
                let list = array.as_fixed_size_list();
                let offsets = (0..=list.len()).map(|i| i * *len as usize).collect();
                Values::List { offsets, items: nested(list.values())? }
            }
            other => return Err(format!("its type {other} is neither text, number nor list")),
        };
        Ok(Self { nulls: array.nulls(), values, missing })
    }

    /// The items of row `i`, if this is a column of lists: no list is an empty one.
    pub(crate) fn list(&self) -> Option<(impl Fn(usize) -> Range<usize> + '_, &Column<'a>)> {
        let Values::List { offsets, items } = &self.values else { return None };
        let range = |i: usize| if self.is_null(i) { 0..0 } else { offsets[i]..offsets[i + 1] };
        Some((range, items))
    }

    pub(crate) fn is_list(&self) -> bool {
        matches!(self.values, Values::List { .. })
    }

    fn is_null(&self, i: usize) -> bool {
        self.nulls.is_some_and(|nulls| nulls.is_null(i))
    }

    fn present<'b>(&self, bytes: &'b [u8]) -> Option<&'b [u8]> {
        let missing = bytes.is_empty() || self.missing.iter().any(|word| word.as_bytes() == bytes);
        (!missing).then_some(bytes)
    }

    /// The bytes to hash: integers as their decimal digits.
    pub(crate) fn text<'b>(
        &'b self,
        i: usize,
        digits: &'b mut itoa::Buffer,
    ) -> Result<Option<&'b [u8]>, Fault> {
        if self.is_null(i) {
            return Ok(None);
        }
        Ok(match &self.values {
            Values::Bytes(get) => self.present(get(i)),
            Values::Signed(values) => Some(digits.format(values[i]).as_bytes()),
            Values::Unsigned(values) => Some(digits.format(values[i]).as_bytes()),
            Values::Float(values) => {
                whole(values[i])?.map(|integer| digits.format(integer).as_bytes())
            }
            Values::Dictionary { keys, values } => values.text(keys[i], digits)?,
            Values::List { .. } => return Err(LIST.into()),
        })
    }

    /// An integer as it stands; a negative one in two's complement.
    pub(crate) fn raw(&self, i: usize) -> Result<Option<u64>, Fault> {
        if self.is_null(i) {
            return Ok(None);
        }
        Ok(match &self.values {
            Values::Bytes(get) => self.present(get(i)).map(raw_key).transpose()?,
            Values::Signed(values) => Some(values[i] as u64),
            Values::Unsigned(values) => Some(values[i]),
            Values::Float(values) => whole(values[i])?.map(|integer| integer as u64),
            Values::Dictionary { keys, values } => values.raw(keys[i])?,
            Values::List { .. } => return Err(LIST.into()),
        })
    }

    /// A finite number. NaN means "no value", as pandas writes it.
    pub(crate) fn number(&self, i: usize) -> Result<Option<f64>, Fault> {
        if self.is_null(i) {
            return Ok(None);
        }
        let number = match &self.values {
            Values::Bytes(get) => self.present(get(i)).map(parse_number).transpose()?,
            Values::Signed(values) => Some(values[i] as f64),
            Values::Unsigned(values) => Some(values[i] as f64),
            Values::Float(values) => Some(values[i]),
            Values::Dictionary { keys, values } => values.number(keys[i])?,
            Values::List { .. } => return Err(LIST.into()),
        };
        match number {
            Some(number) if number.is_nan() => Ok(None),
            Some(number) if number.is_infinite() => Err(format!("{number} is not a finite number")),
            number => Ok(number),
        }
    }

    /// The text of a value, or nothing where it is missing or no text.
    pub(crate) fn bytes(&self, i: usize) -> Result<Option<&[u8]>, Fault> {
        match &self.values {
            Values::Bytes(get) if !self.is_null(i) => Ok(self.present(get(i))),
            Values::Dictionary { keys, values } if !self.is_null(i) => values.bytes(keys[i]),
            Values::Bytes(_) | Values::Dictionary { .. } => Ok(None),
            _ => Err("a separator is given, but the values are not text".into()),
        }
    }
}

const LIST: &str = "it is a list, but one value is wanted";

fn bytes<'a, A>(array: &'a A, get: impl Fn(&'a A, usize) -> &'a [u8] + 'a) -> Values<'a> {
    Values::Bytes(Box::new(move |i| get(array, i)))
}

fn signed<T: ArrowPrimitiveType<Native: Into<i64>>>(array: &ArrayRef) -> Values<'_> {
    Values::Signed(array.as_primitive::<T>().values().iter().map(|x| (*x).into()).collect())
}

fn unsigned<T: ArrowPrimitiveType<Native: Into<u64>>>(array: &ArrayRef) -> Values<'_> {
    Values::Unsigned(array.as_primitive::<T>().values().iter().map(|x| (*x).into()).collect())
}

/// Text as an integer key.
pub(crate) fn raw_key(text: &[u8]) -> Result<u64, Fault> {
    let parsed = std::str::from_utf8(text).ok().and_then(|text| {
        text.parse::<u64>().ok().or_else(|| text.parse::<i64>().ok().map(|key| key as u64))
    });
    parsed.ok_or_else(|| format!("{} is not an integer of 64 bits", show(text)))
}

/// Text as a number; spaces around it do not matter.
pub(crate) fn parse_number(text: &[u8]) -> Result<f64, Fault> {
    let parsed = std::str::from_utf8(text.trim_ascii()).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| format!("{} is not a number", show(text)))
}

/// An integer that came as a float, as pandas writes a column of integers with gaps.
fn whole(x: f64) -> Result<Option<i64>, Fault> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    if x.is_nan() {
        Ok(None)
    } else if x.fract() == 0.0 && x.abs() <= EXACT_MAX {
        Ok(Some(x as i64))
    } else {
        Err(format!("{x} is no integer: a key cannot be made of it (a [[bucket]] could)"))
    }
}

/// A value for a message: quoted, and cut where it is long.
pub(crate) fn show(text: &[u8]) -> String {
    const SHOWN_MAX: usize = 40;
    let shown = String::from_utf8_lossy(&text[..text.len().min(SHOWN_MAX)]);
    if text.len() > SHOWN_MAX { format!("{shown:?}…") } else { format!("{shown:?}") }
}
