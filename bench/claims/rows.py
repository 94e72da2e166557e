"""Rows of a claim's table: one per seed, task, setting and method; means and paired differences of
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from twa.merge.report import markdown_table

KEYS = ("task", "setting", "method")  # what makes a line of the table


class Rows(list):
    """Dicts with seed, task, setting, method, steps, evaluations, cost, val and test (losses),
    perhaps metric, and what a picture needs.
    """

    def where(self, **wanted: object) -> Rows:
        """Those with these values; a value may be a tuple of several."""
        return Rows(
            r
            for r in self
            if all(
                r.get(k) in v if isinstance(v, tuple) else r.get(k) == v for k, v in wanted.items()
            )
        )

    def of(self, key: str) -> list:
        """The values of a key, each once, in the order in which they come."""
        return list(dict.fromkeys(r[key] for r in self if r.get(key) is not None))

    def mean(self, key: str = "test", **wanted: object) -> float:
        values = [r[key] for r in self.where(**wanted) if r.get(key) is not None]
        if not values:
            raise KeyError(f"no rows with {wanted}")
        return statistics.fmean(values)

    def spread(self, key: str = "test", **wanted: object) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        values = [r[key] for r in self.where(**wanted) if r.get(key) is not None]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def by_seed(self, key: str = "test", **wanted: object) -> dict[int, float]:
        """The lowest value of each seed."""
        found: dict[int, float] = {}
        for r in self.where(**wanted):
            if r.get(key) is not None:
                found[r["seed"]] = min(r[key], found.get(r["seed"], float("inf")))
        return found

    def against(self, ours: dict, theirs: dict, key: str = "test") -> str:
        """ "-0.0123 ± 0.0010, lower on 3 of 3 seeds": paired differences of the lowest values."""
        a, b = self.by_seed(key, **ours), self.by_seed(key, **theirs)
        differences = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
        if not differences:
            return "not measured"
        wins = sum(d < 0 for d in differences)
        sd = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        return (
            f"{statistics.fmean(differences):+.4f}{sd}, lower on {wins} of {len(differences)} seeds"
        )


def table(rows: Rows, metric: str = "") -> str:
    """A line per task, setting and method: means over seeds, with the sample standard deviation;
    the lowest test loss of a setting in bold.
    """
    groups: dict[tuple, Rows] = {}
    for r in rows:
        groups.setdefault(tuple(r.get(k, "") for k in KEYS), Rows()).append(r)
    best: dict[tuple, float] = {}
    for key, members in groups.items():
        best[key[:2]] = min(best.get(key[:2], float("inf")), members.mean())
    shown = metric and any(r.get("metric") is not None for r in rows)
    header = [
        "task",
        "setting",
        "method",
        "steps",
        "evaluations",
        "cost",
        "val loss",
        "test loss",
        *([f"test {metric}"] if shown else []),
        "",
    ]
    lines = []
    for key, members in groups.items():
        test = f"{members.mean():.4f}" + (f" ± {members.spread():.4f}" if len(members) > 1 else "")
        if members.mean() == best[key[:2]]:
            test = f"**{test}**"
        line = [
            *map(str, key),
            *(number(members.mean(k)) for k in ("steps", "evaluations", "cost")),
            f"{members.mean('val'):.4f}",
            test,
        ]
        if shown:
            line.append(f"{members.mean('metric'):.4f}" if members.of("metric") else "")
        lines.append([*line, ""])
    return markdown_table(header, lines)


def pivot(rows: Rows) -> str:
    """Test losses with a line per method and a column per setting, a table per task; the lowest of
    a column in bold. cost: least and most.
    """
    parts = []
    for task in rows.of("task"):
        mine = rows.where(task=task)
        settings = mine.of("setting")
        best = {
            s: min(mine.mean(setting=s, method=m) for m in mine.where(setting=s).of("method"))
            for s in settings
        }
        lines = []
        for method in mine.of("method"):
            cells = []
            for s in settings:
                members = mine.where(setting=s, method=method)
                text = (
                    f"{members.mean():.4f}"
                    + (f" ± {members.spread():.4f}" if len(members) > 1 else "")
                    if members
                    else ""
                )
                cells.append(f"**{text}**" if members and members.mean() == best[s] else text)
            costs = [
                number(mine.mean("cost", setting=s, method=method))
                for s in mine.where(method=method).of("setting")
            ]
            least, most = min(costs, key=float), max(costs, key=float)
            lines.append([method, *cells, least if least == most else f"{least} to {most}", ""])
        parts.append(markdown_table([task, *settings, "cost", ""], lines))
    return "\n\n".join(parts)


def number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def merged(parts: Iterable[Iterable[dict]]) -> Rows:
    return Rows(row for part in parts for row in part)
