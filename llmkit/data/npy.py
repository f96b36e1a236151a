"""The files that shards are made of: arrays that grow while they are written."""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt


class NpyWriter:
    """Appends to a `.npy` file whose length is written when it is closed.

    Args:
        path: The file.
        dtype: The type of its values.
        width: The array is two-dimensional, with rows of so many values; by default it has one dimension.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], *, width: int | None = None) -> None:
        self._file: BinaryIO = path.open("wb", buffering=2**20)
        self._dtype = dtype
        self._row = () if width is None else (width,)
        self._write_header(0)
        self._header_bytes = self._file.tell()
        self.length = 0

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add values, or rows of them, at the end."""
        assert values.shape[1:] == self._row
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self.length += len(values)

    def close(self) -> None:
        """Write the length and close the file."""
        self._file.seek(0)
        self._write_header(self.length)
        # numpy pads the header so that a growing length never changes its size.
        assert self._file.tell() == self._header_bytes
        self._file.close()

    def _write_header(self, length: int) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (length, *self._row)}
        np.lib.format.write_array_header_1_0(self._file, header)
