"""The word encoder against its closed form, and what it refuses."""

import numpy as np
import pytest

from rfjax import shapes, text
from rfjax.errors import UserError

ENCODER = text.WordEncoder()


def test_every_word_of_the_world_is_known_and_no_other():
    captions = [
        shapes.caption(shapes.sample_scene(index, 0, shapes.World(objects=2), split))
        for index in range(200)
        for split in shapes.SPLITS
    ]
    assert {word for caption in captions for word in caption.split()} == set(text.VOCABULARY)
    assert max(len(caption.split()) for caption in captions) <= ENCODER.text_len
    assert ENCODER.encode(captions).shape == (400, ENCODER.text_len, ENCODER.text_dim)


def test_features_are_word_and_position():
    words = "a red star drifting over an orange background".split()
    features = ENCODER.encode([" ".join(words)])[0]
    assert features.dtype == np.float32
    for place, word in enumerate(words):
        expected = np.zeros(ENCODER.text_dim)
        expected[text.VOCABULARY.index(word)] = 12**0.5
        for i in range(12):
            expected[-24 + i] = np.cos(place * 100 ** (-i / 12))
            expected[-12 + i] = np.sin(place * 100 ** (-i / 12))
        np.testing.assert_allclose(features[place], expected, atol=1e-6)
    assert not features[len(words) :].any()


def test_case_and_punctuation_are_forgiven():
    plain, shouted = ENCODER.encode(["a red star over a background", "  A RED star,\tover a background. "])
    np.testing.assert_array_equal(plain, shouted)


def test_same_words_bound_otherwise_differ():
    one, other = ENCODER.encode(
        ["a red star bouncing and a blue circle bouncing over a pink background"]
        + ["a blue star bouncing and a red circle bouncing over a pink background"]
    )
    assert set(map(bytes, one)) != set(map(bytes, other))  # even as bags of features


def test_unconditional_is_zeros():
    assert (
        not ENCODER.unconditional(3).any()
        and ENCODER.unconditional(3).shape == ENCODER.encode(["a"] * 3).shape
    )


@pytest.mark.parametrize(
    ("caption", "says"),
    [
        ("", "empty"),
        (" .,! ", "empty"),
        ("a red dragon", "dragon.*known words.*circle"),
        ("a " * 17, "17 words"),
    ],
)
def test_bad_prompts_are_refused(caption, says):
    with pytest.raises(UserError, match=says):
        ENCODER.encode([caption])


def test_too_narrow_features_are_refused():
    with pytest.raises(UserError, match="text_dim"):
        text.WordEncoder(text_dim=32)
