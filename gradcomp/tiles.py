"""How a matrix is cut into tiles."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Tiling"]


class Tiling(NamedTuple):
    """A matrix of ``rows`` by ``columns`` cut into ``down`` by ``across`` tiles of ``height`` by ``width``.

    Tiles are all alike, as large as ``chunk`` by ``chunk`` allows and as even as they can be, so that little is beyond
    the matrix's edge (nothing of it where a side is a multiple of its tiles): 65 rows of 64 become 2 tiles of 33, not 2
    of 64.

    >>> Tiling.of(65, 10, 64)
    Tiling(rows=65, columns=10, down=2, across=1, height=33, width=10)
    """

    rows: int
    columns: int
    down: int
    across: int
    height: int
    width: int

    @classmethod
    def of(cls, rows: int, columns: int, chunk: int) -> Tiling:
        """Tiles of at most ``chunk`` by ``chunk``; rows and columns at least 1."""
        down, across = -(-rows // chunk), -(-columns // chunk)
        return cls(rows, columns, down, across, -(-rows // down), -(-columns // across))

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return self.down * self.across

    @property
    def tile_numel(self) -> int:
        """Elements of a tile."""
        return self.height * self.width
