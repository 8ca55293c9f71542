"""8 bits: values, products and the cache against their closed forms, the network against qwix's own, refusals in a sentence."""

import dataclasses
import functools
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import tiny

import sample
from rfjax import cache, config, dit, flow, parameters, parity, quantize, rollout, sampler, teacher
from rfjax.bench import __main__ as bench
from rfjax.bench import eight_bits
from rfjax.dit import KV
from rfjax.errors import UserError
from rfjax.golden import Golden
from rfjax.preflight import __main__ as preflight
from rfjax.rollout import Model, RolloutConfig
from rfjax.stream import Stream
from rfjax.tree import flatten

ROOT = Path(__file__).parents[1]
DTYPES = quantize.DTYPES[1:]
KERNELS = {
    f"blocks/{name}/kernel" for name in ("self_q self_k self_v self_o cross_q cross_o ffn_in ffn_out").split()
}


def int8(x, over):
    """(whole numbers, scales) by the definition."""
    scale = np.abs(x).max(over, keepdims=True) / 127.5
    return np.clip(np.rint(x / scale), -128, 127), scale


def bytes_of(parameters):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(parameters))


@pytest.mark.parametrize("over", [-1, 0])
def test_int8_is_off_by_half_a_step_at_most(over):
    x = tiny.normal(0, 5, 7, 12) * np.exp(tiny.normal(1, 5, 7, 1))
    q = quantize.quantized(x, "int8", over)
    values, scale = int8(x, over)
    assert q.qvalue.dtype == jnp.int8 and q.scale.dtype == jnp.float32
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    inner = np.abs(values) < 127  # 127.5, the largest, may be rounded either way
    np.testing.assert_array_equal(q.qvalue[inner], values[inner])
    off = np.abs(quantize.plain(q, jnp.float32) - x)
    assert (off <= 0.5001 * scale).all() and off.max() > 0.4 * scale.min()


def test_fp8_keeps_three_bits_of_a_fraction():
    x = tiny.normal(2, 6, 40)
    q = quantize.quantized(x, quantize.FP8)
    scale = np.abs(x).max(-1, keepdims=True) / 448
    off = np.abs(quantize.plain(q, jnp.float32) - x)
    assert q.qvalue.dtype == jnp.float8_e4m3fn
    assert (off <= np.maximum(np.abs(x) / 16, scale * 2.0**-10) * 1.0001).all()


def test_zeros_stay_zeros():
    for dtype in DTYPES:
        assert not np.asarray(quantize.plain(quantize.quantized(jnp.zeros((2, 3)), dtype), jnp.float32)).any()


def test_a_product_is_one_of_whole_numbers():
    x, kernel = tiny.normal(3, 2, 3, 4, 8), tiny.normal(4, 8, 5)
    dimensions = (((3,), (0,)), ((), ()))
    a, b = quantize.quantized(x, "int8"), quantize.quantized(kernel, "int8", 0)
    ours = quantize.dot_general(jnp.asarray(x), b, dimensions)
    whole = np.asarray(a.qvalue, int) @ np.asarray(b.qvalue, int)
    np.testing.assert_allclose(ours, whole * np.asarray(a.scale) * np.asarray(b.scale), rtol=1e-5)
    np.testing.assert_allclose(ours, x @ kernel, atol=0.1)


def test_products_come_back_in_bfloat16_from_float32_scales():
    x, kernel = tiny.normal(3, 4, 8), quantize.quantized(tiny.normal(4, 8, 5), "int8", 0)
    half = jnp.asarray(x, jnp.bfloat16)
    ours = quantize.dot_general(half, kernel, (((1,), (0,)), ((), ())))
    exact = quantize.dot_general(half.astype(jnp.float32), kernel, (((1,), (0,)), ((), ())))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, exact.astype(jnp.bfloat16))


def test_the_kernels_of_the_layers_are_quantised_and_nothing_else():
    plain, ours = tiny.params(), quantize.params(tiny.params(), "int8")
    was, now = flatten(plain), flatten(ours)
    assert {path for path in now if quantize.is_quantized(now[path])} == KERNELS
    assert all(now[path] is was[path] for path in was.keys() - KERNELS)
    for path in KERNELS:  # a byte a weight, and a scale for each layer and output
        layers, _, outputs = was[path].shape
        assert bytes_of(now[path]) == was[path].size + 4 * layers * outputs


@functools.cache
def network():
    """(network, parameters, inputs) of the public implementation's bidirectional numbers, and its flow."""
    golden = Golden(ROOT / "tests/golden")
    arrays, parameters = golden.arrays("bidirectional"), parity.dit_params(golden, "bidirectional_dit")
    inputs = arrays.latents("x"), arrays.take("timestep", "B"), arrays.context("context")
    return golden.dit, parameters, inputs, arrays.latents("flow")


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("dtype, most", [("int8", 0.01), ("float8_e4m3fn", 0.04)])
def test_the_network_against_the_public_flow_and_qwix(dtype, most):
    """Off from the public numbers by little, and the same as if qwix had intercepted the products."""
    net, parameters, inputs, flow = network()
    ours = parity.predict_flow(net, quantize.params(parameters, dtype), *inputs)
    assert 1e-3 < relative(ours, flow) < most
    with jax.numpy_dtype_promotion("standard"):
        theirs = by_interception(net, parameters, inputs, dtype)
    assert relative(ours, theirs) < 1e-5


