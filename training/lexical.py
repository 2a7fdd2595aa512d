"""The overlap of letters as a teacher, by scikit-learn: see `LexicalTeacher`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.teacher_settings import LexicalTeacher


class LexicalOverlap:
    """TF-IDF of character n-grams, at random projected so that dot products of the vectors stay what they were.

    Args:
        teacher: Its settings.
        texts: That the frequencies are counted in.

    Raises:
        ValueError: If no n-gram occurs in as many texts as it must.
    """

    def __init__(self, teacher: LexicalTeacher, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.random_projection import SparseRandomProjection

        # Within words, with their edges: a name is found in another form or compound, two words never make an n-gram.
        self._counts: Any = TfidfVectorizer(
            analyzer="char_wb", ngram_range=tuple(teacher.ngrams), sublinear_tf=True, min_df=teacher.least
        )
        try:
            self._counts.fit(texts)
        except ValueError as error:
            raise ValueError(
                f"the teacher of {teacher.folder} finds no group of {teacher.ngrams[0]} to {teacher.ngrams[1]} "
                f"characters in at least {teacher.least} of {len(texts)} texts; lower `least` or `ngrams`"
            ) from error
        found = self._counts.transform(texts[:1])
        self._size = min(teacher.dimension, found.shape[1])
        self._projection: Any = None  # of few n-grams the counts themselves are short enough
        if self._size < found.shape[1]:
            self._projection = SparseRandomProjection(self._size, dense_output=True, random_state=0).fit(found)

    def vectors(self, texts: Sequence[str], kinds: Sequence[str] | None = None) -> np.ndarray:
        """Unit vectors, (N, dimension), fp32; zeros of a text without any known n-gram.

        Args:
            texts: N texts.
            kinds: Not used: letters are the same in all.
        """
        from sklearn.preprocessing import normalize

        if not texts:
            return np.zeros((0, self._size), np.float32)
        counts = self._counts.transform(texts)
        found = counts.toarray() if self._projection is None else self._projection.transform(counts)
        return normalize(found).astype(np.float32)
