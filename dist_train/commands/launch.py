"""`launch`: starts a script on every GPU of this machine, or of several, and starts it again when something dies.

Invariant: without torch until the options are understood. Its exit code is what the workers mean, see `ExitCode`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dist_train.checkpoint.store import Store
from dist_train.cluster.launch import GIVE_UP_AFTER, MAX_RESTARTS, MONITOR_SECONDS, LaunchOptions, launch
from dist_train.cluster.summary import summary_json, summary_lines
from dist_train.cluster.worker import Program
from dist_train.commands.command import AddCommand, refuse
from dist_train.console import finite, print_text
from dist_train.errors import ConfigError, ExitCode
from dist_train.time_ledger import read_time


def add_commands(add: AddCommand) -> None:
    one = add("launch", _launch, "Start a script on every GPU, and again when something dies.", on_a_run=False)
    one.set_defaults(run_dir="the launch")
    one.usage = "dist-train launch [options] script.py [arguments of the script]"
    nodes = one.add_argument_group("how many processes")
    _add(nodes, "--nproc-per-node", default="auto", metavar="N|gpu|cpu|auto", help="one a GPU, one without, by default")
    _add(nodes, "--nnodes", default="1", metavar="N|MIN:MAX", help="machines; a range is elastic")
    meet = one.add_argument_group("where machines meet")
    _add(meet, "--rdzv-endpoint", default="", metavar="HOST:PORT", help="on one of the machines, the same for all")
    _add(meet, "--rdzv-id", default="none", metavar="ID", help="keeps launches apart that share an endpoint")
    _add(meet, "--rdzv-backend", default="c10d", metavar="NAME", help="c10d by default; static, etcd-v2, etcd")
    _add(
        meet, "--rdzv-conf", default="", metavar="KEY=VALUE,...", help="last_call_timeout, join_timeout ... in seconds"
    )
    _add(meet, "--standalone", action="store_true", help="this machine alone, whatever else is given")
    _add(meet, "--node-rank", type=int, default=0, metavar="K", help="with the static backend")
    _add(meet, "--master-addr", default="", metavar="HOST", help="with the static backend")
    _add(meet, "--master-port", type=int, default=29500, metavar="PORT", help="with the static backend")
    _add(meet, "--local-addr", default=None, metavar="HOST", help="by which other machines reach this one")
    again = one.add_argument_group("when something dies")
    _add(
        again,
        "--max-restarts",
        type=int,
        default=MAX_RESTARTS,
        metavar="N",
        help=f"restarts without a commit in between, {MAX_RESTARTS} by default",
    )
    _add(
        again,
        "--give-up-after",
        type=int,
        default=GIVE_UP_AFTER,
        metavar="N",
        help=f"attempts in a row that end at the same committed step, {GIVE_UP_AFTER} by default; exit code 93",
    )
    _add(again, "--monitor-interval", type=float, default=MONITOR_SECONDS, metavar="SECONDS", help="of other machines")
    _add(again, "--grace", default=None, metavar="TIME", help="for saving at a signal; by default from measured saves")
    start = one.add_argument_group("how workers start")
    _add(start, "--start-method", default="forkserver", choices=("forkserver", "spawn"), help="spawn: fresh processes")
    _add(start, "--preload", default="", metavar="MODULE,...", help="import once, for all workers and restarts")
    one.add_argument("-m", "--module", action="store_true", help="script.py is the name of a module, as for python -m")
    one.add_argument("script", metavar="script.py", help="what python would run")
    one.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own")


def _add(group: Any, name: str, **settings: Any) -> None:
    """torchrun takes both spellings."""
    spellings = dict.fromkeys([name, f"--{name[2:].replace('-', '_')}"])
    group.add_argument(*spellings, **settings)


def _launch(args: argparse.Namespace) -> int:
    try:
        conclusion = launch(_options(args), _say)
    except ConfigError as error:
        refuse(str(error))
        return ExitCode.USAGE
    for line in summary_lines(conclusion, _goodput(conclusion.run_dir)):
        _say(line) if not line.startswith(" ") else print_text(line, error=True)
    if args.json:
        facts = {**summary_json(conclusion), "goodput": _goodput(conclusion.run_dir)}
        print_text(json.dumps(finite(facts), allow_nan=False))
    return conclusion.exit_code


def _goodput(run_dir: str | None) -> float | None:
    """As the run's own account has it; None where no run was entered, or its directory is not here."""
    try:
        run = None if run_dir is None else read_time(Store(run_dir))
    except OSError:
        return None
    return None if run is None else run.goodput


def _say(line: str) -> None:
    print_text(f"dist-train launch: {line}", error=True)


def _options(args: argparse.Namespace) -> LaunchOptions:
    endpoint = args.rdzv_endpoint
    if args.rdzv_backend == "static" and not endpoint:
        endpoint = f"{args.master_addr or '127.0.0.1'}:{args.master_port}"
    return LaunchOptions(
        program=Program(name=args.script, arguments=args.arguments, is_module=args.module),
        nnodes=args.nnodes,
        nproc_per_node=args.nproc_per_node,
        rdzv_backend=args.rdzv_backend,
        rdzv_endpoint=endpoint,
        rdzv_id=args.rdzv_id,
        rdzv_conf=_parse_conf(args.rdzv_conf),
        standalone=args.standalone,
        node_rank=args.node_rank,
        local_addr=args.local_addr,
        max_restarts=args.max_restarts,
        give_up_after=args.give_up_after,
        monitor_interval=args.monitor_interval,
        start_method=args.start_method,
        preload=[name for name in args.preload.split(",") if name],
        grace=args.grace,
    )


def _parse_conf(text: str) -> dict[str, str]:
    pairs = [one.strip().partition("=") for one in text.split(",") if one.strip()]
    if any(not (key and equals) for key, equals, _ in pairs):
        raise ConfigError(f"--rdzv-conf is {text!r}; give KEY=VALUE pairs with commas between them.")
    return {key: value for key, _, value in pairs}
