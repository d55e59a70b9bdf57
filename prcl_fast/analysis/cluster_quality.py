"""Metrics of a representation space: separation of the classes, and sigma^2 as a detector of wrong pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import davies_bouldin_score, roc_auc_score, silhouette_score

DEFINITIONS = {
    "silhouette": "mean over pixels of (b - a) / max(a, b), a the mean distance to the pixels of its class, "
    "b to those of the nearest other class; -1 to 1, larger is better; Euclidean distances of L2-normalised "
    "representations, which grow with the angle as cosine distances do",
    "davies_bouldin": "mean over classes of the largest (s_i + s_j) / d_ij, s the mean distance of a class's "
    "pixels to their mean, d the distance of two class means, L2-normalised representations; smaller is "
    "better",
    "intra_variance": "mean over classes of the mean squared distance of a class's L2-normalised "
    "representations to their mean; smaller is tighter",
    "inter_variance": "mean squared distance of the class means to the mean of the class means, of "
    "L2-normalised representations; larger is further apart",
    "trace_intra": "trace of the within-class variance matrix, as intra_variance but of representations as "
    "they are, not L2-normalised: PCR table 5; it grows with the square of their scale",
    "trace_inter": "trace of the between-class variance matrix, as inter_variance but not L2-normalised",
    "trace_ratio": "trace_inter / trace_intra, larger is better separated",
    "variance_auroc": "probability that a wrongly predicted pixel has a larger mean sigma^2 than a right "
    "one, over the drawn pixels; 0.5 is chance",
    "wrong_share": "share of wrongly predicted pixels among the drawn ones, of which every class has as many "
    "as it can; not among all pixels",
    "variance_rank": "of the class's mean sigma^2, 1 the most certain",
    "iou": "in %, on the validation images, as the run logged it at this checkpoint; iou_rank: 1 the best",
    "variance_iou_correlation": "Spearman's rank correlation over classes of mean sigma^2 and IoU; -1 where "
    "the worse classes are the less certain ones",
    "moved": "distance of a class's L2-normalised prototype from that of the checkpoint before; for several, "
    "the mean",
}


@dataclass(frozen=True, eq=False)
class ClusterQuality:
    """The metrics of `cluster_quality`, explained in DEFINITIONS."""

    silhouette: float
    davies_bouldin: float
    intra_variance: float
    inter_variance: float
    trace_intra: float
    trace_inter: float
    intra_by_class: np.ndarray  # float64 [C], nan for a class without pixels


def normalized(vectors: np.ndarray) -> np.ndarray:
    """[..., D] -> float64, each of length 1; a vector of zeros stays as it is."""
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(length > 0, length, 1.0)


def cluster_quality(representation: np.ndarray, group: np.ndarray, num_classes: int) -> ClusterQuality:
    """Silhouette and Davies-Bouldin index (IJCV table 4), intra- and inter-class variance (PCR table 5).

    With m_c the mean over class c; each of the K classes that have pixels has the same weight:

        intra = 1/K sum_c mean_{i in c} |x_i - m_c|^2,    inter = 1/K sum_c |m_c - m|^2,  m = 1/K sum_c m_c.

    These are the traces of the within- and between-class variance matrices of linear discriminant analysis.
    `trace_intra` and `trace_inter`, as in PCR's table, are of the features themselves; all other metrics are
    of L2-normalised representations.

    Args:
        representation: [P, D], not all equal.
        group: int [P], 0 .. num_classes - 1; at least 2 classes, and fewer classes than pixels.
    """
    points = normalized(representation)
    intra, inter_variance = _variances(points, group, num_classes)
    trace_intra, trace_inter = _variances(representation.astype(np.float64), group, num_classes)
    return ClusterQuality(
        silhouette=float(silhouette_score(points, group, metric="euclidean")),
        davies_bouldin=float(davies_bouldin_score(points, group)),
        intra_variance=float(np.nanmean(intra)),
        inter_variance=inter_variance,
        trace_intra=float(np.nanmean(trace_intra)),
        trace_inter=trace_inter,
        intra_by_class=intra,
    )


def _variances(points: np.ndarray, group: np.ndarray, num_classes: int) -> tuple[np.ndarray, float]:
    """Variance within each class [C], nan for a class without pixels, and between the classes."""
    present = np.unique(group)
    means = np.stack([points[group == index].mean(axis=0) for index in present])
    within = np.full(num_classes, np.nan)
    for index, mean in zip(present, means, strict=True):
        within[index] = np.square(points[group == index] - mean).sum(axis=1).mean()
    return within, float(np.square(means - means.mean(axis=0)).sum(axis=1).mean())


def variance_auroc(variance: np.ndarray, wrong: np.ndarray) -> float | None:
    """AUROC of sigma^2 as a detector of wrong pixels; None if all pixels are right or all are wrong.

    Args:
        variance: [P], mean of sigma^2 over the dimensions.
        wrong: bool [P].
    """
    if wrong.all() or not wrong.any():
        return None
    return float(roc_auc_score(wrong, variance))


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 for the smallest value; equal values share their mean rank, nan stays nan: [n] -> [n]."""
    return np.asarray(stats.rankdata(values, nan_policy="omit"))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Spearman's rho over the entries known in both; None for fewer than three, or if one is constant."""
    known = ~np.isnan(first) & ~np.isnan(second)
    a, b = first[known], second[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(stats.spearmanr(a, b).statistic)
