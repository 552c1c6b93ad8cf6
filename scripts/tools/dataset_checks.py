"""What is wrong with a record, in the words of the training loader; run in worker processes."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image

from data.files import Place
from data.images import ImageError, require_one_window
from data.records import Record, RecordError
from data.sources import JsonlRecords
from data.stream import Dataset, Planner
from data.tally import Bad, reason_of
from data.tasks import decoded, require_tags
from data.volumes import UnreachableError

RECORDS_PER_JOB = 32
VOLUME = "volume_in_test_set"
"""Reason of a finding about all records of a volume, none of which it makes bad."""
CHOICES = 8
"""How often a record is laid out whose task chooses."""


class Finding(NamedTuple):
    dataset: int
    """Its place among the sets of the checker: names may repeat."""
    source: str
    """`file:line`"""
    reason: str
    message: str

    def __str__(self) -> str:
        own = self.message.startswith(self.source)
        return f"{self.reason}: {self.message if own else f'{self.source}: {self.message}'}"


@dataclass(frozen=True)
class HeldOut:
    """A test set, whose images and volumes must not be in the mixture."""

    name: str
    records: JsonlRecords
    folder: Place


@dataclass
class Outcome:
    """Of a job."""

    dataset: int
    records: int
    findings: list[Finding] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Of each sample that a pack can have."""
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """Key, name and source of each image; equal pixels have equal keys. Empty without any
    held-out set."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Sources of the first records by the names of volumes; empty likewise."""


class Checker(torch.utils.data.Dataset):
    """Jobs by number: some records each. Held-out sets come first, then those of the mixture."""

    def __init__(self, planner: Planner, held_out: list[HeldOut]) -> None:
        self.planner, self.held_out = planner, held_out
        self.sets: list[Dataset | HeldOut] = [*held_out, *planner.datasets]
        self.jobs = [
            (number, range(len(dataset.records))[start : start + RECORDS_PER_JOB])
            for number, dataset in enumerate(self.sets)
            for start in range(0, len(dataset.records), RECORDS_PER_JOB)
        ]

    def __getitem__(self, job: int) -> Outcome:
        number, indexes = self.jobs[job]
        outcome = Outcome(number, len(indexes))
        for index in indexes:
            self._check(number, index, outcome)
        return outcome

    def _check(self, number: int, index: int, outcome: Outcome) -> None:
        dataset, found = self.sets[number], dict[str, str]()
        try:
            record = dataset.records[index]
        except RecordError as error:
            found[str(error)] = reason_of(error)
        else:
            outcome.seen.extend(self._images(record, dataset, found))
            if self.held_out and (volume := record.raw.get("volume")):
                # Unrelated data sets have volumes of one name: `sub-01_T1w`.
                of = f" of data set {record.raw['dataset']}" if record.raw.get("dataset") else ""
                outcome.volumes.setdefault(f"a volume named {volume}{of}", record.source)
            if isinstance(dataset, Dataset):
                outcome.tokens.extend(self._measure(number, index, record, found))
        source = dataset.records.source(index)
        outcome.findings.extend(Finding(number, source, r, m) for m, r in found.items())

    def _images(
        self, record: Record, dataset: Dataset | HeldOut, found: dict[str, str]
    ) -> Iterator[tuple[str, str, str]]:
        """Decodes all images; `found` gets reasons by message."""
        images = []
        for ref in (*record.inputs, *record.outputs):
            try:
                image = decoded(record, dataset.folder, ref, dataset.records.form.paired)
            except UnreachableError:
                raise  # says nothing of the image
            except (RecordError, ImageError) as error:
                found[str(error)] = reason_of(error)
                continue
            images.append(image)
            if self.held_out:
                yield pixel_hash(image), ref.path, record.source
        try:
            require_one_window(record.source, images)
        except ImageError as error:
            found[str(error)] = reason_of(error)

    def _measure(self, number: int, index: int, record: Record, found: dict[str, str]) -> list[int]:
        """Tokens of the sample, if a pack can have it; `found` gets what speaks against it."""
        planned, tokens = number - len(self.held_out), list[int]()
        for seed in range(CHOICES if self.planner.datasets[planned].task.chooses else 1):
            sample = self.planner.measured(planned, index, seed)
            if isinstance(sample, Bad):
                found[sample.message] = sample.reason
            else:
                tokens = [sample.tokens]
        try:
            require_tags(record)
        except RecordError as error:
            found.setdefault(str(error), "image_tags")
        return tokens


def pixel_hash(image: Image.Image) -> str:
    """The same for images of the same size and pixels, whatever their files are like."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, salt=b"%dx%d" % image.size).hexdigest()
