use std::sync::Arc;

use arrow_array::RecordBatch;

use crate::column::{self, Column, Fault};
use crate::hash::fold;
use crate::schema::Part;
use crate::{
    Bucket, Chunk, Encoded, Error, Feature, Keys, Label, LabelRule, Result, Salt, Schema, Source,
    Task, Transform,
};

/// Turns Arrow rows into what a model wants, by a [`Schema`].
#[derive(Clone, Debug)]
pub struct Encoder {
    schema: Arc<Schema>,
}

impl Encoder {
    pub fn new(schema: impl Into<Arc<Schema>>) -> Self {
        Self { schema: schema.into() }
    }

    #[must_use]
    pub fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// Encodes rows of a task.
    pub fn encode(&self, task: &Arc<Task>, chunk: &Chunk) -> Result<Encoded> {
        let mut encoded = Encoded::empty(&self.schema);
        self.append(&mut encoded, task, &chunk.batch, chunk.first_row)?;
        Ok(encoded)
    }

    /// Encodes rows behind those that are there. After an error `out` is of no use.
    pub(crate) fn append(
        &self,
        out: &mut Encoded,
        task: &Arc<Task>,
        batch: &RecordBatch,
        first_row: u64,
    ) -> Result<()> {
        let rows = Rows { schema: &self.schema, task, batch, first_row };
        for (feature, keys) in self.schema.features().iter().zip(&mut out.features) {
            rows.keys(feature, keys)?;
        }
        rows.numbers(&mut out.numbers)?;
        rows.labels(&mut out.labels)?;
        if let Some(name) = &self.schema.spec().weight {
            rows.weights(name, &mut out.weights)?;
        }
        if let Some(name) = &self.schema.spec().user {
            rows.users(name, &mut out.users)?;
        }
        let origin = |i| crate::Origin { task: task.clone(), row: first_row + i as u64 };
        out.origins.extend((0..batch.num_rows()).map(origin));
        out.end_rows(batch.num_rows());
        Ok(())
    }
}

/// The rows that are being encoded, and where they are: what an error has to say.
struct Rows<'a> {
    schema: &'a Schema,
    task: &'a Task,
    batch: &'a RecordBatch,
    first_row: u64,
}

impl<'a> Rows<'a> {
    fn count(&self) -> usize {
        self.batch.num_rows()
    }

