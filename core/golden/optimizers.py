"""Writes testdata/optimizer/*.json: what PyTorch's optimizers make of fixed gradients.

    python core/golden/optimizers.py        # with torch 2.11 on the CPU; no other package

`schedules.json` has learning rates of PyTorch's schedulers instead. Each other case starts from `weights` (rows of a table, or one row for a dense tensor) and applies `steps`: at each step the rows that
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


def by_torch_lazily(make, weights, steps, slots, clip=None):
    """The same with one parameter for each row: torch leaves a parameter without gradient alone, state and all."""
    rows = [torch.nn.Parameter(row.clone()) for row in weights]
    optimizer = make(rows)
    for named, gradients in steps:
        for index, row in enumerate(rows):
            row.grad = gradients[named.index(index)].clone() if index in named else None
            if clip is not None and row.grad is not None:
                torch.nn.utils.clip_grad_norm_([row], clip)
        optimizer.step()
    state = [torch.stack([optimizer.state[row][slot] for row in rows]) for slot in slots]
    return torch.stack([row.data for row in rows]), state


def every_row(weights, steps):
    """The same with every row in every step: where torch counts steps per parameter, and we per table."""
    return weights, [(list(range(ROWS)), gradients[:1] + 0.5 * torch.arange(ROWS).reshape(-1, 1)) for _, gradients in steps]


def ftrl_by_paper(alpha, beta, l1, l2):
    """Algorithm 1 of McMahan et al. (2013) in f64, one number at a time. A first weight gives z its first value."""

    def run(weights, steps):
        def element(row, column):
            w = float(weights[row][column])
            n = 0.0
            z = -(w * (beta / alpha + l2) + (l1 if w > 0 else -l1 if w < 0 else 0.0))
            for rows, gradients in steps:
                if row in rows:
                    g = float(gradients[rows.index(row)][column])
                    sigma = ((n + g * g) ** 0.5 - n**0.5) / alpha
                    z += g - sigma * w
                    n += g * g
                    sign = 1.0 if z > 0 else -1.0
                    w = 0.0 if abs(z) <= l1 else -(z - sign * l1) / ((beta + n**0.5) / alpha + l2)
            return w, z, n

        table = torch.tensor([[element(row, column) for column in range(DIM)] for row in range(len(weights))], dtype=torch.float64)
        return table[:, :, 0], [table[:, :, 1], table[:, :, 2]]

    return run


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


def momentum():
    cases = []
    for name, lr, mu, nesterov in [("heavy ball", 0.05, 0.9, False), ("Nesterov", 0.02, 0.8, True)]:
        weights, steps = inputs(6)
        make = lambda p: torch.optim.SGD(p, lr=lr, momentum=mu, nesterov=nesterov)
        hyper = {"learning_rate": lr, "momentum": mu, "nesterov": nesterov}
        cases.append(case(name, hyper, weights, steps, by_torch_lazily(make, weights, steps, ["momentum_buffer"])))
    return cases


def rms_prop():
    cases = []
    for name, lr, alpha, eps, mu in [("defaults of torch", 0.01, 0.99, 1e-8, 0.0), ("momentum", 0.003, 0.9, 1e-3, 0.9)]:
        weights, steps = inputs(7)
        make = lambda p: torch.optim.RMSprop(p, lr=lr, alpha=alpha, eps=eps, momentum=mu)
        hyper = {"learning_rate": lr, "alpha": alpha, "epsilon": eps, "momentum": mu}
        slots = ["square_avg"] + (["momentum_buffer"] if mu else [])
        cases.append(case(name, hyper, weights, steps, by_torch_lazily(make, weights, steps, slots)))
    return cases


def adam_w():
    cases = []
    for name, lr, betas, eps, decay in [("defaults of torch", 1e-3, (0.9, 0.999), 1e-8, 1e-2), ("strong decay", 0.02, (0.8, 0.95), 1e-4, 0.5)]:
        weights, steps = every_row(*inputs(8))
        make = lambda p: torch.optim.AdamW(p, lr=lr, betas=betas, eps=eps, weight_decay=decay)
        hyper = {"learning_rate": lr, "beta1": betas[0], "beta2": betas[1], "epsilon": eps, "weight_decay": decay}
        cases.append(case(name, hyper, weights, steps, by_torch_lazily(make, weights, steps, ["exp_avg", "exp_avg_sq"])))
    return cases


def ftrl():
    cases = []
    for name, alpha, beta, l1, l2, start in [
        ("from zero", 0.1, 1.0, 0.0, 0.0, 0.0),
        ("from zero, regularised", 0.05, 1.0, 2.0, 0.5, 0.0),
        ("from other weights, regularised", 0.5, 0.5, 0.25, 0.125, 1.0),
    ]:
        weights, steps = inputs(9)
        weights = weights * start
        hyper = {"learning_rate": alpha, "beta": beta, "l1": l1, "l2": l2}
        cases.append(case(name, hyper, weights, steps, ftrl_by_paper(alpha, beta, l1, l2)(weights, steps)))
    return cases


def modified():
    """Clipping by row, and decay as torch's `weight_decay`. Gradients are large: torch adds 1e-6 to the norm, we do not."""
    cases = []
    for name, clip, decay in [("clipped", 20.0, 0.0), ("decay", None, 0.1), ("clipped, decay", 20.0, 0.1)]:
        for rule, make, slots in [
            ("sgd", lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=decay), []),
            ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-10, weight_decay=decay), ["sum"]),
            ("adam", lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=decay), ["exp_avg", "exp_avg_sq"]),
        ]:
            weights, steps = every_row(*inputs(10, 7.0)) if rule == "adam" else inputs(10, 7.0)
            hyper = {"rule": rule, "learning_rate": 0.01, "clip_row_norm": clip, "l2_decay": decay}
            cases.append(case(f"{rule}, {name}", hyper, weights, steps, by_torch_lazily(make, weights, steps, slots, clip)))
    return cases


