//! What PyTorch makes of the same gradients: `core/golden/optimizers.py` wrote it.

use serde_json::Value;

use super::*;

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn rows(value: &Value) -> Vec<Vec<f32>> {
    value.as_array().unwrap().iter().map(numbers).collect()
}

fn close(actual: &[f32], expected: &[f32], what: &str) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    // Sums of 20 steps cancel: small results are compared on the scale of their row.
    let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    for (a, e) in actual.iter().zip(expected) {
        assert!((a - e).abs() <= 2e-6 * e.abs().max(0.1 * scale), "{what}: {a}, not {e}");
    }
}

/// Compares each case with the reference and returns a hash of our own bits over all of them.
fn compare(text: &str, spec: impl Fn(&Value) -> OptimizerSpec) -> u64 {
    let golden: Value = serde_json::from_str(text).unwrap();
    let mut hash = 0;
    for case in golden["cases"].as_array().unwrap() {
        let spec = spec(case);
        assert_eq!(spec.validate(), Ok(()));
        let mut table: Vec<Row> =
            rows(&case["weights"]).iter().map(|weights| Row::new(spec, weights)).collect();
        for (step, push) in (1..).zip(case["steps"].as_array().unwrap()) {
            let gradients = rows(&push["gradients"]);
            for (row, gradient) in push["rows"].as_array().unwrap().iter().zip(&gradients) {
                let row = usize::try_from(row.as_u64().unwrap()).unwrap();
                assert_eq!(table[row].push(step, gradient), 0);
            }
        }
        let name = case["name"].as_str().unwrap();
        let expected = rows(&case["expected_weights"]);
        for (index, (row, state)) in table.iter().zip(rows(&case["expected_state"])).enumerate() {
            close(&row.weights, &expected[index], &format!("{name}: weights of row {index}"));
            for (slot, expected) in row.state.chunks(11).zip(state.chunks(11)) {
                close(slot, expected, &format!("{name}: state of row {index}"));
            }
            for bits in bits(&row.weights).into_iter().chain(bits(&row.state)) {
                hash = mix64(hash ^ u64::from(bits));
            }
        }
    }
    hash
}

fn number(case: &Value, field: &str) -> f64 {
    case[field].as_f64().unwrap()
}

fn float(case: &Value, field: &str) -> f32 {
    number(case, field) as f32
}

// The numbers below pin our own bits. They change only with the arithmetic, and then no replica, log or checkpoint digest of
// an older version agrees with the new one.

#[test]
fn sgd_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/sgd.json"), |case| {
        OptimizerSpec::Sgd(Sgd { learning_rate: float(case, "learning_rate") })
    });
    assert_eq!(hash, 0xa1fa_614b_607d_3173, "{hash:#x}");
}

#[test]
fn adagrad_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/adagrad.json"), |case| {
        OptimizerSpec::Adagrad(Adagrad {
            learning_rate: float(case, "learning_rate"),
            epsilon: float(case, "epsilon"),
            initial_accumulator: float(case, "initial_accumulator"),
        })
    });
    assert_eq!(hash, 0x5354_3839_9e24_0073, "{hash:#x}");
}

#[test]
fn rowwise_adagrad_equals_its_definition_in_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/rowwise_adagrad.json"), |case| {
        OptimizerSpec::RowwiseAdagrad(RowwiseAdagrad {
            learning_rate: float(case, "learning_rate"),
            epsilon: float(case, "epsilon"),
            initial_accumulator: float(case, "initial_accumulator"),
        })
    });
    assert_eq!(hash, 0xd1ab_ddb5_2e22_aafd, "{hash:#x}");
}

#[test]
fn adam_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/adam.json"), |case| {
        OptimizerSpec::Adam(Adam {
            learning_rate: float(case, "learning_rate"),
            beta1: number(case, "beta1"),
            beta2: number(case, "beta2"),
            epsilon: float(case, "epsilon"),
        })
    });
    assert_eq!(hash, 0x9ee6_45e8_6444_0dc1, "{hash:#x}");
}

#[test]
fn momentum_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/momentum.json"), |case| {
        let nesterov = case["nesterov"].as_bool().unwrap();
        let (learning_rate, momentum) = (float(case, "learning_rate"), float(case, "momentum"));
        Momentum { learning_rate, momentum, nesterov }.into()
    });
    assert_eq!(hash, 0x9e2b_4903_7701_6bc7, "{hash:#x}");
}

#[test]
fn rms_prop_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/rms_prop.json"), |case| {
        OptimizerSpec::RmsProp(RmsProp {
            learning_rate: float(case, "learning_rate"),
            alpha: number(case, "alpha"),
            epsilon: float(case, "epsilon"),
            momentum: float(case, "momentum"),
        })
    });
    assert_eq!(hash, 0xd9eb_cee1_1557_09a9, "{hash:#x}");
}

