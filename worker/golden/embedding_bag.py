"""Makes ../testdata/embedding_bag.json: what torch.nn.EmbeddingBag gives, and the gradients of its weights.

    pip install torch==2.11.0 && python worker/golden/embedding_bag.py

EmbeddingBag has neither weighted means nor sqrt-n. Those are its weighted sum with each weight divided by the sum of the bag's
weights, or by the root of the sum of their squares.
"""

import json
import pathlib

import torch

ROWS, DIM = 7, 3
BAGS = [[3, 1, 3], [], [6], [0, 5, 1, 2, 6], [4, 4]]
WEIGHTS = [[0.5, -1.0, 2.0], [], [0.25], [1.0, 2.0, 0.0, 3.0, 0.5], [1.5, 1.5]]
MODES = ["sum", "mean", "sqrtn"]


def divisor(mode, weights):
    if mode == "sum" or not weights:
        return 1.0
    return sum(weights) if mode == "mean" else sum(w * w for w in weights) ** 0.5


def case(mode, bags, weights):
    torch.manual_seed(7)
    keys = torch.tensor([key for bag in bags for key in bag])
    offsets = torch.tensor([sum(len(bag) for bag in bags[:i]) for i in range(len(bags))])
    table = torch.randn(ROWS, DIM)
    upstream = torch.randn(len(bags), DIM)
    plain = weights is None and mode != "sqrtn"
    layer = torch.nn.EmbeddingBag(ROWS, DIM, mode=mode if plain else "sum", _weight=table.clone())
    if plain:
        output = layer(keys, offsets)
    else:
        used = weights or [[1.0] * len(bag) for bag in bags]
        scaled = [w / divisor(mode, bag) for bag in used for w in bag]
        output = layer(keys, offsets, per_sample_weights=torch.tensor(scaled))
    (output * upstream).sum().backward()
    return {
        "pool": mode,
        "dim": DIM,
        "table": table.tolist(),
        "bags": bags,
        "weights": weights or [],
        "upstream": upstream.tolist(),
        "output": output.tolist(),
        "gradient": layer.weight.grad.tolist(),
    }


cases = [case(mode, BAGS, weights) for mode in MODES for weights in (None, WEIGHTS)]
cases += [case(mode, [[2], [0], [2], [5]], None) for mode in MODES]
path = pathlib.Path(__file__).parent.parent / "testdata" / "embedding_bag.json"
lines = ",\n".join(json.dumps(case) for case in cases)
path.write_text(f'{{"torch": "{torch.__version__.split("+")[0]}", "cases": [\n{lines}\n]}}\n')
