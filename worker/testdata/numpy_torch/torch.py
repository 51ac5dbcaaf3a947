"""As much of torch as python/score.py uses for models that are no TorchScript, on numpy: for tests where torch is not installed."""
import statistics
from types import SimpleNamespace

import numpy as np

float, int64, float64 = np.float32, np.int64, np.float64


class Tensor(np.ndarray):
    def sum(self, axis=None, keepdims=False):
        return np.ndarray.sum(self, axis=axis, keepdims=keepdims)

    def float(self):
        return self.astype(np.float32)

    def bfloat16(self):
        bits = np.ascontiguousarray(self, np.float32).view(np.uint32).astype(np.uint64)
        return _of(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32))

    def sqrt(self):
        return np.sqrt(self)

    def square(self):
        return self * self

    def relu(self):
        return np.maximum(self, 0)

    def flatten(self, start):
        return self.reshape(*self.shape[:start], -1)

    def index_add_(self, axis, at, rows):
        assert axis == 0
        np.add.at(self, at, rows)
        return self

    def detach(self):
        return self

    def numpy(self):
        return np.asarray(self)


def _of(x):
    return np.asarray(x).view(Tensor)


def from_numpy(x):
    return _of(x)


def tensor(x, dtype=np.float32):
    return _of(np.array(x, dtype))


def zeros(*shape):
    return _of(np.zeros(shape, np.float32))


def cat(parts, axis):
    return _of(np.concatenate(parts, axis))


def stack(parts, axis):
    return _of(np.stack(parts, axis))


def nan_to_num(x, posinf, neginf):
    return _of(np.nan_to_num(x, nan=0.0, posinf=posinf, neginf=neginf))


nn = SimpleNamespace(functional=SimpleNamespace(linear=lambda x, weight, bias: x @ weight.T + bias))
_inverse = np.vectorize(statistics.NormalDist().inv_cdf, otypes=[np.float64])
special = SimpleNamespace(ndtri=lambda x: _of(_inverse(x)))
