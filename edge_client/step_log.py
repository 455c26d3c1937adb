"""The replay log: the encoded rows that were sent for each position, kept so that the very same bytes can go again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from split_llama.wire.codec import Codec, row_bytes


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Consecutive rows in one codec, as they travel."""

    codec: Codec
    count: int
    data: bytes

    def cut(self, rows_per_piece: int) -> Iterator[EncodedRows]:
        """Split into pieces of at most `rows_per_piece` rows."""
        size = len(self.data) // self.count
        for start in range(0, self.count, rows_per_piece):
            count = min(rows_per_piece, self.count - start)
            yield EncodedRows(self.codec, count, self.data[start * size : (start + count) * size])

    def pick(self, indices: Sequence[int]) -> EncodedRows:
        """Give some of the rows, in the order of `indices`."""
        size = len(self.data) // self.count
        return EncodedRows(self.codec, len(indices), b"".join(self.data[i * size : (i + 1) * size] for i in indices))


class StepLog:
    """Rows by position. A row is self-contained, so rows of one codec join into steps of any size."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._codecs: list[Codec] = []
        self._rows: list[bytes] = []

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, first: int, rows: EncodedRows) -> None:
        """Put rows at `first`, at most the length; what lay there and beyond is forgotten."""
        assert first <= len(self._rows), f"rows for position {first} leave a gap after {len(self._rows)}"
        del self._rows[first:], self._codecs[first:]
        size = row_bytes(rows.codec, self.width)
        self._rows.extend(rows.data[start : start + size] for start in range(0, len(rows.data), size))
        self._codecs.extend([rows.codec] * rows.count)

    def fork(self, at: int) -> StepLog:
        """Give a log of its own with the first `at` positions."""
        assert at <= len(self._rows), f"fork at {at} of {len(self._rows)}"
        log = StepLog(self.width)
        log._codecs, log._rows = self._codecs[:at], self._rows[:at]
        return log

    def read(self, start: int, stop: int) -> Iterator[tuple[int, EncodedRows]]:
        """Yield `(first, rows)` that cover `[start, stop)`, each as long as the codec allows."""
        while start < stop:
            codec, end = self._codecs[start], start + 1
            while end < stop and self._codecs[end] is codec:
                end += 1
            yield start, EncodedRows(codec, end - start, b"".join(self._rows[start:end]))
            start = end
