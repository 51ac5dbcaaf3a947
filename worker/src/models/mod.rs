//! Ready-made models, written on the public interface of this crate: read them as examples of custom loops.
//!
//! A model says which table it wants for each table of the schema ([`Kind::table_dim`]), keeps its dense weights in a VarStore, and
//! turns a [`Step`] into logits. Rows of Wide & Deep and of DeepFM hold the linear weight of a key before its embedding, so that a
//! key is one row and one lookup.

mod catalogue;
mod deepfm;
mod factorisation;
mod logistic;
mod mlp;
mod script;
mod wide_deep;

use std::collections::BTreeMap;
use std::path::PathBuf;

use tch::nn::VarStore;
use tch::{Kind as TensorKind, Reduction, Tensor};

pub use catalogue::Catalogue;
pub use deepfm::DeepFm;
pub use factorisation::{MatrixFactorisation, RankingReport};
pub use logistic::Logistic;
pub use script::Script;
pub use wide_deep::WideDeep;

use crate::{Error, Job, Result, Schema, Step, Table, TableHandle};

/// A model that gives one logit (or one prediction) per row and label.
pub trait Model {
    /// `[batch]`, or `[batch, labels]` where there are several. `train` turns dropout on.
    fn forward(&self, step: &Step, train: bool) -> Result<Tensor>;
}

/// The models that the worker binary knows by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One weight per key.
    Logistic,
    /// A linear part beside a neural network.
    WideDeep,
    /// A linear part, all pairs of features, and a neural network.
    DeepFm,
    /// A vector per user and per item, trained to rank (BPR).
    MatrixFactorisation,
    /// A TorchScript module.
    Script,
}

impl Kind {
    /// Every model with its name and a line about it.
    pub const ALL: [(Kind, &'static str, &'static str); 5] = [
        (Kind::Logistic, "lr", "logistic regression: one weight per key and per number"),
        (
            Kind::WideDeep,
            "wide-deep",
            "Wide & Deep: logistic regression beside a multilayer perceptron",
        ),
        (Kind::DeepFm, "deepfm", "DeepFM: factorization machine beside a multilayer perceptron"),
        (
            Kind::MatrixFactorisation,
            "mf-bpr",
            "matrix factorisation by BPR: the schema's first feature is the user, the second the item",
        ),
        (Kind::Script, "script", "the TorchScript module of --model-file"),
    ];

    /// The model of this name.
    pub fn named(name: &str) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, known, _)| *known == name);
        known.map(|(kind, ..)| *kind).ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|(_, name, _)| *name).collect();
            Error::usage(format!("no model is called {name:?}; there are: {}", names.join(", ")))
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(kind, ..)| *kind == self).map_or("", |(_, name, _)| name)
    }

    /// Floats of a row, for a table that has `dim` in the schema.
    #[must_use]
    pub fn table_dim(self, dim: u32) -> u32 {
        match self {
            Kind::Logistic => 1,
            Kind::WideDeep | Kind::DeepFm => dim + 1,
            Kind::MatrixFactorisation | Kind::Script => dim,
        }
    }

    /// Defines a table of the job for each table of the schema; `table` says what one of so many floats a row is like.
    pub fn tables(
        self,
        job: &Job,
        schema: &Schema,
        table: impl Fn(u32) -> Table,
    ) -> Result<BTreeMap<String, TableHandle>> {
        let define = |(name, dim): (&str, u32)| {
            Ok((name.to_owned(), job.table(name, table(self.table_dim(dim)))?))
        };
        schema.tables()?.into_iter().map(define).collect()
    }
}

/// What a model is made of beside its features.
#[derive(Clone, Debug)]
pub struct Options {
    /// Widths of the hidden layers.
    pub hidden: Vec<i64>,
    /// Share of a hidden layer that is left out in training.
    pub dropout: f64,
    /// For [`Kind::Script`].
    pub model_file: Option<PathBuf>,
}

/// Widest hidden layer.
const HIDDEN_MAX: i64 = 1 << 20;

