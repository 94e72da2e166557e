"""One line of advice: what the next steps would best be spent on."""

from __future__ import annotations

from collections.abc import Sequence

from .results import START, Result


def advice(results: Sequence[Result]) -> str:
    """What a run's own figures say of more of it; "" without a trained average, or after few steps.

    Args:
        results: all rows
    """
    trained = [r for r in results if r.is_trained]
    if not trained:
        return ""
    best = min(trained, key=lambda r: r.val_loss)
    fixed = min((r for r in results if not r.is_trained and r.is_average), key=lambda r: r.val_loss)
    if fixed.method != START and fixed.val_loss < best.val_loss:
        return f"{fixed.method} is better here than what TWA has found"
    if best.gain is None:
        return ""  # it has taken too few steps to tell
    start = next((r for r in results if r.method == START), None)
    pace = start.gain if start is not None else None
    if start is not None and best.val_loss >= start.val_loss:
        return (
            "TWA has found nothing better than its start: other candidates, or more data to train"
            " on, might help; more steps will not"
        )
    gain = best.gain
    ours = f"100 more steps of {best.method} would gain about {_loss(100 * gain)}"
    if gain <= 0:
        ours = f"more steps of {best.method} would gain nothing that shows"
    if pace is None:
        more = "more candidates" if gain <= 0 else "more steps (--steps)"
        return f"{ours}; what is left to gain is in {more}"
    run = f"100 of ordinary training {_loss(100 * pace)}"
    if pace <= 0:
        return f"{ours}; training on would gain nothing that shows"
    if pace > gain:
        return (
            f"{ours}, {run}: the run still learns. Train on, or, if you have the optimizer's state,"
            " let the learning rate fall to zero over as many steps; then average again"
        )
    return f"{ours}, {run}: more steps (--steps) are worth more than training on"


def _loss(value: float) -> str:
    return f"{value:.2g}"
