"""Weights taken out, one by one or in whole parts, and the search for a smaller shape."""

from gptlite.pruning.importance import (
    activation_importance,
    gradient_importance,
    most_important,
)
from gptlite.pruning.masks import (
    MaskedLinear,
    bake_masks,
    gradual_pruning,
    magnitude_mask,
    prune_weights,
    sparsity_at,
    two_of_four_mask,
)
from gptlite.pruning.shape_search import (
    CHOICES,
    Tried,
    pareto_front,
    scaled_config,
    search,
    suggest_config,
)
from gptlite.pruning.sparse_linear import BitmapLinear, CsrLinear
from gptlite.pruning.structure import greedy_layers, shrink

__all__ = [
    "CHOICES",
    "BitmapLinear",
    "CsrLinear",
    "MaskedLinear",
    "Tried",
    "activation_importance",
    "bake_masks",
    "gradient_importance",
    "gradual_pruning",
    "greedy_layers",
    "magnitude_mask",
    "most_important",
    "pareto_front",
    "prune_weights",
    "scaled_config",
    "search",
    "shrink",
    "sparsity_at",
    "suggest_config",
    "two_of_four_mask",
]
