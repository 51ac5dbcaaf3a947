#!/usr/bin/env python3
"""Scores every row of a Parquet file with an exported model (docs/export.md): score.py FOLDER FILE [MODULE.pt], a line of logits each."""
import bisect, functools, json, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, torch
from safetensors.numpy import load_file
folder, file = sys.argv[1:3]
spec = json.load(open(f"{folder}/features.json"))
net = {name[4:]: torch.from_numpy(x) for name, x in load_file(f"{folder}/dense.safetensors").items()}
table, ONES = pq.read_table(file), (1 << 64) - 1
offset, prime, (m1, m2), golden = (spec["hash"][x] for x in ("offset", "prime", "mix", "stream"))
def mix(z):  # of an integer, or of each of an array of uint64
    z = (z ^ z >> 30) * m1 & ONES
    z = (z ^ z >> 27) * m2 & ONES
    return z ^ z >> 31
def fnv(data, h=offset): return functools.reduce(lambda h, byte: (h ^ byte) * prime & ONES, data, h)
def present(v):  # nulls, NaN, empty text and the words that mean "no value" are None
    if isinstance(v, list): return [present(item) for item in v]
    return None if v != v or isinstance(v, (str, bytes)) and (not v or v in spec["missing"]) else v
def column(name):
    x = pa.chunked_array(table[name]).combine_chunks()
    if pa.types.is_dictionary(x.type): x = x.dictionary_decode()
    if pa.types.is_temporal(x.type): x = x.cast(pa.int32() if x.type.bit_width == 32 else pa.int64())
    return [present(v) for v in x.to_pylist()]
def text(v): return v if v is None or isinstance(v, bytes) else v.encode() if isinstance(v, str) else str(int(v)).encode()
def number(v): return None if v is None or float(v) != float(v) else float(v)
def bucket(b): return [None if v is None else str(bisect.bisect_right(b["boundaries"], v)).encode() for v in map(number, column(b["column"]))]
def values(f):  # what is hashed (or a raw key), and weights, of each row
    if "bucket" in f: return [[(v, 1.0)] for v in bucket(f["bucket"])]
    if "cross" in f: return [[(v if None not in v else None, 1.0)] for v in zip(*(bucket(p) if "boundaries" in p else map(text, column(p["column"])) for p in f["cross"]))]
    rows, split = column(f["column"]), f.get("separator")
    weights = column(f["weights"]) if "weights" in f else [None] * len(rows)
    many = lambda v: [] if v is None else v.split(split) if split else v if isinstance(v, list) else [v]
    bags = [list(zip(many(v), many(w) or [1.0] * len(many(v)))) for v, w in zip(rows, weights)]
    return [[(text(v) if f["salt"] is not None else None if v in (None, "") else int(v) & ONES, float(w)) for v, w in bag] for bag in bags]
def key_of(f):  # hashes each value once
    if f["salt"] is None: return lambda v: v
    basis, seen = mix(fnv(f["salt"].encode())), {}
    fresh = (lambda v: functools.reduce(lambda h, part: mix(h ^ mix(fnv(part))), v, basis)) if "cross" in f else (lambda v: mix(fnv(v, basis)))
    return lambda v: seen[v] if v in seen else seen.setdefault(v, fresh(v))
def untrained(t, keys):  # what a key has before its first push
    init, dim = t["init"], t["dim"]
    if "constant" in init: return np.full((len(keys), dim), init["constant"], np.float32)
    bits = mix(mix(keys ^ mix(spec["seed"] ^ mix(t["salt"])))[:, None] + np.arange(1, dim + 1, dtype=np.uint64) * np.uint64(golden))
    if "low" in init: return (init["low"] + (init["high"] - init["low"]) * ((bits >> 40) * 2.0**-24)).astype(np.float32)
    return (init["mean"] + init["std"] * torch.special.ndtri(torch.from_numpy(((bits >> 12) * 2 + 1) * 2.0**-53)).numpy()).astype(np.float32)
tables = {name: load_file(f"{folder}/{t['file']}") for name, t in spec["tables"].items()}
def pooled(f):
    t, key = spec["tables"][f["table"]], key_of(f)
    bags = [[(key(v), w) for v, w in bag if v not in (None, b"")][: f.get("max_len")] for bag in values(f)]
    row = torch.tensor([i for i, bag in enumerate(bags) for _ in bag], dtype=torch.int64)
    keys, at = np.unique(np.array([k for bag in bags for k, _ in bag], np.uint64), return_inverse=True)
    have, rows = tables[f["table"]]["keys"], untrained(t, keys)
    place = np.minimum(np.searchsorted(have, keys), max(len(have) - 1, 0))
    if len(have): rows[have[place] == keys] = tables[f["table"]]["rows"][place[have[place] == keys]]
    rows, weight = torch.from_numpy(rows), torch.tensor([w for bag in bags for _, w in bag])
    if t["bf16"]: rows = rows.bfloat16().float()
    total = lambda x: torch.zeros(len(bags)).index_add_(0, row, x)[row]
    if f["pool"] in ("mean", "sqrtn"): weight = torch.nan_to_num(weight / (total(weight) if f["pool"] == "mean" else total(weight**2).sqrt()), posinf=0.0, neginf=0.0)
    return torch.zeros(len(bags), t["dim"]).index_add_(0, row, rows[at] * weight[:, None])
def numbers(n):
    x = [number(v) for v in column(n["column"])]
    x = [n["default"] if v is None else ((np.sign(v) * np.log1p(abs(v)) if n["log"] else v) - n["mean"]) / n["std"] for v in x]
    return torch.tensor(x, dtype=torch.float64).float()
def deep(x):
    layers = sum(name.startswith("deep.") for name in net) // 2
    for i in range(layers): x = torch.nn.functional.linear(x if i == 0 else x.relu(), net[f"deep.{i}.weight"], net[f"deep.{i}.bias"])
    return x
x, dense = [pooled(f) for f in spec["features"]], torch.stack([torch.zeros(len(table))] + [numbers(n) for n in spec["numbers"]], 1)[:, 1:]
if spec["model"] == "lr": out = torch.cat([*x, dense * net.get("numbers", 1)], 1).sum(1) + net["bias"]
elif spec["model"] == "wide-deep": out = deep(torch.cat([v[:, 1:] for v in x] + [dense], 1)) + sum(v[:, :1] for v in x)
elif spec["model"] == "deepfm":
    v = torch.stack(x, 1)
    pairs = (v[:, :, 1:].sum(1).square() - v[:, :, 1:].square().sum(1)).sum(1, True) / 2
    out = deep(torch.cat([v[:, :, 1:].flatten(1), dense], 1)) + v[:, :, 0].sum(1, True) + pairs + (dense @ net["numbers"] if "numbers" in net else 0)
elif spec["model"] == "mf-bpr": out = (x[0] * x[1]).sum(1)
else:
    module = torch.jit.load(sys.argv[3])
    for name, weight in module.named_parameters(): weight.data.copy_(net[name.replace(".", "_")])
    out = module(x, dense)
for row in out.detach().reshape(len(table), -1).tolist(): print(*row)