#[test]
fn adam_w_equals_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/adam_w.json"), |case| {
        OptimizerSpec::AdamW(AdamW {
            learning_rate: float(case, "learning_rate"),
            beta1: number(case, "beta1"),
            beta2: number(case, "beta2"),
            epsilon: float(case, "epsilon"),
            weight_decay: float(case, "weight_decay"),
        })
    });
    assert_eq!(hash, 0xbe5c_48eb_8ffc_c950, "{hash:#x}");
}

#[test]
fn ftrl_equals_its_paper() {
    let hash = compare(include_str!("../../../testdata/optimizer/ftrl.json"), |case| {
        OptimizerSpec::Ftrl(Ftrl {
            learning_rate: float(case, "learning_rate"),
            beta: float(case, "beta"),
            l1: float(case, "l1"),
            l2: float(case, "l2"),
        })
    });
    assert_eq!(hash, 0x054a_faeb_c651_97e8, "{hash:#x}");
}

#[test]
fn clipping_and_decay_equal_torch() {
    let hash = compare(include_str!("../../../testdata/optimizer/modified.json"), |case| {
        let (learning_rate, epsilon) = (float(case, "learning_rate"), 1e-10);
        let spec: OptimizerSpec = match case["rule"].as_str().unwrap() {
            "sgd" => Sgd { learning_rate }.into(),
            "adagrad" => Adagrad { learning_rate, epsilon, initial_accumulator: 0.0 }.into(),
            _ => Adam { learning_rate, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }.into(),
        };
        let clip_row_norm = case["clip_row_norm"].as_f64().map(|norm| norm as f32);
        OptimizerSpec { clip_row_norm, l2_decay: float(case, "l2_decay"), ..spec }
    });
    assert_eq!(hash, 0x5beb_f550_172e_5cfe, "{hash:#x}");
}

#[test]
fn schedules_equal_those_of_torch() {
    let text = include_str!("../../../testdata/optimizer/schedules.json");
    let golden: Value = serde_json::from_str(text).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let count = |field: &str| case[field].as_u64().unwrap();
        let then = match case["then"].as_str().unwrap() {
            "step" => Course::Step { every: count("every"), factor: number(case, "factor") },
            "cosine" => Course::Cosine { steps: count("steps"), floor: float(case, "floor") },
            _ => Course::Constant,
        };
        let schedule = Schedule { warm_up_steps: count("warm_up_steps"), then };
        for (clock, expected) in (0..).zip(case["expected"].as_array().unwrap()) {
            let rate = f64::from(schedule.learning_rate(float(case, "learning_rate"), clock));
            let relative = rate / expected.as_f64().unwrap() - 1.0;
            assert!(relative.abs() < 1e-6, "{}: {rate} at {clock}, not {expected}", case["name"]);
        }
    }
}

/// Exact numbers: what a log has of an older version must be applied alike for ever.
#[test]
fn stale_gradients_take_the_steps_that_they_always_took() {
    let sgd: OptimizerSpec = Sgd { learning_rate: 0.1 }.into();
    let rate = |staleness, clocks, records| {
        let spec = OptimizerSpec { staleness, ..sgd };
        spec.scalars_of_stale(1, 0, Staleness { clocks, records }).learning_rate.to_bits()
    };
    let bits = |rate: f32| rate.to_bits();
    assert_eq!(rate(Scaling::None, 9, Some(9)), bits(0.1));
    let halved = Scaling::Clocks { per: 1.0 };
    let rates = [0, 1, 2, 3, 7].map(|clocks| rate(halved, clocks, Some(1 << 40)));
    assert_eq!(rates, [0.1, 0.05, 0.033_333_335, 0.025, 0.0125].map(bits));
    let slow = Scaling::Records { per: 4.0 };
    let rates = [None, Some(0), Some(1), Some(4), Some(12)].map(|records| rate(slow, 99, records));
    assert_eq!(rates, [0.1, 0.1, 0.08, 0.05, 0.025].map(bits));
    assert!(f32::from_bits(rate(halved, u64::MAX, None)) > 0.0, "and never none at all");
    let falling = Schedule { warm_up_steps: 0, then: Course::Step { every: 10, factor: 0.5 } };
    let both = OptimizerSpec { schedule: falling, staleness: halved, ..sgd };
    let staleness = Staleness { clocks: 1, records: None };
    assert_eq!(both.scalars_of_stale(1, 10, staleness).learning_rate.to_bits(), bits(0.025));
}
