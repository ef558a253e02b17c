"""The command line: what can be run, what it means, and running it.

Nothing heavy is imported before it is needed, so that help is quick.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fptquant.command import Debug, File, Output, Overrides, Overwrite, Resume, Save, Stream, Threads, guard
from fptquant.errors import UserError
from fptquant.reports.console import output_console
from fptquant.reports.processes import leaves_lost_run

if TYPE_CHECKING:
    from fptquant.config.schema import Config

app = typer.Typer(
    name="fptquant",
    help="4-bit language models by function-preserving transforms: calibrate, evaluate, compare.",
    epilog=(
        "[bold]Start here[/bold]\n\n"
        "[cyan]fptquant ls[/]: what there is\n\n"
        "[cyan]fptquant show fptquant-local[/]: what a method does\n\n"
        "[cyan]fptquant run rtn quantization=w4a8kv8-static[/]: calibrate, evaluate, report\n\n"
        "[cyan]fptquant table demo[/]: one table of full precision, RTN and FPTQuant\n\n"
        "Any setting follows the config's name: local.method=adamw seed=1"
    ),
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fptquant {version('fptquant')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version; python -m fptquant says more."),
    ] = False,
) -> None:
    pass


@app.command("ls", epilog="Next: fptquant show NAME")
@guard
def ls(debug: Debug = False) -> None:
    """List methods, tables, settings, models and texts."""
    from rich.table import Table

    from fptquant.config.labels import EXAMPLE_LABELS
    from fptquant.config.loading import describe_config, shipped_configs
    from fptquant.data.text import TEXT_SOURCES
    from fptquant.models.architectures import supported_architectures

    shipped = {
        folder: {name: describe_config(path) for name, path in shipped_configs().items() if path.parent.name == folder}
        for folder in ("methods", "tables")
    }
    models = {
        "smollm2-135m": "SmolLM2-135M-Instruct, fetched once and kept in the cache folder",
        "FOLDER or HUB/NAME": f"a Hugging Face model: {', '.join(supported_architectures())}",
    }
    texts = {**TEXT_SOURCES, "FILE.txt, .jsonl, .parquet": "your own text; rows of the last two have a text (or FILE,column=NAME)"}
    texts["TEXT,add_bos_token=false"] = "any of these without the BOS that some tokenizers, Llama's, put before it"
    parts = {**shipped, "settings (quantization=...)": EXAMPLE_LABELS, "models (model=...)": models}
    for title, entries in {**parts, "texts (calibration.text=..., evaluation.text=...)": texts}.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2), title_style="bold")
        table.add_column(no_wrap=True, style="cyan")
        table.add_column()
        for name, description in entries.items():
            table.add_row(escape(name), escape(description))
        output_console().print(table, "")


@app.command("show", epilog="Example: fptquant show fptquant-local quantization=w4a4kv4-dynamic")
@guard
def show(name: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Show a config with every default filled in, and what each of its transforms does."""
    from rich.syntax import Syntax
    from rich.table import Table

    from fptquant.config.loading import describe_config, dump_config, find_config, load_config

    config = load_config(name, *(overrides or ()))
    console = output_console()
    description = describe_config(find_config(name))
    console.print(f"[bold]{config.name}[/]{f': {escape(description)}' if description else ''}\n")
    grid = Table.grid(padding=(0, 2))
    for transform in config.transforms.used:
        of_transform = (type(getattr(config.transforms, transform)).__doc__ or "").strip()
        grid.add_row(f"[cyan]{transform}[/]", escape(of_transform))
    if not config.transforms.used:
        grid.add_row("[cyan]transforms[/]", "none")
    grid.add_row("[cyan]setting[/]", escape(config.quantization.setting))
    console.print(grid, "")
    console.print(Syntax(dump_config(config), "yaml", background_color="default"))


