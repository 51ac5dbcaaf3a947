//! Rows of one table, what features gather from them, and how their gradients come back.
//!
//! A leaf holds every key of a step once, so gradients of equal keys meet in it. On the CPU gathering and its gradient are done here and not by
//! LibTorch: what was gathered is what autograd begins with, and its gradient is summed into the rows that are then pushed.

use std::cell::RefCell;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::dense::floats;
use crate::keys::{Bags, UniqueKeys};
use crate::memory::{filled, with_rows};

/// The rows of `keys`, `[keys, dim]`, that a gradient flows into.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) keys: UniqueKeys,
    dim: usize,
    /// Gradients are wanted.
    trains: bool,
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    Host(Vec<f32>),
    /// They were copied to another device, where LibTorch gathers and differentiates.
    Device(Tensor),
}

/// Which rows of a leaf a feature is made of.
#[derive(Debug)]
pub(crate) struct Gather {
    pub(crate) bags: Bags,
    /// Columns of a padded feature; otherwise each bag is pooled.
    width: Option<usize>,
    /// The results that somebody wanted.
    taken: RefCell<Vec<Taken>>,
}

/// Some floats of each row, gathered.
#[derive(Debug)]
struct Taken {
    floats: Range<usize>,
    value: Tensor,
}

impl Gather {
    pub(crate) fn new(bags: Bags, width: Option<usize>) -> Self {
        Self { bags, width, taken: RefCell::default() }
    }
}

impl Leaf {
    /// `values` has a row of `dim` floats for each key. Without `trains` no gradient can flow into it (evaluation).
    pub(crate) fn new(
        keys: UniqueKeys,
        values: Vec<f32>,
        dim: u32,
        device: Device,
        trains: bool,
    ) -> Result<Self> {
        let rows = match device {
            Device::Cpu => Rows::Host(values),
            _ => Rows::Device(
                Tensor::f_from_slice(&values)?
                    .f_view([keys.len() as i64, i64::from(dim)])?
                    .f_to_device(device)?
                    .f_set_requires_grad(trains)?,
            ),
        };
        Ok(Self { keys, dim: dim as usize, trains, rows })
    }

    /// `[bags, dim]`; of a padded feature `[bags, width, dim]`, the rows of each bag one after the other and zeros behind them.
    pub(crate) fn gather(&self, gather: &Gather) -> Result<Tensor> {
        self.gather_floats(gather, 0..self.dim)
    }

    /// [`Leaf::gather`] of some floats of each row.
    pub(crate) fn gather_floats(&self, gather: &Gather, floats: Range<usize>) -> Result<Tensor> {
        let mut taken = gather.taken.borrow_mut();
        if let Some(before) = taken.iter().find(|taken| taken.floats == floats) {
            return Ok(before.value.shallow_clone());
        }
        let value = match &self.rows {
            Rows::Host(rows) => self.gather_here(rows, gather, floats.clone())?,
            Rows::Device(rows) => {
                let (start, length) = (floats.start as i64, floats.len() as i64);
                self.gather_there(rows, gather)?.f_narrow(-1, start, length)?
            }
        };
        taken.push(Taken { floats, value: value.shallow_clone() });
        Ok(value)
    }

    fn shape(&self, gather: &Gather, dim: usize) -> Vec<i64> {
        let (bags, dim) = (gather.bags.len() as i64, dim as i64);
        gather.width.map_or_else(|| vec![bags, dim], |width| vec![bags, width as i64, dim])
    }

    fn gather_here(&self, rows: &[f32], gather: &Gather, floats: Range<usize>) -> Result<Tensor> {
        let (bags, dim, wanted) = (&gather.bags, self.dim, floats.len());
        let copied = bags.coefficients.is_empty() && (gather.width.is_some() || bags.at_most_one());
        let value = filled(&self.shape(gather, wanted), |out| {
            bags.for_each(gather.width, |place, position, coefficient| {
                let row = &rows[position * dim..][floats.clone()];
                let out = &mut out[place * wanted..][..wanted];
                if copied {
                    out.copy_from_slice(row);
                } else {
                    add(out, row, coefficient);
                }
            });
        })?;
        let trains = self.trains && !bags.positions.is_empty();
        Ok(value.f_set_requires_grad(trains)?)
    }

    fn gather_there(&self, rows: &Tensor, gather: &Gather) -> Result<Tensor> {
        let (device, bags) = (rows.device(), &gather.bags);
        let there = |values: Vec<i64>| Tensor::f_from_slice(&values)?.f_to_device(device);
        let wide = |values: &[u32]| there(values.iter().map(|&value| value.into()).collect());
        if bags.positions.is_empty() {
            return Ok(Tensor::f_zeros(
                self.shape(gather, self.dim).as_slice(),
                (Kind::Float, device),
            )?);
        }
        if let Some(width) = gather.width {
            let (positions, coefficients, _) = bags.padded(width);
            let coefficients = Tensor::f_from_slice(&coefficients)?.f_to_device(device)?;
            let rows = rows.f_index_select(0, &there(positions)?)?;
            return Ok(rows
                .f_mul(&coefficients.f_unsqueeze(1)?)?
                .f_view(self.shape(gather, self.dim).as_slice())?);
        }
        let positions = wide(&bags.positions)?;
        if bags.one_each() {
            return Ok(rows.f_index_select(0, &positions)?);
        }
        let offsets = wide(&bags.offsets)?;
        let coefficients = match bags.coefficients.as_slice() {
            [] => None,
            some => Some(Tensor::f_from_slice(some)?.f_to_device(device)?),
        };
        let (pooled, ..) = Tensor::f_embedding_bag(
            rows,
            &positions,
            &offsets,
            false,
            EMBEDDING_BAG_SUM,
            false,
            coefficients.as_ref(),
            true,
        )?;
        Ok(pooled)
    }

