"""A fixed average of candidates, loaded into a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..dtensors import is_sharded
from ..io.averaging import merge_weights
from ..io.candidates import Candidates
from ..io.errors import check_type
from ..io.key_map import match_model
from .choose import find_ranks
from .ranks import Ranks
from .sharding import ColumnsSharding, Sharding
from .weights import load_merge


def load_average(model: nn.Module, candidates: Candidates, beta: Tensor | Sequence[float]) -> None:
    """Moves a model to sum_i beta[i] w_i, a weighted average of candidates.

    Frozen parameters and float buffers are averaged, too. Integer and bool buffers are the last
    candidate's, or those of the one that has all the weight. With BatchNorm, call `update_bn`
    afterwards. No basis is made: it takes one read of the candidates. Ranks of a sharded model call
    it together; each reads what it holds.

    Args:
        model: whose parameters and buffers are written
        candidates: the n checkpoints, or a recording
        beta: merge weights (n,) that sum to 1, such as `twa.averages.ema(n, 0.9)`, or a list

    Raises:
        CandidateError: files and model do not fit, or the average is not finite
        TwaError: beta are no merge weights, or the average overflows a parameter's dtype
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    check_type("candidates", candidates, Candidates, "twa.Candidates(...)")
    weights = merge_weights(beta, len(candidates))
    matched, key_map = match_model(model, candidates)
    if is_sharded(model):
        ranks = find_ranks("columns", model)
        sharding: Sharding = ColumnsSharding(ranks, model, matched, key_map)
    else:
        sharding = Sharding(Ranks(), model, matched, key_map)
    load_merge(sharding, weights)