def by_interception(net, parameters, inputs, dtype):
    """The flow of a network that knows nothing of 8 bits, its products quantised by qwix as they are traced."""
    layers = "blocks/((self|cross)_[qkvo]|ffn_(in|out))"
    rules = [qwix.QtRule(module_path=layers, weight_qtype=dtype, act_qtype=dtype)]
    other = qwix.quantize_model(net, qwix.QtProvider(rules), methods=("__call__", "text_kv"))
    return jax.jit(functools.partial(teacher.predict_flow, other))(parameters, *inputs)


# The cache


@pytest.mark.parametrize("sizes", [(1, 7, 7), (2, 4, 5)])
def test_the_cache_keeps_the_same_blocks_in_8_bits(sizes):
    written = {b: KV(*(jnp.asarray(tiny.normal((b, i), 2, 1, 6, 2, 12)) for i in (0, 1))) for b in range(17)}
    plain = cache.init(cache.CacheConfig(*sizes), tiny.CONFIG, 1, 6)
    ours = cache.init(cache.CacheConfig(*sizes, int8=True), tiny.CONFIG, 1, 6)
    assert bytes_of(ours.kv) == plain.kv.k.size * 2 * (1 + 4 / 12)
    store = jax.jit(cache.write)
    for block, kv in written.items():
        plain, ours = (store(state, jnp.int32(block), kv) for state in (plain, ours))
        np.testing.assert_array_equal(ours.block, plain.block)
    past, expected = (cache.read_clean(state, jnp.int32(17), 3, True) for state in (ours, plain))
    np.testing.assert_array_equal(past.slots, expected.slots)
    np.testing.assert_array_equal(past.positions, expected.positions)
    for kept, exact in zip(dit.seen(past.kv, past.slots), dit.seen(expected.kv, expected.slots), strict=True):
        half_steps = np.abs(exact).max(-1, keepdims=True) / 255
        assert (np.abs(quantize.plain(kept, jnp.float32) - exact) <= 1.001 * half_steps).all()


def rounding(state, block, kv, when=True):
    """`cache.write` of what 8 bits keep, in full width."""

    def rounded(x):
        scale = jnp.maximum(jnp.abs(x).max(-1, keepdims=True), 1e-12) / 127.5
        return jnp.clip(jnp.round(x / scale), -128, 127) * scale

    return cache.write(state, block, KV(*map(rounded, kv)), when)


def test_a_stream_with_it_is_one_that_remembers_rounded_keys():
    roll = RolloutConfig((1000, 500), 5.0, 1, 1, 4, 4)
    model = tiny.model(dataclasses.replace(roll, int8_cache=True))
    rounded = cache.SINK_RING._replace(write=rounding)
    other = Model(model.dit, model.params, model.text_kv, roll, rounded)
    keys = jax.random.split(jax.random.PRNGKey(0), 1)

    def clip(model):
        blocks = Stream(model, keys, (1, *tiny.FRAME), "rolling", 7)
        return np.concatenate([np.asarray(block) for block in blocks], 1)

    kept, rounded, exact = map(clip, (model, other, tiny.model(roll)))
    gap, effect = np.abs(kept - rounded), np.abs(kept - exact)
    # The largest number of a token, where negative, lies between two numbers of 8 bits, and may fall to either: the two
    # programs differ in the last bit before.
    assert gap.mean() < 0.2 * effect.mean()


# What `python -m rfjax.bench quantize` tells


@functools.cache
def midway():
    """The tiny world's sampler with random weights, and a state in the middle of its stream."""
    model = sampler.load(config.load(str(ROOT / "configs/tiny.py")), sampler.RANDOM)
    return model, eight_bits.midway(model, ["a"])


def test_the_table_s_errors_are_of_what_8_bits_change():
    model, state = midway()
    full = model.params["dit"]

    def window(params, int8_cache=False):
        return eight_bits.window_flow(eight_bits.changed(model, params, int8_cache).bind(["a"]), state)

    exact = window(full)
    x0 = (
        state.window - flow.sigma_like(jnp.asarray(model.rollout.timesteps[::-1].copy())[None], exact) * exact
    )
    _, theirs = rollout.METHODS["rolling"].step(
        model.bind(["a"]), lambda block, step: state.window[:, -1], rollout.ENDLESS, state, steady=True
    )
    np.testing.assert_allclose(x0[:, 0], theirs, atol=1e-5)  # it is the window that the stream sees next
    small, large = (
        eight_bits.relative(window(*kept), exact) for kept in ((full, True), (quantize.params(full, "int8"),))
    )
    assert 0 < small < large < 0.1


