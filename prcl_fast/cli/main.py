"""`prcl`: the command line, one module a command.

Exit status: 0 done, 2 a mistake in the input (one line on standard error), 1 anything else.
"""

from __future__ import annotations

import os
import sys

import typer

from prcl_fast import __version__
from prcl_fast.cli import data
from prcl_fast.cli.analyse import analyse_command
from prcl_fast.cli.bench import bench_command
from prcl_fast.cli.compare import compare_command
from prcl_fast.cli.configs import configs_command
from prcl_fast.cli.demo import demo
from prcl_fast.cli.doctor import doctor
from prcl_fast.cli.eval import evaluate_command
from prcl_fast.cli.figures import figures_command
from prcl_fast.cli.plan import plan_command
from prcl_fast.cli.predict import predict_command
from prcl_fast.cli.profile import profile_command
from prcl_fast.cli.sweep import sweep_command
from prcl_fast.cli.train import train_command
from prcl_fast.cli.weights import convert_weights
from prcl_fast.errors import InputError, RunError

app = typer.Typer(
    help="Semi-supervised semantic segmentation with probabilistic representations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command("train")(train_command)
app.command("eval")(evaluate_command)
app.command("predict")(predict_command)
app.command("sweep")(sweep_command)
app.command("compare")(compare_command)
app.command("figures")(figures_command)
app.command("analyse")(analyse_command)
app.command("demo")(demo)
app.command("configs")(configs_command)
app.add_typer(data.app, name="data")
app.command("weights")(convert_weights)
app.command("bench")(bench_command)
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("doctor")(doctor)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


# What several processes of torchrun or srun do together; of every other command, one does the work.
_SHARED = ("train", "eval", "predict", "demo")


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand in _SHARED or not {"RANK", "SLURM_STEP_ID"} & os.environ.keys():
        return
    from prcl_fast.processes.launch import read_launch

    launch = read_launch(os.environ)
    if launch is not None and launch.rank > 0:
        raise typer.Exit


def main() -> None:
    """The entry point of the `prcl` script."""
    try:
        app()
    except InputError as error:
        print(f"prcl: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"prcl: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
