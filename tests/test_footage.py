"""What clips begin with: pictures made to fit, and the frames of a video that another frame rate asks for."""

import types
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from rfjax import footage
from rfjax.errors import UserError


def save_video(path, levels, fps, size=(32, 48)):
    """A lossless video whose frame n has grey level levels[n]."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *size, "rgb24"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def levels(frames):
    return [int(np.median(frame)) for frame in frames]


@pytest.mark.parametrize("fps, source", [(16, 16), (16, 30), (16, 8), (16, 24)])
def test_frames_are_those_shown_at_the_clip_s_own_times(tmp_path, fps, source):
    save_video(tmp_path / "a.mp4", range(40), source)
    shown = levels(footage.read_video(tmp_path / "a.mp4", (16, 16), fps, "crop", 1, 1)[0])
    assert shown == [n * source // fps for n in range(-(-40 * fps // source))]


@pytest.mark.parametrize("frames, used", [(9, 9), (20, 9), (21, 21), (50, 45)])
def test_whole_blocks_from_the_end_are_used(tmp_path, frames, used):
    save_video(tmp_path / "a.mp4", range(frames), 16)
    shown, count = footage.read_video(tmp_path / "a.mp4", (16, 16), 16, "crop", 9, 12)
    assert levels(shown) == list(range(frames - used, frames)) and count == used


def test_video_shorter_than_a_block_is_refused(tmp_path):
    save_video(tmp_path / "a.mp4", range(8), 16)
    with pytest.raises(UserError, match="has 8 frames at 16 a second, and the first block takes 9"):
        footage.read_video(tmp_path / "a.mp4", (16, 16), 16, "crop", 9, 12)


def test_damaged_and_missing_videos_are_one_sentence(tmp_path):
    save_video(tmp_path / "a.mp4", range(30), 16)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(whole[: len(whole) // 2])
    for name in ("a.mp4", "none.mp4"):
        with pytest.raises(UserError, match=f"Cannot read the video .*{name}"):
            footage.read_video(tmp_path / name, (16, 16), 16, "crop", 9, 12)


def test_pictures_that_are_damaged_further_on_or_too_large_are_one_sentence(tmp_path, monkeypatch):
    path, noise = tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    path.write_bytes(whole[:second] + b"\0\1\2\3" + whole[second + 4 :])
    with pytest.raises(UserError, match="a.png"):
        footage.read_picture(path, (16, 16), "crop")
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="a.png has too many pixels"):
        footage.read_picture(path, (16, 16), "crop")


def test_frames_without_times_are_refused():
    frame = types.SimpleNamespace(pts=None, time_base=Fraction(1, 16))
    with pytest.raises(UserError, match="has no time; put it into an mp4 file first"):
        list(footage._resampled([frame], Fraction(16), Fraction(1, 16)))


def test_sound_without_pictures_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="has no video in it"):
        footage.read_video(tmp_path / "a.wav", (16, 16), 16, "crop", 9, 12)


def test_a_picture_of_other_sides_is_cropped_or_gets_bars():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20, 0], wide[:, 20:40, 1], wide[:, 40:, 2] = 200, 200, 200
    cropped = footage.fit(Image.fromarray(wide), (20, 20), "crop")
    np.testing.assert_array_equal(cropped, wide[:, 20:40])
    whole = footage.fit(Image.fromarray(wide), (60, 60), "letterbox")
    np.testing.assert_array_equal(whole[20:40], wide)
    assert not whole[:20].any() and not whole[40:].any()


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    for mode in ("L", "LA", "P", "RGBA"):
        Image.new(mode, (8, 8)).save(tmp_path / "a.png")
        assert footage.read_picture(tmp_path / "a.png", (4, 4), "crop").shape == (4, 4, 3)


def test_grey_of_sixteen_bits_keeps_its_values(tmp_path):
    Image.fromarray(np.full((8, 8), 0x4060, np.uint16)).save(tmp_path / "a.png")
    assert (footage.read_picture(tmp_path / "a.png", (4, 4), "crop") == 0x40).all()


def test_a_picture_of_floats_is_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="a.tiff is no picture that can be read"):
        footage.read_picture(tmp_path / "a.tiff", (4, 4), "crop")


@pytest.mark.parametrize("angle, brightest", [(0, "left"), (90, "bottom"), (-90, "top"), (180, "right")])
def test_a_frame_is_turned_as_its_file_says(angle, brightest):
    """By so many degrees against the clock."""
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :8] = 255
    frame = types.SimpleNamespace(to_image=lambda: Image.fromarray(picture), rotation=angle)
    shown = np.asarray(footage.upright(frame))
    assert shown.shape[:2] == ((20, 30) if angle in (0, 180) else (30, 20))
    edges = {"left": shown[:, 0], "right": shown[:, -1], "top": shown[0], "bottom": shown[-1]}
    assert max(edges, key=lambda side: edges[side].mean()) == brightest
