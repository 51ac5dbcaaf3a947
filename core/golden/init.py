"""Writes testdata/init.json: rows of downpour_core::init, computed a second time.

    python3 core/golden/init.py        # the standard library of Python 3.9 or later is enough

Python evaluates every operation in IEEE double precision and fuses none, so the values are exact. `statistics.NormalDist`
implements the same algorithm with the platform's logarithm and is used to check this script.
"""

import json
import math
import pathlib
import statistics
import struct

M = 2**64 - 1


def mix64(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M
    z = (z ^ z >> 27) * 0x94D049BB133111EB & M
    return z ^ z >> 31


def salt(name, h=0xCBF29CE484222325):
    for byte in name.encode():
        h = (h ^ byte) * 0x100000001B3 & M
    return mix64(h)


def row_bits(seed, variable, key, dim):
    stream = mix64(key ^ mix64(seed ^ mix64(salt(variable))))
    return [mix64(stream + n * 0x9E3779B97F4A7C15 & M) for n in range(1, dim + 1)]


def polynomial(coefficients, x):
    total = coefficients[0]
    for c in coefficients[1:]:
        total = total * x + c
    return total


def ln(x):
    m, e = math.frexp(x)  # m in [1/2, 1)
    m, e = (m, e) if m * 2 > math.sqrt(2) else (m * 2, e - 1)
    s = (m - 1.0) / (m + 1.0)
    series = [1.0 / n for n in range(21, 0, -2)]
    return e * 0.6931471805599453 + 2.0 * s * polynomial(series, s * s)


CENTRE = (
    [
        2509.0809287301227,
        33430.57558358813,
        67265.7709270087,
        45921.95393154987,
        13731.69376550946,
        1971.5909503065513,
        133.14166789178438,
        3.3871328727963665,
    ],
    [
        5226.495278852854,
        28729.085735721943,
        39307.89580009271,
        21213.794301586597,
        5394.196021424751,
        687.1870074920579,
        42.31333070160091,
        1.0,
    ],
)
TAIL = (
    [
        0.0007745450142783414,
        0.022723844989269184,
        0.2417807251774506,
        1.2704582524523684,
        3.6478483247632045,
        5.769497221460691,
        4.630337846156546,
        1.4234371107496835,
    ],
    [
        1.0507500716444169e-09,
        0.0005475938084995345,
        0.015198666563616457,
        0.14810397642748008,
        0.6897673349851,
        1.6763848301838038,
        2.053191626637759,
        1.0,
    ],
)
FAR_TAIL = (
    [
        2.0103343992922881e-07,
        2.7115555687434876e-05,
        0.0012426609473880784,
        0.026532189526576124,
        0.29656057182850487,
        1.7848265399172913,
        5.463784911164114,
        6.657904643501103,
    ],
    [
        2.0442631033899397e-15,
        1.421511758316446e-07,
        1.8463183175100548e-05,
        0.0007868691311456133,
        0.014875361290850615,
        0.1369298809227358,
        0.599832206555888,
        1.0,
    ],
)

def quantile(p):
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return polynomial(CENTRE[0], r) * q / polynomial(CENTRE[1], r)
    r = math.sqrt(-ln(p if q < 0 else 1.0 - p))
    offset, (numerator, denominator) = (1.6, TAIL) if r <= 5.0 else (5.0, FAR_TAIL)
    x = polynomial(numerator, r - offset) / polynomial(denominator, r - offset)
    return -x if q < 0 else x


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def uniform(bits, low, high):
    low, high = f32(low), f32(high)
    return f32(low + (high - low) * ((bits >> 40) * 2.0**-24))


def normal(bits, mean, std):
    mean, std = f32(mean), f32(std)
    return f32(mean + std * quantile(((bits >> 12) * 2 + 1) * 2.0**-53))


def hexadecimal(x):
    return struct.pack(">f", x).hex()


def main():
    exact = statistics.NormalDist().inv_cdf
    for p in [2.0**-53, 1e-12, 1e-6, 0.01, 0.0749, 0.0751, 0.3, 0.5, 0.8, 0.9251, 0.9999, 1 - 2.0**-53]:
        assert math.isclose(quantile(p), exact(p), rel_tol=1e-14, abs_tol=1e-300), p
    cases = []
    for seed, variable, key in [(0, "", 0), (1, "item", 42), (M, "größe", M), (20240131, "user", 0x0123456789ABCDEF)]:
        bits = row_bits(seed, variable, key, 40)
        for kind, value, parameters in [
            ("uniform", uniform, (-0.05, 0.05)),
            ("uniform", uniform, (0.0, 1.0)),
            ("normal", normal, (0.0, 0.01)),
            ("normal", normal, (1.5, 3.0)),
        ]:
            row = [hexadecimal(value(b, *parameters)) for b in bits]
            # Numbers of 64 bits as text: many readers of JSON keep 53.
            cases.append({"seed": str(seed), "variable": variable, "key": str(key), "init": kind, "parameters": parameters, "row": row})
    # All bits of the double: one rounded to f32 would hide a fused operation.
    points = [2.0**-53, 1e-13, 1e-9, 1e-4] + [n / 64 for n in range(1, 64)] + [n / 2048 for n in range(1, 64)] + [1 - 1e-10, 1 - 2.0**-53]
    quantiles = [[struct.pack(">d", x).hex() for x in (p, quantile(p))] for p in points]
    target = pathlib.Path(__file__).parent.parent / "testdata" / "init.json"
    lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in cases)
    target.write_text(f'{{"quantiles": {json.dumps(quantiles)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
