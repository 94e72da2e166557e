"""Rows of a claim's table, one per seed, task, setting and method; means and paired differences of
them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from twa.io.tables import markdown_table

#: Student's t at 97.5 %, for 3, 4, ... values
T_95 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
KEYS = ("task", "setting", "method")  # what makes a line of the table


@dataclass(frozen=True)
class Difference:
    """Of two methods, seed by seed.

    Args:
        mean: over the seeds, of ours - theirs
        error: standard error of that mean; 0 for one seed
        lower: seeds on which ours is lower
        count: seeds
    """

    mean: float
    error: float
    lower: int
    count: int

    @property
    def is_clear(self) -> bool:
        """Whether its interval of 95 %, of Student's t, leaves out zero; of three seeds or more."""
        if self.count < 3:
            return False
        return abs(self.mean) > T_95[min(self.count, len(T_95) + 2) - 3] * self.error

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} ± {self.error:.4f}, lower on {self.lower} of {self.count}"


class Rows(list):
    """Dicts with seed, task, setting, method, steps, looks, cost, val and test (losses),
    perhaps metric, and what a picture needs.
    """

    def where(self, **wanted: object) -> Rows:
        """Those with these values; a value may be a tuple of several."""

        def fits(row: dict, key: str, value: object) -> bool:
            return row.get(key) in value if isinstance(value, tuple) else row.get(key) == value

        return Rows(r for r in self if all(fits(r, *pair) for pair in wanted.items()))

    def of(self, key: str) -> list:
        """The values of a key, each once, in the order in which they come."""
        return list(dict.fromkeys(r[key] for r in self if r.get(key) is not None))

    def values(self, key: str, **wanted: object) -> list:
        """The values of a key in the rows with these values, as often as they come."""
        return [r[key] for r in self.where(**wanted) if r.get(key) is not None]

    def mean(self, key: str = "test", **wanted: object) -> float:
        if not (values := self.values(key, **wanted)):
            raise KeyError(f"no rows with {wanted}")
        return statistics.fmean(values)

    def spread(self, key: str = "test", **wanted: object) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        values = self.values(key, **wanted)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def by_seed(self, key: str = "test", **wanted: object) -> dict[int, float]:
        """The lowest value of each seed."""
        found: dict[int, float] = {}
        for r in self.where(**wanted):
            if r.get(key) is not None:
                found[r["seed"]] = min(r[key], found.get(r["seed"], float("inf")))
        return found

    def chosen(self, *methods: str) -> Rows:
        """Of each seed's rows of these methods the one with the lowest validation loss."""
        best: dict[int, dict] = {}
        for r in self.where(method=methods):
            if r["val"] < best.get(r["seed"], {"val": float("inf")})["val"]:
                best[r["seed"]] = r
        return Rows(best.values())

    def apart(self, theirs: Rows, key: str = "test") -> list[float]:
        """The lowest value of each seed, less that of others, for the seeds that both have."""
        a, b = self.by_seed(key), theirs.by_seed(key)
        return [a[s] - b[s] for s in sorted(a.keys() & b.keys())]

    def less(self, theirs: Rows, key: str = "test") -> Difference:
        """These rows, one per seed, less others of the same seeds.

        KeyError if there is no seed that both have.
        """
        if not (apart := self.apart(theirs, key)):
            raise KeyError(f"no seed with {key} in both")
        n = len(apart)
        error = statistics.stdev(apart) / n**0.5 if n > 1 else 0.0
        return Difference(statistics.fmean(apart), error, sum(d < 0 for d in apart), n)

    def against(self, ours: dict, theirs: dict, key: str = "test") -> str:
        """Paired differences of the lowest values: "-0.0123 ± 0.0010, lower on 3 of 3 seeds"."""
        differences = self.where(**ours).apart(self.where(**theirs), key)
        if not differences:
            return "not measured"
        sd = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        wins = f"lower on {sum(d < 0 for d in differences)} of {len(differences)} seeds"
        return f"{statistics.fmean(differences):+.4f}{sd}, {wins}"


def table(rows: Rows, metric: str = "") -> str:
    """A line per task, setting and method: means over seeds, with the sample standard deviation.

    The lowest test loss of a setting is in bold.
    """
    groups: dict[tuple, Rows] = {}
    for r in rows:
        groups.setdefault(tuple(r.get(k, "") for k in KEYS), Rows()).append(r)
    best: dict[tuple, float] = {}
    for key, members in groups.items():
        best[key[:2]] = min(best.get(key[:2], float("inf")), members.mean())
    shown = metric and any(r.get("metric") is not None for r in rows)
    header = [*KEYS, "steps", "looks", "cost", "val loss", "test loss"]
    header += [f"test {metric}"] if shown else []
    lines = []
    for key, members in groups.items():
        line = [*map(str, key)]
        line += [number(members.mean(k)) for k in ("steps", "looks", "cost")]
        line += [f"{members.mean('val'):.4f}", cell(members, best[key[:2]])]
        if shown:
            line.append(f"{members.mean('metric'):.4f}" if members.of("metric") else "")
        lines.append([*line, ""])
    return markdown_table([*header, ""], lines)


def pivot(rows: Rows, key: str = "test", title: str = "") -> str:
    """Test losses with a line per method and a column per setting; a table per task.

    The best of a column is in bold. cost: the least and the most.

    Args:
        key: "test", or "metric", of which the highest is the best
        title: after the name of the task
    """
    parts, better = [], max if key == "metric" else min
    for task in rows.of("task"):
        mine = Rows(r for r in rows.where(task=task) if r.get(key) is not None)
        settings = mine.of("setting")
        best = {
            s: better(
                mine.mean(key, setting=s, method=m) for m in mine.where(setting=s).of("method")
            )
            for s in settings
        }
        lines = []
        for method in mine.of("method"):
            one = mine.where(method=method)
            cells = [
                cell(members, best[s], key) if (members := one.where(setting=s)) else ""
                for s in settings
            ]
            costs = [number(one.mean("cost", setting=s)) for s in one.of("setting")]
            least, most = min(costs, key=float), max(costs, key=float)
            lines.append([method, *cells, least if least == most else f"{least} to {most}", ""])
        if lines:
            parts.append(markdown_table([f"{task}{title}", *settings, "cost", ""], lines))
    return "\n\n".join(parts)


def cell(members: Rows, best: float, key: str = "test") -> str:
    """Mean and deviation of a cell; in bold if it is the best."""
    mean = members.mean(key)
    text = f"{mean:.4f}"
    if len(members) > 1:
        text += f" ± {members.spread(key):.4f}"
    return f"**{text}**" if mean == best else text


def number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def merged(parts: Iterable[Iterable[dict]]) -> Rows:
    return Rows(row for part in parts for row in part)
