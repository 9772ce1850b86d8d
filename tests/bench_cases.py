"""Small cases, an oracle and file checks that the tests of the benchmarks share."""

import json
from pathlib import Path

import torch

from moefp8.bench import candidates, problem

CPU = torch.device("cpu")
TINY = problem.Problem(96, 64, 32, 3)


def tiny_case(multiple_of: int = 32, backward: bool = True) -> candidates.Case:
    operands = problem.draw(TINY, CPU)
    offs = problem.unequal_offs(TINY, CPU, multiple_of, seed=1)
    return candidates.make_case(TINY, operands._replace(offs=offs), backward)


def fails(error: Exception, name: str) -> candidates.Candidate:
    def step() -> candidates.Results:
        raise error

    return candidates.Candidate(name, build=lambda case: step)


def exact(case: candidates.Case) -> list[torch.Tensor]:
    """out, da and db of the high-precision product in float64, group by group."""
    a, b, offs, g = (x.detach().double() if x.is_floating_point() else x for x in case.operands)
    out, da, db = torch.zeros_like(g), torch.zeros_like(a), torch.zeros_like(b)
    ends = offs.tolist()
    for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        out[lo:hi] = a[lo:hi] @ b[e]
        da[lo:hi] = g[lo:hi] @ b[e].T
        db[e] = a[lo:hi].T @ g[lo:hi]
    return [out, da, db]


def written(path: Path) -> dict:
    content = json.loads(path.read_text())
    assert content["command"].startswith("python -m moefp8.bench")
    assert content["environment"]["torch"] == torch.__version__
    return content


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")
