"""A device that is not here, known by its latency table alone: what was timed there is looked up, nothing is timed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import io
from onnx_lowrank.latency.chains import Dropped, Progress, total
from onnx_lowrank.latency.circumstances import Circumstances, lowered_by
from onnx_lowrank.latency.grid import Kind, known_block
from onnx_lowrank.latency.measure import Paired, Timing, steady_clock
from onnx_lowrank.latency.messages import Subject
from onnx_lowrank.latency.pieces import Job, as_timed, chain_key
from onnx_lowrank.latency.table import MODEL, LatencyTable, Record
from onnx_lowrank.latency.table_file import day
from onnx_lowrank.latency.turns import Clock
from onnx_lowrank.layer import Layer
from onnx_lowrank.plan import MEASURED
from onnx_lowrank.search.racer import Contestant, Racer, Sample
from onnx_lowrank.target import InputShapes, Target

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which of the circumstances in a table the user means; None and empty where nothing was said.

    Args:
        device: Any part of `Circumstances.label`.
        provider: Short name.
        options: Provider options; each must be the table's.
        threads: Intra-op threads.
    """

    device: str | None = None
    provider: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    threads: int | None = None

    def fits(self, where: Circumstances) -> bool:
        """Whether the circumstances are among those meant."""
        return (
            (self.device is None or self.device.lower() in where.label.lower())
            and (self.provider is None or self.provider == where.provider)
            and set(self.options) <= set(where.options)
            and (not self.threads or self.threads == where.threads)
        )

    def __str__(self) -> str:
        said = {"--device": self.device, "--provider": self.provider, "--threads": self.threads}
        words = [f"{option} {value}" for option, value in said.items() if value]
        return " ".join([*words, *(f"--provider-option {name}={value}" for name, value in self.options)])


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """The device planned for; see `Device`.

    Args:
        table: Latencies.
        where: Those of this provider, options, threads and version are used, at whatever level is best.
        source: Where the table comes from, for messages.
        remedy: What to do about what is missing: the command that measures it there.
    """

    table: LatencyTable
    where: Circumstances
    source: str
    remedy: str

    def block(self, kind: Kind) -> int:
        """The channel block there.

        Raises:
            InputError: if it was not probed.
        """
        block = known_block(self.where, self.table, kind)
        if block is None:
            raise self.missing(f"the channel block of {kind}")
        return block

    def pricer(self, level: str) -> RememberedPrices:
        """The chains timed there, at this optimization level."""
        return RememberedPrices(self, level)

    def racer(self, target: Target, samples: Sequence[Sample], folder: Path, *, as_float32: bool) -> Racer:
        """Whole models timed there."""
        return RememberedRaces(target, samples, folder, as_float32=as_float32, there=self)

    def planning(self, shapes: tuple[InputShapes, ...]) -> Target:
        """What stands in for the device here, where the model is only looked at: its levels, on the CPU."""
        return Target(levels=self.where.target().levels, shapes=shapes)

    def missing(self, what: str) -> InputError:
        """The error for what the table does not hold."""
        return InputError(f"{self.source} without {what} on {self.where.label}", "it measured there", self.remedy)

    @property
    def label(self) -> str:
        """The device, and when it was measured last, in words."""
        levels = [found for found in self.table.circumstances() if found.at("all") == self.where]
        last = max(record.measured for found in levels for record in self.table.records(found))
        return f"{self.where.label}, measured there on {day(last)}"


def elsewhere(table: LatencyTable, choice: Choice, source: str, remedy: str) -> Elsewhere:
    """The device in a table that the user means.

    Raises:
        InputError: if the table holds none, or several, of what was asked for, or nodes of another version.
    """
    held = sorted({where.at("all") for where in table.circumstances() if table.records(where)})
    found = [where for where in held if choice.fits(where)]
    own = [where for where in found if where.lowered_by == lowered_by()]
    listed = "; ".join(dict.fromkeys(where.label for where in (own or found or held)))
    if not found:
        raise InputError(f"{source} with latencies of {listed or 'nothing'}", str(choice) or "any latency", remedy)
    if not own:
        made = ", ".join(sorted({where.lowered_by for where in found}))
        raise InputError(f"{source} with chains of onnx-lowrank {made}", f"those of {lowered_by()}", remedy)
    if len(own) > 1:
        got = f"{source} with latencies of {listed}"
        raise InputError(got, "one of them", "choose it by --device NAME (any part of its description) or --threads")
    return Elsewhere(table, own[0], source, remedy)