@app.command("validate", epilog="Example: fptquant validate my.yaml quantization.weight.bits=3")
@guard
def validate(file: File, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check the config of a method or a table; every mistake is listed with its path in the file."""
    from fptquant.config.loading import is_table
    from fptquant.config.tables import load_table, table_cells

    if is_table(file):
        grid = load_table(file, *(overrides or ()))
        cells = f"{len(table_cells(grid))} cells of {len(grid.methods)} methods"
        output_console().print(f"{escape(file)} is valid: {grid.name}, {cells}")
        return
    config = _load(file, overrides, None)
    used = ", ".join(config.transforms.used) or "no transforms"
    output_console().print(f"{escape(file)} is valid: {config.name}, {config.quantization.setting}, {used}")


@app.command(
    "run",
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "fptquant run fptquant-local quantization=w4a8kv8-static\n\n"
        "fptquant run configs/methods/rtn.yaml model=./my-model output=runs/mine evaluation.text=wikitext2\n\n"
        "torchrun --nproc-per-node 4 -m fptquant run fptquant training.batch=16"
    ),
)
@guard
def run(
    file: File,
    overrides: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    save: Save = True,
    stream: Stream = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Calibrate a model, compare it with full precision, and write a run folder.

    The folder holds the config, versions, metrics as JSON, the table as Markdown, plots, and the calibrated model. It is made as
    FOLDER.partial; if it is killed in training, rounding or an evaluation, the same command with --resume goes on, and has lost a
    minute at most. With --stream the folder is the calibrated model alone, and --resume goes on after the last finished block.
    """
    config = _load(file, overrides, output)
    if stream:
        _stream(config, overwrite, resume, save, threads)
        return
    _run(config, overwrite, resume, save, threads)


@app.command(
    "evaluate",
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "fptquant evaluate runs/fptquant --text wikitext2 --window 2048\n\n"
        "fptquant evaluate runs/rtn runs/mine --text wikitext2 --window 2048 --windows all --output runs/table\n\n"
        "fptquant evaluate runs/mine --tasks piqa=piqa.jsonl,arc_challenge --limit 200 --samples 3"
    ),
)
@guard
def evaluate(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Run folders, or folders of calibrated models.")],
    text: Annotated[str, typer.Option("--text", help="A text of fptquant ls, or a file.")] = "auto",
    windows: Annotated[str, typer.Option("--windows", help="How many of the text's first windows, or all.")] = "8",
    window: Annotated[int, typer.Option("--window", min=2, help="Tokens of a window.")] = 1024,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="TASK,...",
            help="Zero-shot tasks: names of lm-eval, NAME=FILE.jsonl, or a folder of NAME.jsonl (piqa, winogrande, arc_easy, "
            "boolq, lambada). Needs pip install 'fptquant\\[eval]'.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="First examples of each task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts of a task that are read at once.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="For tasks that draw at random.")] = 0,
    samples: Annotated[int, typer.Option("--samples", min=0, help="Show what each model says after so many prompts.")] = 0,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder for the table and metrics; none by default.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Evaluate calibrated models that were saved, in one table with full precision.

    The models come from one full-precision model. Perplexity, divergence from full precision and agreement are those of
    fptquant run, on any text and any number of windows. --tasks adds accuracy on zero-shot tasks by lm-eval, --samples greedy
    continuations of the text's beginnings. With --output, an evaluation that is killed goes on with --resume.
    """
    if windows != "all" and not (windows.isascii() and windows.isdigit() and int(windows) > 0):
        raise UserError(f"--windows {windows} is no number of windows; write at least 1, or all")
    from fptquant.models.folders import find_saved
    from fptquant.reports.processes import check_one_process, processes

    for folder in folders:
        find_saved(folder)
    check_one_process("evaluate")
    from fptquant.reports.further import Further
    from fptquant.reports.progress import Progress
    from fptquant.reports.samples import samples_rich_tables
    from fptquant.reports.saved import evaluate_saved
    from fptquant.reports.zero_shot import rich_tables

    with processes(device, threads), Progress() as progress:
        found = evaluate_saved(
            folders,
            text=text,
            windows="all" if windows == "all" else int(windows),
            window=window,
            device=device,
            output=output,
            overwrite=overwrite,
            resume=resume,
            further=Further(tasks=tasks, limit=limit, batch_size=batch_size, seed=seed, samples=samples),
            progress=progress,
        )
    console = output_console()
    said = samples_rich_tables(found.samples) if found.samples else []
    console.print(*rich_tables(found.rows, title="evaluation", width=console.width), *said, sep="\n\n")
    if output is not None:
        console.print(f"written to {escape(output)}")


@app.command("report", epilog="Example: fptquant report runs/fptquant --windows 4 --output page.html")
@guard
def report(
    folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or the folder of a calibrated model.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="The page; RUN/report.html by default.")] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity/--no-sensitivity", help="Evaluate with each kind of site quantized alone.")
    ] = True,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also with each site of each layer alone, which takes long.")
    ] = False,
    text: Annotated[str | None, typer.Option("--text", help="A text of fptquant ls, or a file; the run's by default.")] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="How many of the text's first windows are read.")] = 2,
    window: Annotated[int | None, typer.Option("--window", min=2, help="Tokens of a window; 512 at most by default.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=0, help="Show what both models say after so many prompts; 2 at most by default.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run: results, samples of text, where the error arises, outliers, histograms.

    The page holds everything it shows. What it shows is measured on a few windows: minutes for a small model, most for sensitivity.
    """
    from fptquant.models.folders import find_saved
    from fptquant.reports.processes import check_one_process, processes

    find_saved(folder)
    check_one_process("report")
    from fptquant.reports.progress import Progress
    from fptquant.reports.report import write_report

    with processes(device, threads), Progress() as progress:
        page = write_report(
            folder,
            output=output,
            sensitivity=sensitivity,
            per_layer=per_layer,
            text=text,
            windows=windows,
            window=window,
            samples=samples,
            device=device,
            progress=progress,
        )
    output_console().print(f"written to {escape(str(page))}")


