#!/usr/bin/env python3
r"""DeepFM in one PyTorch process, and logistic regressions: what docs/quality.md compares Downpour's DeepFM with.

    python worker/golden/pytorch_deepfm.py data/datasets/adult.toml \
        data/datasets/adult/train.parquet data/datasets/adult/test.parquet --epochs 8 --seeds 1 2 3 --logistic

Reads the schema file that the workers read (keys, buckets, crosses and numbers; no bags). One table for all features, a row per
value of a feature; a value that training never saw keeps its first, random row, as on the cluster. Prints a JSON object a run,
then the mean. --holdout 0.1 scores on a tenth of the training rows instead of the test file: so were the hyper-parameters chosen.
Needs torch, pandas, pyarrow, scikit-learn.
"""
import argparse, json, pathlib, time, tomllib
import numpy as np, pandas as pd, torch
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn


def as_list(columns):
    return [columns] if isinstance(columns, str) else columns


class Features:
    """What a schema makes of a frame: `keys` (a column of row numbers per feature), `numbers` and `label`."""

    def __init__(self, schema, frame):
        label = schema["label"][0]
        self.label = frame[label["column"]].isin(label["positive"]).to_numpy(np.float32)
        raw, numbers = [], []
        for number in schema.get("number", []):
            for column in as_list(number.get("columns", number.get("column"))):
                x = frame[column].to_numpy(np.float64)
                raw.append(x)
                x = np.sign(x) * np.log1p(np.abs(x)) if number.get("transform") == "log" else x
                numbers.append((x - number.get("mean", 0.0)) / number.get("std", 1.0))
        self.raw, self.numbers = np.stack(raw, 1), np.stack(numbers, 1).astype(np.float32)
        columns = {c: frame[c] for key in schema["key"] for c in as_list(key.get("columns", key.get("column")))}
        self.plain = len(columns)  # the first features are columns as they stand
        for bucket in schema.get("bucket", []):
            index = np.searchsorted(bucket["boundaries"], frame[bucket["column"]], side="right")
            columns[bucket.get("name", bucket["column"] + "_bucket")] = pd.Series(index)
        hidden = {b.get("name", b["column"] + "_bucket") for b in schema.get("bucket", []) if b.get("hidden")}
        for cross in schema.get("cross", []):
            parts = [columns[c] if c in columns else frame[c] for c in cross["columns"]]
            columns["_x_".join(cross["columns"])] = pd.Series(list(zip(*parts)))
        codes = [pd.factorize(values)[0] for name, values in columns.items() if name not in hidden]
        self.sizes = [int(code.max()) + 1 for code in codes]
        self.keys = np.stack(codes, 1) + np.cumsum([0, *self.sizes[:-1]])


def load(schema, paths, holdout):
    """Features of training rows and scored rows together, and how many are for training."""
    train = pd.read_parquet(paths[0])
    if not holdout:
        return Features(schema, pd.concat([train, pd.read_parquet(paths[1])], ignore_index=True)), len(train)
    train = train.iloc[np.random.RandomState(0).permutation(len(train))].reset_index(drop=True)
    return Features(schema, train), round(len(train) * (1 - holdout))


class DeepFM(nn.Module):
    """bias + weight of each key and number + second-order term of the embeddings + MLP(embeddings, numbers). A row holds its
    key's weight and then its embedding. First values as in Downpour (He's for the MLP)."""

    def __init__(self, rows, fields, numbers, dim, hidden, init_std):
        super().__init__()
        self.table = nn.Embedding(rows, 1 + dim)
        nn.init.normal_(self.table.weight, std=init_std)
        self.numbers = nn.Parameter(torch.zeros(numbers))
        widths = [fields * dim + numbers, *hidden, 1]
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        for layer in layers:
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        self.mlp = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU())), layers[-1])

    def forward(self, keys, numbers):
        weight, e = self.table(keys).split([1, self.table.embedding_dim - 1], 2)
        pairs = (e.sum(1).square() - e.square().sum(1)).sum(1) / 2
        deep = self.mlp(torch.cat([e.flatten(1), numbers], 1)).squeeze(1)
        return weight.sum((1, 2)) + numbers @ self.numbers + pairs + deep


def scores(label, probability):
    return {"test_auc": round(roc_auc_score(label, probability), 5),
            "test_logloss": round(log_loss(label, probability.astype(np.float64)), 5)}


def deepfm(data, train, args, seed, each_epoch=None):
    torch.manual_seed(seed)
    keys, numbers, label = (torch.from_numpy(x) for x in (data.keys, data.numbers, data.label))
    model = DeepFM(sum(data.sizes), keys.shape[1], numbers.shape[1], args.dim, args.hidden, args.init_std)
    optimizers = [torch.optim.Adagrad([model.table.weight], args.lr_table, initial_accumulator_value=args.initial_accumulator),
                  torch.optim.Adam([model.numbers, *model.mlp.parameters()], args.lr_dense)]

    @torch.no_grad()
    def score():
        parts = [model(k, n) for k, n in zip(keys[train:].split(8192), numbers[train:].split(8192))]
        return scores(data.label[train:], torch.cat(parts).sigmoid().numpy())

    for epoch in range(args.epochs):
        for rows in torch.randperm(train).split(args.batch):
            loss = nn.functional.binary_cross_entropy_with_logits(model(keys[rows], numbers[rows]), label[rows])
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        if each_epoch:
            each_epoch(epoch + 1, score())
    return score()


def logistic(data, train, crosses):
    """scikit-learn's, with its default penalty: categories one-hot and numbers standardized, or all features of the schema."""
    keys = data.keys if crosses else data.keys[:, :data.plain]
    numbers = data.numbers if crosses else (data.raw - data.raw[:train].mean(0)) / data.raw[:train].std(0)
    ones = csr_matrix((np.ones(keys.size), keys.ravel(), np.arange(0, keys.size + 1, keys.shape[1])))
    x = hstack([ones, csr_matrix(numbers)]).tocsr()
    model = LogisticRegression(max_iter=2000).fit(x[:train], data.label[:train])
    return scores(data.label[train:], model.predict_proba(x[train:])[:, 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schema", type=pathlib.Path)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 32])
    parser.add_argument("--lr-table", type=float, default=0.02, help="Adagrad")
    parser.add_argument("--initial-accumulator", type=float, default=0.01, help="Adagrad's initial sum")
    parser.add_argument("--lr-dense", type=float, default=0.002, help="Adam")
    parser.add_argument("--init-std", type=float, default=0.01, help="of the rows")
    parser.add_argument("--holdout", type=float, default=0.0, metavar="SHARE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--logistic", action="store_true", help="logistic regressions too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    schema = tomllib.loads(args.schema.read_text())
    args.dim = schema["dim"]
    data, train = load(schema, (args.train, args.test), args.holdout)
    runs = []
    for crosses, name in ((False, "logistic"), (True, "logistic, schema's features")) if args.logistic else ():
        print(json.dumps({"dataset": args.schema.stem, "model": name, **logistic(data, train, crosses)}), flush=True)
    for seed in args.seeds:
        start = time.monotonic()
        runs.append(deepfm(data, train, args, seed) | {"wall_s": round(time.monotonic() - start, 1)})
        print(json.dumps({"dataset": args.schema.stem, "model": "deepfm", "seed": seed, **runs[-1]}), flush=True)
    mean = {name: round(float(np.mean([run[name] for run in runs])), 5) for name in runs[0]}
    print(json.dumps({"dataset": args.schema.stem, "model": "deepfm", "mean_of": len(runs), **mean}))


if __name__ == "__main__":
    main()
