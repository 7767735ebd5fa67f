"""The labels of each example as multilabel targets, instead of a 0 or 1 for each of a million classes.

The formulas make the targets of one block of examples of them (formulas/targets.py), and nothing larger.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .checks import fail
from .compilers import as_it_is_in_autograph
from .sparse import places


class Positives(NamedTuple):
    """The labels of each example, as targets of the losses of independent classes: z is 1 there, and 0 elsewhere.

    `z_nc = 1` if c is one of `indices[n]`, else 0

    Args:
        indices: integers of shape (..., K), for logits of shape (..., C): the labels of an example in any order, padded
            with -1. One that is there twice counts once. An index of C or more, or below -1, makes the loss of its
            example NaN. An array of the logits' framework, a NumPy array, a list, or a `tf.RaggedTensor`.

    A named tuple, so that every framework's tree functions, transforms and data loaders take it. Targets of
    `multilabel_logistic_loss`, `binary_cross_entropy` and `linear_multilabel_logistic_loss`, of their `value_and_grad`
    and `grad_and_hess`, and of their modules and layers.

    >>> import numpy as np
    >>> from unilabel import multilabel_logistic_loss
    >>> logits = np.array([[0.1, -0.2, 0.0], [0.4, 0.1, -0.3]])
    >>> loss = multilabel_logistic_loss(logits, Positives([[0, 2], [1, -1]]))
    >>> print(f"{loss:.6f}")
    2.023725
    """

    indices: Any

    @classmethod
    def from_csr(cls, indptr: Any, indices: Any, rows: Any = None, *, length: int | None = None) -> Positives:
        """The labels that a CSR matrix names: of row n, `indices[indptr[n]:indptr[n + 1]]`.

        Args:
            indptr: where each row begins in `indices`, and where the last one ends: N + 1 integers.
            indices: the columns of each row, one row after the other.
            rows: which rows, in which order, such as those of a batch; None: all.
            length: K, to which the rows are padded; None: the most labels that one of them has. Compilers compile
                again for each K.

        Returns:
            Positives of a NumPy array (len(rows), K), in the dtype of `indices`.

        Raises:
            TypeError: arrays that are not of integers.
            ValueError: an indptr that does not fit `indices`, or a row of more than `length` labels.
            IndexError: rows that are not there.

        >>> Positives.from_csr([0, 2, 2, 3], [0, 2, 1]).indices.tolist()
        [[0, 2], [-1, -1], [1, -1]]
        """
        import numpy as np

        indptr, indices = np.asarray(indptr), np.asarray(indices)
        for label, array in (("indptr", indptr), ("indices", indices)):
            if array.ndim != 1 or array.dtype.kind not in ("iu" if array.size else "iuf"):
                fail(TypeError, label, "one axis of integers", f"{array.dtype} of shape {array.shape}")
        if not (len(indptr) and indptr[0] >= 0 and indptr[-1] <= len(indices) and (indptr[1:] >= indptr[:-1]).all()):
            expected = f"ascending positions from 0 to {len(indices)}, the number of indices"
            fail(ValueError, "indptr", expected, np.array2string(indptr, threshold=8))
        starts, counts = indptr[:-1], indptr[1:] - indptr[:-1]
        if rows is not None:
            rows = np.asarray(rows, None if np.size(rows) else np.int64)
            starts, counts = starts[rows], counts[rows]
        most = int(counts.max(initial=0))
        if length is None:
            length = most
        elif most > length:
            fail(ValueError, "length", f"at least {most}, the most labels of a row", length)
        signed = np.promote_types(indices.dtype if indices.size else np.int64, np.int8)
        there = np.arange(length) < counts[:, None]
        padded = np.full(there.shape, -1, signed)
        padded[there] = indices[places(np, starts, counts, length)[there]]
        return cls(padded)


as_it_is_in_autograph(Positives)
