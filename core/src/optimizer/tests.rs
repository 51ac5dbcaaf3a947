mod golden;

use super::*;
use crate::mix::mix64;
use crate::tensor_bytes::floats;
use proptest::prelude::*;

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

fn adam(learning_rate: f32) -> OptimizerSpec {
    Adam { learning_rate, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }.into()
}

/// One of each, with this learning rate: kernels differ by more than the rule where a parameter chooses between two.
fn all(learning_rate: f32) -> Vec<OptimizerSpec> {
    let (epsilon, initial_accumulator) = (1e-8, 0.1);
    let momentum = Momentum { learning_rate, momentum: 0.9, nesterov: false };
    let rms_prop = RmsProp { learning_rate, alpha: 0.99, epsilon, momentum: 0.0 };
    vec![
        Sgd { learning_rate }.into(),
        momentum.into(),
        Momentum { nesterov: true, ..momentum }.into(),
        Adagrad { learning_rate, epsilon, initial_accumulator }.into(),
        RowwiseAdagrad { learning_rate, epsilon, initial_accumulator }.into(),
        rms_prop.into(),
        RmsProp { momentum: 0.9, ..rms_prop }.into(),
        adam(learning_rate),
        AdamW { learning_rate, beta1: 0.9, beta2: 0.999, epsilon, weight_decay: 0.01 }.into(),
        Ftrl { learning_rate, beta: 1.0, l1: 0.01, l2: 0.1 }.into(),
    ]
}

/// [`all`], also with rows clipped, with decay, and with both.
fn all_modified(learning_rate: f32) -> Vec<OptimizerSpec> {
    let modify = |(norm, l2_decay): (Option<f32>, f32)| {
        let modified = move |spec| OptimizerSpec { clip_row_norm: norm, l2_decay, ..spec };
        all(learning_rate).into_iter().map(modified)
    };
    [(None, 0.0), (Some(30.0), 0.0), (None, 0.02), (Some(30.0), 0.02)]
        .into_iter()
        .flat_map(modify)
        .collect()
}

/// A row with its state, which gradients are applied to one after the other.
struct Row {
    spec: OptimizerSpec,
    weights: Vec<f32>,
    state: Vec<f32>,
}

impl Row {
    fn new(spec: OptimizerSpec, weights: &[f32]) -> Self {
        let mut state = vec![f32::NAN; spec.state_width(weights.len())];
        spec.init_state(&mut state);
        Self { spec, weights: weights.to_vec(), state }
    }

    fn push(&mut self, step: u64, gradient: &[f32]) -> u32 {
        let scalars = self.spec.scalars(step, 0);
        self.spec.apply(&scalars, &mut self.weights, &mut self.state, &bytes(gradient))
    }

    fn bits(&self) -> (Vec<u32>, Vec<u32>) {
        (bits(&self.weights), bits(&self.state))
    }
}

#[test]
fn state_layout_is_what_checkpoints_expect() {
    let layout = |spec: OptimizerSpec| {
        let slots = spec.slots().iter().map(|slot| (slot.name, slot.width(16)));
        (spec.state_width(16), slots.collect::<Vec<_>>())
    };
    let layout: Vec<_> = all(0.1).into_iter().map(layout).collect();
    let expected = [
        (0, vec![]),
        (16, vec![("momentum", 16)]),
        (16, vec![("momentum", 16)]),
        (16, vec![("adagrad_sum", 16)]),
        (1, vec![("rowwise_adagrad_sum", 1)]),
        (16, vec![("rms_prop_square", 16)]),
        (32, vec![("rms_prop_square", 16), ("rms_prop_momentum", 16)]),
        (32, vec![("adam_m", 16), ("adam_v", 16)]),
        (32, vec![("adam_m", 16), ("adam_v", 16)]),
        (32, vec![("ftrl_z", 16), ("ftrl_n", 16)]),
    ];
    assert_eq!(layout, expected);
}

