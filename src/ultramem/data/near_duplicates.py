"""Finding near-duplicates: documents that are nearly the same as an earlier one."""

from __future__ import annotations

import re
from collections.abc import Iterable

from datasketch import LeanMinHash, MinHash, MinHashLSH

from ultramem.data.documents import Document
from ultramem.data.worker_processes import map_documents

WORDS = 5  # of a sequence
PERMUTATIONS = 128
LARGEST_OF_INDEX = 0.95  # similarity for which an index of so many permutations can be made


class Signature:
    """MinHash signatures of texts, from their sets of sequences of five words."""

    def __init__(self) -> None:
        self.empty = MinHash(PERMUTATIONS)

    def __call__(self, text: str) -> LeanMinHash:
        """The signature; equal for texts that differ in white space and punctuation only."""
        words = re.findall(r"\w+", text)
        sequences = {" ".join(words[start : start + WORDS]) for start in range(max(len(words) - WORDS + 1, 1))}
        signature = self.empty.copy()
        # Sorted: sets of strings have another order in every process.
        signature.update_batch([sequence.encode() for sequence in sorted(sequences)])
        return LeanMinHash(signature)


def near_duplicates(documents: Iterable[Document], similarity: float, processes: int) -> set[int]:
    """Find near-duplicates: numbers, from 0, of the documents that resemble an earlier one that is kept.

    `similarity` is the share of common sequences (Jaccard index) from which on a document is a near-duplicate, above 0
    and at most 1. It is estimated by MinHash (Broder, 1997), in several processes, which does not change the result.
    """
    index = MinHashLSH(min(similarity, LARGEST_OF_INDEX), PERMUTATIONS)
    kept: dict[int, LeanMinHash] = {}
    found: set[int] = set()
    for number, (_, signature) in enumerate(map_documents(documents, Signature, (), processes)):
        if any(kept[other].jaccard(signature) >= similarity for other in index.query(signature)):
            found.add(number)
        else:
            kept[number] = signature
            index.insert(number, signature)
    return found