@app.command(
    "table",
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "fptquant table demo\n\n"
        "fptquant table demo 'methods=\\[rtn, gptq, fptquant-local]' 'settings=\\[w4a16]' --output runs/quick\n\n"
        "fptquant table configs/tables/demo.yaml 'overrides=\\[evaluation.text=wikitext2, evaluation.windows=all]' --resume\n\n"
        "fptquant table demo -o runs/whole --from runs/quick --from runs/other-machine"
    ),
)
@guard
def table(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A table's YAML file, or the name of a shipped one (fptquant ls).")],
    overrides: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    save: Save = False,
    parts: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="FOLDER", help="Take cells of the same settings that another table has finished. Repeatable."
        ),
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="--no-run writes the table of what is finished, and stops.")] = True,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Run every method in every setting on every model of a grid, and write one table.

    Each cell is a run folder of its own below FOLDER/cells. The table is written anew after each, as Markdown, CSV and LaTeX;
    in the end plots are drawn. A cell that fails is reported and does not stop the rest. With --resume finished cells are
    kept, a killed one goes on, a failed one is tried again, and the grid may have grown. Several machines can share a grid: each
    makes a table of some of its methods, settings or models, and --from puts their cells together.
    """
    from fptquant.config.tables import load_table, table_cells
    from fptquant.models.folders import find_model
    from fptquant.reports.grid_folder import check_table
    from fptquant.reports.processes import launched, processes

    grid = load_table(file, *(overrides or ()), *_output_override(output))
    device = table_cells(grid)[0].config.device
    for model in grid.models:
        find_model(model.model)
    if launched() is None:  # before torch is imported, which takes seconds; several processes first find each other
        check_table(grid, overwrite=overwrite, resume=resume, parts=parts or ())
    from fptquant.reports.grid import make_table
    from fptquant.reports.progress import Progress
    from fptquant.reports.zero_shot import rich_tables
    from fptquant.stages.distributed import is_main
    from fptquant.stages.progress import quiet

    with processes(device, threads):
        with Progress() if is_main() else nullcontext(quiet) as progress:
            made = make_table(grid, overwrite=overwrite, resume=resume, save=save, parts=parts or (), run=run, progress=progress)
        if is_main():
            console = output_console()
            console.print(*rich_tables(made.rows, title=grid.name, width=console.width), sep="\n\n")
            console.print(f"written to {escape(str(made.folder))}")
            for row in made.failed:
                console.print(f"[bold red]failed:[/] {escape(f'{row.method}, {row.setting}: {row.error}')}")
    if made.failed:
        raise typer.Exit(1)


def _output_override(output: str | None) -> list[str]:
    return [] if output is None else [f"output={json.dumps(output)}"]


def _load(file: str, overrides: list[str] | None, output: str | None) -> Config:
    from fptquant.config.loading import load_config

    return load_config(file, *(overrides or ()), *_output_override(output))


def _run(config: Config, overwrite: bool, resume: bool, save: bool, threads: int | None) -> None:
    from fptquant.models.folders import find_model
    from fptquant.reports.processes import launched, processes
    from fptquant.reports.unfinished_run import check_run, config_files

    find_model(config.model)
    if launched() is None:  # before torch is imported, which takes seconds; several processes first find each other
        check_run(config.output_folder, config_files(config), overwrite=overwrite, resume=resume)
    from fptquant.reports.experiment import run_experiment
    from fptquant.reports.progress import Progress
    from fptquant.reports.zero_shot import rich_tables
    from fptquant.stages.distributed import is_main
    from fptquant.stages.progress import quiet

    title, output = f"{config.name} on {config.model}", config.output_folder
    with processes(config.device, threads):
        with Progress() if is_main() else nullcontext(quiet) as progress:
            experiment = run_experiment(
                config, title=title, output=output, overwrite=overwrite, resume=resume, save=save, progress=progress
            )
        if is_main():
            console = output_console()
            console.print(*rich_tables(experiment.rows, title=title, width=console.width), sep="\n\n")
            console.print(f"written to {escape(str(experiment.folder))}")


def _stream(config: Config, overwrite: bool, resume: bool, save: bool, threads: int | None) -> None:
    from fptquant.models.folders import find_model
    from fptquant.reports.processes import check_one_process, processes, resolve_device
    from fptquant.reports.unfinished_run import check_run, stream_description

    if not save:
        raise UserError("--stream does nothing but write the calibrated model; leave out --no-save")
    find_model(config.model)
    check_one_process("--stream")
    # before torch is imported, which takes seconds
    check_run(config.output_folder, stream_description(config), overwrite=overwrite, resume=resume)
    from fptquant.stages.stream import calibrate_streamed

    with processes(config.device, threads):
        device = resolve_device(config.device)
        folder = calibrate_streamed(config.model, config, config.output_folder, overwrite=overwrite, resume=resume, device=device)
    output_console().print(f"written to {escape(str(folder))}")


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    if not leaves_lost_run():
        sys.exit(128 + signal_number)


def main() -> None:
    """Entry point of ``fptquant``."""
    # A polite kill unwinds like Ctrl-C does, so that no partial run folder stays behind.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app(prog_name="fptquant")
    except BrokenPipeError:
        sys.exit(0)  # the reader (head, less) has left: not an error worth a traceback
