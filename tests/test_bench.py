"""The benchmark: what it counts and sums up against closed forms, and a run from flags to figures."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import compilation, config, dit, parameters, quantize, rollout, sampler
from rfjax.bench import __main__ as bench
from rfjax.bench import compare, first, flags, formula, parts, roofline, stamp, stream, timing
from rfjax.preflight.flops import flops
from rfjax.tree import flatten

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs/tiny.py")
PERCENT = {"p50_s": 50.0, "p95_s": 95.0, "p99_s": 99.0, "max_s": 100.0}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a run of the tiny model tells."""
    folder = tmp_path_factory.mktemp("bench")
    names = "text,text_kv,window,clean,step,decode,stream"
    flags = ["--parts", names, "--blocks", "300", "--json", str(folder / "a.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ENOUGH", 0.1)
        bench.main(["--config", TINY, *flags])
    assert [file.name for file in folder.iterdir()] == ["a.json"]
    return json.loads((folder / "a.json").read_text())


def fails(capsys, *arguments):
    """The one line that a command says before it ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        bench.main(list(arguments))
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.strip().splitlines()
    return line


@pytest.mark.parametrize("method", sorted(rollout.METHODS))
@pytest.mark.parametrize("name", ["shapes", "wan_1_3b", "wan_self_forcing"])
def test_the_formula_agrees_with_the_traced_programs(method, name):
    video, network, codec, roll = sampler.sections(config.load(ROOT / f"configs/{name}.py"))
    latent = sampler.latent_size(video, codec, network)
    tokens = latent[0] * latent[1] // 4
    told = formula.block(network, roll, method, tokens, 2)
    shape = (roll.block_frames, *latent)
    kv = jax.ShapeDtypeStruct(
        (network.num_layers, 2, network.text_len, network.num_heads, network.head_dim), network.dtype
    )
    model = rollout.Model(dit.DiT(network), parameters.abstract("dit", network), dit.KV(kv, kv), roll)
    state = jax.eval_shape(lambda: rollout.METHODS[method].init(model, 2, shape))
    block, index = jax.ShapeDtypeStruct((2, *shape), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    if method == "rolling":
        window = functools.partial(rollout.window_call, steady=True)
        traced = jax.make_jaxpr(window)(model, state.cache, state.window, index, index)
    else:
        window = functools.partial(rollout.block_call, steady=True)
        traced = jax.make_jaxpr(window)(model, state.cache, block, index, index)
    clean = jax.make_jaxpr(functools.partial(rollout.clean_call, steady=True))
    np.testing.assert_allclose(told["window"], flops(traced), rtol=0.02)
    np.testing.assert_allclose(told["clean"], flops(clean(model, state.cache, index, block)), rtol=0.02)
    calls = 1 if method == "rolling" else len(roll.steps)
    assert told["step"] == calls * told["window"] + told["clean"]
    if (method, name) == ("rolling", "wan_1_3b"):
        np.testing.assert_allclose(told["step"] / 2, 242e12, rtol=0.01)


@pytest.mark.parametrize("method", sorted(rollout.METHODS))
def test_the_roofline_counts_the_formula_s_operations_and_the_network_s_parameters(method):
    network, roll = sampler.sections(config.load(ROOT / "configs/wan_1_3b.py"))[1:4:2]
    found = roofline.block(network, roll, method, 1560, 2)
    counted = sum(work for work, _ in found.values())
    np.testing.assert_allclose(counted, formula.block(network, roll, method, 1560, 2)["step"])
    leaves = flatten(parameters.abstract("dit", network))
    read = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel") and "blocks/" in path}
    still = roofline.call(network, 0, 15, 1560, 32760)  # no clips: what is left are parameters
    per_layer = sum(moved for name, (_, moved) in still.items() if name not in ("patches in, out", "time"))
    assert per_layer == sum(leaf.size * leaf.dtype.itemsize for leaf in read.values())
    nothing, slow = roofline.Chip(0, 1e30, 1e30, 0), roofline.Chip(0, 4.0, 2.0, 0)
    assert roofline.seconds(8.0, 1.0, slow) == 2.0 and roofline.seconds(1.0, 8.0, slow) == 4.0
    assert sum(roofline.seconds(*part, nothing) for part in found.values()) < 1e-12


def test_the_roofline_is_a_table(capsys):
    bench.main(["roofline", "--config", TINY, "--size", "32x32"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("frames/s at most")
    assert "--samples must be at least 1" in fails(capsys, "roofline", "--samples", "0")


def test_percentiles_and_drift_of_known_durations():
    assert timing.percentiles(np.arange(101.0)) == PERCENT
    short = timing.drift(np.array([2.0] * 2 + [5.0] * 16 + [3.0] * 2))
    assert short == {"over": "tenth", "first_s": 2.0, "last_s": 3.0, "change": 0.5}
    assert timing.drift(np.ones(19)) == {}  # nothing to say of so few
    long = timing.drift(np.array([1.0] * 60 + [7.0] * 10 + [0.5] * 120))
    assert long == {"over": "minute", "first_s": 1.0, "last_s": 0.5, "change": -0.5}
    slow = timing.drift(np.array([70.0] * 10 + [80.0] * 10))  # no call ends in the first minute
    assert slow == {"over": "tenth", "first_s": 70.0, "last_s": 80.0, "change": 80 / 70 - 1}


def test_calls_are_counted_without_the_warm_up(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    assert len(timing.timed(lambda: calls.append(0))) == timing.FEWEST
    assert len(calls) == timing.WARM_UP + timing.FEWEST
    monkeypatch.setattr(timing, "ENOUGH", 1e9)
    assert len(timing.timed(lambda: None)) == timing.MOST


def test_programs_and_bytes_are_counted():
    double, count = jax.jit(lambda x: 2 * x), compilation.counter()
    inputs = [jnp.zeros(n) for n in (3, 3, 5)]
    before = count()
    for x, programs in zip(inputs, (1, 1, 2), strict=True):
        double(x)
        assert count() - before == programs
    before = stream.memory_now()["live"]
    kept = jnp.zeros((1024, 256)).block_until_ready()
    assert stream.memory_now()["live"] - before == kept.nbytes == 2**20


def test_a_stream_keeps_its_memory_and_its_programs(told):
    found = told["stream"]
    assert found["compilations"]["measured"] == 0 < found["compilations"]["warm_up"]
    assert len(found["memory"]) == stream.SAMPLES
    assert len({sample["live"] for sample in found["memory"]}) == 1
    assert found["memory"][-1]["block"] == 299


def test_the_stream_s_figures_fit_each_other(told):
    found = told["stream"]
    taken = np.array(found["intervals_s"])
    assert (found["blocks"], found["frames"], len(taken)) == (300, 3600, 300)
    np.testing.assert_allclose(found["frames_per_s"], 3600 / taken.sum(), rtol=1e-3)
    for name, share in PERCENT.items():
        np.testing.assert_allclose(found["block_latency"][name], np.percentile(taken, share), rtol=1e-2)
        np.testing.assert_allclose(12 * found["frame_latency"][name], found["block_latency"][name])
    work = told["parts"]["step"]["flops"] + told["parts"]["decode"]["flops"]
    np.testing.assert_allclose(found["flops_per_s"] * found["block_latency"]["p50_s"], work)


def test_a_stream_ends_early_when_its_seconds_are_over(tmp_path, capsys):
    file = tmp_path / "run.json"
    wanted = ["--blocks", "100000", "--seconds", "1"]
    bench.main(["--config", TINY, "--parts", "stream", *wanted, "--json", str(file)])
    found = json.loads(file.read_text())["stream"]
    taken = np.array(found["intervals_s"])
    assert taken[:-1].sum() < 1 <= taken.sum() + 1e-3  # they are rounded
    assert found["blocks"] == len(taken) == found["frames"] / 12 == found["memory"][-1]["block"] + 1
    np.testing.assert_allclose(found["frames_per_s"], found["frames"] / taken.sum(), rtol=1e-3)
    assert f"{found['blocks']} blocks (of 100000: --seconds ended it)" in capsys.readouterr().out


def test_a_run_that_is_cut_off_leaves_what_it_has_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "ENOUGH", 0.01)
    monkeypatch.setattr(parts, "decode", lambda *_: sys.exit(143))
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--parts", "step,decode,clean,stream", "--blocks", "3"]
    files = ["--json", str(file), "--plot", str(picture)]
    with pytest.raises(SystemExit):
        bench.main(["--config", TINY, *flags, *files])
    told = json.loads(file.read_text())
    assert told["stream"]["blocks"] == 3 and list(told["parts"]) == ["step"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_parts_run_on_random_numbers(monkeypatch):
    """Zeros would run faster than what a stream has, and scales below 0 are none."""
    model, seen = sampler.load(quantize.configured(config.load(TINY), "kv8"), sampler.RANDOM), []
    state = parts.steady(model.bind(["a"]), 1, model.frame_shape, "rolling")
    fresh = rollout.rolling_init(model.bind(["a"]), 1, model.frame_shape)
    for kept in state.cache.kv:
        np.testing.assert_array_equal(np.unique(kept.qvalue), np.arange(-127, 128))
        np.testing.assert_allclose(np.std(kept.qvalue), ((255**2 - 1) / 12) ** 0.5, rtol=0.1)  # all alike
        assert np.asarray(kept.scale).min() > 0
        np.testing.assert_allclose(np.std(quantize.plain(kept, jnp.float32)), 1.5, rtol=0.1)
    np.testing.assert_allclose(np.std(state.window), 1, rtol=0.1)
    np.testing.assert_array_equal(state.cache.block, fresh.cache.block)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, fresh)
    decode = sampler.decode_block
    monkeypatch.setattr(sampler, "decode_block", lambda *args: seen.append(args[2]) or decode(*args))
    parts.decode(model, 1)()
    assert len(seen) == 2
    np.testing.assert_allclose([np.std(block) for block in seen], 1, rtol=0.1)


def test_prompts_are_encoded_before_their_keys_and_values_are_timed(monkeypatch):
    model = sampler.load(config.load(TINY), sampler.RANDOM)
    captions = ["a small red star orbiting over a cyan background"]
    expected, run = model.bind(captions).text_kv, parts.text_kv(model, captions)
    monkeypatch.setattr(type(model.encoder), "encode", None)
    jax.tree.map(np.testing.assert_array_equal, run(), expected)


def test_what_ran_is_stamped(told):
    assert (told["schema"], told["version"]) == (compare.SCHEMA, compare.VERSION)
    assert told["versions"]["jax"] == jax.__version__ and told["hardware"]["platform"] == "cpu"
    assert told["config"] == json.loads(json.dumps(config.load(TINY).to_dict()))
    assert told["command"][:3] == ["python", "-m", "rfjax.bench"] and "--blocks" in told["command"]
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        assert told["commit"].rstrip("+") == head.stdout.strip()


def test_cudnn_is_stamped_where_it_is_installed(tmp_path, monkeypatch):
    here = dict(stamp.cudnn())
    for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-frontend"):
        folder = tmp_path / f"{name.replace('-', '_')}-9.1.0.7.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.1.0.7\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stamp.stamp([])["versions"].items() >= (here | {"nvidia-cudnn-cu13": "9.1.0.7"}).items()
    assert set(stamp.cudnn()) == {*here, "nvidia-cudnn-cu13"}


@pytest.mark.parametrize("decoded", [True, False])
def test_the_stream_is_the_sampler_s(decoded):
    model = sampler.load(config.load(TINY), sampler.RANDOM)
    captions = [config.load(TINY).prompt] * 2
    latents = list(model.latents(captions, 0, 18))
    expected = list(model.decode(latents)) if decoded else latents
    coming = stream.arrivals(model, captions, "rolling", decoded)
    for block in expected[:2]:  # the windows of its last blocks are not those of a clip that does not end
        np.testing.assert_array_equal(next(coming), block)


def test_the_first_block_is_seen_before_the_second_is_made():
    model, made = sampler.load(config.load(TINY), sampler.RANDOM), []

    def blocks():
        for block in model.latents([config.load(TINY).prompt], 0, 6):
            made.append(block)
            yield block

    coming = model.decode(blocks())
    assert next(coming).shape == (1, 9, 16, 16, 3) and len(made) == 1
    assert next(coming).shape == (1, 12, 16, 16, 3) and len(made) == 2


def test_random_weights_have_the_config_s_shapes_and_keep_the_variance():
    _, network, codec, _ = sampler.sections(config.load(ROOT / "configs/shapes.py"))
    for name, sizes in (("dit", network), ("vae", codec)):
        shapes = parameters.abstract(name, sizes)
        drawn = parameters.stand_in(shapes)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(drawn))
    kernel = flatten(parameters.stand_in(parameters.abstract("dit", network)))["blocks/ffn_out/kernel"]
    np.testing.assert_allclose(jnp.std(kernel) * network.ffn_dim**0.5, 1, rtol=0.01)


def test_a_fresh_process_finds_what_another_compiled():
    found = dict(first.apart(["--config", TINY, "--decoder", "none"]))
    assert found["cold"]["compiled"] > 0 and found["cold"]["loaded"] == 0
    assert found["cached"]["compiled"] == 0 and found["cached"]["loaded"] > 0
    for times in found.values():
        together = sum(times[f"{part}_s"] for part in ("imports", "weights", "prompt"))
        np.testing.assert_allclose(times["total_s"], together, rtol=0.05)


@pytest.mark.parametrize("decoder", ["wan", "none"])
def test_a_first_frame_of_a_warm_process_compiles_nothing(tmp_path, monkeypatch, decoder):
    """Also where nothing else was measured before it, and after a stream, of which blocks are under way."""
    monkeypatch.setattr(
        first, "apart", lambda argv: [(name, {"total_s": 1.0}) for name in ("cold", "cached")]
    )
    monkeypatch.setattr(bench.report, "show", lambda told: None)
    file = tmp_path / "run.json"
    for names in ("first", "first,stream"):
        flags = ["--decoder", decoder, "--parts", names, "--blocks", "2", "--json", str(file)]
        bench.main(["--config", TINY, "--size", "32x16", *flags])
        warm = json.loads(file.read_text())["first_frame"]["warm"]
        assert warm["compiled"] == 0 and warm["prompt_s"] > 0


def test_a_fresh_process_s_mistake_is_told():
    with pytest.raises(flags.UserError, match="is no size that this network makes"):
        dict(first.apart(["--config", TINY, "--size", "17x16"]))


def test_two_runs_side_by_side(told, tmp_path, capsys):
    slow = json.loads(json.dumps(told))
    slow["parts"]["step"]["median_s"] *= 3
    slow["hardware"]["cores"] += 1
    del slow["parts"]["text"]
    for name, run in (("a", told), ("b", slow)):
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    bench.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["parts.step.median_s"][-1] == "3.000" and rows["parts.clean.median_s"][-1] == "1.000"
    assert "parts.text.median_s" not in rows and rows["warning:"]
    bench.main(["compare", *[str(tmp_path / "a.json")] * 2])
    assert "warning" not in capsys.readouterr().out


def test_files_that_are_not_of_this_benchmark_are_refused(told, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"parts": {}}')
    (tmp_path / "new.json").write_text(json.dumps(told | {"version": 99}))
    (tmp_path / "none.json").write_text("no")
    for name, said in (
        ("other", "not of this"),
        ("new", "version 99"),
        ("none", "no JSON"),
        ("no", "No such"),
    ):
        path = str(tmp_path / f"{name}.json")
        assert said in fails(capsys, "compare", path, path)
    assert "two files" in fails(capsys, "compare", "a.json")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--foo", "3"], "There is no flag --foo"),
        (["--decoder", "other"], "--decoder"),
        (["--decoder", "tiny"], "has no tiny decoder"),
        (["--size", "17x16"], "is no size that this network makes"),
        (["--size", "big"], "--size must be like 832x480"),
        (["--blocks", "0"], "--blocks must be at least 1"),
        (["--seconds", "0"], "--seconds must be at least 1"),
        (["--frames", "9", "--blocks", "1"], "not allowed with"),
        (["--parts", "windows"], "--parts has no windows"),
        (["--json", "no/where.json"], "no/where.json cannot be written"),
        (["--json", "."], ". cannot be written"),
        (["--plot", "a.txt"], "--plot needs a name"),
        (["--plot", "a.png", "--parts", "step"], "--plot draws the stream"),
        (["--config.dit.widht", "8"], "--config.dit.widht"),
        (["--weights", "nowhere", "--parts", "step"], "There is no folder nowhere"),
        (["--attention", "cudnn", "--parts", "step"], "There is no cudnn attention on CPU"),
        (["--quantize", "int3"], "--quantize"),
        (["--samples", "20000", "--size", "512x512", "--parts", "step"], "but the device has"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, "--config", TINY, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--samples", "0"], "--samples must be at least 1"),
        (["--golden", "nowhere"], "There is no directory nowhere"),
        (["--weights", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_a_mistake_in_the_table_of_8_bits_is_one_sentence(arguments, said, capsys):
    assert said in fails(capsys, "quantize", "--config", TINY, *arguments)


def test_a_config_without_a_prompt_is_one_sentence(tmp_path, capsys):
    (tmp_path / "silent.py").write_text(
        f"{Path(TINY).read_text()}\nfull = get_config\n\n\ndef get_config():\n"
        "    config = full()\n    del config.prompt\n    return config\n"
    )
    silent = ["--config", str(tmp_path / "silent.py")]
    for words in ([*silent, "--parts", "step"], ["quantize", *silent]):
        assert "The config lacks config.prompt, which bench needs" in fails(capsys, *words)


def test_the_config_names_the_method_unless_the_command_does():
    words = ["--config", str(ROOT / "configs/wan_self_forcing.py")]
    for more, method in ([], "self_forcing"), (["--method", "rolling"], "rolling"):
        args, settings = flags.parse([*words, *more], None)
        assert bench.conditions(args, settings)["method"] == method


def test_the_stamp_tells_what_ran_and_not_what_was_asked():
    args, settings = flags.parse(["--config", TINY, "--quantize", "int8+kv8"], None)
    args.quantize = None  # as of a config that says so itself
    told = bench.conditions(args, settings)
    assert (told["quantize"], told["attention"]) == ("int8+kv8", "xla")


def test_the_table_of_8_bits_wants_a_config_in_full_width(tmp_path, capsys):
    text, field = Path(TINY).read_text(), '"block_frames": 3'
    assert field in text
    (tmp_path / "eight.py").write_text(text.replace(field, f'{field}, "int8_cache": True'))
    assert "is in 8 bits already" in fails(capsys, "quantize", "--config", str(tmp_path / "eight.py"))


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "rfjax.bench.plot", raising=False)
    monkeypatch.delattr("rfjax.bench.plot", raising=False)  # where an earlier test has drawn
    assert "pip install -e '.[plot]'" in fails(capsys, "--config", TINY, "--plot", "a.png")


def test_a_stream_without_its_decoder_s_operations_is_given_no_rate():
    part = {"median_s": 0.5, "flops": 4.0}
    stream = {"block_latency": {"p50_s": 2.0}}

    def achieved(decoder, *names):
        devices = {"data": 1, "context": 2, "decoder": 0}
        told = {"hardware": {"peak_flops": 5.0}, "run": {"decoder": decoder, "devices": devices}}
        told["stream"] = dict(stream)
        told["parts"] = {name: dict(part) for name in names}
        bench.rates(told, 12)
        return told["stream"].get("flops_per_s"), told["stream"].get("mfu")

    assert achieved("wan", "step", "decode") == (4.0, 0.4)
    assert achieved("none", "step") == (2.0, 0.2)
    assert achieved("wan", "step") == (None, None)
