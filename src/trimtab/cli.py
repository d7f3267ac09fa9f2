"""The command line: verbs only. Bad input is one sentence and exit code 2; a run that had to stop is exit code 1."""

import errno
import itertools
import logging
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trimtab import __version__
from trimtab.errors import RunStopped, UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Post-train text-to-image models."
)
PLAIN = {"markup": False, "emoji": False, "highlight": False}  # names are the user's own: [x] and :star: are text
console = Console(**PLAIN)


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"trimtab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None: ...


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number; give 1, which is off, or more, such as 4.5.")
    return value


Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the recipe, as rollout.group_size=8.")]
Adapter = Annotated[
    list[str] | None, typer.Option(help="The `export` folder of a run: a LoRA, or soft tokens; repeatable.")
]
Guidance = Annotated[float, typer.Option(min=0, callback=_finite, help="1 is off.")]
Resolution = Annotated[int | None, typer.Option(min=8, help="Pixels a side; default: the model's own.")]
NumSteps = Annotated[int | None, typer.Option(min=1, help="Default: 40, or what a few-step student was made for.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Pictures in one forward. Default: 64 small ones, 4 of 1024 pixels a side.")
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file; see `trimtab recipes`.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run, or start it.")] = False,
) -> None:
    """Train, evaluate before and after, export, and write the report."""
    from trimtab import run

    config = run.load_config(recipe, overrides or [])
    with Terminal() as display:
        folder = run.train(config, display, resume=resume, command=shlex.join(["trimtab", *sys.argv[1:]]))
    if not console.quiet:
        _print_results(sorted((folder / "evaluation").glob("*/results.json")))
        made = next(path for path in (folder / "report.html", folder / "export") if path.exists())
        _say(f"\n{made.stem}  {made.resolve()}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="`micro`, `micro-turbo`, a diffusers folder or a hub id.")],
    adapter: Adapter = None,
    suite: Annotated[
        str, typer.Option(help="`blocks`, a .txt or .jsonl file, or a folder with a test file.")
    ] = "blocks",
    output: Annotated[Path | None, typer.Option(help="Folder for results.json, images.jsonl and the pictures.")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 4,
    num_inference_steps: NumSteps = None,
    guidance_scale: Guidance = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="That of the first picture; the next has one more.")] = 0,
    resolution: Resolution = None,
    reward: Annotated[list[str] | None, typer.Option(help="Score with this, too; repeatable.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no or bf16; default: bf16 on a GPU, else no.")] = None,
    batch_size: BatchSize = None,
) -> None:
    """Score a model on a suite of prompts with fixed seeds; the same call gives the same numbers."""
    from trimtab import inference

    of = "-".join(_short(name) for name in (model, *(adapter or [])))
    folder = output or Path("evaluations") / f"{of}-{Path(suite).stem}-cfg{guidance_scale:g}-seed{seed}"
    with Terminal() as display:
        results = inference.evaluate_model(
            model, adapter or [], suite, folder, display,
            images_per_prompt=images_per_prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            seed=seed, resolution=resolution, precision=mixed_precision, batch_size=batch_size, rewards=reward or [],
        )  # fmt: skip
    _print_table({folder.name: results})
    if not results["scores"]:
        _say("no score applies to these prompts; add --reward path.py:function, or facts")
    _say(f"\nresults  {(folder / 'results.json').resolve()}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="`micro`, `micro-turbo`, a diffusers folder or a hub id.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; repeatable.")],
    adapter: Adapter = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("samples"),
    num_images: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    num_inference_steps: NumSteps = None,
    guidance_scale: Guidance = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Picture i starts from torch.Generator().manual_seed(seed + i).")
    ] = 0,
    resolution: Resolution = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no or bf16; default: bf16 on a GPU, else no.")] = None,
    batch_size: BatchSize = None,
) -> None:
    """Draw pictures, the same as stock diffusers draws from the same seed."""
    from trimtab import inference

    with Terminal() as display:
        files = inference.sample(
            model, adapter or [], prompt, output, display,
            images_per_prompt=num_images, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            seed=seed, resolution=resolution, precision=mixed_precision, batch_size=batch_size,
        )  # fmt: skip
    for file in files:
        _say(str(file))


@app.command()
def report(
    run_folder: Annotated[Path, typer.Argument(help="A folder that `trimtab train` wrote.")],
    output: Annotated[Path | None, typer.Option(help="Default: report.html in the run folder.")] = None,
    compare: Annotated[list[Path] | None, typer.Option(help="Another run on the same axes; repeatable.")] = None,
) -> None:
    """Write the run's page: pictures before and after, curves, tables, in one file that needs no network."""
    from trimtab.report import write_report

    _say(str(write_report(run_folder, output, compare or []).resolve()))


