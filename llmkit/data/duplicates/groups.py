"""Groups that grow together: union-find over numbers 0 to n-1, in numpy."""

import numpy as np
from numpy.typing import NDArray


class Groups:
    """Numbers in groups, at first each by itself; a group is known by its smallest number.

    **Source**: Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm": all pairs are hooked at
    once to the smaller root, and paths are halved, until nothing changes.
    """

    def __init__(self, size: int) -> None:
        self._parents = np.arange(size, dtype=np.uint32 if size <= 2**32 else np.int64)

    def find(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The smallest number of each one's group."""
        roots = self._parents[numbers]
        while True:
            higher = self._parents[roots]
            if np.array_equal(higher, roots):
                break
            roots = higher
        self._parents[numbers] = roots
        return roots.astype(np.int64)

    def join(self, lefts: NDArray[np.int64], rights: NDArray[np.int64]) -> None:
        """Put the groups of each pair together."""
        while len(lefts):
            left, right = self.find(lefts), self.find(rights)
            apart = left != right
            lefts, rights = left[apart], right[apart]
            lower, upper = np.minimum(lefts, rights), np.maximum(lefts, rights)
            np.minimum.at(self._parents, upper, lower.astype(self._parents.dtype))

    def are_first(self) -> NDArray[np.bool_]:
        """Which numbers are the smallest of their group."""
        return self._parents == np.arange(len(self._parents))