    /// The tensors whose gradients [`Leaf::gradient`] wants, given everything that was gathered from it.
    pub(crate) fn inputs(&self, gathers: &[&Gather]) -> Vec<Tensor> {
        let mut inputs = Vec::new();
        match &self.rows {
            Rows::Host(_) => self.for_each_taken(gathers, |_, taken| {
                inputs.push(taken.value.shallow_clone());
            }),
            Rows::Device(rows) if !self.keys.is_empty() => inputs.push(rows.shallow_clone()),
            Rows::Device(_) => {}
        }
        inputs
    }

    fn for_each_taken(&self, gathers: &[&Gather], mut each: impl FnMut(&Gather, &Taken)) {
        for gather in gathers {
            let taken = gather.taken.borrow();
            taken.iter().filter(|taken| taken.value.requires_grad()).for_each(|t| each(gather, t));
        }
    }

    /// The gradient of its rows from those of its inputs; `None` where the loss depends on none.
    pub(crate) fn gradient(
        &self,
        gathers: &[&Gather],
        gradients: &[Tensor],
    ) -> Result<Option<Vec<f32>>> {
        if gradients.iter().all(|gradient| !gradient.defined()) {
            return Ok(None);
        }
        if let Rows::Device(_) = self.rows {
            return Ok(Some(floats(&gradients[0])?));
        }
        let mut sums = vec![0.0; self.keys.len() * self.dim];
        let mut gradients = gradients.iter();
        let mut result = Ok(());
        self.for_each_taken(gathers, |gather, taken| {
            if let Some(gradient) = gradients.next().filter(|gradient| gradient.defined()) {
                result = std::mem::replace(&mut result, Ok(()))
                    .and_then(|()| self.scatter(gather, &taken.floats, gradient, &mut sums));
            }
        });
        result.map(|()| Some(sums))
    }

    /// Adds the gradient of what was gathered to that of the rows.
    fn scatter(
        &self,
        gather: &Gather,
        floats: &Range<usize>,
        gradient: &Tensor,
        sums: &mut [f32],
    ) -> Result<()> {
        with_rows(gradient, |rows, stride| {
            gather.bags.for_each(gather.width, |place, position, coefficient| {
                let sums = &mut sums[position * self.dim..][floats.clone()];
                add(sums, &rows[place * stride..][..floats.len()], coefficient);
            });
        })
    }
}

/// `sum` plus so many times `row`.
pub(crate) fn add(sum: &mut [f32], row: &[f32], coefficient: f32) {
    for (sum, x) in sum.iter_mut().zip(row) {
        *sum += coefficient * x;
    }
}

const EMBEDDING_BAG_SUM: i64 = 0;

#[cfg(test)]
mod tests {
    use downpour_data::Pool;
    use serde::Deserialize;

    use super::*;
    use downpour_client::Arrangement;

    use crate::keys::unique;

    #[derive(Deserialize)]
    struct Golden {
        cases: Vec<Case>,
    }

    #[derive(Deserialize)]
    struct Case {
        pool: Pool,
        dim: u32,
        table: Vec<Vec<f32>>,
        bags: Vec<Vec<u64>>,
        weights: Vec<Vec<f32>>,
        upstream: Vec<Vec<f32>>,
        output: Vec<Vec<f32>>,
        gradient: Vec<Vec<f32>>,
    }

    impl Case {
        fn bags(&self) -> (UniqueKeys, Bags) {
            let (keys, mut positions) =
                unique(Arrangement { salt: 0, shards: 1 }, &[&self.bags.concat()]);
            let mut offsets = vec![0];
            for bag in &self.bags {
                offsets.push(offsets[offsets.len() - 1] + bag.len() as u32);
            }
            let bags = Bags::new(self.pool, positions.remove(0), &offsets, &self.weights.concat());
            (keys, bags)
        }

        fn leaf(&self, keys: UniqueKeys) -> Leaf {
            let values: Vec<f32> =
                keys.iter().flat_map(|&key| self.table[key as usize].clone()).collect();
            Leaf::new(keys, values, self.dim, Device::Cpu, true).unwrap()
        }
    }

    impl Leaf {
        /// As it would be on another device.
        fn there(&self) -> Self {
            let Rows::Host(rows) = &self.rows else { unreachable!() };
            let rows = Tensor::from_slice(rows).view([-1, self.dim as i64]);
            let rows = Rows::Device(rows.set_requires_grad(true));
            Self { keys: self.keys.clone(), rows, ..*self }
        }
    }

