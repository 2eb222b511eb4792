"""Write a `.npy` file from pieces, without knowing its length beforehand."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from torchrec_sid.data.parquet import Array

_HEADER = 128


class NpyAppender:
    """A ``.npy`` file ``[rows, *tail]`` that grows; the header is written on close.

    Args:
        path: file to write.
        dtype: of every element.
        tail: shape of one row, ``()`` for a vector.
    """

    def __init__(self, path: Path, dtype: Any, tail: tuple[int, ...] = ()) -> None:
        self.dtype = np.dtype(dtype)
        self.tail = tail
        self.rows = 0
        self._file = path.open("wb")
        self._file.write(b"\0" * _HEADER)

    def append(self, values: Array) -> None:
        """Add rows ``[n, *tail]``, cast to the file's dtype."""
        values = np.ascontiguousarray(values, self.dtype)
        if values.shape[1:] != self.tail:
            raise ValueError(f"rows of shape {values.shape[1:]} in a file of {self.tail}")
        self._file.write(values.tobytes())
        self.rows += len(values)

    def close(self) -> None:
        """Write the header and close; until then the file is not a ``.npy`` file."""
        shape = (self.rows, *self.tail)
        text = f"{{'descr': {self.dtype.str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        magic = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
        self._file.seek(0)
        self._file.write(magic + text.ljust(_HEADER - 11).encode() + b"\n")
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
