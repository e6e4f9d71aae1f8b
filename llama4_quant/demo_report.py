"""The demo's result, and its HTML page: one self-contained file."""

import base64
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llama4_quant.conversion.report import Report, WeightRecord
from llama4_quant.errors import UsageError
from llama4_quant.evaluation.report import Estimate

TEMPLATE = Path(__file__).with_name("demo_report.html.jinja")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRun:
    """One model of the demo: its size, what it says, and how far it is from BF16 (None for BF16 itself)."""

    name: str
    num_bytes: int
    bits_per_weight: float
    text: str
    caption: str
    tokens_per_second: float
    perplexity: Estimate
    divergence: Estimate | None
    agreement: Estimate | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Everything that the demo shows; `conversions` are the reports of the quantized runs, by name."""

    prompt: str
    image: str
    truth: str
    num_tokens: int
    runs: tuple[DemoRun, ...]
    conversions: dict[str, Report]
    report: str

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the weights of the conversions: those are in their own reports."""
        data = asdict(replace(self, conversions={}))
        del data["conversions"]
        return data


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleError:
    """Weights of one role in one conversion: how many, and their SQNR in dB."""

    role: str
    scheme: str
    count: int
    lowest_sqnr: float
    mean_sqnr: float


def write_report(result: DemoResult, path: Path) -> None:
    """Write the page.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - part of an extra; conversion and loading work without it
    except ImportError as error:
        raise UsageError("the report needs jinja2: pip install 'llama4-quant[transformers]'") from error
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    image = base64.b64encode(Path(result.image).read_bytes()).decode()
    errors = {name: role_errors(report.weights) for name, report in result.conversions.items()}
    path.write_text(template.render(result=result, image=image, errors=errors), encoding="utf-8")


def role_errors(weights: tuple[WeightRecord, ...]) -> list[RoleError]:
    """Summarise quantized weights by role."""
    groups: dict[tuple[str, str], list[float]] = {}
    for weight in weights:
        if weight.sqnr_db is not None:
            groups.setdefault((weight.role, weight.scheme), []).append(weight.sqnr_db)
    return [
        RoleError(
            role=role, scheme=scheme, count=len(values), lowest_sqnr=min(values), mean_sqnr=sum(values) / len(values)
        )
        for (role, scheme), values in groups.items()
    ]
