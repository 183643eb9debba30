"""The claims, one module each, in the order of their numbers."""

from drrho_clip.reproduce.claim import Claim
from drrho_clip.reproduce.claims.beyond import BEYOND
from drrho_clip.reproduce.claims.data_efficiency import DATA_EFFICIENCY
from drrho_clip.reproduce.claims.estimator import ESTIMATOR
from drrho_clip.reproduce.claims.generic import GENERIC
from drrho_clip.reproduce.claims.good_reference import GOOD_REFERENCE
from drrho_clip.reproduce.claims.scaling_law import SCALING_LAW
from drrho_clip.reproduce.claims.table import TABLE
from drrho_clip.reproduce.claims.variance import VARIANCE
from drrho_clip.reproduce.claims.weak_to_strong import WEAK_TO_STRONG

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        WEAK_TO_STRONG,
        TABLE,
        DATA_EFFICIENCY,
        SCALING_LAW,
        VARIANCE,
        GENERIC,
        ESTIMATOR,
        GOOD_REFERENCE,
        BEYOND,
    )
}
"""All claims by name."""
