"""What a conversion is asked for: how to store which source (`Request`), and where and how to write it (`Target`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama4_quant.calibration.memory import with_calibration
from llama4_quant.calibration.settings import Calibration
from llama4_quant.checkpoint.meta import MetaReader
from llama4_quant.checkpoint.paths import DOWNLOAD_NAME, STAGING_NAME
from llama4_quant.checkpoint.reader import CheckpointReader, TensorEntry
from llama4_quant.checkpoint.resume import Resume
from llama4_quant.config import Llama4Config
from llama4_quant.conversion.ranks import Rank
from llama4_quant.errors import UsageError
from llama4_quant.formats.choice import CheckpointFormat
from llama4_quant.planning.choose import Choice
from llama4_quant.planning.make import make_plan
from llama4_quant.planning.plan import Plan
from llama4_quant.quantizers.backend import Backend
from llama4_quant.scheme import Scheme, WeightType
from llama4_quant.work import MemoryUse, plan_memory, work_items


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to make of a source: all that a dry run needs as well.

    Attributes:
        source: as the user named it; a folder or a Hub id.
        revision: branch, tag or commit of a Hub id.
        storage: the output's format.
        scheme: of quantized weights; None quantizes nothing.
        model_parallel: for Meta's layout: the number of ranks; None: as the source has, or as fits.
        max_memory: bytes or a size that may be held at a time; None: part of the machine's.
        workers: threads at most; None: one for each core.
        calibration: None rounds to nearest, without data.
    """

    source: str
    revision: str | None
    storage: CheckpointFormat
    scheme: Scheme | None
    model_parallel: int | None
    max_memory: int | str | None
    workers: int | None
    calibration: Calibration | None

    def plan(self, reader: CheckpointReader, choices: Mapping[str, Choice] | None = None) -> Plan:
        """The plan for an open source; `choices` are schemes of mixed precision.

        Raises:
            Llama4QuantError: as `make_plan`.
        """
        config, ranks = Llama4Config.from_dict(reader.config), self.model_parallel
        if self.storage is CheckpointFormat.META_FP8 and ranks is None and isinstance(reader, MetaReader):
            ranks = reader.num_ranks
        return self.plan_of(config, reader.tensors, ranks, choices)

    def plan_of(
        self,
        config: Llama4Config,
        entries: Mapping[str, TensorEntry] | None,
        model_parallel: int | None,
        choices: Mapping[str, Choice] | None = None,
    ) -> Plan:
        """The plan for a model; without `entries` for a BF16 source that is not there.

        Raises:
            Llama4QuantError: as `make_plan`.
        """
        cache = None if self.calibration is None else self.calibration.kv_cache_scheme
        return make_plan(config, self.scheme, entries, self.storage, model_parallel, cache, choices=choices)

    def memory(self, plan: Plan, backend: Backend) -> MemoryUse:
        """What a plan takes, calibration included."""
        memory = plan_memory(plan, work_items(plan), backend, self.max_memory, self.workers)
        return memory if self.calibration is None else with_calibration(memory, plan, self.calibration)

    def check_calibration(self, rank: Rank, *, delete_source_shards: bool = False) -> None:
        """Refuse what does not go with calibration.

        Raises:
            UsageError: and the message says what to drop.
        """
        if self.calibration is None:
            return
        is_int4 = self.scheme is not None and self.scheme.weights.type is WeightType.INT4
        if self.calibration.target_bits is not None and not is_int4:
            raise UsageError("--target-bits chooses each weight's scheme from int4 up; drop --scheme, or give W4A16")
        if self.storage is not CheckpointFormat.COMPRESSED_TENSORS:
            raise UsageError(f"--format {self.storage} is written without calibration; use --algorithm rtn")
        if rank.world_size > 1:
            raise UsageError(
                "calibration goes layer by layer in one process; without torchrun, or with --algorithm rtn"
            )
        if delete_source_shards:
            raise UsageError(
                "calibration reads weights more than once; drop --delete-source-shards, or use --algorithm rtn"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where the output goes, and how it gets there.

    Attributes:
        out: the output folder, as the user named it.
        shard_size: bytes of a file at most.
        overwrite: replace the checkpoint that is there.
        resume: what to do with an interrupted conversion that is there.
        rank: this process among those that share the work.
        delete_source_shards: the source is downloaded, converted and deleted shard by shard.
    """

    out: Path
    shard_size: int
    overwrite: bool
    resume: Resume
    rank: Rank
    delete_source_shards: bool

    @property
    def staging(self) -> Path:
        """Where the output is while it is not finished."""
        return self.out.resolve() / STAGING_NAME

    @property
    def download_folder(self) -> Path | None:
        """Where shards are downloaded to that are deleted after use: inside the output; None keeps them elsewhere.

        Raises:
            UsageError: there are several processes.
        """
        if not self.delete_source_shards:
            return None
        if self.rank.world_size > 1:
            raise UsageError("--delete-source-shards works in one process, since each would download every shard")
        return self.out / STAGING_NAME / DOWNLOAD_NAME