    fn column(&self, name: &str) -> Result<Column<'a>> {
        let Some(array) = self.batch.column_by_name(name) else {
            let fields = self.batch.schema_ref().fields();
            return Err(Error::MissingColumn {
                file: self.task.file.clone(),
                column: name.into(),
                present: fields.iter().map(|field| field.name().clone()).collect(),
            });
        };
        Column::new(array, &self.schema.spec().missing).map_err(|what| Error::Column {
            file: self.task.file.clone(),
            column: name.into(),
            what,
        })
    }

    /// The error for a fault in row `i` of this batch.
    fn fault<'n>(&'n self, i: usize, column: &'n str) -> impl FnOnce(Fault) -> Error + 'n {
        move |what| Error::Value {
            file: self.task.file.clone(),
            row: self.task.row_in_file(self.first_row + i as u64),
            column: column.into(),
            what,
        }
    }

    fn keys(&self, feature: &Feature, out: &mut Keys) -> Result<()> {
        match &feature.source {
            Source::Column { column, hash, separator, weights } => {
                let bag = Bag {
                    values: self.column(column)?,
                    weights: weights.as_ref().map(|name| self.column(name)).transpose()?,
                    hash: hash.as_ref(),
                    keys_max: feature.max_len.map_or(usize::MAX, |len| len as usize),
                };
                for i in 0..self.count() {
                    match separator {
                        Some(separator) => bag.split(i, separator, out),
                        None if bag.values.is_list() => bag.list(i, out),
                        None => bag.one(i, out),
                    }
                    .map_err(self.fault(i, column))?;
                    out.end_row();
                }
            }
            Source::Bucket { bucket, salt } => {
                let numbers = self.column(&bucket.column)?;
                let mut digits = itoa::Buffer::new();
                for i in 0..self.count() {
                    let index =
                        bucket_of(bucket, &numbers, i).map_err(self.fault(i, &bucket.column))?;
                    out.keys.extend(index.map(|index| salt.key(digits.format(index).as_bytes())));
                    out.end_row();
                }
            }
            Source::Cross { parts, salt } => self.cross(parts, salt, out)?,
        }
        Ok(())
    }

    fn cross(&self, parts: &[Part], salt: &Salt, out: &mut Keys) -> Result<()> {
        let mut hashes = vec![Some(salt.start()); self.count()];
        let mut digits = itoa::Buffer::new();
        for part in parts {
            let name = match part {
                Part::Column(name) | Part::Bucket(Bucket { column: name, .. }) => name,
            };
            let column = self.column(name)?;
            for (i, hash) in hashes.iter_mut().enumerate() {
                let value = match part {
                    Part::Column(_) => column.text(i, &mut digits),
                    Part::Bucket(bucket) => bucket_of(bucket, &column, i)
                        .map(|index| index.map(|index| digits.format(index).as_bytes())),
                }
                .map_err(self.fault(i, name))?;
                *hash = value.and_then(|value| hash.map(|hash| fold(hash, value)));
            }
        }
        for hash in hashes {
            out.keys.extend(hash);
            out.end_row();
        }
        Ok(())
    }

    fn numbers(&self, out: &mut Vec<f32>) -> Result<()> {
        let (start, width) = (out.len(), self.schema.numbers().len());
        out.resize(start + self.count() * width, 0.0);
        for (j, number) in self.schema.numbers().iter().enumerate() {
            let column = self.column(&number.column)?;
            for i in 0..self.count() {
                let value = column.number(i).map_err(self.fault(i, &number.column))?;
                out[start + i * width + j] = match value {
                    None => number.default,
                    Some(x) => {
                        let x = match number.transform {
                            Transform::Raw => x,
                            Transform::Log => x.abs().ln_1p().copysign(x),
                        };
                        narrow((x - number.mean) / number.std)
                            .map_err(self.fault(i, &number.column))?
                    }
                };
            }
        }
        Ok(())
    }

    fn labels(&self, out: &mut Vec<f32>) -> Result<()> {
        let (start, width) = (out.len(), self.schema.labels().len());
        out.resize(start + self.count() * width, 0.0);
        for (j, label) in self.schema.labels().iter().enumerate() {
            let column = self.column(&label.column)?;
            for i in 0..self.count() {
                let value = label_of(label, &column, i).map_err(self.fault(i, &label.column))?;
                out[start + i * width + j] = value;
            }
        }
        Ok(())
    }

    fn weights(&self, name: &str, out: &mut Vec<f32>) -> Result<()> {
        let column = self.column(name)?;
        for i in 0..self.count() {
            let weight = match column.number(i).map_err(self.fault(i, name))? {
                Some(weight) if weight >= 0.0 => narrow(weight).map_err(self.fault(i, name))?,
                Some(weight) => {
                    return Err(self.fault(i, name)(format!("sample weight {weight} is negative")));
                }
                None => return Err(self.fault(i, name)("the sample weight is missing".into())),
            };
            out.push(weight);
        }
        Ok(())
    }

    fn users(&self, name: &str, out: &mut Vec<u64>) -> Result<()> {
        let column = self.column(name)?;
        let (salt, mut digits) = (Salt::new(""), itoa::Buffer::new());
        for i in 0..self.count() {
            let user = column.text(i, &mut digits).map_err(self.fault(i, name))?;
            let user = user.ok_or_else(|| self.fault(i, name)("the user is missing".into()))?;
            out.push(salt.key(user));
        }
        Ok(())
    }
}

/// A column of keys with what belongs to it.
struct Bag<'a> {
    values: Column<'a>,
    weights: Option<Column<'a>>,
    hash: Option<&'a Salt>,
    keys_max: usize,
}

