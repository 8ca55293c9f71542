"""Preflight by compiling: operations against closed forms, what lies on a chip, the verdict, the command; TPUs where libtpu is."""

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rfjax import attention, axes, config, dit, flash, parameters, placement, rollout, sampler
from rfjax.bench import formula
from rfjax.errors import UserError
from rfjax.preflight import __main__ as command
from rfjax.preflight import compiled, programs, report, topology
from rfjax.preflight.flops import flops

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mesh():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(devices, axes.MESH, axis_types=(AxisType.Auto,) * 3)


def abstract(mesh, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))


# Operations


def test_products_count_as_often_as_their_loop_runs():
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert flops(jax.make_jaxpr(program)(jnp.ones((4, 4)))) == (5 + 2) * 2 * 4**3


def test_a_convolution_counts_every_tap():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    dims = ("NHWC", "HWIO", "NHWC")
    program = lambda *args: jax.lax.conv_general_dilated(*args, (1, 1), "SAME", dimension_numbers=dims)  # noqa: E731
    assert flops(jax.make_jaxpr(program)(image, kernel)) == 2 * (2 * 8 * 8 * 5) * 3 * 3 * 3


def test_the_attention_kernel_counts_its_products():
    q, k = jnp.ones((1, 256, 2, 128)), jnp.ones((1, 512, 2, 128))
    counted = flops(jax.make_jaxpr(lambda q, k: flash.flash(q, k, k, None))(q, k))
    assert counted == 2 * 2 * 2 * 256 * 512 * 128  # q·k and weights·v, two heads


@pytest.fixture(scope="module")
def wide():
    """A rollout model wide enough that its products are nearly all that it does, as shapes; layers one after another."""
    sizes = dit.DiTConfig(512, 2048, 4, 2, 64, 16, freq_dim=64, unroll=True)
    params, text = parameters.abstract("dit", sizes), jax.ShapeDtypeStruct((2, 4, 16, 4, 128), jnp.float32)
    return rollout.Model(dit.DiT(sizes), params, dit.KV(text, text), rollout.RolloutConfig())


def test_operations_of_a_rolling_window_are_those_that_xla_counts(wide, monkeypatch):
    """The window and the clean call after it, of the steady kind, in plain attention on CPU."""
    monkeypatch.setattr(
        attention, "CACHED_SCORES", attention.MOST_SCORES
    )  # XLA counts a loop over heads once
    frame = (3, 16, 16, 16)
    state = jax.eval_shape(lambda: rollout.rolling_init(wide, 4, frame))

    def step(model, state):
        x0 = rollout.window_call(model, state.cache, state.window, state.index, 99, steady=True)
        past = model.policy.read_clean(state.cache, state.index - 4, 3, steady=True)
        return x0, model.x0(x0[:, 0], jnp.zeros(3), jnp.arange(3), past)

    traced = jax.jit(step).trace(wide, state)
    xla = traced.lower().compile({"xla_backend_optimization_level": 0}).cost_analysis()["flops"]
    assert flops(traced.jaxpr) == pytest.approx(xla, rel=0.02)


@pytest.mark.parametrize("method", sorted(rollout.METHODS))
def test_operations_of_the_steady_step_are_the_formula_s(method, mesh):
    settings = config.load(Path(__file__).parents[1] / "configs/wan_1_3b.py")
    program = programs.sampling(settings, placement.Placement(mesh, mesh), 1, method)["steady"]
    _, network, _, roll = sampler.sections(settings)
    expected = formula.block(network, roll, method, 1560, 1)["step"]
    assert flops(program.function.trace(*program.args).jaxpr) == pytest.approx(expected, rel=0.02)


def test_bytes_of_all_layers_are_those_of_as_many_that_are_unrolled(mesh):
    settings, where = config.load(ROOT / "configs/tiny.py"), placement.Placement(mesh, mesh)
    one, two, four = (programs.layered(settings, where, 1, layers) for layers in (1, 2, 4))
    counted = four.function.trace(*four.args).lower().compile().cost_analysis()["bytes accessed"]
    assert compiled.moved(one, two, 4) == pytest.approx(
        counted, rel=0.05
    )  # ends of a network this small weigh


# What lies on a chip


def test_what_another_program_needs_lies_there_too(mesh):
    mine, shared, other = abstract(mesh, 8, 8), abstract(mesh, 16), abstract(mesh, 100)
    named = {
        "first": programs.Program(jax.jit(lambda x, y: (x @ x).sum() + y.sum()), (mine, shared), mesh),
        "second": programs.Program(jax.jit(lambda y, z: y.sum() + z.sum()), (shared, other), mesh),
    }
    first, second = compiled.measure(named, named).values()
    assert (first["arguments"], first["elsewhere"]) == (4 * (64 + 16), 4 * 100)
    assert (second["arguments"], second["elsewhere"]) == (4 * (16 + 100), 4 * 64)
    assert first["total"] == sum(first[part] for part in ("arguments", "outputs", "temporaries", "elsewhere"))
    assert first["flops"] == 2 * 8**3 and second["flops"] == 0