    fn gradient_of(leaf: &Leaf, gather: &Gather, upstream: &[f32]) -> Vec<f32> {
        let value = leaf.gather(gather).unwrap();
        let loss = (&value * Tensor::from_slice(upstream).view_as(&value)).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], &leaf.inputs(&[gather]), false, false);
        leaf.gradient(&[gather], &gradients).unwrap().expect("it is used")
    }

    fn near(found: &[f32], wanted: &[f32], what: &str) {
        assert_eq!(found.len(), wanted.len(), "{what}");
        let far = found.iter().zip(wanted).find(|(a, b)| (**a - **b).abs() > 1e-6);
        assert_eq!(far, None, "{what}: {found:?} {wanted:?}");
    }

    #[test]
    fn pooling_and_its_gradients_equal_those_of_pytorch() {
        let golden: Golden =
            serde_json::from_str(include_str!("../testdata/embedding_bag.json")).unwrap();
        assert_eq!(golden.cases.len(), 9);
        for (number, case) in golden.cases.iter().enumerate() {
            let what = format!("case {number}, {:?}", case.pool);
            let (keys, bags) = case.bags();
            let leaf = case.leaf(keys);
            let gather = Gather::new(bags, None);
            let pooled = leaf.gather(&gather).unwrap();
            near(&floats(&pooled).unwrap(), &case.output.concat(), &what);
            let there = leaf.there();
            let Rows::Device(rows) = &there.rows else { unreachable!() };
            let pooled_there = there.gather_there(rows, &gather).unwrap();
            near(&floats(&pooled_there).unwrap(), &case.output.concat(), &what);
            let gradient = gradient_of(&leaf, &gather, &case.upstream.concat());
            let fresh = Gather::new(gather.bags, None);
            let gradient_there = gradient_of(&there, &fresh, &case.upstream.concat());
            near(&gradient_there, &gradient, &what);
            let mut of_table = vec![0.0; case.gradient.concat().len()];
            let dim = case.dim as usize;
            for (i, &key) in leaf.keys.iter().enumerate() {
                let row = &gradient[i * dim..(i + 1) * dim];
                of_table[key as usize * dim..][..dim].copy_from_slice(row);
            }
            near(&of_table, &case.gradient.concat(), &what);
        }
    }

    #[test]
    fn a_feature_without_any_key_is_zeros_and_has_no_gradient() {
        let host = Leaf::new(Vec::new(), Vec::new(), 4, Device::Cpu, true).unwrap();
        for leaf in [host.there(), host] {
            let bags = || Bags::new(Pool::Mean, Vec::new(), &[0, 0, 0], &[]);
            let (pooled, padded) = (Gather::new(bags(), None), Gather::new(bags(), Some(3)));
            assert_eq!(floats(&leaf.gather(&pooled).unwrap()).unwrap(), [0.0; 8]);
            assert_eq!(leaf.gather(&padded).unwrap().size(), [2, 3, 4]);
            assert!(!leaf.gather(&pooled).unwrap().requires_grad());
            assert!(leaf.inputs(&[&pooled, &padded]).is_empty());
        }
    }

    #[test]
    fn padded_rows_end_in_zeros_that_no_gradient_reaches() {
        let values = vec![1.0, 2.0, 3.0, 4.0];
        let host = Leaf::new(vec![5, 9], values, 2, Device::Cpu, true).unwrap();
        for leaf in [host.there(), host] {
            let bags = Bags::new(Pool::Padded, vec![1, 0, 1], &[0, 2, 2, 3], &[]);
            let gather = Gather::new(bags, Some(2));
            let rows = leaf.gather(&gather).unwrap();
            assert_eq!(rows.size(), [3, 2, 2]);
            let wanted = [3.0, 4.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0];
            assert_eq!(floats(&rows).unwrap(), wanted);
            assert_eq!(gradient_of(&leaf, &gather, &[1.0; 12]), [1.0, 1.0, 2.0, 2.0]);
        }
    }

    #[test]
    fn what_several_features_take_of_a_row_meets_in_its_gradient() {
        let leaf = Leaf::new(vec![5, 9], vec![0.0; 2], 1, Device::Cpu, true).unwrap();
        let gathers =
            [vec![0, 1], vec![1, 1], vec![0, 0]].map(|p| Gather::new(Bags::single(p), None));
        let [one, two, unused] = &gathers;
        let all = [one, unused, two];
        let loss = Tensor::cat(&[leaf.gather(one).unwrap(), leaf.gather(two).unwrap()], 1);
        let loss = (loss * Tensor::from_slice(&[1.0f32, 10.0])).sum(Kind::Float);
        let gradients = Tensor::run_backward(&[loss], &leaf.inputs(&all), false, false);
        assert_eq!(leaf.gradient(&all, &gradients).unwrap().unwrap(), [1.0, 21.0]);
        assert_eq!(leaf.gradient(&[unused], &[]).unwrap(), None);
    }
}