#[test]
fn parameters_that_cannot_work_are_refused_by_field() {
    let base = Adagrad { learning_rate: 0.1, epsilon: 0.0, initial_accumulator: 0.0 };
    let good = Adam { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let rms_prop = RmsProp { learning_rate: 0.1, alpha: 0.9, epsilon: 1e-8, momentum: 0.0 };
    let decoupled =
        AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.1 };
    let ftrl = Ftrl { learning_rate: 0.1, beta: 1.0, l1: 0.0, l2: 0.0 };
    let scheduled = |then| OptimizerSpec {
        schedule: Schedule { warm_up_steps: 0, then },
        ..Sgd { learning_rate: 0.1 }.into()
    };
    let stale = |staleness| OptimizerSpec { staleness, ..Sgd { learning_rate: 0.1 }.into() };
    let refused = [
        (OptimizerSpec::Sgd(Sgd { learning_rate: f32::NAN }), "sgd.learning_rate"),
        (OptimizerSpec::Adagrad(base), "adagrad.epsilon"),
        (OptimizerSpec::Adagrad(Adagrad { epsilon: -1.0, ..base }), "adagrad.epsilon"),
        (
            OptimizerSpec::Adagrad(Adagrad { initial_accumulator: -0.1, ..base }),
            "adagrad.initial_accumulator",
        ),
        (
            OptimizerSpec::RowwiseAdagrad(RowwiseAdagrad {
                learning_rate: f32::INFINITY,
                epsilon: 1e-8,
                initial_accumulator: 0.0,
            }),
            "rowwise_adagrad.learning_rate",
        ),
        (OptimizerSpec::Adam(Adam { beta1: 1.0, ..good }), "adam.beta1"),
        (OptimizerSpec::Adam(Adam { beta2: f64::NAN, ..good }), "adam.beta2"),
        (OptimizerSpec::Adam(Adam { epsilon: 0.0, ..good }), "adam.epsilon"),
        (
            Momentum { learning_rate: 0.1, momentum: 1.0, nesterov: true }.into(),
            "momentum.momentum",
        ),
        (RmsProp { alpha: -0.1, ..rms_prop }.into(), "rms_prop.alpha"),
        (RmsProp { momentum: f32::NAN, ..rms_prop }.into(), "rms_prop.momentum"),
        (AdamW { weight_decay: -0.1, ..decoupled }.into(), "adam_w.weight_decay"),
        (AdamW { beta2: 1.0, ..decoupled }.into(), "adam_w.beta2"),
        (Ftrl { learning_rate: 0.0, ..ftrl }.into(), "ftrl.learning_rate"),
        (Ftrl { beta: 0.0, ..ftrl }.into(), "ftrl.beta"),
        (Ftrl { l1: f32::INFINITY, ..ftrl }.into(), "ftrl.l1"),
        (Ftrl { l2: -1.0, ..ftrl }.into(), "ftrl.l2"),
        (OptimizerSpec { clip_row_norm: Some(0.0), ..good.into() }, "clip_row_norm"),
        (OptimizerSpec { l2_decay: -1.0, ..good.into() }, "l2_decay"),
        (OptimizerSpec { l2_decay: 0.1, ..ftrl.into() }, "l2_decay"),
        (stale(Scaling::Clocks { per: 0.0 }), "staleness.clocks"),
        (stale(Scaling::Records { per: f32::NAN }), "staleness.records"),
        (scheduled(Course::Step { every: 0, factor: 0.5 }), "schedule.step.every"),
        (scheduled(Course::Step { every: 1, factor: 1.5 }), "schedule.step.factor"),
        (scheduled(Course::Cosine { steps: 0, floor: 0.0 }), "schedule.cosine.steps"),
        (scheduled(Course::Cosine { steps: 1, floor: f32::NAN }), "schedule.cosine.floor"),
    ];
    for (spec, field) in refused {
        assert_eq!(spec.validate().map_err(|error| error.field), Err(field), "{spec:?}");
    }
    assert!(all_modified(0.5).iter().all(|spec| match spec.rule {
        Rule::AdamW(_) | Rule::Ftrl(_) => spec.validate().is_ok() == (spec.l2_decay == 0.0),
        _ => spec.validate().is_ok(),
    }));
    let downwards = |spec: &OptimizerSpec| spec.validate().is_ok();
    assert_eq!(
        all(-1.0).into_iter().filter(downwards).count(),
        all(-1.0).len() - 1,
        "all but FTRL"
    );
    let error = OptimizerSpec::Adam(Adam { beta1: 1.5, ..good }).validate().unwrap_err();
    assert_eq!(error.to_string(), "adam.beta1 is 1.5, but must be at least 0 and below 1");
}

