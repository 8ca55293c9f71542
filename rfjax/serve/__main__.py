"""Streams for several viewers in their browsers, prompted while they play.

    python -m rfjax.serve --port 8000

Then open http://127.0.0.1:8000. docs/serve.md describes the page, the limits, and what is told over the socket.
"""

import argparse
import math
import os
import re
from pathlib import Path

from rfjax.errors import Parser, UserError, exit_cleanly

CONFIG = Path(__file__).parents[2] / "configs/shapes.py"
LOCAL = ("127.0.0.1", "localhost", "::1")
TOKEN = "RFJAX_TOKEN"  # the variable, so that it need not be in the list of processes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rfjax.serve",
        description=__doc__,
    )
    add = parser.add_argument
    add("--config", default=str(CONFIG), help="Python file with get_config() (default configs/shapes.py)")
    add(
        "--weights",
        metavar="random|DIR|HUB_ID",
        help="weights as sample.py takes them (default: config.weights), or random numbers",
    )
    add("--limit", type=int, default=4, metavar="N", help="streams at a time (default %(default)s)")
    add(
        "--policy",
        metavar="WORDS",
        help="what a new prompt does to what is under way: keep, renoise:M, recache, crossfade:K, or several joined by +",
    )
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)")
    add("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    add(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="a page's origin that may connect besides this server's own, like https://example.org; may be given several times",
    )
    add(
        "--token",
        default=os.environ.get(TOKEN),
        help=f"what viewers must show (default ${TOKEN}, or nothing)",
    )
    add(
        "--idle",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="after which a silent viewer is closed (default %(default)g)",
    )
    add("--compile_cache", metavar="DIR", help="where compiled programs are kept (default: as sample.py)")
    add("--skip_preflight", action="store_true", help="go ahead even if memory will probably not do")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """UserError for numbers and words that cannot be."""
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}.")
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be from 0 to {2**16 - 1}, not {args.port}.")
    if not (math.isfinite(args.idle) and args.idle > 0):
        raise UserError(f"--idle must be a positive number of seconds, not {args.idle}.")
    for origin in args.origin:
        if not re.fullmatch(r"https?://[^/\s]+", origin):
            raise UserError(f"--origin is like https://example.org, without a path, not {origin}.")
    if args.token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{8,128}", args.token):
        raise UserError(
            "The token must have 8 to 128 letters, digits, - and _: python -c 'import secrets; print(secrets.token_urlsafe())'."
        )


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        from rfjax.serve import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "prometheus_client",
            "starlette",
            "uvicorn",
            "websockets",
        ):
            raise
        raise UserError(
            f"The server needs {error.name}; install it with: pip install -e '.[serve]'."
        ) from error
    listener = run.listen(args.host, args.port)  # a port that is taken is told before the weights are read
    if args.host not in LOCAL and not (args.token and args.origin):
        print(
            "Other machines can come in: --token keeps strangers out, --origin names where they find the page."
        )
    from rfjax.serve import model

    live, hello = model.load(args)
    run.serve(live, hello, listener, args.token, tuple(args.origin))


if __name__ == "__main__":
    main()
