use super::*;
use crate::mix::salt;
use proptest::prelude::*;

fn row(init: Init, seed: u64, variable: &str, key: u64, dim: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; dim];
    init_row(&init, seed, salt(variable), key, &mut out);
    out
}

/// Mean and standard deviation.
fn moments(values: &[f32]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let variance = values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
    (mean, variance.sqrt())
}

fn share(values: &[f32], counted: impl Fn(f32) -> bool) -> f64 {
    values.iter().filter(|&&x| counted(x)).count() as f64 / values.len() as f64
}

/// Against `golden/init.py`, to the bit.
#[test]
fn rows_equal_the_second_implementation() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../testdata/init.json")).unwrap();
    for case in golden["rows"].as_array().unwrap() {
        let number = |name: &str| case[name].as_str().unwrap().parse::<u64>().unwrap();
        let parameter = |at: usize| case["parameters"][at].as_f64().unwrap() as f32;
        let init = match case["init"].as_str().unwrap() {
            "uniform" => Init::Uniform { low: parameter(0), high: parameter(1) },
            _ => Init::Normal { mean: parameter(0), std: parameter(1) },
        };
        let expected: Vec<&str> =
            case["row"].as_array().unwrap().iter().map(|x| x.as_str().unwrap()).collect();
        let variable = case["variable"].as_str().unwrap();
        let row = row(init, number("seed"), variable, number("key"), expected.len());
        let row: Vec<String> = row.iter().map(|x| format!("{:08x}", x.to_bits())).collect();
        assert_eq!(row, expected, "{init:?} of {variable:?}");
    }
    for pair in golden["quantiles"].as_array().unwrap() {
        let bits = |at: usize| u64::from_str_radix(pair[at].as_str().unwrap(), 16).unwrap();
        assert_eq!(normal_quantile(f64::from_bits(bits(0))).to_bits(), bits(1), "{pair}");
    }
}

#[test]
fn ln_agrees_with_the_platform() {
    for n in 1..10_000 {
        let x = f64::from(n) * f64::from(n) * 1e-9;
        assert!((ln(x) - x.ln()).abs() <= 4e-16 * x.ln().abs().max(1.0), "{x}");
    }
    assert_eq!(ln(1.0), 0.0);
}

#[test]
fn normal_rows_have_the_asked_mean_spread_and_tails() {
    let values: Vec<f32> = (0..6_250)
        .flat_map(|key| row(Init::Normal { mean: 2.0, std: 0.5 }, 7, "item", key, 16))
        .collect();
    let (mean, std) = moments(&values);
    // Four standard errors of 100,000 samples.
    assert!((mean - 2.0).abs() < 0.0064, "{mean}");
    assert!((std - 0.5).abs() < 0.0045, "{std}");
    for (sigmas, expected) in [(1.0, 0.317_31), (2.0, 0.045_50), (3.0, 0.002_700)] {
        let outside = share(&values, |x| (x - 2.0).abs() > sigmas * 0.5);
        let error = 4.0 * (expected / 100_000.0_f64).sqrt();
        assert!((outside - expected).abs() < error, "{outside} beyond {sigmas} sigma");
        let above = share(&values, |x| x - 2.0 > sigmas * 0.5);
        assert!((above - expected / 2.0).abs() < error, "{above} above {sigmas} sigma");
    }
}

#[test]
fn uniform_rows_fill_their_range_evenly() {
    let values: Vec<f32> = (0..6_250)
        .flat_map(|key| row(Init::Uniform { low: -0.05, high: 0.05 }, 7, "item", key, 16))
        .collect();
    let (mean, std) = moments(&values);
    assert!(mean.abs() < 4e-4, "{mean}");
    assert!((std - 0.1 / 12.0_f64.sqrt()).abs() < 3e-4, "{std}");
    for tenth in 0..10 {
        let from = -0.05 + 0.01 * tenth as f32;
        let inside = share(&values, |x| x >= from && x < from + 0.01);
        assert!((inside - 0.1).abs() < 0.004, "{inside} in tenth {tenth}");
    }
}

#[test]
fn neighbours_in_seed_variable_key_and_element_are_unrelated() {
    let uniform = Init::Uniform { low: -1.0, high: 1.0 };
    let base: Vec<f32> = (0..2_000).flat_map(|key| row(uniform, 1, "a", key, 8)).collect();
    let others = [
        (0..2_000).flat_map(|key| row(uniform, 2, "a", key, 8)).collect::<Vec<f32>>(),
        (0..2_000).flat_map(|key| row(uniform, 1, "b", key, 8)).collect(),
        (1..2_001).flat_map(|key| row(uniform, 1, "a", key, 8)).collect(),
        base.iter().skip(1).copied().chain([0.0]).collect(),
    ];
    for other in others {
        let product: f64 =
            base.iter().zip(&other).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        // The variance of one product is 1/9.
        assert!((product / 16_000.0).abs() < 4.0 / 3.0 / 16_000.0_f64.sqrt(), "{product}");
    }
}

#[test]
fn what_could_give_a_value_that_is_not_finite_is_refused_by_field() {
    let refused = [
        (Init::Constant(f32::NAN), "init.constant"),
        (Init::Uniform { low: f32::NEG_INFINITY, high: 0.0 }, "init.uniform.low"),
        (Init::Uniform { low: 0.0, high: f32::NAN }, "init.uniform.high"),
        (Init::Uniform { low: 1.0, high: 0.5 }, "init.uniform.low"),
        (Init::Normal { mean: f32::INFINITY, std: 1.0 }, "init.normal.mean"),
        (Init::Normal { mean: 0.0, std: -1.0 }, "init.normal.std"),
        (Init::Normal { mean: 0.0, std: f32::MAX / 8.0 }, "init.normal.std"),
    ];
    for (init, field) in refused {
        assert_eq!(init.validate().map_err(|error| error.field), Err(field), "{init:?}");
    }
    assert_eq!(Init::Zeros.validate(), Ok(()));
}

proptest! {
    #[test]
    fn valid_inits_give_finite_rows_within_bounds_whatever_the_length(
        a in any::<f32>(), b in any::<f32>(), seed: u64, key: u64, dim in 0..40usize,
    ) {
        for init in [Init::Constant(a), Init::Uniform { low: a, high: b }, Init::Normal { mean: a, std: b }] {
            if init.validate().is_ok() {
                let whole = row(init, seed, "v", key, 40);
                prop_assert!(whole.iter().all(|x| x.is_finite()));
                if let Init::Uniform { low, high } = init {
                    prop_assert!(whole.iter().all(|&x| low <= x && x <= high));
                }
                let part = row(init, seed, "v", key, dim);
                prop_assert!(part.iter().zip(&whole).all(|(x, y)| x.to_bits() == y.to_bits()));
            }
        }
    }
}
