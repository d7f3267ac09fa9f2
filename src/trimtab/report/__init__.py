"""From a run folder to one HTML page that says whether training worked, and opens from disk without a network."""

import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trimtab.errors import UserError
from trimtab.files import atomic_write, check_folder
from trimtab.report import hacking, pictures, tables, words
from trimtab.report.curves import scores_chart, training_charts
from trimtab.report.folder import RunFolder, read_run
from trimtab.report.verdict import sentence

__all__ = ["write_report"]


def write_report(run_folder: Path, output: Path | None = None, compare: Sequence[Path] = ()) -> Path:
    """Writes the page (run_folder/report.html by default) and returns its path; `compare` adds other runs' curves.

    The page depends on the folders alone, so the same folders give the same bytes. Raises UserError when a folder is
    missing or holds nothing to report, when a file in it can't be read, or, before the page is made, when `output`
    can't be written. A picture that is missing or damaged is no error: the page says so in its place.
    """
    run, others = read_run(run_folder), [read_run(folder) for folder in compare]
    output = output or run_folder / "report.html"
    _check(output)
    atomic_write(output, _page(run, others))
    return output


def _check(output: Path) -> None:
    """UserError unless a page can be written at `output`, in place of no other file, in folders that can be made."""
    if output.is_dir():
        raise UserError(f"{output} is a folder; give --output the name of a file, such as {output / 'report.html'}.")
    if output.exists() and output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{output} is a file already, and no page; give --output a name that ends in .html.")
    there = next(each for each in output.absolute().parents if os.path.lexists(each))
    if not there.is_dir():
        raise UserError(f"{output} cannot be made below {there}, which is a file; give --output another name.")
    check_folder(there)  # may be written to


def _page(run: RunFolder, others: Sequence[RunFolder]) -> str:
    jinja = Environment(
        loader=PackageLoader("trimtab", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    outcomes = pictures.outcomes(run) if run.subject else {}
    return jinja.get_template("page.html").render(
        run=run,
        style=Markup(jinja.loader.get_source(jinja, "style.css")[0]),
        words=words,
        verdict=sentence(run),
        facts=tables.facts(run),
        warnings=hacking.warnings(run) + tables.warnings(run),
        columns=tables.columns(run),
        score_rows=tables.score_rows(run),
        scores_chart=scores_chart(run),
        comparisons=pictures.comparisons(run),
        counts=pictures.count(outcomes),
        strip=pictures.strip(run),
        run_columns=tables.RUN_COLUMNS,
        run_rows=tables.run_rows([run, *others]) if others else [],
        charts=training_charts([run, *others]),
        drift_rows=tables.drift_rows(run),
        flag_above=tables.FLAG_ABOVE,
        smallest=tables.SMALLEST,
        versions=tables.versions(run),
    )
