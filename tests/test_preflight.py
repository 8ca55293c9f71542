"""The memory check: parts against counts by hand and against XLA, advice that holds, and the command."""

import functools
import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from ml_collections import ConfigDict

from rfjax import config, preflight, rollout, sampler
from rfjax.dit import DiT, DiTConfig
from rfjax.errors import UserError
from rfjax.preflight import __main__ as command
from rfjax.preflight import estimate
from rfjax.stream import stream_step
from rfjax.tiny_vae import TinyDecoder, TinyVAEConfig
from rfjax.vae import VAE, VAEConfig

QUICK = {
    "xla_backend_optimization_level": 0
}  # the code is never run, and where its arrays lie stays the same
WAN = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30, "text_dim": 4096, "text_len": 512}


def small(dtype="float32", decoder="vae", **sections):
    """Latents of 4×6×3 as in tests/tiny.py, from a video of 16×24."""
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "freq_dim")
    vae = {"dim": 8, "z_dim": 3, "dim_mult": (1, 2, 2), "temporal_downsample": (True, True)}
    settings = ConfigDict(
        {
            "video": {"height": 16, "width": 24, "fps": 8},
            "dit": {name: getattr(tiny.CONFIG, name) for name in names} | {"dtype": dtype},
            "vae": vae | {"num_res_blocks": 1, "dtype": dtype},
            "tiny": {"z_dim": 3, "widths": (16, 8, 8), "temporal_upsample": (True, True), "dtype": dtype},
            "decoder": decoder,
            "rollout": {},
        }
    )
    settings.update(sections)
    return settings


def wan(dtype, decoder):
    return ConfigDict(
        {
            "video": {"height": 480, "width": 832, "fps": 16},
            "dit": WAN | {"dtype": dtype},
            "vae": {"dim": 96, "dtype": dtype},
            "tiny": {"dtype": dtype},
            "decoder": decoder,
            "rollout": {},
        }
    )


def abstract(tree, dtype):
    """Statistics of the VAE stay float32, as the sampler keeps them."""
    return jax.tree.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, "float32" if "latent" in path[-1].key else dtype),
        tree,
    )


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Parts


def transformer_numbers(c):
    square, patch = c.dim * c.dim + c.dim, 4 * c.in_dim
    outside = (patch + c.freq_dim + c.text_dim + 3) * c.dim + 2 * square + 6 * square
    outside += 2 * c.dim + c.dim * patch + patch
    text = 2 * square + c.dim
    mlp = 2 * c.dim * c.ffn_dim + c.ffn_dim + c.dim
    block = 6 * c.dim + 4 * square + 2 * c.dim + 2 * c.dim + 2 * square + c.dim + mlp
    return outside + c.num_layers * (text + block)


def tiny_decoder_numbers(c):
    numbers = 9 * c.z_dim * c.widths[0] + c.widths[0] + 9 * c.widths[-1] * 3 + 3
    for level, doubles in enumerate(c.temporal_upsample):
        n, following = c.widths[level : level + 2]
        numbers += 3 * (9 * 2 * n * n + 2 * 9 * n * n + 3 * n)  # memory blocks
        numbers += n * n * (1 + doubles) + 9 * n * following
    return numbers


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
def test_parameters_are_counted_by_hand(dtype, width):
    settings = small(dtype, "tiny")
    network, decoder = DiTConfig(**settings.dit), TinyVAEConfig(**settings.tiny)
    numbers = transformer_numbers(network) + tiny_decoder_numbers(decoder)
    assert preflight.need(settings, 3).parameters == numbers * width


def test_statistics_of_the_vae_stay_float32():
    settings = small("bfloat16")
    init, video = VAE(VAEConfig(**settings.vae)).init, jnp.zeros((1, 1, 4, 4, 3))
    params = jax.eval_shape(init, jax.random.key(0), video)["params"]
    halves = 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) + 2 * 2 * settings.vae.z_dim
    assert preflight.need(settings, 1).parameters == halves + 2 * transformer_numbers(
        DiTConfig(**settings.dit)
    )


