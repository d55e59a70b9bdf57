"""`python -m bench` is `prcl bench` for a Python that has only what the ops and tables need."""

from __future__ import annotations

import sys

from bench.packages import needed

with needed("bench" if __name__ == "__main__" else None):
    import typer

    from prcl_fast.cli.bench import bench_command
    from prcl_fast.errors import InputError


def main() -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(bench_command)
    try:
        app()
    except InputError as error:
        print(f"prcl: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