#[test]
fn sgd_with_learning_rate_minus_one_counts_exactly() {
    let mut row = Row::new(OptimizerSpec::Sgd(Sgd { learning_rate: -1.0 }), &[0.0; 3]);
    for step in 1..=1_000 {
        row.push(step, &[1.0; 3]);
    }
    assert_eq!(row.weights, [1_000.0; 3]);
}

#[test]
fn powers_of_beta_are_those_of_the_mathematics() {
    for beta in [0.9, 0.999, 0.999_999] {
        let mut product = 1.0;
        for step in 1..=3_000 {
            product *= beta;
            let relative = power(beta, step) / product - 1.0;
            assert!(relative.abs() < 1e-12, "{beta}^{step}");
        }
    }
    assert_eq!((power(0.0, 1), power(0.5, 10), power(0.9, u64::MAX)), (0.0, 1.0 / 1024.0, 0.0));
    assert_eq!(adam(0.1).scalars(0, 0), adam(0.1).scalars(1, 0));
}

#[test]
fn adams_first_step_is_the_learning_rate_against_the_sign_of_the_gradient() {
    let mut row = Row::new(adam(0.01), &[1.0, 1.0, 1.0]);
    row.push(1, &[5.0, -0.003, 0.0]);
    for (weight, expected) in row.weights.iter().zip([0.99, 1.01, 1.0]) {
        assert!((weight - expected).abs() < 1e-6, "{weight}");
    }
}

#[test]
fn an_element_that_would_overflow_keeps_its_weight_and_state() {
    let huge = [1.0, f32::MAX, -f32::MAX, 1.0];
    for spec in all(2.0) {
        let mut row = Row::new(spec, &[0.0, f32::MAX, f32::MIN, 0.0]);
        // A gradient that pushes the weights outwards.
        let outwards = huge.map(|g| -g);
        let skipped = row.push(1, &outwards);
        let rowwise = matches!(spec.rule, Rule::RowwiseAdagrad(_));
        assert_eq!(skipped, if rowwise { 4 } else { 2 }, "{spec:?}");
        assert_eq!(row.weights[1..3], [f32::MAX, f32::MIN], "{spec:?}");
        assert_eq!(row.weights[0] == 0.0, rowwise, "the others are updated: {spec:?}");
        let untouched = Row::new(spec, &row.weights);
        for slot in 0..row.state.len() / 4 {
            let (state, start) = (&row.state[slot * 4..], &untouched.state[slot * 4..]);
            assert_eq!(state[1..3], start[1..3], "{spec:?}");
            assert_ne!(state[0], start[0], "{spec:?}");
        }
    }
}

#[test]
fn a_schedule_ends_at_its_floor_and_never_leaves_it() {
    let base = 0.5;
    let at =
        |warm_up_steps, then, clock| Schedule { warm_up_steps, then }.learning_rate(base, clock);
    let cosine = Course::Cosine { steps: 100, floor: 0.01 };
    assert_eq!([at(10, cosine, 110), at(10, cosine, u64::MAX)], [0.01, 0.01]);
    assert_eq!(at(0, Course::Step { every: 1, factor: 0.5 }, u64::MAX), 0.0);
    assert_eq!(at(u64::MAX, Course::Constant, u64::MAX - 1), base);
    assert_eq!([at(4, cosine, 0), at(4, cosine, 3), at(4, cosine, 4)], [base / 4.0, base, base]);
}

