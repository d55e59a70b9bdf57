"""The public lists by the hash of their ids: the same rate is a different list in different families."""

from __future__ import annotations

# Keys: 12 hex digits of SHA-256 over the sorted ids joined by newlines, so that order and form do not count.
KNOWN_LISTS: dict[str, str] = {
    "124b0aab2fcd": "92 labeled of U2PL = UniMatch = PseudoSeg 1/16",
    "7ea77f8ddd7b": "92 unlabeled of U2PL = UniMatch",
    "79b959bccf77": "183 labeled of U2PL",
    "92513e42c678": "183 unlabeled of U2PL",
    "f0e702c687e2": "366 labeled of U2PL",
    "0bee39f227c8": "366 unlabeled of U2PL",
    "8c23014f5128": "732 labeled of U2PL",
    "2080ec33c9d7": "732 unlabeled of U2PL",
    "129f1fe99172": "1464 labeled of U2PL",
    "6d42f86cb89e": "1464 unlabeled of U2PL",
    "1c27978cdf51": "1/2 labeled of PseudoSeg (CPS)",
    "22be7051e35a": "1/16 unlabeled of PseudoSeg (CPS)",
    "d65246e0d2ff": "1/2 unlabeled of PseudoSeg (CPS)",
    "feea46927383": "662 labeled of U2PL = PRCL",
    "c3164407fe1a": "662 unlabeled of U2PL = PRCL",
    "baa85754594f": "662 labeled of CPS = UniMatch",
    "c38f02fc6adc": "662 unlabeled of CPS = UniMatch",
    "6f8edc379937": "val",
    "f20f7c7dea9c": "186 labeled of U2PL",
    "d01da4f44587": "186 unlabeled of U2PL",
    "1e5363dd012c": "186 labeled of CPS = UniMatch",
    "61bcee728acc": "186 unlabeled of CPS = UniMatch",
    "f13edf481be9": "372 labeled of U2PL",
    "3758d38898f6": "372 unlabeled of U2PL",
    "639dfd9068a5": "150 labeled of PRCL, seed 3407",
    "4f5a4dc5c3c7": "150 unlabeled of PRCL, seed 3407",
    "9e85f1e65cf6": "val",
    "f3ac653e7763": "test (its labels are not public)",
}
