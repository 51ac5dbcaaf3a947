"""Makes ../testdata/two_towers.pt: a TorchScript module such as `--model-file` takes.

    pip install torch==2.11.0 && python worker/golden/two_towers.py
"""

import pathlib

import torch


class TwoTowers(torch.nn.Module):
    """The features' rows and the numbers through a layer each."""

    def __init__(self):
        super().__init__()
        self.rows = torch.nn.Linear(8, 16)
        self.numbers = torch.nn.Linear(1, 16)
        self.output = torch.nn.Linear(16, 1)

    def forward(self, features: list[torch.Tensor], dense: torch.Tensor) -> torch.Tensor:
        hidden = self.rows(torch.cat(features, 1)) + self.numbers(dense)
        return self.output(torch.relu(hidden)).squeeze(1)


torch.manual_seed(1)
path = pathlib.Path(__file__).parent.parent / "testdata" / "two_towers.pt"
torch.jit.script(TwoTowers()).save(path)
