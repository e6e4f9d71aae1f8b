"""The patience of threads is set before torch loads, and not against the user."""

import os
import subprocess
import sys

import pytest

from llama4_quant import threads

SHOW = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"


def _seen_after(imports: str, environment: dict[str, str]) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    ran = subprocess.run(
        [sys.executable, "-c", f"{imports}; {SHOW}"], env=kept | environment, capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()


@pytest.mark.parametrize(
    ("imports", "environment", "expected"),
    [
        ("import llama4_quant", {}, str(threads.SPINS)),
        ("import llama4_quant.cli", {}, str(threads.SPINS)),
        ("import llama4_quant", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("import llama4_quant", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import torch, llama4_quant", {}, "None"),  # too late to matter: not set for child processes either
    ],
)
def test_when_it_is_set(imports: str, environment: dict[str, str], expected: str) -> None:
    assert _seen_after(imports, environment) == expected
