"""Makes data sets: `python -m rfjax.data COMMAND [SOURCE] --config FILE`.

    latents                  clips of the small world through the VAE      {"caption", "latents" [F, h, w, C]}
    encode-videos FOLDER     videos of your own through the VAE            {"caption", "context" [n, text_dim], "latents"}
    encode-prompts FILE      prompts, one a line, through the text encoder {"caption", "context"}
    ode-pairs                the teacher's guided trajectories             {"caption", "context", "trajectory" [S + 1, F, h, w, C]}

All go shard by shard, skip shards that are there, and so go on after a stop. Of several processes with one folder (SLURM and Open
MPI are noticed, on a TPU pod give --distributed), each makes its share of the shards. They go to config.data; those of
encode-prompts to config.prompts where the config has both. A field of the config is changed by `--config.data=FOLDER`.
"""

import contextlib
from pathlib import Path

from rfjax import checkpoint, compilation, config, data, datasets, distributed, files
from rfjax.errors import Parser, UserError, exit_cleanly
from rfjax.stages import latent

COMMANDS = {
    "latents": datasets.clip_latents,
    "encode-videos": datasets.encoded_videos,
    "encode-prompts": datasets.encoded_prompts,
    "ode-pairs": datasets.ode_pairs,
}
NEEDS = {  # settings without which a command cannot work
    "latents": ("data", "record_frames", "record_batch", "shard_records", "shards"),
    "encode-videos": ("data", "record_frames", "record_batch", "vae_weights"),
    "encode-prompts": (),
    "ode-pairs": ("data", "record_frames", "record_batch", "shard_records", "shards", "teacher", "guidance"),
}
SOURCES = {"encode-videos": "FOLDER", "encode-prompts": "FILE"}


@exit_cleanly
def main() -> None:
    parser = Parser(
        prog="python -m rfjax.data",
        description=__doc__,
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("source", nargs="?", help="encode-videos: a folder; encode-prompts: a text file")
    parser.add_argument("--config", required=True, help="a stage's config, which names the folder")
    parser.add_argument(
        "--shards", type=int, help="how many files latents and ode-pairs make (default config.shards)"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="this is one of several processes, as on a TPU pod"
    )
    args, rest = parser.parse_known_args()
    if args.what in SOURCES and (args.source is None or args.shards is not None):
        raise UserError(f"Write `python -m rfjax.data {args.what} {SOURCES[args.what]} --config FILE`.")
    if args.what not in SOURCES and args.source is not None:
        raise UserError(f"{args.what} makes its records from the config alone; leave {args.source!r} out.")
    compilation.keep_programs()
    settings = config.changed(config.load(args.config), rest)
    if lacking := [name for name in NEEDS[args.what] if name not in settings]:
        raise UserError(
            f"{args.config} has no {', '.join(lacking)}, which {args.what} needs; give a config of the stage that reads them."
        )
    if args.shards is not None:
        settings.shards = args.shards
    config.check(settings)
    if args.distributed or distributed.detected():
        distributed.start()
    with distributed.together(), config.read_by(args.what, settings):
        run(args.what, settings, [args.source] if args.source else [])


def run(what: str, settings, source: list[str]) -> None:
    """Makes the data set `what`, or this process's share of it, and says what is there."""
    plan = COMMANDS[what](settings, *source)
    files.refuse_bucket(plan.folder)
    with contextlib.ExitStack() as stack:
        if distributed.is_main():
            Path(plan.folder).mkdir(parents=True, exist_ok=True)
            stack.enter_context(files.locked(Path(plan.folder), "name another folder in the config"))
            data.claim(plan.folder, {"command": what} | plan.about, plan.sources)
        if not distributed.seen(Path(plan.folder) / data.ABOUT):
            raise UserError(f"Not every process sees {plan.folder}; name a folder that all machines share.")
        make(plan, source)


def make(plan: datasets.Plan, source: list[str]) -> None:
    """Makes the shards of a folder that is claimed, or this process's share of them."""
    negative = Path(plan.folder) / latent.NEGATIVE
    if plan.negative and distributed.is_main() and not negative.exists():
        checkpoint.save_params(negative, {"context": plan.negative()})
    data.write_shards(plan.folder, plan.make, plan.shards)
    if plan.skipped:
        print("\n".join(plan.skipped))
        print(f"{len(plan.skipped)} sources gave no records, or not all that are in them.")
    data.wait_for(plan.folder, plan.shards)
    count = data.count(plan.folder)
    if distributed.agree(not count):  # all have counted, before what they count is removed
        if distributed.is_main():
            data.discard(plan.folder, latent.NEGATIVE)
        raise UserError(
            f"No clip came of {source[0]}, so nothing is kept in {plan.folder}; give longer videos."
        )
    distributed.tell(f"{count} records in {plan.shards} shards are in {plan.folder}/")


if __name__ == "__main__":
    main()
