"""Mixed precision: which scheme each weight gets, so that all of them take so many bits per weight.

A unit is the weights that have to share a scheme, since loaders run them as one: q, k and v; gate and up; all routed
experts of a layer. A survey (survey.py) predicts what each candidate costs each unit, and knapsack.py chooses.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from llama4_quant.architecture import Role
from llama4_quant.calibration.corpus import Corpus, Sample
from llama4_quant.calibration.embed import write_embeddings
from llama4_quant.calibration.knapsack import Option, choose
from llama4_quant.calibration.originals import Originals
from llama4_quant.calibration.records import CandidateRecord, MixedPrecisionRecord, UnitRecord
from llama4_quant.calibration.streams import Sequences, Streams
from llama4_quant.calibration.survey import Survey
from llama4_quant.checkpoint.files import os_errors
from llama4_quant.checkpoint.json_files import shown
from llama4_quant.checkpoint.reader import CheckpointReader
from llama4_quant.errors import OutputError, UsageError
from llama4_quant.planning.choose import Choice
from llama4_quant.planning.plan import Decision, Plan
from llama4_quant.quantizers.packing import packed_features
from llama4_quant.quantizers.quantize import grid_of
from llama4_quant.scheme import Observer, Strategy, WeightScheme, WeightType

MIXED_ROLES = (Role.ATTENTION, Role.SHARED_EXPERT, Role.DENSE_MLP, Role.ROUTED_EXPERT)
"""What is chosen for, where the scheme applies to it; anything else keeps the scheme that was asked for."""
SURVEY_TOKENS = 8192
"""Tokens of the calibration set that the survey runs on, in whole samples, at least one."""
BF16_BITS = 16
_GROUPS = (None, 128, 64, 32)
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
_FUSED_MLP = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def unit_name(decision: Decision) -> str:
    """What a weight shares its scheme with."""
    if decision.role is Role.ROUTED_EXPERT:
        return decision.name.partition(".experts.")[0] + ".experts"
    base, _, projection = decision.name.rpartition(".")
    return f"{base}.{(_FUSED | _FUSED_MLP).get(projection, projection)}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Weights that share a scheme.

    Attributes:
        name: see `unit_name`.
        members: the decisions about them, in order of the model.
        candidates: schemes that fit all of them, in order of size.
    """

    name: str
    members: tuple[Decision, ...]
    candidates: tuple[WeightScheme, ...]

    @property
    def num_weights(self) -> int:
        """Elements of all members."""
        return sum(member.num_weights for member in self.members)

    def num_bytes(self, scheme: WeightScheme | None) -> int:
        """Bytes of codes and scales of all members."""
        return sum(_stored_bytes((member.shape[0], member.shape[1]), scheme) for member in self.members)


def units_of(plan: Plan) -> tuple[Unit, ...]:
    """The units of all weights that the plan quantizes and that are chosen for, in order of the model."""
    assert plan.scheme is not None
    members: dict[str, list[Decision]] = {}
    for decision in plan.decisions:
        if decision.scheme is not None and decision.role in MIXED_ROLES:
            members.setdefault(unit_name(decision), []).append(decision)
    observer = plan.scheme.weights.observer
    return tuple(
        Unit(name=name, members=tuple(found), candidates=_candidates(found, observer))
        for name, found in members.items()
    )


def choose_schemes(
    plan: Plan,
    target_bits: float,
    corpus: Corpus,
    reader: CheckpointReader,
    *,
    folder: Path,
    device: str,
    equalize: bool,
    done: Callable[[str], None],
) -> MixedPrecisionRecord:
    """Survey the model and choose.

    Args:
        plan: with one scheme for all weights; says which weights are meant.
        target_bits: stored bits per weight of these, at most.
        corpus: calibration data.
        reader: the source.
        folder: where temporary files may be.
        device: where the arithmetic is done.
        equalize: as the calibration will.
        done: called with what has been done.

    Raises:
        UsageError: fewer bits than the smallest candidates take.
    """
    units = units_of(plan)
    check_target(units, target_bits)
    samples = _survey_samples(corpus)
    lengths = tuple(len(sample.input_ids) for sample in samples)
    with os_errors(f"{folder}: cannot hold the survey's files"):
        scratch = tempfile.TemporaryDirectory(prefix=".llama4-quant-survey-", dir=folder)
    with scratch as path:
        survey = Survey(
            plan.config,
            Originals(plan, reader, torch.device(device), equalize=equalize),
            Sequences(lengths=lengths),
            Path(path),
            unit_of={member.name: unit.name for unit in units for member in unit.members},
            candidates={unit.name: unit.candidates for unit in units},
            done=done,
        )
        survey.run(
            lambda file: write_embeddings(
                Streams(quantized=file, original=None), lambda: iter(samples), plan, reader, None
            )
        )
    return _decide(units, survey.predicted, target_bits, sum(lengths))


