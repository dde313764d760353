"""The `trunkline` command: one sub-command per verb, each in a module of its own that is imported when it is called.

Exit codes: 0 done, 1 a check failed, 2 the configuration or the command line is wrong.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from conf.errors import ConfigError, TrunklineError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="What is on trunk is what is in production.")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def tell(told: str, as_json: bool) -> None:
    """Print what was done, in a sentence."""
    typer.echo(json.dumps({"told": told}, ensure_ascii=False) if as_json else told)


@app.command()
def use(experiment: Annotated[str, typer.Argument(help="Name of a file in conf/experiment/.")], as_json: Json = False) -> None:
    """Select an experiment: one line of conf/config.yaml changes."""
    from stages.operate.use import use as select

    tell(select(experiment), as_json)


@app.command()
def config(
    key: Annotated[str, typer.Argument(help="Only this key and what is below it, dotted: `tune.lora`.")] = "",
    as_json: Json = False,
) -> None:
    """Show every resolved value with the file it came from."""
    from stages.operate.config import show

    show(key, as_json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def repro(context: typer.Context) -> None:
    """`dvc repro` with its own arguments, faster: waits for another one in this checkout, and mends what a killed one left."""
    from stages.operate.repro import repro as run

    run(context.args)


@app.command()
def summary(as_json: Json = False) -> None:
    """Show what the last `dvc repro` made: scores, verdict, artefacts, answers, time, and the next command."""
    from stages.operate.summary import show

    show(as_json)


@app.command()
def plan(
    base: Annotated[str, typer.Option(help="Revision that the configuration is compared with.")] = "HEAD",
    as_json: Json = False,
) -> None:
    """Show what `dvc repro` would do and why, what it costs, and what it means for the gate and for production. Runs nothing."""
    from stages.operate.plan import show

    show(base, as_json)


@app.command()
def review(
    base: Annotated[str, typer.Option(help="Revision that this tree is to be merged into; its rules, evaluation data and code judge.")] = "main",
    production: Annotated[str | None, typer.Option(help="Branch whose last commit is served; without it, the base.")] = None,
    to: Annotated[Path, typer.Option(help="Folder for review.md and review.html.")] = Path(".dvc/tmp/trunkline/review"),
    latency: Annotated[bool, typer.Option(help="Measure how fast champion and candidate answer here.")] = True,
    as_json: Json = False,
) -> None:
    """Judge this tree with evidence, as Markdown for the pull request and as an HTML page. Exit codes: 0 may be merged, 1 held."""
    from stages.operate.review.command import show

    raise typer.Exit(show(base, production, to, latency, as_json))


@app.command()
def champion(
    revision: Annotated[str, typer.Argument(help="Branch, tag or commit whose model is in production.")] = "main",
    when_other: Annotated[bool, typer.Option("--when-other", help="Only if it serves another model than this tree measured last.")] = False,
    as_json: Json = False,
) -> None:
    """Pin what a revision serves as the champion of the gate: one line of conf/gate/ changes."""
    from stages.operate.champion import pin

    tell(pin(revision, when_other), as_json)


@app.command()
def rollback(
    revisions: Annotated[list[str] | None, typer.Argument(help="Commits or ranges (`A..B`) to take back; without any, HEAD.")] = None,
    to: Annotated[str | None, typer.Option(help="Bring back the whole state of this tag or commit instead.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prove that it can be done, and change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Bring an earlier state back in one commit, weights included, proven before it is made. No stage runs."""
    if revisions and to:
        raise ConfigError(f"--to {to} and {' '.join(revisions)} exclude each other", "name what to take back, or where to go back to")
    from stages.operate.rollback import show

    show(revisions or (), to, dry_run, as_json)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what stays and what would go, and remove nothing.")] = False,
    cloud: Annotated[bool, typer.Option("--cloud", help="Clean the default remote too.")] = False,
    keep: Annotated[list[str] | None, typer.Option(help="One more revision whose commits stay; may be repeated.")] = None,
    in_production: Annotated[list[str] | None, typer.Option(help="Engine digest, Bento tag or address of a running service; may be repeated.")] = None,
    protect: Annotated[list[str] | None, typer.Option(help="Pattern of branches that stay, instead of main, master, trunk, production, release/*.")] = None,
    days: Annotated[float, typer.Option(min=0, help="What is younger stays: commits of any branch, and objects.")] = 30,
    history: Annotated[int | None, typer.Option(min=1, help="Keep only so many of each reference's newest commits; without it, all.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Go on where a folder's listing is neither in the cache nor on the remote.")] = False,
    as_json: Json = False,
) -> None:
    """Remove artefacts that no protected branch, tag, recent commit or digest in production reaches."""
    from stages.operate.gc import show
    from stages.operate.reach import PROTECTED

    show(
        as_json,
        protected=protect or PROTECTED,
        keep=keep or (),
        in_production=in_production or (),
        days=days,
        most=history,
        cloud=cloud,
        allow_missing=allow_missing,
        dry_run=dry_run,
    )


@app.command()
def setup(as_json: Json = False) -> None:
    """Set up this clone: git merges dvc.lock by stage and params.yaml by key."""
    from stages.operate.merge_driver import setup as set_up

    tell(set_up(), as_json)


@app.command()
def remerge(as_json: Json = False) -> None:
    """Merge dvc.lock and params.yaml again where a host merged them by lines, as "Update branch" does. CI calls it."""
    from stages.operate.remerge import remerge as merge_again

    tell("\n".join(merge_again()) or "there is nothing to merge again", as_json)


@app.command(hidden=True)
def merge_driver(
    base: Annotated[Path, typer.Argument(help="%O: the common ancestor's version.")],
    ours: Annotated[Path, typer.Argument(help="%A: our version, and the place of the result.")],
    theirs: Annotated[Path, typer.Argument(help="%B: the other version.")],
    name: Annotated[str, typer.Argument(help="%P: the path in the repository.")],
) -> None:
    """Merge one file that the pipeline writes. git calls it (`trunkline setup`)."""
    from stages.operate.merge_driver import drive

    typer.echo(drive(base, ours, theirs, name), err=True)


def main() -> None:
    """Entry point: from the root of a checkout; a user's mistake is told in a sentence."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow must not stop a command where the locale has none
    try:
        if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and not Path("conf/config.yaml").exists():
            raise ConfigError(f"{Path.cwd()} holds no conf/config.yaml", "run `trunkline` in the root of a Trunkline checkout")
        app()
    except TrunklineError as error:
        typer.echo(f"trunkline: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
