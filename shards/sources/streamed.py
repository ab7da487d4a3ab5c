"""Rows of a large file that stay on the disk: their places are in memory, and a row is parsed when it is read.

A document is one JSON value, one record of a CSV, one line or one Arrow row. It makes one row, or several where the
table's format explodes a list.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa

CHUNK = 4 << 20
MAX_DOCUMENT = 512 << 20  # characters of one JSON value; a longer one is not a row
SPACE = re.compile(r"[ \t\r\n,]*")  # a comma separates the items of an array


class DocumentSizeError(ValueError):
    """A JSON value is longer than `MAX_DOCUMENT`."""


Explode = Callable[[Any], Sequence[Any]]


class TextDocuments:
    """Documents of a text file, by their places in it. `parse` makes a document of its bytes and number."""

    def __init__(
        self, content: IO[bytes], places: Sequence[tuple[int, int]], parse: Callable[[bytes, int], Any]
    ) -> None:
        weakref.finalize(self, content.close)
        self.content, self.places, self.parse = content, np.array(places, np.int64).reshape(-1, 2), parse

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.places)

    def __getitem__(self, number: int) -> Any:
        """One document."""
        start, end = (int(place) for place in self.places[number])
        self.content.seek(start)
        return self.parse(self.content.read(end - start), number)


class ArrowDocuments:
    """Rows of an Arrow table that is mapped into memory."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.table.num_rows)

    def __getitem__(self, number: int) -> Any:
        """One row."""
        return self.table.slice(number, 1).to_pylist()[0]


class StreamedRows(Sequence[Any]):
    """The rows of documents; the rows of the last document are kept in memory."""

    def __init__(self, documents: TextDocuments | ArrowDocuments, explode: Explode) -> None:
        """Read every document once, to count and check its rows.

        Raises:
            ValueError: a row is not an object.
        """
        self.documents, self.explode = documents, explode
        self.last: tuple[int, Sequence[Any]] = (-1, ())
        counts = np.zeros(len(documents), np.int64)
        for number in range(len(documents)):
            rows = self._rows_of(number)
            for row in rows:
                if not isinstance(row, dict):
                    raise ValueError(
                        f"document {number}: expected an object with columns, found {type(row).__name__}; "
                        "correct `table` of the catalog row"
                    )
            counts[number] = len(rows)
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: Any) -> Any:
        """One row, or a list of rows for a slice."""
        if isinstance(number, slice):
            return [self[index] for index in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        document = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[document - 1]) if document else 0
        return self._rows_of(document)[number - before]

    def _rows_of(self, document: int) -> Sequence[Any]:
        if self.last[0] != document:
            self.last = (document, self.explode(self.documents[document]))
        return self.last[1]


def json_places(content: IO[bytes], skip: int = 0) -> Iterator[tuple[int, int]]:
    """Places (start, end in bytes) of the JSON values of a text: JSON lines, or the items of one array.

    Raises:
        ValueError: a value is broken.
        DocumentSizeError: a value is longer than `MAX_DOCUMENT` characters.
    """
    for _ in range(skip):
        content.readline()
    decode, decoder = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder()
    place, text, at, wanted, ended = content.tell(), "", 0, CHUNK, False
    in_array: bool | None = None  # None until the first character is known
    while True:
        skipped = SPACE.match(text, at)
        assert skipped is not None  # it matches the empty text
        place += len(skipped[0])
        at = skipped.end()
        if in_array is None and at < len(text):
            in_array = text[at] == "["
            if in_array:
                place, at = place + 1, at + 1
                continue
        if in_array and text[at : at + 1] == "]":
            return
        try:
            if at < len(text):
                _, end = decoder.raw_decode(text, at)
                size = len(text[at:end].encode())
                yield place, place + size
                place, at, wanted = place + size, end, CHUNK
                continue
            if ended and not in_array:
                return
            if ended:
                raise ValueError("the array is cut short")
        except ValueError:
            if ended:
                raise
            if len(text) - at > MAX_DOCUMENT:
                raise DocumentSizeError(f"a value at byte {place} has more than {MAX_DOCUMENT} characters") from None
        data = content.read(wanted)
        ended = not data
        text, at, wanted = text[at:] + decode(data, ended), 0, 2 * wanted


def line_places(content: IO[bytes], skip: int = 0) -> Iterator[tuple[int, int]]:
    """Places of the lines that are not empty."""
    for _ in range(skip):
        content.readline()
    place = content.tell()
    while line := content.readline():
        if line.strip():
            yield place, place + len(line)
        place += len(line)


def csv_places(content: IO[bytes], delimiter: str, skip: int) -> Iterator[tuple[int, int]]:
    """Places of the records of a CSV, the header's first; a quoted field may hold line breaks.

    Raises:
        csv.Error: a record is broken.
    """
    for _ in range(skip):
        content.readline()
    place = end = content.tell()

    def lines() -> Iterator[str]:
        nonlocal end
        while line := content.readline():
            end += len(line)
            yield line.decode()

    for fields in csv.reader(lines(), delimiter=delimiter, strict=True):
        if fields:
            yield place, end
        place = end
