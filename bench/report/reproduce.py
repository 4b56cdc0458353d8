"""With which commands does a reader get these numbers again?"""

import shlex
from typing import NamedTuple

from bench.report.material import Material
from bench.tidy import FLOOR


class Step(NamedTuple):
    what: str
    commands: str


def steps(material: Material) -> list[Step]:
    """From the code to this file."""
    suite = material.target if material.is_suite else str(material.suite["name"])
    given = " ".join(["", *(shlex.quote(text) for text in material.settings)])
    runs = material.results.frame
    runs = runs[(runs["run"] != FLOOR) & (runs["started"] != "")].drop_duplicates("run")
    commits = sorted(set(runs["commit"]) - {""})
    clean = runs["dirty"].fillna(True).eq(False).all() and len(commits) == 1
    code = f"git checkout {commits[0]}\nmake install" if len(commits) == 1 else "make install"
    why = (
        "The code that made the runs, in a clone of this repository."
        if clean
        else "The runs were made by several commits: each run names its own."
        if len(commits) > 1
        else "The runs were made with changes that no commit has: what follows is the nearest there is."
    )
    return [
        Step(why, code),
        Step(
            "The runs. What is finished is reused, what was interrupted goes on; on a Slurm cluster, give --cluster slurm.",
            f"tsbench sweep {suite}{given} --cluster local\ntsbench status {suite}{given}",
        ),
        Step(
            "Results, tables, figures and this report.",
            f"{command('tables', material)}\ntsbench plots {shlex.quote(material.target)}{given}\n{command('report', material)}",
        ),
        Step(
            "Where a number comes from: every cell of the tables above, when chosen, gives its own command. Whether the "
            "committed files still follow from the committed results:",
            f"tsbench tables {_folder(material)} --suite {suite} --check",
        ),
        Step("One run alone: its settings, saved as run.yaml from its page below.", "tsbench train run.yaml"),
    ]


def command(name: str, material: Material) -> str:
    """That was, or is, to be given with the same target, settings and options."""
    return " ".join(["tsbench", name, shlex.quote(material.target), options_of(material)]).strip()


def options_of(material: Material) -> str:
    return " ".join(shlex.quote(word) for word in (*material.settings, *material.options))


def _folder(material: Material) -> str:
    return f"results/{material.suite['name']}" if material.is_suite else material.target
