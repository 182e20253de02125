# SPDX-License-Identifier: Apache-2.0
"""`rapid serve`: the options, and what is checked before anything slow begins."""

import argparse
import importlib.util
import os
import sys
import threading
from typing import TYPE_CHECKING, cast

from rapid_jax.answer_options import TEXT, config_of
from rapid_jax.config import RapidConfig
from rapid_jax.runtime.command_line import Place, prepare_jax, say
from rapid_jax.runtime.distributed import meet
from rapid_jax.runtime.errors import InputError, extra
from rapid_jax.runtime.files import cache_dir
from rapid_jax.serve.keys import VARIABLE, Keys, read_keys
from rapid_jax.serve.settings import ServeSettings

if TYPE_CHECKING:
    from rapid_jax.serve.interface import Engine

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_PLAIN = ServeSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.add_argument("--config", **TEXT, metavar="FILE", help="settings to start from, as configs/rapid/*.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any setting, section.key=value"
    )
    parser.add_argument("--model", **TEXT, metavar="DIR|FILE.gguf|smollm2", help="the long-context target")
    parser.add_argument("--drafter", **TEXT, metavar="same|attended|DIR|FILE.gguf",
                        help="drafts; same: the target; attended: the target, over what it attends to")  # fmt: skip
    parser.add_argument("--mode", metavar="rapid|lossless|phat|target|retrieval", help="of requests that name none")
    parser.add_argument("--host", default=_PLAIN.host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=_PLAIN.port, help="0: any free one (default: %(default)s)")
    parser.add_argument(
        "--api-key", action=Place, metavar="FILE", help=f"a key a line; more of them in ${VARIABLE}, with commas"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name of this machine besides localhost"
    )
    parser.add_argument("--drain", type=float, default=_PLAIN.drain_seconds, metavar="S",
                        help="seconds after SIGTERM for requests to end and what was read of documents to be stored: "
                        "what that is reckoned to take is kept back for it, half at most (default: %(default)g)",
                        )  # fmt: skip
    parser.add_argument("--queue", type=int, default=64, metavar="N",
                        help="requests that may wait; more are told to come again (default: %(default)s)")  # fmt: skip
    parser.add_argument("--documents", action=Place, metavar="DIR",
                        help="keep documents there over a restart (default: in memory alone)")  # fmt: skip
    parser.add_argument("--warm-tokens", type=_wholes, default=(1024,), metavar="LIST",
                        help="lengths of documents that are compiled for before the start, as 1024,8192: each also for "
                        "shorter ones, down to a quarter, which take as much memory")  # fmt: skip
    parser.add_argument("--warm-rows", type=int, default=1, metavar="N",
                        help="questions at once about a document, and chats, compiled for too; above 1 more of "
                        "them wait (default: %(default)s)")  # fmt: skip
    parser.add_argument("--warm-documents", type=int, default=1, metavar="N",
                        help="documents that are asked about at once, likewise (default: %(default)s)")  # fmt: skip
    parser.add_argument("--warm-chats", type=_wholes, default=(), metavar="LIST",
                        help="lengths of prompts without a document, likewise: up to a quarter of "
                        "compute.prefill_chunk is one size, up to all of it another (default: none)")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress while models are loaded")
    parser.add_argument("--max-body", type=int, default=_PLAIN.body_mib, metavar="MIB",
                        help="of a request in JSON (default: %(default)s)")  # fmt: skip
    parser.add_argument("--max-upload", type=int, default=_PLAIN.upload_mib, metavar="MIB",
                        help="of a document's file (default: %(default)s)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Serves until it is told to end; 0, or 1 where the engine failed."""
    with meet() as together:
        if together.count > 1:
            raise InputError(
                f"rapid serve: expected one process, got {together.count}: requests reach one of them alone. Start a "
                "server for each host, behind a load balancer; mesh spreads a model over the devices of one process"
            )
        config, own = config_of(options), settings_of(options)
        if not 1 <= options.queue <= 1 << 16:
            raise InputError(f"--queue: expected 1 to {1 << 16}, got {options.queue}")
        keys = read_keys(options.api_key, os.environ)
        _check_packages()
        prepare_jax(programs=config.cache.programs, cache=cache_dir(config.cache.folder))
        from rapid_jax.engine.aside import NAME as ASIDE
        from rapid_jax.serve.server import WARM_UP, serve
        from rapid_jax.serve.service import Service

        warn_if_open(own, keys)
        service = Service(make_engine(config, options), config, own, keys)
        status = serve(service, lambda text: say(f"rapid serve: {text}"))
        if any(thread.name in (WARM_UP, ASIDE) for thread in threading.enumerate()):
            # Python would end that thread inside of XLA's compiler, or as it writes, which aborts the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


def settings_of(options: argparse.Namespace) -> ServeSettings:
    """Where to listen, and the limits."""
    return ServeSettings(
        host=options.host,
        port=options.port,
        drain_seconds=options.drain,
        body_mib=options.max_body,
        upload_mib=options.max_upload,
        hosts=tuple(name.lower() for name in options.allow_host),
    )


def _wholes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers with commas, got {text!r}") from error


def warn_if_open(own: ServeSettings, keys: Keys) -> None:
    """Says so where anyone on the network may ask, and read what others handed in."""
    if not keys and not own.local:
        say(f"rapid serve: open to everyone who reaches {own.host}: --api-key FILE or ${VARIABLE} closes it")


def make_engine(config: RapidConfig, options: argparse.Namespace) -> "Engine":
    """An engine with its target loaded, as the options want it."""
    from rapid_jax.engine.models import Models
    from rapid_jax.engine.service import RunningEngine
    from rapid_jax.engine.warm_up import WarmUp

    warm = WarmUp(options.warm_tokens, options.warm_rows, options.warm_documents, options.warm_chats)
    more = {"queue": options.queue, "warm": warm, "documents": options.documents}
    engine = RunningEngine(config, Models(config, quiet=options.quiet), **more)
    # Made here, by one thread: while the engine warms up, others may ask for them.
    _ = engine.documents, engine.stats()
    return cast("Engine", engine)  # its cached properties are properties to all but the type checker


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"rapid serve needs {', '.join(missing)}: {extra('serve')}")
