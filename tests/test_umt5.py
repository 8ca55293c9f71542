"""The UMT5 encoder's parts against T5's own definition, word for word; its numbers are in tests/test_parity.py."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import umt5
from rfjax.umt5 import UMT5, UMT5Config

TINY = UMT5Config(vocab_size=20, dim=8, attn_dim=12, ffn_dim=10, num_heads=2, num_layers=2, num_buckets=8)


def bucket(offset, buckets, most):
    """Of one offset, in whole numbers: the j-th wide bucket begins at the distance exact · (most / exact)^(j / wide)."""
    exact, wide = buckets // 4, buckets // 4
    place = distance = abs(offset)
    if distance >= exact:
        begun = [j for j in range(wide) if distance**wide * exact**j >= most**j * exact**wide]
        place = exact + max(begun)
    return place + (buckets // 2 if offset > 0 else 0)


@pytest.mark.parametrize("buckets, most", [(32, 128), (8, 128), (16, 64)])
def test_buckets_are_those_of_the_definition(buckets, most):
    length = 200
    got = umt5.relative_buckets(length, buckets, most)
    for query in (0, 7, 100, 199):
        wanted = [bucket(key - query, buckets, most) for key in range(length)]
        assert list(got[query]) == wanted
    assert got.max() == buckets - 1 and math.prod(got.shape) == length**2


@pytest.fixture(scope="module")
def encoder():
    params = umt5.init(TINY, jax.random.key(0))
    return jax.jit(lambda ids, mask: umt5.prompt_features(UMT5(TINY), params, ids, mask))


def test_padding_is_zero_and_changes_nothing(encoder):
    ids = np.arange(1, 13, dtype=np.int32).reshape(1, 12)
    mask = np.arange(12)[None] < 7
    short = encoder(ids[:, :7], mask[:, :7])
    out = encoder(ids, mask)
    np.testing.assert_allclose(out[:, :7], short, atol=1e-5)
    assert not np.asarray(out[:, 7:]).any() and np.asarray(short).any()
    np.testing.assert_array_equal(encoder(np.where(mask, ids, 19), mask), out)


def test_order_of_words_matters(encoder):
    mask = np.ones((1, 3), bool)
    there, back = (encoder(jnp.asarray([ids], jnp.int32), mask) for ids in ([4, 5, 6], [6, 5, 4]))
    assert np.abs(np.asarray(there - back[:, ::-1])).max() > 1e-3


@pytest.mark.parametrize("field, value", [("num_heads", 5), ("num_buckets", 6)])
def test_sizes_that_do_not_fit_are_told(field, value):
    with pytest.raises(ValueError, match="attn_dim 12" if field == "num_heads" else "num_buckets is 6"):
        UMT5Config(**TINY.__dict__ | {field: value})
