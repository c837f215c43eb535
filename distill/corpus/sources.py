"""Sources of a corpus: each a path with columns, weight and limit, and the files or the data set that it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distill.corpus.own_reader import OwnReader
from distill.corpus.reading import Source, find_sources, local_files
from distill.corpus.shapes import BY_NAME, Columns
from distill.corpus.streams import HubFile, open_hub
from distill.errors import UserError
from distill.system.files import last_part


@dataclass(frozen=True)
class TextSource:
    """One source of a corpus, as its user names it."""

    path: str
    name: str | None = None
    split: str = "train"
    columns: Columns = BY_NAME
    weight: float | None = None
    """Weight of its tokens in the training text; None where all tokens of all sources are taken."""
    limit: int | None = None
    """Largest number of rows that are read."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    reader: OwnReader | None = None
    """Reader of its files, which may then be of any format."""

    @property
    def label(self) -> str:
        """The name in counts and reports, the same on every machine."""
        label = last_part(self.path) if Path(self.path).expanduser().exists() else self.path
        return label if self.name is None else f"{label}/{self.name}"

    def open(self, owner: int, seed: int, *, is_alone: bool) -> list[Source | HubFile]:
        """Return the files. They carry `owner`, the source's number.

        Of a hub data set beside other sources, only as many files are opened, in an order by `seed`, as hold the rows
        that its limit allows. Raises UserError if it has none.
        """
        if is_alone or local_files(self.path, self.split, self.reader) is not None:
            if self.revision is not None:
                raise UserError(
                    f"corpus.sources: {self.path}: only a hub data set has revisions: take {self.revision} out"
                )
            files = find_sources(self.path, self.name, self.split, self.columns, self.reader)
            return [replace(file, owner=owner, limit=self.limit) for file in files]
        if self.limit is None:
            raise UserError(
                f"corpus.sources: {self.path}: a hub data set beside other sources needs a limit, the rows that are "
                "read of it: give it one, such as limit: 20000"
            )
        return [
            replace(file, owner=owner, limit=self.limit)
            for file in open_hub(self.path, self.name, self.split, self.columns, seed, self.revision).files
        ]


def labels_of(sources: Sequence[TextSource]) -> list[str]:
    """Return the sources' labels, with split and number behind those that are not the only ones of their kind."""
    found = [source.label for source in sources]
    for detail in ([source.split for source in sources], [str(number) for number in range(1, len(sources) + 1)]):
        times = Counter(found)
        found = [f"{label} {more}" if times[label] > 1 else label for label, more in zip(found, detail, strict=True)]
    return found


def file_names(sources: Sequence[TextSource], files: Sequence[Source | HubFile]) -> tuple[str, ...]:
    """Return each file's name as it is on every machine: below its source's folder, or the last part of its path.

    Where there are several sources, the source's label stands before a name below a folder.
    """
    labels, names = labels_of(sources), []
    for file in files:
        path = sources[file.owner].path
        root = Path(path).expanduser()
        if root.is_dir():
            below = Path(file.label).relative_to(root).as_posix()
            names.append(f"{labels[file.owner]}/{below}" if len(sources) > 1 else below)
        else:
            names.append(last_part(file.label) if root.exists() else file.label)
    return tuple(names)


def check_weights(sources: Sequence[TextSource]) -> list[float] | None:
    """Return the weights of all sources, or None if no source has one. Raises UserError if only some have."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        lacking = next(source for source in sources if source.weight is None)
        raise UserError(f"corpus.sources: {lacking.path} has no weight, and others have: give all sources one, or none")
    return weights or None


def check_all_are_there(sources: Sequence[TextSource], owners: np.ndarray) -> None:
    """Raise UserError for a source with a weight but without a document. `owners`: the training documents' sources."""
    for number, source in enumerate(sources):
        if not (owners == number).any():
            raise UserError(
                f"corpus.sources: {source.path} has a weight, but no document to train on: take it out, or mend it"
            )