@pytest.mark.parametrize("dtype, width", [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("method, steps", [("rolling", 5), ("self_forcing", 0)])
def test_cache_in_closed_form(method, steps, dtype, width):
    clips, layers, dim, slots, tokens, text = 3, 2, 24, 1 + 7, 3 * 4 * 6 // 4, 5
    keys_and_values = 2 * layers * clips * (slots * tokens + text) * dim * width
    window = clips * steps * 3 * 4 * 6 * 3 * 4
    integers = 4 * (slots + 2)  # block ids, the index, how many blocks were given
    assert preflight.need(small(dtype), clips, method).cache == keys_and_values + window + integers


def test_the_total_is_the_sum_and_a_size_counts_whole_patches():
    needed = preflight.need(small(), 2)
    assert needed.total == needed.parameters + needed.cache + needed.window + needed.decoder
    assert preflight.need(small(video={"height": 9, "width": 17, "fps": 8}), 2) == needed


# Against XLA


def compiled_step(settings, clips, method):
    c, roll = DiTConfig(**settings.dit), rollout.RolloutConfig()
    params = abstract(tiny.params(c), c.dtype)
    context = jax.ShapeDtypeStruct((clips, c.text_len, c.text_dim), jnp.float32)
    read = functools.partial(DiT(c).apply, method="text_kv")
    text_kv = jax.eval_shape(lambda params, context: read({"params": params}, context), params, context)
    model = rollout.Model(DiT(c), params, text_kv, roll)
    state = jax.eval_shape(lambda: rollout.METHODS[method].init(model, clips, (3, *tiny.FRAME)))
    keys, count = jax.ShapeDtypeStruct((clips, 2), jnp.uint32), jax.ShapeDtypeStruct((), jnp.int32)
    return stream_step.lower(model, method, keys, count, state)


def compiled_decoding(settings, clips):
    if settings.decoder == "tiny":
        module, shown = TinyDecoder(TinyVAEConfig(**settings.tiny)), (1, 1, 1, 1, 3)
    else:
        module, shown = VAE(VAEConfig(**settings.vae)), (1, 1, 4, 4, 3)
    params = abstract(
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shown))["params"], module.config.dtype
    )
    latent = (settings.video.height // 4, settings.video.width // 4, 3)
    latents = jax.ShapeDtypeStruct((clips, 3, *latent), jnp.float32)

    _, past = jax.eval_shape(functools.partial(sampler.decode_block, module), params, latents, None)
    return sampler.decode_block.lower(module, params, latents, past), size(past)


@pytest.mark.parametrize("dtype, clips, method", [("float32", 1, "rolling"), ("bfloat16", 2, "self_forcing")])
def test_window_is_what_xla_needs_for_a_step(dtype, clips, method):
    settings = small(dtype)
    xla = compiled_step(settings, clips, method).compile(QUICK).memory_analysis().temp_size_in_bytes
    assert xla <= preflight.need(settings, clips, method).window <= 1.6 * xla


@pytest.mark.parametrize(
    "dtype, clips, decoder", [("float32", 2, "vae"), ("bfloat16", 1, "vae"), ("float32", 1, "tiny")]
)
def test_decoder_is_what_xla_needs_for_a_block(dtype, clips, decoder):
    settings = small(dtype, decoder, video={"height": 48, "width": 64, "fps": 8})
    lowered, past = compiled_decoding(settings, clips)
    xla = past + lowered.compile(QUICK).memory_analysis().temp_size_in_bytes
    assert xla <= preflight.need(settings, clips).decoder <= 1.6 * xla


# GiB of temporaries, and of the decoder's past, that XLA (jax 0.10, CPU) counts for Wan 1.3B at 832×480.
@pytest.mark.parametrize(
    "dtype, rolling, self_forcing, vae, tiny_vae",
    [("float32", 3.73, 2.91, 7.61, 0.90), ("bfloat16", 20.30, 19.87, 5.35, 0.88)],
)
def test_real_size_is_what_xla_counted_once(dtype, rolling, self_forcing, vae, tiny_vae):
    full, light = wan(dtype, "vae"), wan(dtype, "tiny")
    estimates = {
        rolling: preflight.need(full, 1).window,
        self_forcing: preflight.need(full, 1, "self_forcing").window,
        vae: preflight.need(full, 1).decoder,
        tiny_vae: preflight.need(light, 1).decoder,
    }
    for xla, summed in estimates.items():
        assert xla <= summed / estimate.GIB <= 1.6 * xla


# GiB that libtpu 0.0.42 counts for a stream of Wan 1.3B at 832×480 in bfloat16 (docs/pods.md): temporaries of the step, and all
# that lies there at its peak; by rolling windows of v5e and v6e, and by Self Forcing of v5e.
@pytest.mark.parametrize(
    "method, step, peak",
    [("rolling", 2.09, 13.25), ("rolling", 3.39, 14.55), ("self_forcing", 2.17, 13.33)],
)
def test_of_a_tpu_the_sum_is_what_its_compiler_counted(method, step, peak):
    settings, chip = wan("bfloat16", "vae"), int(15.75 * estimate.GIB)
    needed = preflight.check(settings, 1, chip, method, "tpu")  # it fits
    assert step <= needed.window / estimate.GIB <= 1.7 * step
    assert peak <= needed.total / estimate.GIB <= 1.15 * peak
    with pytest.raises(UserError, match="this needs .* GiB"):
        preflight.check(settings, 1, chip, method, "cpu")


def test_a_gpu_counts_as_a_tpu_where_cudnn_serves():
    half, full = (
        [preflight.need(wan(dtype, "vae"), 1, "rolling", platform) for platform in ("gpu", "tpu")]
        for dtype in ("bfloat16", "float32")
    )
    assert half[0] == half[1] and full[0].window > full[1].window


# Advice: of a TPU, since on a CPU 16 bits need more than 32


need, check = (functools.partial(function, platform="tpu") for function in (preflight.need, preflight.check))


def large(**changes):
    """Cache and window weigh most, so that every change helps."""
    network = small().dit.to_dict() | {"dim": 64, "num_layers": 8}
    return small(dit=network, video={"height": 128, "width": 192, "fps": 8}, **changes)


def changed(settings, clips, words):
    """A config and a number of clips after what an advice says."""
    settings = settings.copy_and_resolve_references()
    for change in words.split(" with "):
        if match := re.fullmatch(r"config\.dit\.dtype and config\.(vae|tiny)\.dtype = 'bfloat16'", change):
            settings.dit.dtype = settings[match[1]].dtype = "bfloat16"
        elif match := re.fullmatch(r"(\d+) clips? at a time", change):
            clips = int(match[1])
        elif match := re.fullmatch(r"--size (\d+)x(\d+)", change):
            settings.video.update(width=int(match[1]), height=int(match[2]))
        else:
            assert change == "--decoder tiny"
            settings.decoder = "tiny"
    return settings, clips


def refused(settings, clips, available):
    with pytest.raises(UserError) as error:
        check(settings, clips, available)
    return str(error.value)


def options(message):
    return message.removesuffix(".").split("this would fit: ")[1].split(", or ")


def test_check_passes_up_to_the_last_byte():
    settings, needed = small(), need(small(), 2)
    assert check(settings, 2, needed.total) == check(settings, 2, None) == needed
    message = refused(settings, 2, needed.total - 1)
    assert message.startswith("2 clips at a time, --size 24x16: this needs 0.0")
    assert all(f"{name} 0.0" in message for name in ("parameters", "cache", "window", "decoder"))


@pytest.mark.parametrize("part", [0.95, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01])
def test_everything_that_is_advised_fits(part):
    settings = large()
    available = int(part * need(settings, 4).total)
    for words in options(refused(settings, 4, available)):
        check(*changed(settings, 4, words), available)


def test_each_change_is_advised_where_it_is_enough_and_no_more_than_is_needed():
    settings = large()
    needs = {
        "config.dit.dtype and config.vae.dtype = 'bfloat16'": need(
            *changed(settings, 4, "config.dit.dtype and config.vae.dtype = 'bfloat16'")
        ),
        "--decoder tiny": need(*changed(settings, 4, "--decoder tiny")),
        "3 clips at a time": need(settings, 3),
        "--size 176x120": need(*changed(settings, 4, "--size 176x120")),
    }
    for words, needed in needs.items():
        assert words in options(refused(settings, 4, needed.total))
        assert words not in options(refused(settings, 4, needed.total - 1))


def test_a_thousand_million_clips_are_refused_at_once():
    settings = large(decoder="tiny")
    said = options(refused(settings, 10**9, need(settings, 3).total))
    assert "3 clips at a time" in said


def test_what_is_not_enough_alone_is_combined_in_order():
    settings = large()
    every = changed(
        settings,
        4,
        "config.dit.dtype and config.vae.dtype = 'bfloat16' with --decoder tiny with 1 clip at a time",
    )
    words = options(refused(settings, 4, need(*every).total))[-1]
    assert words.startswith(
        "config.dit.dtype and config.vae.dtype = 'bfloat16' with --decoder tiny with 1 clip"
    )
    assert "size" not in words


def test_a_tiny_decoder_is_advised_only_where_the_config_has_it():
    settings = large()
    del settings.tiny
    assert "tiny" not in refused(settings, 4, need(settings, 1).total // 4)


def test_16_bits_are_not_advised_on_a_cpu():
    settings = large()
    available = preflight.need(settings, 4, platform="cpu").total // 2
    with pytest.raises(UserError, match="this would fit: (?!.*bfloat16)"):
        preflight.check(settings, 4, available, platform="cpu")


def test_nothing_fits():
    message = refused(small(), 1, 1000)
    assert re.search(r"but the device has .*; nothing fits: the network alone needs [\d.]+ GiB", message)


# Capacity and the command


def test_capacity(monkeypatch, tmp_path):
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 7})
    assert preflight.capacity(device) == 7
    device.memory_stats = lambda: None
    assert preflight.capacity(device) is None
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(estimate, "CGROUPS", (str(limit),))
    machine = preflight.capacity(jax.devices("cpu")[0])
    assert machine > 2**27
    for text, expected in (("max\n", machine), ("12345\n", 12345), (f"{2**62}\n", machine)):
        limit.write_text(text)
        assert preflight.capacity(jax.devices("cpu")[0]) == expected


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({small().to_dict()})\n"
    )
    return str(file)


