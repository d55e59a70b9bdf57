"""`prcl`: the command line, one module a command.

Exit status: 0 done, 2 a mistake in the input (one line on standard error), 130 Ctrl-C, 141 a reader of the
output that has gone, 1 any other failure.
"""

from __future__ import annotations

import os
import sys

import click
import typer

from prcl_fast import __version__
from prcl_fast.cli import data
from prcl_fast.cli.analyse import analyse_command
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
from prcl_fast.console import run
from prcl_fast.errors import InputError

app = typer.Typer(
    help="Semi-supervised semantic segmentation with probabilistic representations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
app.command("plan")(plan_command)
app.command("profile")(profile_command)
app.command("doctor")(doctor)


@app.command(
    "bench",
    hidden=True,
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def _bench() -> None:
    raise InputError("bench: the benchmarks are in the source tree: run `python -m bench ops` there")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


# Commands that run on all ranks of torchrun or srun; every other command runs on rank 0 alone.
_ON_ALL_RANKS = ("train", "eval", "predict", "demo")


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    if context.invoked_subcommand in _ON_ALL_RANKS or not {"RANK", "SLURM_STEP_ID"} & os.environ.keys():
        return
    from prcl_fast.processes.launch import read_launch

    launch = read_launch(os.environ)
    if launch is not None and launch.rank > 0:
        raise typer.Exit


def main() -> None:
    """The entry point of the `prcl` script."""
    sys.exit(run(_command, "prcl"))


def _command() -> int | None:
    """Runs the command of the arguments. Raises InputError for arguments that it does not take."""
    try:
        status: int | None = app(prog_name="prcl", standalone_mode=False)
    except click.UsageError as error:
        if error.ctx is None or type(error).__name__ == "NoArgsIsHelpError":  # has printed the help
            return 2
        path = error.ctx.command_path
        message = error.format_message().rstrip(".").replace(" Did you mean", "; did you mean")
        command = "".join(f"{name}: " for name in path.split()[1:])
        raise InputError(f"{command}{message[0].lower()}{message[1:]}; see {path} --help") from None
    return status


if __name__ == "__main__":
    main()