/// The shape of a schema as a model sees it.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Widths of the features' rows, in order.
    pub dims: Vec<i64>,
    /// Columns of the dense matrix.
    pub numbers: i64,
    /// Labels.
    pub labels: i64,
}

impl Inputs {
    /// Of a schema, for a model.
    pub fn new(kind: Kind, schema: &Schema) -> Result<Self> {
        if schema.labels().is_empty() {
            return Err(Error::usage("the schema has no [[label]]: nothing to predict"));
        }
        let dims = schema.features().iter().map(|feature| kind.table_dim(feature.dim).into());
        Ok(Self {
            dims: dims.collect(),
            numbers: schema.numbers().len() as i64,
            labels: schema.labels().len() as i64,
        })
    }
}

/// Builds a model that predicts labels; all but [`Kind::MatrixFactorisation`], which ranks and has a loop of its own.
pub fn build(
    kind: Kind,
    vars: &VarStore,
    inputs: &Inputs,
    options: &Options,
) -> Result<Box<dyn Model>> {
    if let Some(width) = options.hidden.iter().find(|width| !(1..=HIDDEN_MAX).contains(*width)) {
        return Err(Error::usage(format!(
            "--hidden: a layer of {width} is not between 1 and {HIDDEN_MAX} wide"
        )));
    }
    let root = vars.root();
    Ok(match kind {
        Kind::Logistic => Box::new(Logistic::new(&root, inputs)?),
        Kind::WideDeep => Box::new(WideDeep::new(&root, inputs, options)?),
        Kind::DeepFm => Box::new(DeepFm::new(&root, inputs, options)?),
        Kind::Script => Box::new(Script::load(&root, options.model_file.as_deref())?),
        Kind::MatrixFactorisation => {
            return Err(Error::usage("mf-bpr ranks items and predicts no labels"));
        }
    })
}

/// How far predictions are from labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Objective {
    /// Binary cross-entropy of logits.
    #[default]
    Binary,
    /// Squared error of predictions.
    Regression,
}

impl Objective {
    /// The mean over the batch, weighted by the samples.
    pub fn loss(self, predictions: &Tensor, step: &Step) -> Result<Tensor> {
        let (labels, mut weights) = (step.labels(), step.weights());
        if labels.dim() > 1 {
            weights = weights.f_unsqueeze(1)?.f_expand_as(&labels)?;
        }
        let losses = match self {
            Objective::Binary => predictions.f_binary_cross_entropy_with_logits::<Tensor>(
                &labels,
                None,
                None,
                Reduction::None,
            )?,
            Objective::Regression => predictions.f_mse_loss(&labels, Reduction::None)?,
        };
        Ok(losses
            .f_mul(&weights)?
            .f_sum(TensorKind::Float)?
            .f_div(&weights.f_sum(TensorKind::Float)?)?)
    }
}

/// The rows of every feature; a padded one summed.
fn pooled(step: &Step) -> Vec<Tensor> {
    let count = step.features().count();
    (0..count)
        .map(|feature| {
            let rows = step.rows_at(feature);
            if rows.dim() > 2 { rows.sum_dim_intlist(1, false, TensorKind::Float) } else { rows }
        })
        .collect()
}

/// `[batch, labels]` becomes `[batch]` where there is one label, as [`Step::labels`] is.
fn as_labels(logits: &Tensor) -> Result<Tensor> {
    Ok(if logits.size().get(1) == Some(&1) {
        logits.f_squeeze_dim(1)?
    } else {
        logits.shallow_clone()
    })
}

/// The features' common width, which models that stack or multiply them need.
fn common_dim(inputs: &Inputs, model: &str) -> Result<i64> {
    match inputs.dims.as_slice() {
        [] => Err(Error::usage(format!(
            "{model} needs at least one key, bucket or cross in the schema"
        ))),
        [first, rest @ ..] if rest.iter().all(|dim| dim == first) => Ok(*first),
        dims => Err(Error::usage(format!(
            "{model} needs one `dim` for all tables of the schema, which has {:?}",
            dims.iter().map(|dim| dim - 1).collect::<std::collections::BTreeSet<_>>()
        ))),
    }
}