def test_what_is_there_for_one_program_alone_is_not_counted_for_the_others(mesh):
    weights, passing, other = abstract(mesh, 8), abstract(mesh, 1000), abstract(mesh, 50)
    named = {
        "decoder": programs.Program(
            jax.jit(lambda x, y: x.sum() + y.sum()), (weights, passing), mesh, kept=1
        ),
        "step": programs.Program(jax.jit(jnp.sum), (other,), mesh),
    }
    decoder, step = compiled.measure(named, named).values()
    assert (decoder["arguments"], decoder["elsewhere"]) == (4 * 1008, 4 * 50)
    assert (step["arguments"], step["elsewhere"]) == (4 * 50, 4 * 8)


@pytest.mark.parametrize("shows", [True, False])
def test_what_a_save_shows_is_among_the_programs_of_training(mesh, shows):
    settings = command.config.load(str(ROOT / "configs/wan_distill_14b.py"))
    settings.vae_weights = "weights/wan_1_3b/vae.safetensors" if shows else ""
    named = programs.training(settings, mesh)
    assert list(named) == ["critic", "generator", *["sample", "decoder"] * shows]
    if not shows:
        return
    average, _, batch = named["sample"].args
    assert (
        average["blocks"]["ffn_in"]["kernel"] is named["generator"].args[0].ema["blocks"]["ffn_in"]["kernel"]
    )
    assert batch["context"].shape == (4, 512, 4096)  # on one device, of 8 rows a micro-batch
    _, weights, block, past = named["decoder"].args
    assert block.shape == (1, 3, 60, 104, 16) and jax.tree.leaves(past)[0].shape[0] == 1
    lying = programs.resident(named)
    assert id(weights["conv2"]["kernel"]) in lying and id(block) not in lying