#[test]
fn an_ftrl_row_starts_from_its_first_weights_and_forgets_what_l1_outweighs() {
    let spec: OptimizerSpec = Ftrl { learning_rate: 0.1, beta: 1.0, l1: 0.5, l2: 0.25 }.into();
    let first = [0.3, -0.02, 0.0, 0.0];
    let mut row = Row::new(spec, &first);
    row.push(1, &[0.0; 4]);
    for (weight, first) in row.weights.iter().zip(first) {
        assert!((weight - first).abs() < 1e-6, "{weight}, not {first}");
    }
    row.push(2, &[1e-3, -1e-3, 0.4, 0.6]);
    assert_eq!(row.weights[2], 0.0, "less evidence than l1");
    assert!(row.weights[3] < 0.0, "more evidence than l1");
    assert!(row.weights[0] < 0.3 && row.weights[1] > -0.02);
}

#[test]
fn clipping_keeps_the_direction_and_short_gradients() {
    let sgd: OptimizerSpec = Sgd { learning_rate: 1.0 }.into();
    let spec = OptimizerSpec { clip_row_norm: Some(5.0), ..sgd };
    let mut row = Row::new(spec, &[0.0; 2]);
    assert_eq!(row.push(1, &[-6.0, -8.0]), 0);
    assert_eq!(row.weights, [3.0, 4.0]);
    assert_eq!(row.push(2, &[3.0, 4.0]), 0, "as long as is allowed");
    assert_eq!(row.weights, [0.0, 0.0]);
    assert_eq!(row.push(3, &[1e30, 1.0]), 2, "its norm is not a finite number");
    assert_eq!(row.weights, [0.0, 0.0]);
}

#[test]
fn scalars_that_are_not_finite_change_no_weight() {
    for spec in all(0.1) {
        let mut row = Row::new(spec, &[0.5; 9]);
        for bad in [f64::NAN, f64::INFINITY] {
            let scalars =
                StepScalars { learning_rate: bad as f32, beta1_power: bad, beta2_power: bad };
            let skipped = spec.apply(&scalars, &mut row.weights, &mut row.state, &bytes(&[1.0; 9]));
            assert_eq!((skipped, &row.weights), (9, &vec![0.5; 9]), "{spec:?}");
        }
        assert_eq!(row.bits(), Row::new(spec, &[0.5; 9]).bits());
    }
}

/// The order of `row::sum_of_squares`'s documentation, one square at a time.
fn sum_of_squares_by_definition(gradient: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for (i, g) in gradient.iter().enumerate() {
        lanes[i % 8] += g * g;
    }
    let t: Vec<f32> = (0..4).map(|j| lanes[j] + lanes[j + 4]).collect();
    (t[0] + t[2]) + (t[1] + t[3])
}

/// What clipping and decay make of a gradient.
fn modified_by_definition(spec: &OptimizerSpec, weights: &[f32], gradient: &[f32]) -> Vec<f32> {
    if spec.clip_row_norm.is_none() && spec.l2_decay == 0.0 {
        return gradient.to_vec();
    }
    let norm = sum_of_squares_by_definition(gradient).sqrt();
    let scale = spec.clip_row_norm.filter(|max| norm > *max).map_or(1.0, |max| max / norm);
    gradient.iter().zip(weights).map(|(g, w)| g * scale + spec.l2_decay * w).collect()
}

