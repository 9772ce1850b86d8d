"""The sorted rows of a layer, described rather than written: which token each is a copy of, and its score.

    row[i] = data[copy[i] // copies] * scores[copy[i]]

Quantisers read rows in this form, so on a GPU the copies of a token need not exist in high precision:
neither those that the experts get nor, in the backward, those of the cotangent, which is the transpose
of a weighted sum and has the same form.
"""

from typing import NamedTuple

from torch import Tensor

from moefp8.kernels.combine import combine, row_dots, spread


class Gathered(NamedTuple):
    """Rows (M, D).

    Attributes:
        data: ``(T, D)`` tokens, or the rows themselves if ``copy`` is None.
        copy: ``(M,)`` int64, M = T copies: which ``t * copies + j`` (copy j of token t) row i is.
        slot: ``(M,)`` int64, the inverse permutation.
        copies: of each token; 0 if ``data`` are the rows.
        scores: ``(T, copies)`` or None. A row is scaled in float32 and rounded once, to the dtype of
            ``data``.
    """

    data: Tensor
    copy: Tensor | None = None
    slot: Tensor | None = None
    copies: int = 0
    scores: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(M, D)."""
        return (self.data if self.copy is None else self.copy).shape[0], self.data.shape[1]

    @classmethod
    def of(cls, x: "Tensor | Gathered") -> "Gathered":
        """Of rows that are written out, just those."""
        return x if isinstance(x, Gathered) else cls(x)

    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None, int]:
        """As quantisers take them."""
        return self.data, self.copy, self.scores, self.copies

    def rows(self) -> Tensor:
        """The rows, written out."""
        return self.data if self.copy is None else spread(self.data, self.copy, self.scores, self.copies)

    def collect(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cotangents of ``data`` and ``scores`` for that of the rows."""
        if self.slot is None:
            return cotangent, None
        d_data = combine(cotangent, self.slot, self.scores, self.copies)
        if self.scores is None:
            return d_data, None
        return d_data, row_dots(cotangent, self.slot, self.data, self.copies).to(self.scores.dtype)
