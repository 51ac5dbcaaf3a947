//! Rows of one table as a leaf of autograd, and what features gather from them.
//!
//! A leaf holds every key of a step once, so gradients of equal keys meet in it without further work.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::keys::{Bags, UniqueKeys};

/// The rows of `keys`, `[keys, dim]`, that a gradient flows into.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) keys: UniqueKeys,
    pub(crate) rows: Tensor,
    dim: i64,
}

impl Leaf {
    /// `values` has a row of `dim` floats for each key. Without `gradients` nothing can flow into it (evaluation).
    pub(crate) fn new(
        keys: UniqueKeys,
        values: &[f32],
        dim: u32,
        device: Device,
        gradients: bool,
    ) -> Result<Self> {
        let dim = i64::from(dim);
        let rows = Tensor::f_from_slice(values)?
            .f_view([keys.len() as i64, dim])?
            .f_to_device(device)?
            .f_set_requires_grad(gradients)?;
        Ok(Self { keys, rows, dim })
    }

    /// `[bags, dim]`.
    pub(crate) fn pool(&self, bags: &Bags) -> Result<Tensor> {
        let device = self.rows.device();
        if bags.positions.is_empty() {
            return Ok(Tensor::f_zeros([bags.len() as i64, self.dim], (Kind::Float, device))?);
        }
        let positions = Tensor::f_from_slice(&bags.positions)?.f_to_device(device)?;
        if bags.one_each() {
            return Ok(self.rows.f_index_select(0, &positions)?);
        }
        let offsets = Tensor::f_from_slice(&bags.offsets)?.f_to_device(device)?;
        let coefficients = match bags.coefficients.as_slice() {
            [] => None,
            some => Some(Tensor::f_from_slice(some)?.f_to_device(device)?),
        };
        let (pooled, ..) = Tensor::f_embedding_bag(
            &self.rows,
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

    /// `[bags, width, dim]`: the rows of each bag one after the other, zeros behind them.
    pub(crate) fn padded(&self, bags: &Bags, width: usize) -> Result<Tensor> {
        let (device, shape) = (self.rows.device(), [bags.len() as i64, width as i64, self.dim]);
        if bags.positions.is_empty() {
            return Ok(Tensor::f_zeros(shape, (Kind::Float, device))?);
        }
        let (positions, coefficients, _) = bags.padded(width);
        let positions = Tensor::f_from_slice(&positions)?.f_to_device(device)?;
        let coefficients = Tensor::f_from_slice(&coefficients)?.f_to_device(device)?;
        let rows = self.rows.f_index_select(0, &positions)?.f_mul(&coefficients.f_unsqueeze(1)?)?;
        Ok(rows.f_view(shape)?)
    }
}

const EMBEDDING_BAG_SUM: i64 = 0;

#[cfg(test)]
mod tests {
    use downpour_data::Pool;
    use serde::Deserialize;

    use super::*;
    use crate::dense::floats;
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
            let (keys, mut positions) = unique(&[&self.bags.concat()]);
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
            Leaf::new(keys, &values, self.dim, Device::Cpu, true).unwrap()
        }
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
            let pooled = leaf.pool(&bags).unwrap();
            near(&floats(&pooled).unwrap(), &case.output.concat(), &what);
            let upstream = Tensor::from_slice(&case.upstream.concat()).view_as(&pooled);
            let loss = (pooled * upstream).sum(Kind::Float);
            let gradient = Tensor::run_backward(&[loss], &[&leaf.rows], false, false);
            let gradient = floats(&gradient[0]).unwrap();
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
        let leaf = Leaf::new(Vec::new(), &[], 4, Device::Cpu, true).unwrap();
        let bags = Bags::new(Pool::Mean, Vec::new(), &[0, 0, 0], &[]);
        assert_eq!(floats(&leaf.pool(&bags).unwrap()).unwrap(), [0.0; 8]);
        assert_eq!(leaf.padded(&bags, 3).unwrap().size(), [2, 3, 4]);
        assert!(!leaf.pool(&bags).unwrap().requires_grad());
    }

    #[test]
    fn padded_rows_end_in_zeros_that_no_gradient_reaches() {
        let leaf = Leaf::new(vec![5, 9], &[1.0, 2.0, 3.0, 4.0], 2, Device::Cpu, true).unwrap();
        let bags = Bags::new(Pool::Padded, vec![1, 0, 1], &[0, 2, 2, 3], &[]);
        let rows = leaf.padded(&bags, 2).unwrap();
        assert_eq!(rows.size(), [3, 2, 2]);
        let wanted = [3.0, 4.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0];
        assert_eq!(floats(&rows).unwrap(), wanted);
        let loss = rows.sum(Kind::Float);
        let gradient = Tensor::run_backward(&[loss], &[&leaf.rows], false, false);
        assert_eq!(floats(&gradient[0]).unwrap(), [1.0, 1.0, 2.0, 2.0]);
    }
}