/// Each optimizer's documentation, one element at a time.
fn apply_by_definition(
    spec: &OptimizerSpec,
    scalars: &StepScalars,
    weights: &mut [f32],
    state: &mut [f32],
    gradient: &[f32],
) {
    let (dim, lr) = (weights.len(), scalars.learning_rate);
    let gradient = modified_by_definition(spec, weights, gradient);
    if let Rule::RowwiseAdagrad(_) = spec.rule {
        state[0] += sum_of_squares_by_definition(&gradient) / dim as f32;
    }
    let adam_step = |state: &mut [f32], i: usize, g: f32, beta1: f64, beta2: f64, epsilon: f32| {
        state[i] = beta1 as f32 * state[i] + (1.0 - beta1) as f32 * g;
        let v = &mut state[dim + i];
        *v = beta2 as f32 * *v + (1.0 - beta2) as f32 * (g * g);
        let root = v.sqrt() / (1.0 - scalars.beta2_power).sqrt() as f32;
        let step_size = (f64::from(lr) / (1.0 - scalars.beta1_power)) as f32;
        step_size * state[i] / (root + epsilon)
    };
    for i in 0..dim {
        let (g, w) = (gradient[i], weights[i]);
        weights[i] = match spec.rule {
            Rule::Sgd(_) => w - lr * g,
            Rule::Momentum(Momentum { momentum, nesterov, .. }) => {
                state[i] = momentum * state[i] + g;
                w - lr * if nesterov { g + momentum * state[i] } else { state[i] }
            }
            Rule::Adagrad(adagrad) => {
                state[i] += g * g;
                w - lr * g / (state[i].sqrt() + adagrad.epsilon)
            }
            Rule::RowwiseAdagrad(adagrad) => w - lr / (state[0].sqrt() + adagrad.epsilon) * g,
            Rule::RmsProp(RmsProp { alpha, epsilon, momentum, .. }) => {
                state[i] = alpha as f32 * state[i] + (1.0 - alpha) as f32 * (g * g);
                let scaled = g / (state[i].sqrt() + epsilon);
                let buffer = state.get_mut(dim + i).map(|buffer| {
                    *buffer = momentum * *buffer + scaled;
                    *buffer
                });
                w - lr * buffer.unwrap_or(scaled)
            }
            Rule::Adam(Adam { beta1, beta2, epsilon, .. }) => {
                w - adam_step(state, i, g, beta1, beta2, epsilon)
            }
            Rule::AdamW(AdamW { beta1, beta2, epsilon, weight_decay, .. }) => {
                let retained = (1.0 - f64::from(lr) * f64::from(weight_decay)) as f32;
                w * retained - adam_step(state, i, g, beta1, beta2, epsilon)
            }
            Rule::Ftrl(Ftrl { beta, l1, l2, .. }) => {
                let (root, new_root) = (state[dim + i].sqrt(), (state[dim + i] + g * g).sqrt());
                if state[i] == 0.0 && w != 0.0 {
                    state[i] = -(w * ((beta + root) / lr + l2) + l1.copysign(w));
                }
                state[dim + i] += g * g;
                state[i] = state[i] + g - (new_root - root) / lr * w;
                let beyond = state[i].abs() - l1;
                let strength = (beta + new_root) / lr + l2;
                if beyond > 0.0 { -beyond.copysign(state[i]) / strength } else { 0.0 }
            }
        };
    }
}

/// Weights and state after some pushes to one row, as computed by one instruction set.
fn bits_under(
    instructions: InstructionSet,
    spec: &OptimizerSpec,
    elements: &[[f32; 4]],
    step: u64,
) -> (Vec<u32>, Vec<u32>, u32) {
    let weights: Vec<f32> = elements.iter().map(|e| e[0]).collect();
    let mut row = Row::new(*spec, &weights);
    let mut skipped = 0;
    for push in 1..4 {
        let gradient: Vec<f32> = elements.iter().map(|e| e[push]).collect();
        let update = spec.update_with(&spec.scalars(step + push as u64, 0), instructions);
        skipped += update.apply(&mut row.weights, &mut row.state, &bytes(&gradient));
    }
    let (weights, state) = row.bits();
    (weights, state, skipped)
}

#[test]
fn this_machine_says_which_instruction_sets_were_compared() {
    for (name, set) in InstructionSet::all() {
        eprintln!(
            "{name}: {}",
            if set.is_some() { "compared" } else { "skipped, not of this machine" }
        );
    }
    assert_eq!(InstructionSet::all()[0].0, "Baseline");
}

fn finite() -> impl Strategy<Value = f32> {
    any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |x| x.is_finite())
}

/// A weight and gradients of ordinary size for each element of a row, tails of every length included.
fn ordinary_row() -> impl Strategy<Value = Vec<[f32; 4]>> {
    prop::collection::vec(prop::array::uniform4(-1e3f32..1e3), 1..70)
}

