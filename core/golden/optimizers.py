"""Writes testdata/optimizer/*.json: what PyTorch's optimizers make of fixed gradients.

    python core/golden/optimizers.py        # with torch 2.11 on the CPU; no other package

Each case starts from `weights` (rows of a table, or one row for a dense tensor) and applies `steps`: at each step the rows that
are named get a gradient. Every number is the decimal form of an f32, exact.
"""

import json
import pathlib

import torch

ROWS, DIM, STEPS = 3, 11, 20


def inputs(seed, scale=1.0):
    """Start weights, and (rows, gradients) of each step. Row 0 is in every step, the others come and go."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(ROWS, DIM, generator=generator) * 0.1
    steps = []
    for step in range(STEPS):
        rows = [row for row in range(ROWS) if step % (row + 1) == 0]
        steps.append((rows, torch.randn(len(rows), DIM, generator=generator) * scale))
    return weights, steps


def dense(weights, steps):
    """The same as a dense tensor: one row, in every step."""
    return weights[:1].clone(), [([0], gradients[:1].clone()) for _, gradients in steps]


def by_torch(make, weights, steps, slots, sparse):
    """Runs one torch optimizer over all rows; `slots` are the names of its state tensors."""
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = make([parameter])
    for rows, gradients in steps:
        if sparse:
            parameter.grad = torch.sparse_coo_tensor([rows], gradients, parameter.shape).coalesce()
        else:
            parameter.grad = gradients.clone()
        optimizer.step()
    return parameter.data, [optimizer.state[parameter][slot] for slot in slots]


def rowwise_adagrad(learning_rate, epsilon, initial):
    """torch has none. From the documentation and reference code of EXACT_ROWWISE_ADAGRAD in FBGEMM
    (fbgemm_gpu, embedding_optimizer_rowwise_adagrad): one moment per row, the mean of the squared gradients is added to it."""

    def run(weights, steps):
        weights, moment = weights.clone(), torch.full((ROWS, 1), initial)
        for rows, gradients in steps:
            moment[rows] += gradients.pow(2).mean(dim=1, keepdim=True)
            weights[rows] -= learning_rate / (moment[rows].sqrt() + epsilon) * gradients
        return weights, [moment]

    return run


def case(name, hyper, weights, steps, result):
    final, slots = result
    return {
        "name": name,
        **hyper,
        "weights": weights.tolist(),
        "steps": [{"rows": rows, "gradients": gradients.tolist()} for rows, gradients in steps],
        "expected_weights": final.tolist(),
        # For each row its optimizer slots, one after the other.
        "expected_state": torch.cat([slot.reshape(len(final), -1) for slot in slots], dim=1).tolist() if slots else [[] for _ in final],
    }


def sgd():
    weights, steps = inputs(1)
    make = lambda p: torch.optim.SGD(p, lr=0.05)
    hyper = {"learning_rate": 0.05}
    one = dense(weights, steps)
    return [
        case("dense", hyper, *one, by_torch(make, *one, [], sparse=False)),
        case("rows", hyper, weights, steps, by_torch(make, weights, steps, [], sparse=True)),
    ]


def adagrad():
    cases = []
    for name, lr, eps, initial, scale in [
        ("defaults of torch", 0.01, 1e-10, 0.0, 1.0),
        ("initial accumulator", 0.05, 1e-7, 0.1, 1.0),
        ("large epsilon, small gradients", 0.1, 1e-2, 0.0, 1e-3),
    ]:
        weights, steps = inputs(2, scale)
        make = lambda p: torch.optim.Adagrad(p, lr=lr, eps=eps, initial_accumulator_value=initial)
        hyper = {"learning_rate": lr, "epsilon": eps, "initial_accumulator": initial}
        one = dense(weights, steps)
        cases.append(case(f"dense, {name}", hyper, *one, by_torch(make, *one, ["sum"], sparse=False)))
        cases.append(case(f"rows, {name}", hyper, weights, steps, by_torch(make, weights, steps, ["sum"], sparse=True)))
    return cases


def rowwise():
    cases = []
    for name, lr, eps, initial in [("no start value", 0.05, 1e-8, 0.0), ("initial accumulator", 0.02, 1e-5, 0.1)]:
        weights, steps = inputs(3)
        hyper = {"learning_rate": lr, "epsilon": eps, "initial_accumulator": initial}
        cases.append(case(name, hyper, weights, steps, rowwise_adagrad(lr, eps, initial)(weights, steps)))
    return cases


def adam():
    cases = []
    for name, lr, betas, eps in [
        ("defaults of torch", 1e-3, (0.9, 0.999), 1e-8),
        ("other betas", 0.02, (0.8, 0.95), 1e-4),
    ]:
        weights, steps = inputs(4)
        make = lambda p: torch.optim.Adam(p, lr=lr, betas=betas, eps=eps)
        hyper = {"learning_rate": lr, "beta1": betas[0], "beta2": betas[1], "epsilon": eps}
        one = dense(weights, steps)
        cases.append(case(f"dense, {name}", hyper, *one, by_torch(make, *one, ["exp_avg", "exp_avg_sq"], sparse=False)))
    # SparseAdam adds epsilon before the bias correction, so it agrees only where epsilon does not count.
    weights, steps = inputs(5)
    make = lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.9, 0.999), eps=1e-15)
    hyper = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-15}
    cases.append(case("rows, SparseAdam", hyper, weights, steps, by_torch(make, weights, steps, ["exp_avg", "exp_avg_sq"], sparse=True)))
    return cases


def main():
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.enable()
    target = pathlib.Path(__file__).parent.parent / "testdata" / "optimizer"
    for name, cases in [("sgd", sgd()), ("adagrad", adagrad()), ("rowwise_adagrad", rowwise()), ("adam", adam())]:
        source = "written out in golden/optimizers.py" if name == "rowwise_adagrad" else f"PyTorch {torch.__version__.split('+')[0]}"
        lines = ",\n".join(json.dumps(c) for c in cases)
        (target / f"{name}.json").write_text(f'{{"source": "{source}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
