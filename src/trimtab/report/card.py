"""The model card of an export: what it belongs to, how it was made, what it scores. The Hugging Face hub shows it."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from trimtab.files import atomic_write
from trimtab.report.folder import RunFolder, read_run
from trimtab.report.tables import Cell, Row, columns, drift_rows, facts, score_rows
from trimtab.report.verdict import sentence


def write_card(run_folder: Path) -> Path:
    """Writes export/README.md from what else is in the folder, and returns its path; raises as `read_run` does."""
    run, output = read_run(run_folder), run_folder / "export" / "README.md"
    atomic_write(output, "\n".join(_lines(run)) + "\n")
    return output


def _lines(run: RunFolder) -> Iterator[str]:
    model, method = run.config["model"], run.config["method"]["name"]
    base, merged = model["pretrained_model_name_or_path"], model["adapters"]
    about = ModelCardData(
        base_model=base, library_name="diffusers", pipeline_tag="text-to-image", tags=["trimtab", method]
    )
    yield f"---\n{about.to_yaml()}\n---\n\n# {run.name}\n"
    yield f"`{base}`, post-trained by trimtab with `{method}`: {', '.join(facts(run))}.\n"
    if model["finetune_type"] == "full":
        yield f"```\ntrimtab sample . {_how(run)}-p 'a prompt'\n```\n"
    else:
        words = [f"--adapter {shlex.quote(each)}" for each in (*merged, ".")]  # in the order in which they were trained
        yield f"```\ntrimtab sample {shlex.quote(base)} {' '.join(words)} {_how(run)}-p 'a prompt'\n```\n"
    if run.evaluations:
        yield f"{sentence(run)}\n"
        yield from _table(columns(run), [*score_rows(run), *drift_rows(run)])
        yield "\nIn the heads w is the scale of guidance; 1 is off."
    yield f"\n## Recipe\n\n```yaml\n{run.config_text.strip()}\n```"


def _how(run: RunFolder) -> str:
    """Options with which `trimtab sample` draws as the run was evaluated; where it was not, as large as it was trained,
    and in one call if that is what it was trained in."""
    calls = {"num_inference_steps": 1} if run.config["rollout"]["num_inference_steps"] == 1 else {}
    told = run.subject.results if run.subject else {"resolution": run.config["model"]["resolution"]} | calls
    usual = {"num_inference_steps": None, "guidance_scale": 1.0, "resolution": None}
    asked = {name: f"{told[name]:g}" for name, value in usual.items() if told.get(name) not in (None, value)}
    asked |= {"mixed_precision": told["precision"]} if "precision" in told else {}
    return "".join(f"--{name.replace('_', '-')} {value} " for name, value in asked.items())


def _table(heads: Sequence[Cell], rows: Sequence[Row]) -> Iterator[str]:
    yield f"| | {_joined(heads)} |\n|{' --- |' * (len(heads) + 1)}"
    for row in rows:
        yield f"| {row.name} | {_joined(row.cells)} |"


def _joined(cells: Sequence[Cell]) -> str:
    return " | ".join(f"{cell.value} ({cell.detail})" if cell.detail else cell.value for cell in cells)
