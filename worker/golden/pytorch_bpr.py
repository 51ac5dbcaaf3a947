#!/usr/bin/env python3
"""Matrix factorisation with BPR in one PyTorch process on MovieLens 100K: what Downpour's is held against.

    pip download --no-deps --dest .cache recbole==1.2.1
    python -m zipfile -e .cache/recbole-1.2.1-py3-none-any.whl .cache/recbole
    python worker/golden/pytorch_bpr.py .cache/recbole/recbole/dataset_example/ml-100k --split .cache/ml-100k --seeds 1 2 3

Every rating is a positive. A seeded fifth of each user's is the test; --split writes it for Downpour: train.parquet and
test.parquet (columns user_id and item_id, integers) and schema.toml. The whole catalogue is ranked, without the user's training
items. Prints a JSON object a run, then the mean. --holdout scores on a tenth of each user's training items: so were the
hyper-parameters chosen. Needs torch, pandas, pyarrow. The licence of the data allows no redistribution: keep it out of the
repository.
"""
import argparse, json, pathlib, sys, time
import numpy as np, pandas as pd, torch
from torch import nn


def split_users(frame, share, seed):
    """Of each user's rows, `share` at random for the test."""
    shuffled = frame.iloc[np.random.RandomState(seed).permutation(len(frame))]
    place = shuffled.groupby("user_id").cumcount()
    count = shuffled.groupby("user_id")["item_id"].transform("size")
    test = place < (count * share).round()
    return shuffled[~test].sort_index(), shuffled[test].sort_index()


class Factors(nn.Module):
    """score(user, item) = user's row · item's row."""

    def __init__(self, users, items, dim, init_std):
        super().__init__()
        self.user, self.item = (nn.Parameter(torch.randn(n, dim) * init_std) for n in (users, items))

    def loss(self, users, positives, negatives, l2):
        u, i, j = self.user[users], self.item[positives], self.item[negatives]
        penalty = u.square().sum(1) + i.square().sum(1) + j.square().sum(1)
        return (nn.functional.softplus((u * (j - i)).sum(1)) + l2 * penalty).mean()


class Positives:
    """Who has what, as pairs of numbers and as a matrix."""

    def __init__(self, frame, users, items):
        self.pairs = torch.tensor(frame[["user", "item"]].to_numpy().copy())
        self.matrix = torch.zeros(users, items, dtype=torch.bool)
        self.matrix[tuple(self.pairs.T)] = True
        self.items = self.pairs[:, 1].unique()

    def draw(self, users):
        """For each user one of the items, all the same likely, that he does not have."""
        draw = lambda count: self.items[torch.randint(len(self.items), (count,))]
        items = draw(len(users))
        while (had := self.matrix[users, items]).any():
            items[had] = draw(int(had.sum()))
        return items


def metrics(scores, train, test):
    """Means over the users of the test. `scores` has a row for each user; his training items are left out."""
    users = test.pairs[:, 0].unique()
    wanted = test.matrix[users]
    ranked = scores[users].masked_fill(train.matrix[users], -torch.inf).topk(20, 1).indices
    hits, total = wanted.gather(1, ranked).double(), wanted.sum(1)
    gain = 1 / torch.arange(2, 12, dtype=torch.double).log2()
    ideal = gain.cumsum(0)[total.clamp(max=10) - 1]
    result = {"hr@10": hits[:, :10].amax(1), "ndcg@10": (hits[:, :10] * gain).sum(1) / ideal, "recall@20": hits.sum(1) / total}
    return {name: round(value.mean().item(), 4) for name, value in result.items()}


def bpr(train, test, args, seed, each_epoch=None):
    torch.manual_seed(seed)
    model = Factors(*train.matrix.shape, args.dim, args.init_std)
    optimizer = torch.optim.Adagrad(model.parameters(), args.lr_table, initial_accumulator_value=args.initial_accumulator)
    for epoch in range(args.epochs):
        for rows in torch.randperm(len(train.pairs)).split(args.batch):
            user, positive = train.pairs[rows].T
            optimizer.zero_grad()
            model.loss(user, positive, train.draw(user), args.l2).backward()
            optimizer.step()
        if each_epoch:
            each_epoch(epoch + 1, metrics((model.user @ model.item.T).detach(), train, test))
    return metrics((model.user @ model.item.T).detach(), train, test)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds ml-100k.inter")
    parser.add_argument("--split", type=pathlib.Path, help="write train.parquet, test.parquet and schema.toml there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lr-table", type=float, default=0.05, help="Adagrad")
    parser.add_argument("--initial-accumulator", type=float, default=0.0, help="Adagrad's initial sum")
    parser.add_argument("--init-std", type=float, default=0.01)
    parser.add_argument("--l2", type=float, default=0.005, help="of the rows of a step")
    parser.add_argument("--holdout", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ratings = pd.read_csv(args.folder / "ml-100k.inter", sep="\t").rename(columns=lambda name: name.split(":")[0])
    ratings = ratings[["user_id", "item_id"]]
    users, items = (np.unique(ratings[name]) for name in ("user_id", "item_id"))
    ratings["user"], ratings["item"] = np.searchsorted(users, ratings["user_id"]), np.searchsorted(items, ratings["item_id"])
    train, test = split_users(ratings, 0.2, 100)
    if args.split:
        args.split.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", train), ("test", test)):
            part[["user_id", "item_id"]].to_parquet(args.split / f"{name}.parquet", index=False)
        keys = "".join(f'[[key]]\ncolumn = "{name}"\n' for name in ("user_id", "item_id"))
        (args.split / "schema.toml").write_text(f"dim = {args.dim}\n{keys}")
    if args.holdout:
        train, test = split_users(train, 0.1, 101)
    train, test = (Positives(part, len(users), len(items)) for part in (train, test))
    print(f"{len(users)} users, {len(items)} items, {len(train.pairs)} + {len(test.pairs)} pairs", file=sys.stderr)
    popularity = train.matrix.sum(0).float().expand(len(users), -1)
    print(json.dumps({"dataset": "ml-100k", "model": "popularity", **metrics(popularity, train, test)}), flush=True)
    runs = []
    for seed in args.seeds:
        start = time.monotonic()
        runs.append(bpr(train, test, args, seed) | {"wall_s": round(time.monotonic() - start, 1)})
        print(json.dumps({"dataset": "ml-100k", "model": "mf-bpr", "seed": seed, **runs[-1]}), flush=True)
    mean = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
    print(json.dumps({"dataset": "ml-100k", "model": "mf-bpr", "mean_of": len(runs), **mean}))


if __name__ == "__main__":
    main()