impl Bag<'_> {
    fn key(&self, values: &Column, i: usize) -> std::result::Result<Option<u64>, Fault> {
        match self.hash {
            Some(salt) => {
                Ok(values.text(i, &mut itoa::Buffer::new())?.map(|value| salt.key(value)))
            }
            None => values.raw(i),
        }
    }

    fn one(&self, i: usize, out: &mut Keys) -> std::result::Result<(), Fault> {
        if let Some(key) = self.key(&self.values, i)? {
            out.keys.push(key);
            if let Some(weights) = &self.weights {
                out.weights.push(weight_of(weights, i)?);
            }
        }
        Ok(())
    }

    fn list(&self, i: usize, out: &mut Keys) -> std::result::Result<(), Fault> {
        let (range, items) = self.values.list().ok_or("it is no list")?;
        let range = range(i);
        let weights = match &self.weights {
            None => None,
            Some(column) => {
                let (weight_range, weights) = column.list().ok_or("the weights are no list")?;
                let weight_range = weight_range(i);
                same_count(range.len(), weight_range.len())?;
                Some((weight_range.start, weights))
            }
        };
        let keys_max = out.keys.len().saturating_add(self.keys_max);
        for (position, item) in range.enumerate() {
            if out.keys.len() == keys_max {
                break;
            }
            if let Some(key) = self.key(items, item)? {
                out.keys.push(key);
                if let Some((start, weights)) = weights {
                    out.weights.push(weight_of(weights, start + position)?);
                }
            }
        }
        Ok(())
    }

    fn split(&self, i: usize, separator: &str, out: &mut Keys) -> std::result::Result<(), Fault> {
        let Some(text) = self.values.bytes(i)? else { return Ok(()) };
        let weights = match &self.weights {
            None => None,
            Some(column) => {
                let weights = column.bytes(i)?.unwrap_or_default();
                let weights: Vec<&[u8]> = split(weights, separator.as_bytes()).collect();
                same_count(split(text, separator.as_bytes()).count(), weights.len())?;
                Some(weights)
            }
        };
        let keys_max = out.keys.len().saturating_add(self.keys_max);
        for (position, item) in split(text, separator.as_bytes()).enumerate() {
            if out.keys.len() == keys_max {
                break;
            }
            if item.is_empty() {
                continue;
            }
            out.keys.push(match self.hash {
                Some(salt) => salt.key(item),
                None => column::raw_key(item)?,
            });
            if let Some(weights) = &weights {
                out.weights.push(narrow(column::parse_number(weights[position])?)?);
            }
        }
        Ok(())
    }
}

fn same_count(keys: usize, weights: usize) -> std::result::Result<(), Fault> {
    if keys == weights { Ok(()) } else { Err(format!("{keys} keys, but {weights} weights")) }
}

fn weight_of(weights: &Column, i: usize) -> std::result::Result<f32, Fault> {
    narrow(weights.number(i)?.ok_or("the weight of a key is missing")?)
}

/// A number as the model has it.
fn narrow(x: f64) -> std::result::Result<f32, Fault> {
    let narrow = x as f32;
    if narrow.is_finite() { Ok(narrow) } else { Err(format!("{x} is no finite number of 32 bits")) }
}

fn bucket_of(
    bucket: &Bucket,
    numbers: &Column,
    i: usize,
) -> std::result::Result<Option<usize>, Fault> {
    Ok(numbers.number(i)?.map(|x| bucket.index(x)))
}

fn label_of(label: &Label, column: &Column, i: usize) -> std::result::Result<f32, Fault> {
    let number = |i| column.number(i)?.ok_or_else(|| String::from("the label is missing or NaN"));
    match &label.rule {
        LabelRule::Number => narrow(number(i)?),
        LabelRule::Above(threshold) => Ok(f32::from(number(i)? > *threshold)),
        LabelRule::OneOf { positive, negative } => {
            let mut digits = itoa::Buffer::new();
            let text = column.text(i, &mut digits)?.ok_or("the label is missing")?;
            let is_in = |words: &[String]| words.iter().any(|word| word.as_bytes() == text);
            if is_in(positive) {
                Ok(1.0)
            } else if negative.is_empty() || is_in(negative) {
                Ok(0.0)
            } else {
                Err(format!("{} is neither a positive nor a negative label", column::show(text)))
            }
        }
    }
}

/// The pieces between separators.
fn split<'t>(text: &'t [u8], separator: &'t [u8]) -> impl Iterator<Item = &'t [u8]> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        match memchr::memmem::find(text, separator) {
            Some(at) => {
                rest = Some(&text[at + separator.len()..]);
                Some(&text[..at])
            }
            None => rest.take(),
        }
    })
}
