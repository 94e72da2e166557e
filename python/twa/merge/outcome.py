"""`Outcome`: all results of the main job, and the winner, to be used and written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.sharding import Sharding
from ..distributed.weights import checksums, exported_tensors
from ..export import bundle
from ..io.atomic import write_bytes, write_json, write_text
from ..io.errors import TwaError
from ..io.tables import markdown_table
from ..io.versions import COEFFICIENTS, RESULTS
from ..modes import plain_weights
from ..tasks.contract import Task
from .advice import advice
from .report import cost_line, markdown, picture, table_rows
from .results import Result, fixed

REPORTS = ("report.md", "report.png", "results.json")
FILES = (*bundle.FILES, *REPORTS)


@dataclass
class Outcome:
    """All results of a run. The model is at the winner's weights.

    Attributes:
        results: rows of the table
        winner: the one with the lowest validation loss
        sharding: holds the model
        task: what was trained and measured on
    """

    results: list[Result]
    winner: Result
    sharding: Sharding
    task: Task

    def __post_init__(self) -> None:
        self._checksums = checksums(self.sharding)

    def __str__(self) -> str:
        """The table, as Markdown, what it took, the winner, and what more of it would bring."""
        table = markdown_table(*table_rows(self.results, self.task))
        winner = self.winner
        lines = [
            f"{table}\n",
            cost_line(self.cost),
            f"winner on the validation data: {winner.method}, {winner.losses}",
            advice(self.results),
        ]
        return "\n".join(filter(None, lines))

    def _repr_markdown_(self) -> str:
        """The same, which notebooks draw as a table."""
        return str(self)

    def __repr__(self) -> str:
        return f"Outcome({self.winner.method} of {len(self.results)}, {self.winner.losses})"

    @property
    def cost(self) -> dict[str, float]:
        """What the run took, in training steps.

        A batch that is only evaluated counts a third of one that is trained on.

        Returns:
            "start": to choose where trained averages start; "steps": their gradient steps; "looks":
            their looks at the validation data; "comparison": the averages that are there to compare
            with
        """
        trained = [r for r in self.results if r.is_trained]
        *compared, start = fixed(self.results)
        return {
            "start": start.looks,
            "steps": sum(r.steps for r in trained),
            "looks": sum(r.looks for r in trained),
            "comparison": sum(r.looks for r in compared),
        }

    @property
    def state(self) -> dict[str, Tensor]:
        """The winner's weights by key, as they are exported.

        Raises:
            TwaError: the model has been moved since
        """
        sharding = self.sharding
        with sharding.ranks.fail_together("reading the winner"), plain_weights(sharding.model):
            self._check_model()
            return dict(exported_tensors(sharding))

    def save(
        self, folder: str | Path, *, dcp: bool = False, command: str = "twa.average(...)"
    ) -> list[str]:
        """Writes the winner as `Subspace.save` does, and report.md, report.png and results.json.

        On several ranks all call it; the first writes.

        Args:
            folder: where the files go; made if it is not there
            dcp: whether the winner is also written as a torch.distributed.checkpoint directory
            command: what was run, for the page

        Returns:
            names of what was written; none on ranks that write nothing

        Raises:
            TwaError: the model has been moved since
            OSError: a file cannot be written
        """
        folder, ranks = Path(folder), self.sharding.ranks
        with ranks.fail_together(f"writing {folder}"):
            self._check_model()
            names = [str(c.path) for c in self.sharding.candidates]
            chosen = self._coefficients(names)
            written = bundle.write_bundle(folder, self.sharding, chosen, dcp=dcp)
            if not ranks.is_rank_zero:
                return []
            header, rows = table_rows(self.results, self.task)
            table = [dict(zip(header, row, strict=True)) for row in rows]
            write_json(folder / "results.json", {"format": RESULTS, "rows": table})
            write_text(folder / "report.md", markdown(self, self.task, names, command))
            write_bytes(folder / "report.png", picture(self, self.task))
        return [*written, *REPORTS]

    def _coefficients(self, names: list[str]) -> dict[str, object]:
        """What coefficients.json holds of the winner; a fixed average has merge weights only.

        Args:
            names: paths of the candidates
        """
        winner = self.winner
        if winner.coefficients is not None:
            return winner.coefficients | {"method": winner.method}
        beta: Tensor | None = winner.beta
        if beta is None:
            beta = torch.ones(1, dtype=torch.float32, device="cpu")
        return {
            "format": COEFFICIENTS,
            "method": winner.method,
            "candidates": names,
            "segments": ["model"],
            "beta": [[b] for b in beta.tolist()],
        }

    def _check_model(self) -> None:
        """TwaError if the model is no longer at the winner."""
        now = checksums(self.sharding)
        if changed := [name for name, value in self._checksums.items() if now[name] != value]:
            raise TwaError(
                f"{changed[0]!r} is another since ({len(changed)} tensors in all): the model is no"
                " longer at the winner; save before it is trained or loaded again",
                "outcome",
            )