def test_command_prints_the_parts(path, capsys):
    command.main(["--config", path, "--clips", "2", "--memory", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:6]] == [
        "parameters",
        "cache",
        "window",
        "decoder",
        "total",
        "device",
    ]
    total = preflight.need(config.load(path), 2).total
    assert lines[4].split()[1:] == [f"{total / 2**30:.2g}", "GiB"] and lines[5].split()[1:] == ["1.0", "GiB"]
    assert lines[6].startswith("It fits; the length does not matter")


def test_command_takes_the_config_s_method_unless_it_is_told_another(path, capsys):
    def cache(*words):
        command.main(["--config", path, "--memory", "1", *words])
        return capsys.readouterr().out.splitlines()[1].split(None, 1)[1]

    rolling, other = (
        estimate.gib(preflight.need(small(), 1, name).cache) for name in ("rolling", "self_forcing")
    )
    assert cache() == rolling != other
    file = Path(path)
    file.write_text(file.read_text().replace("ConfigDict({", "ConfigDict({'method': 'self_forcing', "))
    assert cache() == other and cache("--method", "rolling") == rolling
    file.write_text(file.read_text().replace("'self_forcing'", "'roling'"))
    with pytest.raises(SystemExit):
        cache()
    assert "config.method is 'roling'; it must be rolling or self_forcing." in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, says",
    [
        (["--memory", "0.0001"], "but the device has 0.0001 GiB; "),
        (["--clips", "0"], "--clips must be at least 1"),
        (["--memory", "nan"], "--memory a positive number"),
        (["--config", "nowhere.py"], "There is no config nowhere.py"),
    ],
)
def test_command_fails_in_one_sentence(path, capsys, args, says):
    with pytest.raises(SystemExit) as stop:
        command.main(["--config", path, *args])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1


def test_a_stage_s_config_says_that_only_sampling_is_counted(capsys):
    command.main(["--config", str(Path(__file__).parents[1] / "configs/shapes_distill.py"), "--memory", "8"])
    assert (
        "This is sampling. What training its stage 'distill' takes is told with --topology"
        in capsys.readouterr().out
    )


def test_command_where_the_device_does_not_say(path, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "capacity", lambda: None)
    command.main(["--config", path])
    assert re.search(r"device +unknown\nGive --memory", capsys.readouterr().out)