def test_a_batch_is_split_and_parameters_go_by_their_rules():
    mesh = jax.sharding.AbstractMesh((2, 4, 1), axes.MESH)
    leaf = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    state, batch = programs._placer(mesh)(
        ({"dense": {"kernel": leaf}}, {"context": jax.ShapeDtypeStruct((8, 3), "float32")})
    )
    assert list(programs.shares((state,)).values()) == [16 * 8 * 4 // 4]
    assert list(programs.shares((batch,)).values()) == [8 * 3 * 4 // 8]


def test_the_largest_arrays_are_named():
    text = jax.jit(lambda x: jnp.sort(jnp.outer(x, x), 1)).lower(jnp.ones(300)).compile().as_text()
    (size, kind, source), *_ = compiled.buffers(text)
    assert size == 4 * 300 * 300 and kind == "f32[300,300]"


@pytest.mark.parametrize(
    "said, size",
    [
        (
            "the total memory required for HLO temporaries (22.50G) exceeds available HBM (15.75G).",
            22.5 * 2**30,
        ),
        ("Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.", 2**29),
    ],
)
def test_what_a_compiler_wanted_is_read_of_its_refusal(said, size):
    assert compiled._wanted(said) == size


FIGURES = {
    "arguments": 50,
    "outputs": 1,
    "temporaries": 30,
    "elsewhere": 19,
    "total": 100,
    "flops": 1e12,
    "compile": 1.0,
}


def test_on_tpus_the_compilers_peak_counts_and_elsewhere_its_temporaries():
    told = types.SimpleNamespace(argument_size_in_bytes=10, output_size_in_bytes=7, alias_size_in_bytes=5)
    told.temp_size_in_bytes, told.generated_code_size_in_bytes, told.peak_memory_in_bytes = 40, 1, 30
    assert compiled._memory(told, "cpu") == {"arguments": 10, "outputs": 2, "temporaries": 41}
    assert compiled._memory(told, "tpu") == {"arguments": 10, "outputs": 2, "temporaries": 19}


@pytest.mark.parametrize(
    "memory, more, fits", [(100, {}, True), (99, {}, False), (1000, {"refused": "too much"}, False)]
)
def test_the_verdict(memory, more, fits, capsys):
    settings = command.config.load(str(ROOT / "configs/wan_1_3b.py"))
    assert report.show({"step": FIGURES | {"buffers": []} | more}, memory, None, settings) == fits
    assert ("\nFITS" in capsys.readouterr().out) == fits


def test_advice_begins_with_what_takes_most():
    settings = command.config.load(str(ROOT / "configs/wan_distill_14b.py"))
    many, busy = FIGURES, FIGURES | {"temporaries": 3000}
    assert "chip, the step 31 " not in report.advice(busy, settings)
    assert report.advice(many, settings).split("; ")[1].startswith("more devices along config.mesh.fsdp")
    assert report.advice(busy, settings).split("; ")[1].startswith("a larger config.accumulate (now 1)")
    codec = command.config.load(str(ROOT / "configs/shapes_vae.py"))
    assert "config.dit" not in report.advice(busy, codec)


# The command


def test_command_end_to_end_on_several_devices(tmp_path):
    """A debug stage for 2 devices: fits in what there is, and not in a kilobyte; the figures are written."""
    told = tmp_path / "told.json"
    line = [
        sys.executable,
        "-m",
        "rfjax.preflight",
        "--config",
        "configs/shapes_debug.py",
        "--topology",
        "cpu:2",
    ]
    small = ["--memory", "0.000001", "--json", str(told)]
    run = subprocess.run([*line, *small], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "DOES NOT FIT (vae): parameters and optimisers take" in run.stdout
    figures = json.loads(told.read_text())
    assert figures["mesh"] == {"data": 2, "fsdp": 1, "context": 1} and not figures["fits"]
    vae = figures["programs"]["vae"]
    assert vae["collectives"]["all-reduce"] > 0 and vae["flops"] > 0 and vae["total"] > vae["arguments"] > 0


@pytest.mark.parametrize(
    "args, says",
    [
        (["--topology", "v9:2x2"], "There is no topology 'v9:2x2'; give one such as v5p:2x2x1"),
        (["--topology", "cpu:0"], "There is no topology 'cpu:0'"),
        (["--topology", "cpu:64"], "CPU devices by now, not 64"),
        (
            ["--topology", "cpu:1", "--config.mesh.fsdp=3"],
            "The mesh 1×3×1 (data, fsdp, context) needs 3 devices",
        ),
        (["--config.mesh.fspd=3"], "--config.mesh.fspd=3 changes nothing"),
        (
            ["--topology", "cpu:1", "--devices", "2"],
            "--devices is about a stream; of training, set config.mesh",
        ),
        (["--devices", "2"], "--json, --programs and --devices are about the programs of --topology"),
        (["--json", "x.json"], "--json, --programs and --devices are about the programs of --topology"),
        (["--topology", "cpu:1", "--config.stage=vea"], "config.stage must be one of vae, teacher"),
        (["--topology", "cpu:1", "--quantize", "int8"], "--quantize is about a stream"),
        (["--quantize", "int4"], "There is no quantisation 'int4'; give one of int8"),
        (
            ["--topology", "cpu:1", "--programs", "decodr"],
            "There is no program 'decodr' here; --programs takes vae",
        ),
    ],
)
def test_command_fails_in_one_sentence(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--config", str(ROOT / "configs/shapes_debug.py"), *args])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1


def test_a_step_that_the_compiler_refuses_is_not_compiled_in_pieces(monkeypatch, tmp_path, capsys):
    figures = FIGURES | {"buffers": [], "refused": "too much"}
    monkeypatch.setattr(compiled, "measure", lambda named, chosen: dict.fromkeys(chosen, dict(figures)))
    monkeypatch.setattr(compiled, "moved", lambda *_: pytest.fail("it would be refused as well"))
    flags = [
        "--config",
        str(ROOT / "configs/tiny.py"),
        "--topology",
        "cpu:1",
        "--json",
        str(tmp_path / "told.json"),
    ]
    with pytest.raises(SystemExit) as stop:
        command.main(flags)
    assert stop.value.code == 1 and "DOES NOT FIT" in capsys.readouterr().out
    assert json.loads((tmp_path / "told.json").read_text())["programs"]["steady"]["refused"] == "too much"


def test_a_chip_without_the_products_is_refused_before_anything_is_compiled(monkeypatch, capsys):
    chip = types.SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    monkeypatch.setattr(topology, "devices", lambda name: [chip])
    with pytest.raises(SystemExit) as stop:
        command.main(
            ["--config", str(ROOT / "configs/tiny.py"), "--topology", "v6e:1x1", "--quantize", "fp8"]
        )
    assert stop.value.code == 2 and "TPU v6 lite has no products in fp8" in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install -e '.[tpu]'")):
        topology.devices("v5p:2x2x1")


# TPUs that are not here


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)
def test_a_program_for_tpus_takes_the_kernel_on_each_chips_share():
    from rfjax import attention

    devices = topology.devices("v5e:2x2")
    mesh = Mesh(np.array(devices).reshape(1, 2, 2), axes.MESH, axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "context", None))
    q = jax.ShapeDtypeStruct((2, 300, 4, 128), jnp.bfloat16, sharding=place)
    # As it runs: the kernel multiplies bfloat16, for which there is no higher precision.
    with jax.default_matmul_precision("default"), jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda q: attention.attend(q, q, q).astype(jnp.float32).sum()))
        traced = grad.trace(q)
        text = traced.lower().compile().as_text()
    assert "splash_mha_fwd" in text and "splash_mha_dkv" in text and "splash_mha_dq" in text
    assert not re.search(r"\[[\d,]*300,300\]|\[[\d,]*384,384\]", text)  # no matrix of scores


def test_figures_that_cannot_be_written_are_told_before_anything_is_compiled(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--topology", "cpu:1", "--json", str(tmp_path / "none" / "told.json")])
    assert stopped.value.code == 2
    assert "cannot be written" in capsys.readouterr().err