def schedules():
    """Learning rates at clocks 0, 1, … as torch's schedulers give them."""
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR, StepLR

    cases = []
    for name, then, make in [
        ("constant", {}, lambda o: ConstantLR(o, factor=1.0)),
        ("step", {"every": 7, "factor": 0.3}, lambda o: StepLR(o, step_size=7, gamma=0.3)),
        ("cosine", {"steps": 25, "floor": 0.001}, lambda o: CosineAnnealingLR(o, T_max=25, eta_min=0.001)),
    ]:
        for warm_up in [0, 10]:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.05)
            if warm_up:
                rise = LinearLR(optimizer, start_factor=1 / warm_up, total_iters=warm_up - 1)
                scheduler = SequentialLR(optimizer, [rise, make(optimizer)], milestones=[warm_up])
            else:
                scheduler = make(optimizer)
            rates = []
            for _ in range(warm_up + 26):  # as far as the cosine goes down: torch's turns up again
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                scheduler.step()
            cases.append({"name": f"{name}, warm-up {warm_up}", "then": name, **then, "warm_up_steps": warm_up, "learning_rate": 0.05, "expected": rates})
    return cases


def main():
    torch.set_num_threads(1)
    torch.sparse.check_sparse_tensor_invariants.enable()
    target = pathlib.Path(__file__).parent.parent / "testdata" / "optimizer"
    for make in [sgd, momentum, adagrad, rowwise, rms_prop, adam, adam_w, ftrl, modified, schedules]:
        name, cases = "rowwise_adagrad" if make == rowwise else make.__name__, make()
        source = "written out in golden/optimizers.py" if make in (rowwise, ftrl) else f"PyTorch {torch.__version__.split('+')[0]}"
        lines = ",\n".join(json.dumps(c) for c in cases)
        (target / f"{name}.json").write_text(f'{{"source": "{source}", "cases": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
