"""Contenders of the ablation: `best` without one of its parts, and with more of it."""

from dataclasses import asdict, replace
from typing import Any

from llama4_quant.calibration.settings import Algorithm, SolverSettings, make_calibration

from .contenders import Contender, System


def ablation_contenders(scheme: str, group_size: int | None, roles: str) -> tuple[Contender, ...]:
    """`gptq` and `best` first, then `best` changed in one way at a time."""
    gptq, best = _solver(Algorithm.GPTQ), _solver(Algorithm.BEST)
    variants = {
        "gptq": gptq,
        "gptq-no-equalize": replace(gptq, equalize=False),
        "best": best,
        "best-no-equalize": replace(best, equalize=False),
        "best-no-correction": replace(best, correct=False),
        "best-no-sweeps": replace(best, num_sweeps=0, refit_scales=False),
        "best-no-refits": replace(best, refit_scales=False),
        "best-10-sweeps": replace(best, num_sweeps=10),
        "best-ridge-0.005": replace(best, ridge_percent=0.005),
        "best-ridge-0.1": replace(best, ridge_percent=0.1),
        "best-damp-0.001": replace(best, damp_percent=0.001),
        "best-damp-0.1": replace(best, damp_percent=0.1),
    }
    common = {
        "scheme": scheme, "group_size": group_size, "quantize": ["attention"] if roles == "all-text-linears" else [],
    }  # fmt: skip
    return tuple(
        Contender(name=f"ours-{name}", system=System.OURS, settings=_settings(common, solver))
        for name, solver in variants.items()
    )


def _settings(common: dict[str, Any], solver: SolverSettings) -> dict[str, Any]:
    return {"job": common | {"solver": asdict(solver)}}


def _solver(algorithm: Algorithm) -> SolverSettings:
    calibration = make_calibration(algorithm)
    assert calibration is not None
    return calibration.solver
