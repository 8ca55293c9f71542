"""The writers, read back by independent decoders: content, interruption, full disks, bad names."""

import errno
import os
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from rfjax import video
from rfjax.errors import UserError

FPS = 8


def moving_square(frames=20, size=(32, 48)):
    """uint8 [F, H, W, 3]: a saturated square on a graded background, one pixel a frame to the right."""
    clip = np.zeros((frames, *size, 3), np.uint8)
    clip[..., 2] = np.linspace(40, 200, size[1])
    for index, frame in enumerate(clip):
        frame[8:20, index : index + 12] = (230, 60, 20)
    return clip


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mean_error(a, b):
    return np.abs(a.astype(float) - b.astype(float)).mean()


def test_ctrl_c_within_the_containers_callback_is_not_lost(tmp_path, monkeypatch):
    class Interrupted(video._File):
        def write(self, data):
            os.kill(os.getpid(), signal.SIGINT)
            return super().write(data)

    clip, written = moving_square(), 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(video, "_File", Interrupted)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with video.open_writer(tmp_path / "clip.mp4", FPS, (32, 48), scale=1, crf=10) as writer:
                for frame in clip:
                    writer.write(frame[None])
                    written += 1
        finally:
            signal.signal(signal.SIGINT, before)
    assert written < len(clip) and len(decode(tmp_path / "clip.partial.mp4")) >= written


def test_mp4_gives_the_frames_back(tmp_path):
    clip = moving_square()
    with video.open_writer(tmp_path / "clip.mp4", FPS, (32, 48), scale=4, crf=10) as writer:
        for start in range(0, 20, 7):
            writer.write(clip[start : start + 7])
    assert os.listdir(tmp_path) == ["clip.mp4"]
    decoded = decode(tmp_path / "clip.mp4")
    assert decoded.shape == (20, 128, 192, 3)
    assert mean_error(decoded[:, 2::4, 2::4], clip) < 3
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == FPS


def test_gif_and_frames_give_the_frames_back(tmp_path):
    clip = moving_square()
    with video.open_writer(tmp_path / "clip.gif", FPS, (32, 48), scale=2) as writer:
        writer.write(clip)
    image = Image.open(tmp_path / "clip.gif")
    frames, seconds = [], 0.0
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB")))
        seconds += image.info["duration"] / 1000
    assert mean_error(np.stack(frames)[:, ::2, ::2], clip) < 4
    assert seconds == pytest.approx(20 / FPS, abs=0.1)
    with video.open_writer(f"{tmp_path}/frames/", FPS, (32, 48), scale=1) as writer:
        writer.write(clip)
    files = sorted((tmp_path / "frames").iterdir())
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), clip)


@pytest.mark.parametrize(
    "size, scale", [((64, 64), 4), ((480, 832), 1), ((45, 300), 6), ((85, 85), 4), ((257, 400), 2)]
)
def test_small_frames_are_enlarged_to_be_seen(size, scale):
    assert video.readable_scale(size) == scale