def test_errors_are_of_exact_products_whatever_the_device_does_by_itself():
    """On CPU there is one precision, so this is read from the program."""
    model, state = midway()
    with jax.default_matmul_precision("default"):
        bound = model.bind(["a"])
        flows = eight_bits.window_flow, eight_bits.window_flow.__wrapped__
        texts = [str(jax.make_jaxpr(flow)(bound, state)) for flow in flows]
    asked, usual = (re.findall(r"dot_general\[.*?precision=\(Precision\.(\w+)", text, re.S) for text in texts)
    assert len(asked) == len(usual) and "DEFAULT" in usual
    assert set(asked) == {"HIGHEST"}


def test_a_group_is_in_8_bits_alone():
    kernels = {}
    for name, group in eight_bits.GROUPS.items():
        changed = flatten(eight_bits.alone(tiny.params(), group, "int8"))
        kernels[name] = {path for path, x in changed.items() if quantize.is_quantized(x)}
    assert kernels["self_q, self_k"] == {"blocks/self_q/kernel", "blocks/self_k/kernel"}
    assert all(kernels.values()) and sum(map(len, kernels.values())) == len(set().union(*kernels.values()))
    of_layers = set().union(*(paths for paths in kernels.values() if min(paths).startswith("blocks/")))
    assert of_layers == KERNELS


def test_the_public_network_s_errors():
    golden = Golden(ROOT / "tests/golden")
    assert max(eight_bits.golden_errors(golden, quantize.Mode("", False))) < 1e-5
    exact, of_cache = eight_bits.golden_errors(golden, quantize.MODES["kv8"])
    assert exact < 1e-5 < of_cache < 1e-3
    assert 1e-3 < min(eight_bits.golden_errors(golden, quantize.MODES["int8"])) < 0.02


# Modes


def test_a_sampler_holds_what_its_mode_says():
    settings = config.load(str(ROOT / "configs/shapes.py"))
    model, full = sampler.load(settings, quantize="int8+kv8"), sampler.load(settings)
    assert model.rollout.int8_cache and not full.rollout.int8_cache
    shapes = parameters.abstract("dit", model.dit.config)
    jax.tree.map(lambda x, like: np.testing.assert_(x.shape == like.shape), model.params["dit"], shapes)
    layers, was = (bytes_of(m.params["dit"]["blocks"]) for m in (model, full))
    assert layers < 0.27 * was
    assert quantize.configured(settings, "fp8").dit.linear_dtype == quantize.FP8 and settings.dit == (
        config.load(str(ROOT / "configs/shapes.py")).dit
    )


def device(platform, kind, **more):
    return types.SimpleNamespace(platform=platform, device_kind=kind, **more)


@pytest.mark.parametrize(
    "chip, fits",
    [
        (device("tpu", "TPU v5 lite"), False),
        (device("tpu", "TPU v6 lite"), False),
        (device("tpu", "TPU7x"), True),
        (device("gpu", "NVIDIA A100", compute_capability="8.0"), False),
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), True),
        (device("gpu", "NVIDIA B200", compute_capability="10.0"), True),
        (device("gpu", "AMD", compute_capability="gfx90a"), False),
        (device("cpu", "cpu"), True),
    ],
    ids=lambda value: getattr(value, "device_kind", ""),
)
def test_fp8_where_the_chip_multiplies_it(chip, fits):
    for mode in ("int8", "kv8"):
        quantize.check(quantize.MODES[mode], chip)
    if fits:
        return quantize.check(quantize.MODES["fp8+kv8"], chip)
    with pytest.raises(UserError, match=rf"{chip.device_kind} has no products in fp8; .* int8\+kv8\."):
        quantize.check(quantize.MODES["fp8+kv8"], chip)


def test_what_is_missing_is_told(monkeypatch):
    settings = config.load(str(ROOT / "configs/shapes.py"))
    with pytest.raises(UserError, match="no quantisation 'int4'; give one of int8, fp8"):
        sampler.load(settings, quantize="int4")
    settings.dit.linear_dtype = "int4"
    with pytest.raises(UserError, match="config.dit is not valid: linear_dtype"):
        sampler.load(settings)
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[quantize\]'"):
        sampler.load(config.load(str(ROOT / "configs/shapes.py")), quantize="kv8")
    sampler.load(config.load(str(ROOT / "configs/shapes.py")))


@pytest.mark.parametrize("mode", ["int8", "kv8"])
@pytest.mark.parametrize("command, more", [(bench.main, ["--parts", "stream"]), (preflight.main, [])])
def test_without_qwix_every_command_says_what_to_install(command, more, mode, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qwix", None)
    tiny = ["--config", str(ROOT / "configs/tiny.py")]
    with pytest.raises(SystemExit) as stop:
        command(
            [*tiny, "--config.dit.num_layers=5", "--quantize", mode, *more]
        )  # sizes that no other test has traced
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and "pip install -e '.[quantize]'" in said


@pytest.mark.parametrize("name, value", [("--attention", "cudnn"), ("--attention", "splash")])
def test_sample_refuses_before_it_works(name, value, tmp_path, capsys):
    if jax.default_backend() != "cpu":
        pytest.skip("this machine has it")
    with pytest.raises(SystemExit) as stop:
        sample.main([name, value, "--out", str(tmp_path / "clip.mp4"), "--seconds", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "no " + value in said and "--attention takes auto, xla" in said
    assert not (tmp_path / "clip.mp4").exists()