def choices_of(plan: Plan, record: MixedPrecisionRecord) -> dict[str, Choice]:
    """What `make_plan` needs to carry out a record, made for this plan by this process or an earlier one.

    Raises:
        OutputError: the record is not about this plan's weights.
    """
    units = {unit.name: unit for unit in units_of(plan)}
    choices: dict[str, Choice] = {}
    for found in record.units:
        unit = units.pop(found.unit, None)
        schemes = {} if unit is None else {_label(scheme): scheme for scheme in (*unit.candidates, None)}
        costs = {candidate.scheme: candidate.predicted_kl for candidate in found.candidates}
        if unit is None or found.chosen not in schemes or found.chosen not in costs:
            raise _damaged(f"{shown(found.unit)} as {shown(found.chosen)}")
        reason = f"target {record.target_bits:g} bits: predicted KL {costs[found.chosen]:.1e} here"
        choices |= {member.name: Choice(scheme=schemes[found.chosen], reason=reason) for member in unit.members}
    if units:
        raise _damaged(f"nothing about {shown(next(iter(units)))}")
    return choices


def parse_record(content: object) -> MixedPrecisionRecord:
    """A record that an interrupted conversion has left.

    Raises:
        OutputError: it is damaged.
    """
    try:
        record = MixedPrecisionRecord.from_json(content)  # type: ignore[arg-type]
        assert record is not None
        for unit in record.units:
            [float(candidate.predicted_kl) for candidate in unit.candidates]
        float(record.target_bits)
    except (AttributeError, AssertionError, KeyError, TypeError, ValueError) as error:
        raise _damaged(str(error)) from error
    return record


def check_target(units: Sequence[Unit], target_bits: float) -> None:
    """Raise UsageError if even the smallest candidates take more bits, or there is nothing to choose for."""
    if not units:
        raise UsageError("--target-bits: the scheme applies to no weight of the decoder")
    num_weights = sum(unit.num_weights for unit in units)
    smallest = 8 * sum(unit.num_bytes(unit.candidates[0]) for unit in units) / num_weights
    if target_bits < smallest:
        raise UsageError(
            f"--target-bits {target_bits:g} is too little: with int4 and the fewest scales these weights take "
            f"{smallest:.4f} bits each; give --target-bits {smallest + 0.005:.2f} or more"
        )


def _decide(
    units: Sequence[Unit], predicted: Mapping[str, Sequence[float]], target_bits: float, num_tokens: int
) -> MixedPrecisionRecord:
    num_weights = sum(unit.num_weights for unit in units)
    options = [
        [
            Option(num_bytes=unit.num_bytes(scheme), loss=loss)
            for scheme, loss in zip((*unit.candidates, None), (*predicted[unit.name], 0.0), strict=True)
        ]
        for unit in units
    ]
    chosen = choose(options, int(target_bits * num_weights / 8))
    assert chosen is not None
    taken = [found[place] for found, place in zip(options, chosen, strict=True)]
    return MixedPrecisionRecord(
        target_bits=target_bits,
        bits=8 * sum(option.num_bytes for option in taken) / num_weights,
        predicted_kl=sum(option.loss for option in taken),
        num_tokens=num_tokens,
        units=tuple(_unit_record(*found) for found in zip(units, options, chosen, strict=True)),
    )


def _unit_record(unit: Unit, options: Sequence[Option], chosen: int) -> UnitRecord:
    labels = [_label(scheme) for scheme in (*unit.candidates, None)]
    return UnitRecord(
        unit=unit.name,
        num_weights=unit.num_weights,
        chosen=labels[chosen],
        candidates=tuple(
            CandidateRecord(scheme=label, bits=8 * option.num_bytes / unit.num_weights, predicted_kl=option.loss)
            for label, option in zip(labels, options, strict=True)
        ),
    )


def _candidates(members: Sequence[Decision], observer: Observer) -> tuple[WeightScheme, ...]:
    """int4 with one scale per channel, and in groups that divide all inputs; FP8."""
    schemes = [
        WeightScheme(
            type=WeightType.INT4,
            strategy=Strategy.CHANNEL if size is None else Strategy.GROUP,
            group_size=size,
            observer=observer,
        )
        for size in _GROUPS
        if size is None
        # A group of all inputs is a channel.
        or (all(m.shape[1] % size == 0 for m in members) and any(m.shape[1] > size for m in members))
    ]
    return (*schemes, WeightScheme(type=WeightType.FP8, strategy=Strategy.CHANNEL, observer=observer))


def _stored_bytes(shape: tuple[int, int], scheme: WeightScheme | None) -> int:
    """Codes (or BF16 values) and scales; not the 16 bytes with which int4 says its shape."""
    num_outputs, num_inputs = shape
    if scheme is None:
        return num_outputs * num_inputs * BF16_BITS // 8
    rows, columns = scheme.scale_shape(num_outputs, num_inputs)
    width = packed_features(num_inputs) * 4 if scheme.type is WeightType.INT4 else num_inputs
    return num_outputs * width + rows * columns * grid_of(scheme).scale_dtype.itemsize


def _survey_samples(corpus: Corpus) -> list[Sample]:
    samples: list[Sample] = []
    num_tokens = 0
    for sample in corpus.samples():
        if samples and num_tokens + len(sample.input_ids) > SURVEY_TOKENS:
            break
        samples.append(sample)
        num_tokens += len(sample.input_ids)
    return samples


def _label(scheme: WeightScheme | None) -> str:
    return "bf16" if scheme is None else scheme.label


def _damaged(what: str) -> OutputError:
    return OutputError(
        f"the schemes that an interrupted conversion chose are damaged ({what}); give --resume never to start anew"
    )
