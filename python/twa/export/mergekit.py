"""An average as a recipe for mergekit.

It is YAML from which `mergekit-yaml` makes the same merge of the same directories.

How mergekit (0.0.4 to 0.1.5) reads it, and what follows for the recipe:

- `weight` may be a list of {filter, value}; the first whose filter is a substring of the tensor's
  name counts. So filters are whole names, longer names before shorter ones, which may be parts of
  them, and the last entry has no filter.
- merge_method "linear" adds up weight * tensor, in float32 with `dtype: float32`, and divides by
  the sum of the weights unless `normalize: false`. A weight of exactly 0 is a weight like any
  other.
- YAML 1.1 reads 1e-05 as a string, 1.0e-05 as a number.
- Models are told apart by their paths; "+" and "@" in a path that is a string mean a LoRA and a
  revision.
- Configuration and tokenizer are those of `base_model`, else of any of the models.
  `tokenizer_source` is left out: it permutes embeddings.
- A tied weight that is in the files once is written once.
- Integer buffers must be equal in all models (0.1.5 refuses others); BatchNorm statistics are
  averaged, not estimated again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..io.errors import TwaError

HEADER = "# The merge weights of {}, for:  mergekit-yaml mergekit.yaml MERGED\n"
#: of weights that may be those of a trained average
TRAINED = (
    "# It merges the candidates themselves. A trained average's averaged.safetensors comes from\n"
    "# candidates packed into a few bits: it differs by their rounding.\n"
)


def mergekit_recipe(
    coefficients: Mapping[str, Any],
    sources: Sequence[str | os.PathLike[str]],
    *,
    aliases: Mapping[str, str] | None = None,
    untrained: Iterable[str] = (),
    out_dtype: str | None = None,
    header: str = HEADER.format("coefficients.json") + TRAINED,
) -> str:
    """YAML for mergekit's merge_method linear, exact but for float32 rounding.

        theta[name] = sum_i beta[i, segment_of[name]] * w_i[name]

    Args:
        coefficients: as in coefficients.json: beta (n, L), segments (L labels), segment_of: tensor
            name -> label, center_weights (n,); without segment_of there is one segment for all
            tensors
        sources: the n model directories, in the order of beta's rows; one that comes twice gets the
            sum of its weights
        aliases: other names of tied tensors: name -> the name in segment_of that stands for it
        untrained: tensors outside segment_of, such as frozen parameters: they, and all that are
            named nowhere, get the center's weights
        out_dtype: dtype of the result's tensors, such as "bfloat16"; None: float32
        header: comments for the first lines

    Raises:
        TwaError: the numbers of sources, weights and segments do not fit, or a weight is not finite
    """
    paths = [os.path.abspath(os.fspath(s)) for s in sources]
    beta: Sequence[Sequence[float]] = coefficients["beta"]
    segments: list[str] = list(coefficients["segments"])
    if len(beta) != len(paths) or any(len(row) != len(segments) for row in beta):
        raise TwaError(
            f"recipe: expected beta of shape ({len(paths)}, {len(segments)}) for the sources and"
            f" segments, found {_shape(beta)}"
        )
    if not all(math.isfinite(b) for row in beta for b in row):
        raise TwaError("recipe: expected finite merge weights, found NaN or Inf")
    columns = _columns(coefficients, segments, aliases or {}, untrained)
    rest = _untrained_weights(coefficients)
    # path -> weight per named tensor, weight of all others
    models: dict[str, tuple[dict[str, float], float]] = {}
    for path, row, other in zip(paths, beta, rest, strict=True):
        named, others = models.get(path, (dict.fromkeys(columns, 0.0), 0.0))
        own = {name: other if l is None else row[l] for name, l in columns.items()}
        models[path] = {name: named[name] + w for name, w in own.items()}, others + other
    lines = [header, "models:\n", *(_model(path, *weights) for path, weights in models.items())]
    lines += [
        f"base_model: {_reference(paths[-1])}\n",
        "merge_method: linear\n",
        "parameters:\n  normalize: false\n",
        "dtype: float32\n",
    ]
    lines += [f"out_dtype: {out_dtype}\n"] if out_dtype else []
    return "".join(lines)


def _shape(beta: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The shape of a list of rows, with all of their lengths."""
    return (len(beta), *sorted({len(row) for row in beta}))


def _columns(
    coefficients: Mapping[str, Any],
    segments: list[str],
    aliases: Mapping[str, str],
    untrained: Iterable[str],
) -> dict[str, int | None]:
    """Column of beta for each name, None for the center's weights; longest names first."""
    segment_of: Mapping[str, str] | None = coefficients.get("segment_of")
    if segment_of is None:
        return {}
    at = {label: l for l, label in enumerate(segments)}
    columns: dict[str, int | None] = {name: at[label] for name, label in segment_of.items()}
    columns |= dict.fromkeys(untrained)
    columns |= {alias: columns.get(name) for alias, name in aliases.items()}
    return {name: columns[name] for name in sorted(columns, key=lambda name: (-len(name), name))}


def _untrained_weights(coefficients: Mapping[str, Any]) -> list[float]:
    """The weights that twa gives tensors that are not trained.

    They are the center's weights; where the center is zero, those of the mean.
    """
    if coefficients.get("segment_of") is None:
        return [row[0] for row in coefficients["beta"]]
    center: Sequence[float] = coefficients["center_weights"]
    return list(center) if any(center) else [1.0 / len(center)] * len(center)


def _model(path: str, named: Mapping[str, float], other: float) -> str:
    """The entry of one model: weights of named tensors, and of all others."""
    start = f"  - model: {_reference(path)}\n    parameters:\n"
    if all(w == other for w in named.values()):
        return f"{start}      weight: {_number(other)}\n"
    entries = "".join(
        f"        - filter: {_quoted(name)}\n          value: {_number(w)}\n"
        for name, w in named.items()
    )
    return f"{start}      weight:\n{entries}        - value: {_number(other)}\n"


def _reference(path: str) -> str:
    """A model by its path, of which "+" and "@" have no meaning of their own."""
    return f"{{model: {{path: {_quoted(path)}}}}}" if "+" in path or "@" in path else _quoted(path)


def _quoted(text: str) -> str:
    """A YAML string: one of JSON, up to characters that JSON writes as two."""
    written = [f"\\U{ord(c):08x}" if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in text]
    return f'"{"".join(written)}"'


def _number(w: float) -> str:
    """A YAML 1.1 float that reads back as the same number."""
    text = repr(float(w))
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+03d}"
    return text
