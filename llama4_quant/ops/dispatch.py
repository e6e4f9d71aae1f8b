"""Which backend runs an operator: one table of backends, asked in order, and the reasons of those that cannot.

A layer asks once, when its weights get their place; what comes back is an object that it keeps and calls. Nothing is
chosen by global state, and nothing is chosen again while a model runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llama4_quant.errors import UsageError
from llama4_quant.ops import native_support, torch_cpu
from llama4_quant.ops.library import OPERATORS, Function
from llama4_quant.ops.use import Kernel, Operator, Use

BACKENDS: Mapping[Kernel, Callable[[Use], str | None]] = {
    Kernel.NATIVE: native_support.why_not,
    Kernel.TORCH: torch_cpu.why_not,
    Kernel.REFERENCE: lambda _use: None,
}
"""Every backend, first choice first, with what says why it cannot do something (None: it can)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What runs a weight's products.

    Attributes:
        use: what was asked.
        kernel: the backend, never AUTO.
        call: the operator's overload; takes the layer's tensors as the operator's reference does.
        rejected: backends that come first in the table, with why they cannot.
    """

    use: Use
    kernel: Kernel
    call: Function
    rejected: tuple[tuple[Kernel, str], ...] = ()

    def __reduce__(self) -> tuple[Callable[..., "Choice"], tuple[object, ...]]:
        """Pickle as names: torch's operators cannot be pickled."""
        return _unpickled, (self.use, self.kernel, self.rejected)

    @property
    def repacks(self) -> bool:
        """`call` takes a weight only once it went through `repack_int4`."""
        return self.kernel is Kernel.TORCH and self.use.operator in {Operator.LINEAR_INT4, Operator.GROUPED_INT4}

    @property
    def stored_call(self) -> Function:
        """What runs on the stored bytes: `call`, or the reference where `call` repacks."""
        return overload(self.use.operator, Kernel.REFERENCE) if self.repacks else self.call


def _unpickled(use: Use, kernel: Kernel, rejected: tuple[tuple[Kernel, str], ...]) -> Choice:
    return Choice(use=use, kernel=kernel, call=overload(use.operator, kernel), rejected=rejected)


def choose(kernel: Kernel | str, use: Use) -> Choice:
    """The backend that `kernel` names, or with `auto` the first in the table that can.

    Args:
        kernel: `auto`, or a backend's name.
        use: what it is for.

    Raises:
        UsageError: unknown name; or the backend asked for cannot do this, and then every backend's reason is listed.
    """
    asked = Kernel.parse(kernel)
    rejected: list[tuple[Kernel, str]] = []
    for backend in BACKENDS if asked is Kernel.AUTO else (asked,):
        reason = BACKENDS[backend](use)
        if reason is None:
            return Choice(use=use, kernel=backend, call=overload(use.operator, backend), rejected=tuple(rejected))
        rejected.append((backend, reason))
    raise UsageError(f"kernel {asked} cannot run {use.label}: {explain(use)}; --kernel auto takes the first that can")


def overload(operator: Operator, kernel: Kernel) -> Function:
    """A backend's overload of an operator; the reference's where a backend has none of its own."""
    overloads = OPERATORS[operator]
    return overloads.get(kernel, overloads[Kernel.REFERENCE])


def explain(use: Use) -> str:
    """What every backend says about `use`: `native: no C++ compiler; torch: can run; reference: can run`."""
    return "; ".join(f"{kernel}: {why_not(use) or 'can run'}" for kernel, why_not in BACKENDS.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCount:
    """How many weights (a stack of experts is one) an operator of one backend runs in a model.

    Attributes:
        rejected: backends that come first in the table, with why they cannot.
    """

    operator: Operator
    kernel: Kernel
    rejected: tuple[tuple[Kernel, str], ...]
    count: int

    def __str__(self) -> str:
        """`linear_int4: torch x 12 (native: no C++ compiler)`."""
        reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in self.rejected)
        return f"{self.operator}: {self.kernel} x {self.count}" + (f" ({reasons})" if reasons else "")


def count_kernels(choices: Iterable[Choice]) -> tuple[KernelCount, ...]:
    """Sum up choices by operator, backend and reasons, in order of appearance."""
    counts = Counter((choice.use.operator, choice.kernel, choice.rejected) for choice in choices)
    return tuple(
        KernelCount(operator=operator, kernel=kernel, rejected=rejected, count=count)
        for (operator, kernel, rejected), count in counts.items()
    )
