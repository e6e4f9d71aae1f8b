"""What is said about a generation when it is done."""

from typing import Any

from llama4_quant.cli.tables import size
from llama4_quant.runtime.memory import peak_memory
from llama4_quant.runtime.streams import Completion
from llama4_quant.runtime.timing import Timing


def summary_line(timing: Timing, first_token_seconds: float, reasons: str) -> str:
    """One line for a person: how much, how fast, why it ended."""
    cached = f", {timing.num_cached_tokens} of them cached" if timing.num_cached_tokens else ""
    return (
        f"{timing.num_prompt_tokens} prompt tokens{cached}{_rate(timing.prefill_tokens_per_second)}, first token after "
        f"{first_token_seconds:.2f} s, {timing.num_new_tokens} new tokens{_rate(timing.decode_tokens_per_second)}, "
        f"peak memory {size(peak_memory())}, ended by {reasons}"
    )


def answer_json(completion: Completion, timing: Timing) -> dict[str, Any]:
    """One answer for a machine; times and speeds are those of its whole batch, memory that of the process."""
    ids = {} if completion.logprobs is None else {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "num_new_tokens": completion.num_new_tokens,
        **ids,
        "first_token_seconds": timing.first_token_seconds,
        "prefill_seconds": timing.prefill_seconds,
        "prefill_tokens_per_second": timing.prefill_tokens_per_second,
        "decode_tokens_per_second": timing.decode_tokens_per_second,
        "peak_memory_bytes": peak_memory(),
    }


def _rate(tokens_per_second: float | None) -> str:
    return "" if tokens_per_second is None else f" (at {tokens_per_second:.1f} tokens/s)"