proptest! {
    #[test]
    fn kernels_equal_their_definition_bit_for_bit(elements in ordinary_row(), step in 1u64..100_000) {
        for spec in all_modified(0.05) {
            let weights: Vec<f32> = elements.iter().map(|e| e[0]).collect();
            let mut row = Row::new(spec, &weights);
            let mut defined = Row::new(spec, &weights);
            for push in 1..4 {
                let gradient: Vec<f32> = elements.iter().map(|e| e[push]).collect();
                let step = step + push as u64;
                row.push(step, &gradient);
                let Row { weights, state, .. } = &mut defined;
                apply_by_definition(&spec, &spec.scalars(step, 0), weights, state, &gradient);
            }
            prop_assert_eq!(row.bits(), defined.bits(), "{:?}", spec);
        }
    }

    /// Numbers of every size: also what overflows and what is subnormal.
    #[test]
    fn every_instruction_set_gives_the_same_bits(
        ordinary in ordinary_row(),
        any in prop::collection::vec(prop::array::uniform4(finite()), 1..40),
        step in 1u64..1_000,
    ) {
        let sets: Vec<_> = InstructionSet::all().into_iter().filter_map(|(_, set)| set).collect();
        for spec in all_modified(0.05) {
            for elements in [&ordinary, &any] {
                let [baseline, wider @ ..] = &*sets else { unreachable!("there is a baseline") };
                let expected = bits_under(*baseline, &spec, elements, step);
                for set in wider {
                    prop_assert_eq!(&bits_under(*set, &spec, elements, step), &expected, "{:?} {:?}", set, spec);
                }
            }
        }
    }

    #[test]
    fn nothing_that_is_stored_is_ever_not_finite(
        elements in prop::collection::vec(prop::array::uniform4(finite()), 1..20),
        learning_rate in finite(),
        step: u64,
    ) {
        for spec in all_modified(learning_rate) {
            let weights: Vec<f32> = elements.iter().map(|e| e[0]).collect();
            let mut row = Row::new(spec, &weights);
            for push in 1..4 {
                let gradient: Vec<f32> = elements.iter().map(|e| e[push]).collect();
                row.push(step, &gradient);
                prop_assert!(row.weights.iter().chain(&row.state).all(|x| x.is_finite()), "{:?}", spec);
            }
        }
    }

    #[test]
    fn alignment_of_the_gradient_changes_no_bit(elements in ordinary_row(), step in 1u64..1_000) {
        let weights: Vec<f32> = elements.iter().map(|e| e[0]).collect();
        let gradient: Vec<f32> = elements.iter().map(|e| e[1]).collect();
        for spec in all(0.05) {
            let mut aligned = Row::new(spec, &weights);
            aligned.push(step, &gradient);
            for offset in 1..4 {
                let mut buffer = vec![0xA5; offset];
                buffer.extend(bytes(&gradient));
                let mut row = Row::new(spec, &weights);
                let scalars = spec.scalars(step, 0);
                spec.apply(&scalars, &mut row.weights, &mut row.state, &buffer[offset..]);
                prop_assert_eq!(row.bits(), aligned.bits(), "{:?} at offset {}", spec, offset);
            }
        }
    }

    #[test]
    fn elementwise_optimizers_may_be_cut_anywhere(elements in ordinary_row(), cut: prop::sample::Index) {
        let weights: Vec<f32> = elements.iter().map(|e| e[0]).collect();
        let gradient: Vec<f32> = elements.iter().map(|e| e[1]).collect();
        let cut = cut.index(weights.len());
        for spec in all(0.05) {
            if let Rule::RowwiseAdagrad(_) = spec.rule {
                continue;
            }
            let mut whole = Row::new(spec, &weights);
            let mut parts = [Row::new(spec, &weights[..cut]), Row::new(spec, &weights[cut..])];
            whole.push(7, &gradient);
            parts[0].push(7, &gradient[..cut]);
            parts[1].push(7, &gradient[cut..]);
            prop_assert_eq!(bits(&whole.weights), bits(&[&*parts[0].weights, &*parts[1].weights].concat()));
            let slots = spec.slots().len();
            for slot in 0..slots {
                let of = |row: &Row| row.state[slot * row.weights.len()..][..row.weights.len()].to_vec();
                prop_assert_eq!(bits(&of(&whole)), bits(&[of(&parts[0]), of(&parts[1])].concat()));
            }
        }
    }

    #[test]
    fn bytes_round_trip(values in prop::collection::vec(finite(), 0..20)) {
        prop_assert_eq!(floats(&bytes(&values)).collect::<Vec<_>>(), values);
    }
}