@pytest.mark.parametrize("frames, kept", [(1, 1), (32, 32), (33, 17), (64, 32), (200, 25)])
def test_contact_sheet_spreads_frames_over_time(tmp_path, frames, kept):
    with video.open_writer(tmp_path / "sheet.png", FPS, (8, 8)) as writer:
        for index in range(frames):
            writer.write(np.full((1, 8, 8, 3), index, np.uint8))
        shown = [frame[0, 0, 0] for _, frame in writer._kept]
    assert len(shown) == kept
    np.testing.assert_array_equal(shown, np.arange(0, frames, -(-frames // 32) if frames <= 64 else 8))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    second_row = writer.CELL + writer.LABEL + 2 * writer.GAP
    assert (
        (sheet[second_row, writer.GAP, 0] == shown[8]) if kept > 8 else len(sheet) < second_row + writer.CELL
    )


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png", "frames/"])
def test_interruption_keeps_what_is_written_and_what_was_there(tmp_path, name):
    target = tmp_path / name.rstrip("/")
    if name != "frames/":
        target.write_bytes(b"good")
    with pytest.raises(KeyboardInterrupt):
        with video.open_writer(f"{tmp_path}/{name}", FPS, (32, 48)) as writer:
            writer.write(moving_square(10))
            raise KeyboardInterrupt
    assert name == "frames/" or target.read_bytes() == b"good"
    if name in ("clip.mp4", "clip.gif"):
        assert len(decode(writer.partial)) == 10
    elif name == "clip.png":
        assert Image.open(writer.partial).size[0] > 8 * writer.CELL
    else:
        assert len(os.listdir(writer.partial)) == 10


def test_nothing_is_left_when_no_frame_came(tmp_path):
    for name in ("clip.mp4", "clip.gif", "clip.png", "frames/"):
        with pytest.raises(UserError):
            with video.open_writer(f"{tmp_path}/{name}", FPS, (32, 48)):
                raise UserError("no weights")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_what_an_earlier_run_left_stays_until_the_first_frame(tmp_path, name):
    left = video.partial_of(tmp_path / name)
    left.write_bytes(b"a film" * 10**5)
    with pytest.raises(UserError, match="no weights"):
        with video.open_writer(tmp_path / name, FPS, (32, 48)):
            raise UserError("no weights")
    assert left.read_bytes() == b"a film" * 10**5
    with video.open_writer(tmp_path / name, FPS, (32, 48)) as writer:
        writer.write(moving_square(10))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).stat().st_size < 10**5


def test_two_commands_do_not_write_to_one_file(tmp_path):
    with video.open_writer(tmp_path / "clip.mp4", FPS, (32, 48)) as writer:
        writer.write(moving_square(10))
        with pytest.raises(UserError, match="Another command writes to .*clip.partial.mp4 just now"):
            video.open_writer(tmp_path / "clip.mp4", FPS, (32, 48))
    assert len(decode(tmp_path / "clip.mp4")) == 10


def test_a_killed_run_leaves_a_playable_mp4(tmp_path):
    script = f"""
import os, signal, sys
import numpy as np
from rfjax import video
writer = video.open_writer({str(tmp_path / "clip.mp4")!r}, {FPS}, (32, 48))
writer.write(np.random.default_rng(0).integers(0, 255, ({4 * FPS}, 32, 48, 3), np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert len(decode(tmp_path / "clip.partial.mp4")) >= 3 * FPS


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.png"])
def test_full_disk_is_an_error_and_loses_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"good")
    stem, suffix = os.path.splitext(name)
    (tmp_path / f"{stem}.partial{suffix}").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        with video.open_writer(tmp_path / name, FPS, (32, 48)) as writer:
            writer.write(moving_square())
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / name).read_bytes() == b"good"


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("clip.avi", {}, r"clip\.avi.*\.mp4.*\.gif.*folder/"),
        ("clip", {}, r"\.mp4"),
        ("missing/clip.mp4", {}, "missing/ does not exist"),
        ("clip.mp4", {"size": (33, 48), "scale": 1}, "even"),
        ("clip.mp4", {"scale": 0}, "scale"),
        ("clip.mp4", {"size": (20000, 20000)}, "Frames of 20000 pixels are too large"),
        ("clip.mp4", {"scale": 400}, "frames of 19200 pixels; choose one of at most 341"),
        ("full/..", {}, "no place of its own"),
        ("clip.mp4", {"crf": 52}, "crf"),
        ("clip.mp4", {"fps": float("nan")}, "positive"),
        ("full/", {}, "already holds files"),
        ("full/photo.png/", {}, "photo.png is a file, not a folder"),
        ("x" * 300 + ".mp4", {}, "Cannot write"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path, name, options, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=says):
        video.open_writer(f"{tmp_path}/{name}", **{"fps": FPS, "size": (32, 48)} | options)
    assert os.listdir(tmp_path) == ["full"]


def test_one_folder_takes_one_command_at_a_time(tmp_path):
    first = video.open_writer(f"{tmp_path}/frames/", FPS, (32, 48))
    with pytest.raises(
        UserError, match="Another command writes to .*frames.partial just now; choose another folder"
    ):
        video.open_writer(f"{tmp_path}/frames/", FPS, (32, 48))
    with first as writer:
        writer.write(moving_square(2))
    assert len(os.listdir(tmp_path / "frames")) == 2


def test_too_many_open_files_leave_no_folder(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(video.files.os, "open", refuses)
        with pytest.raises(UserError, match="Too many open files; make fewer clips at a time"):
            video.open_writer(f"{tmp_path}/frames/", FPS, (32, 48))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, 524])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, number):
    def refuses(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(video.files.fcntl, "flock", refuses)
    with video.open_writer(tmp_path / "clip.mp4", FPS, (32, 48)) as writer:
        writer.write(moving_square(3))
    assert len(decode(tmp_path / "clip.mp4")) == 3
