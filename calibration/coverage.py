"""What a user should know about experts that saw little data: sentences for the report and the screen."""

from collections.abc import Iterator, Sequence
from statistics import median

from llama4_quant.calibration.records import LayerRecord

_MOST_NAMED = 8


def coverage_notes(layers: Sequence[LayerRecord]) -> Iterator[str]:
    """Sentences about experts without any token, and about those with few beside the others of their layer."""
    unseen = [
        f"layer {record.layer} expert {expert}"
        for record in layers
        for expert, rows in enumerate(record.rows_per_expert)
        if rows == 0
    ]
    if unseen:
        yield (
            f"No token was routed to {_experts(unseen)}: rounded to nearest. More or other calibration data may reach "
            "them; --min-tokens-per-expert draws more where it is needed."
        )
    rare = [
        f"layer {record.layer} expert {expert}: {rows:,}"
        for record in layers
        for expert, rows in enumerate(record.rows_per_expert)
        if 0 < rows < few_rows(record.rows_per_expert)
    ]
    if rare:
        yield (
            f"Few tokens were routed to {_experts(rare)}: fitted to them and, with little weight, to "
            "other tokens of the layer. --min-tokens-per-expert draws more data where it is needed."
        )


def few_rows(rows_per_expert: Sequence[int]) -> float:
    """Below how many rows an expert counts as rarely used: a tenth of the layer's median."""
    return median(rows_per_expert) / 10


def _experts(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
    return f"{len(names):,} expert{'' if len(names) == 1 else 's'} ({shown}{more})"
