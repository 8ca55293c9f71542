"""Text to video of any length, written while it is made.

    python sample.py --prompt "a large red circle bouncing over a blue background" --seconds 60 --out clip.mp4

An interrupted run leaves what it has as clip.partial.mp4, which plays.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rfjax import (
    STARTED,
    attention,
    change,
    compilation,
    config,
    files,
    footage,
    placement,
    preflight,
    quantize,
    sampler,
    script,
    shapes,
    video,
)
from rfjax.errors import Parser, UserError, exit_cleanly, interrupts
from rfjax.rollout import METHODS
from rfjax.stream import method_of

ROOT = Path(__file__).parent
LONGEST = 10**8  # seconds: what a stream can count


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_content(parser.add_argument_group("what to show"))
    add_output(parser.add_argument_group("what to write"))
    add_machinery(parser.add_argument_group("what makes it"))
    return parser.parse_args(argv)


def add_content(group) -> None:
    add = group.add_argument
    add("--prompt", action="append", default=[], help="what to show; may be given several times")
    add("--prompts_file", metavar="FILE", help="text file with one prompt a line")
    add("--script", metavar="FILE", help="text file with prompts at times: 0:00 …, then 0:20 …, a line each")
    add(
        "--change",
        metavar="POLICY",
        help=f"what a script's new prompt does: {change.WORDS} (default {change.DEFAULT})",
    )
    add("--num_samples", type=int, default=1, metavar="N", help="clips for each prompt")
    add("--seconds", type=float, help="length of the clips (default 10, of a script until 10 after its last)")
    begin = group.add_mutually_exclusive_group()
    begin.add_argument("--image", metavar="FILE", help="a picture that the clips begin with")
    begin.add_argument(
        "--video", metavar="FILE", help="a video that the clips go on from; --seconds counts it in"
    )
    add(
        "--fit",
        choices=footage.FITS,
        default="crop",
        help="how a picture or video of other sides is made to fit (default crop)",
    )
    add("--seed", type=int, default=0, help="another seed gives other clips")


def add_output(group) -> None:
    add = group.add_argument
    add(
        "--out",
        default="clip.mp4",
        help="*.mp4, *.gif, or folder/ for PNG files, replaced if there; several clips are numbered (default %(default)s)",
    )
    add("--contact_sheet", metavar="PNG", help="also draw frames over time in one picture")
    add(
        "--save_latents",
        metavar="NPZ",
        help="also save the latents [clip, frame, h, w, channel], which the host keeps until the end",
    )
    add("--size", metavar="WxH", help="width and height of the video (default: config.video)")
    add(
        "--scale", type=int, help="enlarge frames by a whole factor (default: short side at least 256 pixels)"
    )
    add("--crf", type=int, default=16, help="mp4 quality: 0 lossless … 51 worst (default %(default)s)")


def add_machinery(group) -> None:
    add = group.add_argument
    add("--config", default=str(ROOT / "configs/shapes.py"), help="Python file with get_config()")
    add(
        "--weights",
        metavar="DIR|HUB_ID",
        help="folder with dit.safetensors, vae.safetensors, …, or a repository of the hub (default: config.weights)",
    )
    add(
        "--method",
        choices=sorted(METHODS),
        help="how clips are rolled out (default: config.method, else rolling)",
    )
    add("--decoder", choices=("vae", "tiny"), help="what makes frames of latents (default: config.decoder)")
    add("--quantize", choices=quantize.MODES, help="8 bits for products, for the cache (kv8), or both")
    add("--attention", choices=attention.BACKENDS, help="its kernel (default: config.dit.attention)")
    add(
        "--devices",
        metavar="WHICH",
        help="like 4 or data=2,context=2,decoder=1 (docs/devices.md); default: one",
    )
    add("--skip_preflight", action="store_true", help="go ahead even if memory will probably not do")
    add(
        "--compile_cache",
        metavar="DIR",
        help="where compiled programs are kept (default $RFJAX_CACHE or ~/.cache/rfjax/jax)",
    )


def check_numbers(args: argparse.Namespace) -> None:
    if not 0 < args.seconds <= LONGEST:
        raise UserError(
            f"--seconds must be a positive number up to {LONGEST} (three years), not {args.seconds}."
        )
    if args.num_samples < 1:
        raise UserError(f"--num_samples must be at least 1, not {args.num_samples}.")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must lie between 0 and 2^32 - 1, not {args.seed}.")


def read_script(args: argparse.Namespace) -> list[script.Line]:
    """The lines of --script, if any; --seconds is filled in where it is not given, and --change read."""
    if args.change and not args.script:
        raise UserError("--change says what new prompts do; give it with --script.")
    args.change = change.parse(args.change or change.DEFAULT)
    if args.script is None:
        args.seconds = 10.0 if args.seconds is None else args.seconds
        return []
    if args.prompt or args.prompts_file:
        raise UserError("--script has all prompts; leave out --prompt and --prompts_file.")
    lines, args.seconds = script.read(args.script, args.seconds)
    return lines


def read_prompts(args: argparse.Namespace, default: str) -> list[str]:
    """One prompt a clip, from the command line, then the file, else the default, each num_samples times."""
    prompts = list(args.prompt)
    if args.prompts_file:
        prompts += files.prompts(args.prompts_file)
    elif not prompts:
        if not default:
            raise UserError(f"{args.config} has no prompt of its own; give --prompt.")
        prompts = [default]
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("A prompt is empty; say what to show, or leave --prompt out for an example.")
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def override(settings, args: argparse.Namespace):
    """The config with --decoder, --size, --attention and --quantize in it; UserError for what it cannot take."""
    if args.decoder == "tiny" and "tiny" not in settings:
        raise UserError(f"{args.config} has no tiny decoder; leave out --decoder.")
    if args.decoder:
        settings.decoder = args.decoder
    if args.size is not None:
        made_for = settings.video.height * settings.video.width
        known = f"{settings.video.width}x{settings.video.height}"
        sampler.resize(settings, args.size)
        times = settings.video.height * settings.video.width / made_for
        if not 0.5 <= times <= 2:
            longer = ", takes at least as many times as long," * (times > 2)
            print(
                f"Note: {args.config} is for {known}; {args.size} has {times:.2g} times its pixels{longer} and is probably "
                "no size that the model has seen.",
                file=sys.stderr,
            )
    args.method = method_of(settings, args.method)
    if args.attention:
        settings.dit.attention = args.attention
    return quantize.configured(settings, args.quantize) if args.quantize else settings


def read_given(args: argparse.Namespace, settings, total: int) -> Iterable[np.ndarray]:
    """The frames that all clips begin with, uint8 [1, H, W, 3]: none, a picture as long as a block, or a video.

    UserError if they fill the clip's `total` frames.
    """
    look, _, codec, roll = sampler.sections(settings)
    size, (first, later) = (look.height, look.width), sampler.block_lengths(codec, roll)
    if args.image:
        frames, count = [footage.read_picture(args.image, size, args.fit)] * first, first
    elif args.video:
        frames, count = footage.read_video(args.video, size, look.fps, args.fit, first, later)
    else:
        return ()
    if count >= total:
        raise UserError(
            f"What is given fills the clip: --seconds counts it in, so give more than {count / look.fps:.1f}."
        )
    return (frame[None] for frame in frames)


def numbered(path: str, clips: int) -> list[str]:
    """clip.mp4 → [clip.mp4], or for several clips [clip_0.mp4, clip_1.mp4, …]."""
    if clips == 1:
        return [path]
    stem, suffix = os.path.splitext(path.rstrip("/"))
    return [f"{stem}_{index}{suffix}{'/' * path.endswith('/')}" for index in range(clips)]


@contextlib.contextmanager
def latents_file(path: str | None):
    """A list for latent blocks [B, n, h, w, C], saved under `path` in the end; None without a path."""
    if path is None:
        yield None
        return
    if not path.endswith(".npz") or not os.path.isdir(Path(path).parent):
        raise UserError(f"--save_latents needs a name *.npz in a folder that exists, not {path}.")
    temporary = path.removesuffix(".npz") + ".partial.npz"
    with os.fdopen(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666), "wb") as file:
        files.lock(file.fileno(), temporary, "give another name")
        # Nobody else may have it until it has another name, or none; Windows has no locks, and renames no open file.
        release = file.flush if files.fcntl else file.close
        try:
            if os.fstat(file.fileno()).st_size:  # what a run that was killed left there
                file.truncate(0)
            blocks = []
            yield blocks
            np.savez(file, latents=np.concatenate(blocks, 1))
            release()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                release()
            Path(temporary).unlink(missing_ok=True)
            raise


def open_clips(
    args: argparse.Namespace, look: sampler.VideoConfig, clips: int, stack
) -> list[list[video.Writer]]:
    """The writers of each clip, opened before anything is computed so that a bad place shows at once."""
    if args.contact_sheet and (
        not args.contact_sheet.endswith(".png")
        or Path(args.contact_sheet).resolve() == Path(args.out).resolve()
    ):
        raise UserError(f"--contact_sheet needs a name *.png of its own, not {args.contact_sheet}.")
    names = [numbered(name, clips) for name in (args.out, args.contact_sheet) if name]
    keep_given(args.image or args.video, [Path(name) for name in itertools.chain(*names) if Path(name).name])
    options = dict(fps=look.fps, size=(look.height, look.width), scale=args.scale, crf=args.crf)
    return [
        [stack.enter_context(video.open_writer(name, **options)) for name in clip]
        for clip in zip(*names, strict=True)
    ]


def keep_given(given: str | None, targets: list[Path]) -> None:
    """UserError if what the clips begin with would be replaced by what is written."""
    for path in itertools.chain(targets, map(video.partial_of, targets)):
        if given and path.exists() and os.path.exists(given) and path.samefile(given):
            raise UserError(f"{path} would replace what the clip begins with; give another name to write to.")


def produce(blocks: Iterable[np.ndarray], clips: list[list[video.Writer]], total: int) -> tuple[float, float]:
    """Writes uint8 blocks [B, n, H, W, 3] as they come, up to `total` frames of each clip.

    Returns the seconds from the program's start until the first frames were written, and the frames a second after them.
    """
    done, first = 0, None
    with tqdm(total=total, unit=" frames", disable=None) as bar, interrupts() as check:
        for block in blocks:
            check()
            block = block[:, : total - done]
            for frames, writers in zip(block, clips, strict=True):
                for writer in writers:
                    writer.write(frames)
            done += block.shape[1]
            bar.update(block.shape[1])
            if first is None:
                written, at_first = time.perf_counter(), done
                first = written - STARTED
                bar.set_postfix_str(f"the first after {first:.1f} s")
    return first, (done - at_first) / max(time.perf_counter() - written, 1e-9)


def stream(
    args: argparse.Namespace, settings, prompts: list[str], lines: list[script.Line]
) -> tuple[list[list[video.Writer]], float, float]:
    """Opens the files, loads the sampler, fills the files. Returns the writers and what `produce` does.

    The clips begin with the prompts, and go on with those of a script's `lines`, if any.
    """
    look, network, _, roll = sampler.sections(settings)
    sampler.check(network, roll)
    devices = placement.parse(args.devices) if args.devices else placement.Devices()
    sampler.check_devices(settings, devices, len(prompts))
    total = max(1, round(args.seconds * look.fps))
    clips = []
    try:
        with contextlib.ExitStack() as stack:
            clips += open_clips(args, look, len(prompts), stack)
            collected = stack.enter_context(latents_file(args.save_latents))
            given = read_given(args, settings, total)
            if not args.skip_preflight:
                share = len(prompts) // devices.data  # of the clips, on each device
                preflight.check(settings, share, preflight.capacity(), args.method)
            model = sampler.load(settings, args.weights, given=bool(args.image or args.video))
            if args.devices:
                model = model.over(devices)
            if lines:
                script.check(lines, model)
            begin, recall = model.encode(given), args.change.recache
            clip = prompts, args.seed, model.latent_frames(total), args.method, begin, recall
            latents = script.play(lines, model, model.latents(*clip), len(prompts), args.change)
            if "umt5" not in settings:
                note_unlearnt([*prompts, *(line.prompt for line in lines[1:])])
            if not (args.prompt or args.prompts_file or args.script):
                print(f'No --prompt given: showing "{prompts[0]}".')
            return clips, *produce(model.decode(tee(latents, collected)), clips, total)
    except BaseException:
        for writer in itertools.chain(*clips):
            if writer.frames and writer.partial.exists():
                seconds = float(writer.frames / writer.fps)
                print(f"Stopped early; the first {seconds:.1f} s are in {writer.partial}", file=sys.stderr)
        raise


def note_unlearnt(prompts: list[str]) -> None:
    """Says of the small world's prompts which are no sentences as its models have learnt them, though all words are known."""
    for prompt in dict.fromkeys(prompts):
        try:
            shapes.parse(prompt)
        except UserError:
            print(
                f'Note: the model has learnt sentences such as "{shapes.EXAMPLE}"; "{prompt}" may show anything (of two colours '
                "the first is the object's).",
                file=sys.stderr,
            )


def tee(blocks: Iterable, collected: list | None) -> Iterator:
    """The same blocks, also put in the list where there is one, and there on the host when the next one comes."""
    for block in blocks:
        if collected is not None:
            collected[-1:] = [*map(np.asarray, collected[-1:]), block]
        yield block


@exit_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    lines = read_script(args)
    check_numbers(args)
    compilation.keep_programs(args.compile_cache)
    compile_seconds = compilation.stopwatch()
    settings = override(config.load(args.config), args)
    prompts = read_prompts(args, lines[0].prompt if lines else settings.get("prompt", ""))
    clips, first, rate = stream(args, settings, prompts, lines)
    for prompt, (clip, *_) in zip(prompts, clips, strict=True):
        story = "".join(f', from {line.seconds:g} s "{line.prompt}"' for line in lines[1:])
        print(f'{clip.path}: {clip.frames} frames, {float(clip.frames / clip.fps):.1f} s, "{prompt}"{story}')
    compiling = compile_seconds()
    then = f", then {rate:.1f} frames/s" if rate else ""  # none after the first block
    print(
        f"First frame {first:.1f} s after the start{then}; "
        f"compiling or loading programs took {compiling:.1f} s in all."
    )


if __name__ == "__main__":
    main()