@app.command()
def pairs(
    run_folder: Annotated[Path, typer.Argument(help="A folder that `trimtab train` wrote, of a method with rewards.")],
    output: Annotated[Path | None, typer.Option(help="Default: pairs in the run folder.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Whose checkpoint draws; 0: untrained. Default: the latest.")
    ] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="How many, of the run's size.")] = 1,
    num_pairs: Annotated[int, typer.Option(min=1, help="The best, and the worst, kept of each prompt.")] = 1,
) -> None:
    """Write a run's candidates, ranked by its rewards, as a file of preferences for offline training."""
    from trimtab import preferences

    with Terminal() as display:
        file = preferences.write_pairs(run_folder, display, output, step, rollouts, num_pairs)
    _say(f"pairs  {file.resolve()}")


@app.command()
def bench(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe or a YAML file.")],
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to time, after one that is not counted.")] = 3,
) -> None:
    """Time a recipe: the raw network, the rollout, the training, and where a step's time and memory go."""
    from trimtab import bench as benchmark
    from trimtab import run

    config = run.load_config(recipe, overrides or [])
    with Terminal() as display:
        rows = benchmark.bench(config, display, steps)
    table = Table("", "value", box=None)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)


@app.command()
def recipes() -> None:
    """List the built-in recipes."""
    from trimtab.config import RECIPES

    table = Table("recipe", "what it does", box=None)
    for path in sorted(RECIPES.glob("*.yaml")):
        comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
        table.add_row(path.stem, " ".join(line.lstrip("# ") for line in comment))
    console.print(table)


def _short(model: str) -> str:
    """What a model or an adapter is called in a folder's name; an `export` is called as its run."""
    path = Path(model).resolve()
    return path.parent.name if path.name == "export" else path.name


def _say(text: str) -> None:
    """One line, whatever its length: a path that is broken in two is none."""
    console.print(text, soft_wrap=True)


class Terminal:
    """A progress line with rate and remaining time; plain lines where the output is not a terminal."""

    def __init__(self):
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self.bars = Progress(*columns, console=console, disable=console.quiet or not console.is_terminal)
        self.tasks: dict[str, int] = {}
        self.shown = -1

    def __enter__(self) -> "Terminal":
        self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        self.bars.stop()

    def note(self, text: str) -> None:
        console.print(text)

    def progress(self, what: str, done: int, total: int, numbers: str = "") -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, numbers="", rate="")
        task = self.bars.tasks[self.tasks[what]]
        rate = f"{task.speed:.2f}/s" if task.speed else ""
        self.bars.update(self.tasks[what], completed=done, numbers=numbers, rate=rate)
        tenth = 10 * done // total
        if not console.is_terminal and (done == total or tenth != self.shown):
            console.print(f"{what} {done}/{total}  {numbers}")
        self.shown = tenth


def _print_results(files: list[Path]) -> None:
    import json

    if files:
        order = {"base": 0, "base-guided": 1}
        files = sorted(files, key=lambda file: (order.get(file.parent.name, 2), file.parent.name))
        _print_table({file.parent.name: json.loads(file.read_text()) for file in files})


def _print_table(results: dict[str, dict]) -> None:
    from trimtab.evaluate import table

    header, *rows = table(results)
    shown = Table(*header, box=None)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


def main() -> None:
    """Entry point of the console script."""
    # They warn of torchvision, of LoRAs without text encoders, and of each time that a name is asked for in vain.
    for library in ("TRANSFORMERS", "DIFFUSERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    console.quiet = int(os.environ.get("RANK", "0")) > 0  # of several processes the first speaks for all
    try:
        app(standalone_mode=False)
    except UserError as error:
        sys.exit(_failed(str(error), 2))
    except typer.TyperException as error:
        sys.exit(_failed(error.format_message(), 2))
    except typer.Abort:
        sys.exit(_failed("interrupted; a training run goes on with --resume", 130))
    except RunStopped as error:
        sys.exit(_failed(str(error), 1))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            sys.exit(_failed("no space is left on the disk; make room, and a training run goes on with --resume", 1))
        if error.filename is None:  # not of a file that somebody named
            raise
        sys.exit(_failed(f"{error.filename}: {error.strerror}", 2))


def _failed(sentence: str, code: int) -> int:
    if sentence:  # it is empty after the help that a bare `trimtab` prints
        line = " ".join(filter(None, map(str.strip, sentence.splitlines())))  # a user's own exception may have several
        Console(stderr=True, **PLAIN).print(f"trimtab: {line}", soft_wrap=True)
    return code