class RememberedPrices:
    """Prices of chains from the table alone; what is not in it is dropped. See `ChainTimer` for the rest."""

    source = MEASURED

    def __init__(self, there: Elsewhere, level: str) -> None:
        self._there, self._where = there, there.where.at(level)
        self.timed = self.priced = self.disturbed = 0
        self.dropped: list[Dropped] = []

    def price(self, jobs: Sequence[Job], progress: Progress | None = None) -> list[float | None]:
        """Milliseconds per run of the model for each job.

        Raises:
            InputError: if not one of them is in the table.
        """
        prices = [self._price(job) for job in jobs]
        if jobs and all(price is None for price in prices):
            raise self._there.missing("any layer of this model")
        if progress is not None:
            progress(len(jobs), len(jobs))
        if self.dropped:
            names = ", ".join(sorted({drop.layer.key for drop in self.dropped})[:3])
            source = self._there.source
            logger.warning("%d chains are left out, as %s has no latency of them: %s", len(self.dropped), source, names)
        return prices

    def drift(self, layers: Sequence[Layer], model: Subject, model_ms: float, budget_s: float) -> float:
        """1: models are in the table on the scale of their chains."""
        del layers, model, model_ms, budget_s
        return 1.0

    def _price(self, job: Job) -> float | None:
        sites = as_timed(job.layer.sites, self._where.provider)
        records = [self._there.table.record(chain_key(job.layer, job.chain, s), self._where) for s in sites]
        price = total(
            [(site.count, None if record is None else record.ms) for site, record in zip(sites, records, strict=True)]
        )
        if price is None:
            said = [record.reason for record in records if record is not None and record.ms is None]
            self.dropped.append(Dropped(job.layer, job.chain, said[0] if said else f"not in {self._there.source}"))
        return price


@dataclass(kw_only=True)
class RememberedRaces(Racer):
    """What `Racer` would find out, from latencies of whole models in a table.

    Args:
        there: The table and the device.
    """

    there: Elsewhere

    def best_level(self, path: Path) -> Contestant:
        """The model at the level it was fastest at.

        Raises:
            InputError: if it was not timed.
        """
        found = {level: ms for level in self.target.levels if (ms := self._ms(path, level)) is not None}
        if not found:
            raise self.there.missing(f"the latency of the model {path.name} on inputs {_shapes(self.samples)}")
        return Contestant(path, min(found, key=lambda level: found[level]))

    def gains(self, path: Path, variant: Path) -> bool:
        """Whether the variant was faster there, or is the only one that was timed."""
        old, new = (
            [ms for level in self.target.levels if (ms := self._ms(each, level)) is not None]
            for each in (path, variant)
        )
        return bool(new) and (not old or min(new) < min(old))

    def race(self, contestants: Sequence[Contestant], seconds: float | None = None) -> Paired:
        """The latencies in the table as a race of one round: they were not timed in turns, so there is no interval."""
        del seconds
        timings: list[Timing] = []
        for contestant in contestants:
            ms = self._ms(contestant.path, contestant.level)
            if ms is None:
                raise self.there.missing(f"the latency of the model {contestant.path.name}")
            timings.append(Timing(ms, (ms, ms), (ms,)))
        ratios = tuple(timings[0].median_ms / timing.median_ms for timing in timings)
        spans = tuple((ratio, ratio) for ratio in ratios)
        return Paired(tuple(timings), ratios, spans, 1, Clock(self.there.where.clock), disturbed=False)

    def _ms(self, path: Path, level: str) -> float | None:
        key = model_key(io.model_sha256(path), self.samples, as_float32=self.as_float32)
        record = self.there.table.record(key, self.there.where.at(level))
        return None if record is None else record.ms


def model_key(sha256: str, samples: Sequence[Sample], *, as_float32: bool) -> str:
    """What is timed for a whole model, for latency tables: its content, and the shapes it runs on."""
    # Tables of before hold sums without weights of models over several shapes.
    kind = "model" if len(samples) == 1 else "weighted model"
    what = repr((kind, sha256, as_float32, _shapes(samples)))
    return hashlib.sha256(what.encode()).hexdigest()


def remember_models(racer: Racer, contestants: Sequence[tuple[Contestant, str]], race: Paired, drift: float) -> None:
    """Put whole models, with what they are in words, and their race into the user's table: others may plan by it.

    Not those that are timed by another clock than their chains, because of their size: a plan would mix the two.

    Args:
        racer: Has timed them.
        contestants: The models.
        race: In the same order.
        drift: How many times as long the machine takes now as when the chains of the table were timed: a plan by the
            table compares the two.
    """
    if race.clock is not steady_clock(racer.target):
        return
    with LatencyTable() as table:
        for (contestant, what), timing in zip(contestants, race.timings, strict=True):
            sha256 = io.model_sha256(contestant.path)
            key = model_key(sha256, racer.samples, as_float32=racer.as_float32)
            where = Circumstances.here(racer.target, contestant.level)
            ms = timing.median_ms / drift
            record = Record(key, f"{what} {sha256[:12]}", ms, race.rounds, MODEL, disturbed=race.disturbed)
            table.put(where, record)


def _shapes(samples: Sequence[Sample]) -> str:
    return "; ".join(
        " ".join(f"{name}={'x'.join(map(str, np.shape(array))) or 'scalar'}" for name, array in sorted(s.feeds.items()))
        + (f"*{s.weight:g}" if len(samples) > 1 else "")
        for s in samples
    )
