"""Which scores share a tune, and are trained on together.

`tools/corpus_statistics.py` compares all pieces and says which are missing here.
"""

import numpy as np

# Pieces that the draw of `Piece.split` would hold out, and that are trained on all the same, since
# a version of theirs is.
_CHORALES = """
11.6 13.6 31.9 40.3 44.7 69.6-a 70.11 84.5 88.7 93.7 124.6 154.8 157.5 166.6 244.10 244.29-a 244.37
245.11 248.12-2 248.35-3 288 328 392 393 395
"""
TRAINED_ON = frozenset(f"bach/bwv{number}" for number in _CHORALES.split())


def intervals(table: np.ndarray, voice: int) -> list[int]:
    """Successive intervals of a voice of a note table `[note, 5]`, repeated notes left out."""
    own = table[table[:, 3] == voice]
    steps = np.diff(own[np.argsort(own[:, 0], kind="stable"), 2].astype(int))
    return steps[steps != 0].tolist()
