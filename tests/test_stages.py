"""Every stage with its own config, but tiny: data made, trained, resumed, shown, judged; mistakes told."""

import functools
import os
import sys
import types
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import train
from rfjax import (
    checkpoint,
    compilation,
    config,
    data,
    detect,
    dit,
    flow,
    lora,
    losses,
    parameters,
    rollout,
    score,
    shapes,
    sharding,
    teacher,
    training_rollout,
    tree,
)
from rfjax import state as train_state
from rfjax.config import build
from rfjax.data import __main__ as data_command
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.stages import STAGES, clips, distill, latent, sources, teacher_forcing
from rfjax.stages import teacher as teacher_stage
from rfjax.stages import vae as vae_stage
from rfjax.vae import VAE, VAEConfig

CONFIGS = Path(__file__).parents[1] / "configs"
FRAMES = 8  # latent frames of a record: 4 blocks of 2
SIZES = {
    "world": {"size": 16, "fps": 16, "objects": 1},
    "vae": {"dim": 4, "z_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temporal_downsample": (True,)},
    "dit": {"dim": 12, "ffn_dim": 16, "num_heads": 2, "num_layers": 1, "in_dim": 4, "freq_dim": 8}
    | {"text_len": 16, "text_dim": 48},
    "rollout": {"steps": (1000, 500), "block_frames": 2, "ring_blocks": 3, "span_blocks": 3, "shift": 5.0},
}
SMALL = {
    "teacher": {"frames": 4, "shard_records": 4, "record_batch": 2, "record_frames": FRAMES, "shards": 1},
    "teacher_forcing": {"frames": 6},
    "ode": {"frames": 6, "shard_records": 4, "record_batch": 2, "record_frames": 6, "shards": 1},
    "distill": {"frames": 6, "blocks": (3, 4), "critic_steps": 2, "critic_warmup": 1},
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Nothing here depends on how well programs are optimised, and compiling them is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def settings_of(stage, folder, **changes):
    """The stage's config, tiny, with its files in `folder`."""
    settings = config.load(CONFIGS / f"shapes_{stage}.py")
    for section, sizes in SIZES.items():
        settings[section] = type(settings)(sizes)
    settings.update({"steps": 3, "batch_size": 2, "judged": 4, "vae_weights": f"{folder}/vae.safetensors"})
    settings.update(SMALL[stage] | changes)
    settings.optimizer.name = "adamw"  # Muon compiles longer
    if stage in ("teacher", "ode"):
        settings.update({"data": f"{folder}/{stage}", "solver_steps": 4})
    if stage == "teacher_forcing":
        settings.data = f"{folder}/teacher"
    for name in ("teacher", "init_from", "critic_init") if stage != "teacher" else ():
        settings[name] = f"{folder}/dit.safetensors"
    return settings


def random_params(shapes, seed):
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [0.3 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights of a VAE and of a transformer, and the records that the data commands make with them."""
    folder = tmp_path_factory.mktemp("stages")
    settings = settings_of("ode", folder)
    vae, video = VAE(build(VAEConfig, settings, "vae")), jnp.zeros((1, 1, 16, 16, 3))
    params = random_params(jax.eval_shape(lambda: vae.init(jax.random.key(0), video)["params"]), 0)
    params |= {"latent_mean": np.float32([0.1, -0.2, 0, 1]), "latent_std": np.float32([1, 2, 0.5, 3])}
    checkpoint.save_params(folder / "vae.safetensors", params)
    sizes = build(dit.DiTConfig, settings, "dit")
    params = random_params(jax.eval_shape(functools.partial(dit.init, sizes), jax.random.key(0)), 1)
    checkpoint.save_params(folder / "dit.safetensors", params)
    make("latents", settings_of("teacher", folder))
    make("ode-pairs", settings)
    return folder


def make(what, settings, *flags):
    """`python -m rfjax.data WHAT --config FILE …`, in this process."""
    file = written(settings, Path(f"{settings.data}.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rfjax.data", what, "--config", str(file), *flags])
        data_command.main()


def written(settings, file):
    """The file, which holds these settings now."""
    file.write_text(
        f"import ml_collections\ndef get_config(): return ml_collections.ConfigDict({settings.to_dict()})"
    )
    return file


def records(shard):
    source = grain.sources.ArrayRecordDataSource([str(shard)])
    return [serialization.msgpack_restore(source[i]) for i in range(len(source))]


def trained(settings, workdir, save_at):
    """(state, data position) after settings.steps, the state before each step, and each step's metrics; goes on if it can."""
    stage, mesh = STAGES[settings.stage], sharding.make_mesh(sharding.MeshConfig())
    with checkpoint.Checkpoints(workdir, 2, settings.stage) as kept:  # written when this is left
        batches = data.iterate(stage.data(settings))
        state, start = train.begin(settings, stage, mesh, kept, batches)
        fixed = sources.load(stage.frozen(settings), jax.random.key(settings.seed), mesh)
        update, before, told = compiled(settings.stage, settings), [], []
        for step in range(start, settings.steps):
            before.append(jax.device_get(state))
            state, metrics = update(state, fixed, sharding.put_batch(next(batches), mesh), step)
            told.append({name: float(value) for name, value in metrics.items()})
            assert np.isfinite(list(told[-1].values())).all()
            if step + 1 == save_at:
                kept.save(save_at, state, batches.get_state())
    return jax.device_get(state), batches.get_state(), before, told


@functools.cache
def _updates():
    return {}


def compiled(name, settings):
    """The stage's update, compiled once for all tests."""
    if name not in _updates():
        made = distill.steps
        with (
            pytest.MonkeyPatch.context() as patch
        ):  # what `update` calls in turn is for tests of its own, too
            keep = _updates().setdefault
            patch.setattr(distill, "steps", lambda settings: keep("distill's steps", made(settings)))
            _updates()[name] = STAGES[name].update(settings)
    return _updates()[name]


@pytest.fixture(scope="module", params=["teacher", "teacher_forcing", "ode", "distill"])
def run(request, folder, tmp_path_factory):
    """Three steps that nothing interrupted, with a checkpoint after the second."""
    settings = settings_of(request.param, folder)
    workdir = tmp_path_factory.mktemp("run")
    state, position, before, told = trained(settings, workdir, save_at=2)
    return types.SimpleNamespace(
        settings=settings, workdir=workdir, state=state, position=position, before=before, told=told
    )


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run):
    state, position, before, _ = trained(run.settings, run.workdir, save_at=None)
    assert len(before) == 1 and position == run.position
    jax.tree.map(np.testing.assert_array_equal, state, run.state)
    names = {str(path) for path, _ in jax.tree_util.tree_leaves_with_path(run.state)}
    assert any("opt_state" in name for name in names) and any("ema" in name for name in names)


def test_every_parameter_learns_but_not_the_generator_while_the_critic_warms_up(run):
    changed = functools.partial(jax.tree.map, lambda a, b: bool((a != b).any()))
    if run.settings.stage == "distill":
        after = run.before[1]
        assert not any(jax.tree.leaves(changed(run.before[0].generator, after.generator)))
        assert all(jax.tree.leaves(changed(run.before[0].critic.params, after.critic.params)))
        assert run.state.critic.step == 3 * run.settings.critic_steps and run.state.generator.step == 2
        first, last = run.before[1].generator, run.state.generator
    else:
        first, last = run.before[0], run.state
    assert all(jax.tree.leaves(changed(first.params, last.params)))
    assert all(jax.tree.leaves(changed(first.ema, last.ema)))


def test_every_step_draws_anew(run):
    stage, mesh, told = STAGES[run.settings.stage], sharding.make_mesh(sharding.MeshConfig()), []
    fixed = sources.load(stage.frozen(run.settings), jax.random.key(0), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, train.shapes(run.settings, stage, mesh))
    for step in (1, 2):
        batch = sharding.put_batch(stage.data(run.settings)[0], mesh)
        state = jax.device_put(run.before[0], places)  # where the run had it, so that nothing compiles anew
        metrics = compiled(run.settings.stage, run.settings)(state, fixed, batch, step)[1]
        told.append(float(metrics["critic_loss" if run.settings.stage == "distill" else "loss"]))
    assert told[0] != told[1]


@pytest.mark.parametrize("run", ["ode"], indirect=True)
def test_ode_is_its_loss_at_levels_of_the_blocks_own(run):
    parts, batch = latent.parts(run.settings), STAGES["ode"].data(run.settings)[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.settings.seed), 0), 0)
    level = np.repeat(jax.random.randint(key, (2, 3), 0, 2), 2, 1)
    path = np.float32(batch["trajectory"])  # [B, S + 1, F, h, w, C], the last the clip
    x_t = np.stack([[path[clip, k, frame] for frame, k in enumerate(row)] for clip, row in enumerate(level)])
    loss = jax.jit(functools.partial(losses.ode_loss, parts.dit, block_frames=2))
    wanted = loss(run.before[0].params, x_t, parts.rollout.timesteps[level], path[:, -1], batch["context"])
    assert run.told[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("run", ["teacher"], indirect=True)
def test_teacher_is_its_loss_at_levels_of_clips_that_go_on(run):
    settings, parts = run.settings, latent.parts(run.settings)
    batch = STAGES["teacher"].data(settings)[0]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), 0), 0)
    keys, clips = jax.random.split(key, 3), np.float32(batch["latents"])
    t, weight = teacher_stage.levels(parts.rollout, keys[0], *clips.shape[:2])
    keep = np.asarray(jax.random.uniform(keys[1], (2, 1, 1))) >= teacher_stage.DROPPED
    context, noise = np.where(keep, batch["context"], 0), np.asarray(jax.random.normal(keys[2], clips.shape))
    sigma = np.asarray(t)[..., None, None, None] / 1000
    flow_of = jax.jit(functools.partial(teacher.predict_flow, parts.dit))
    predicted = flow_of(run.before[0].params, (1 - sigma) * clips + sigma * noise, t, context)
    error = ((predicted - (noise - clips)) ** 2).mean((2, 3, 4))
    counted = np.asarray(t) > 0  # the clean frames that a clip goes on from are no question
    assert run.told[0]["loss"] == pytest.approx(float(error[counted].mean()), rel=1e-5)


@functools.cache
def rolled_out(parts, method):
    """f(generator params, context, exit step, number of blocks, key) → the student's clip of at most 4 blocks."""

    def roll(params, context, exit_step, num_blocks, key):
        text_kv = parts.dit.apply({"params": params}, context, method="text_kv")
        model = rollout.Model(parts.dit, params, text_kv, parts.rollout)
        noise = rollout.position_noise(jax.random.split(key, 2), parts.frame_shape)
        plan = training_rollout.Plan(noise, exit_step, num_blocks, 4, 2, parts.frame_shape)
        return training_rollout.constant_rollout(model, method, plan)

    return jax.jit(roll)


@pytest.mark.parametrize("run", ["distill"], indirect=True)
def test_distillation_is_its_losses_of_three_networks_that_differ(run):
    """Both updates as trained, against the losses written out. Student, critic and teacher are drawn apart, and so are prompts."""
    settings, parts, mesh = (
        run.settings,
        latent.parts(run.settings),
        sharding.make_mesh(sharding.MeshConfig()),
    )
    stage = STAGES["distill"]
    fixed = sources.load(stage.frozen(settings), jax.random.key(0), mesh)
    drawn = {name: random_params(fixed["teacher"], seed) for seed, name in enumerate("GCT", 5)}
    put = functools.partial(jax.tree.map, lambda like, new: jax.device_put(new, like.sharding))
    negative = np.random.default_rng(8).normal(size=(16, 48)).astype(np.float32)
    fixed |= {"teacher": put(fixed["teacher"], drawn["T"])}
    fixed |= {"negative": put(fixed["negative"], {"context": negative})}
    batch = sharding.put_batch(
        {"context": np.random.default_rng(9).normal(size=(6, 16, 48)).astype("f")}, mesh
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, train.shapes(settings, stage, mesh))
    state = jax.device_put(run.before[0], places)
    generator = state.generator.replace(params=put(state.generator.params, drawn["G"]))
    critic = state.critic.replace(params=put(state.critic.params, drawn["C"]))
    critic_step, generator_step = _updates()["distill's steps"]
    flow_of, crop = (
        jax.jit(functools.partial(teacher.predict_flow, parts.dit)),
        cropping(settings, fixed["vae"]),
    )

    def scored(key, rows):
        """What is scored of the clips of these prompts, which frames count, and how it is noised."""
        keys = jax.random.split(jax.random.fold_in(key, 0), 3)
        how = jax.device_get(distill.draw(settings, keys[0]))
        roll = rolled_out(parts, "rolling" if how.rolling else "self_forcing")
        clip = roll(drawn["G"], context(rows), how.exit_step, how.num_blocks, keys[1])
        clip, counts = crop(clip, how.num_blocks)
        return clip, counts, *distill.score_draw(settings, keys[2], clip)

    def context(rows):
        return np.asarray(batch["context"])[rows]

    def x0(network, x_t, t, text):
        return x_t - t[:, None, None, None, None] / 1000 * flow_of(drawn[network], x_t, t, text)

    # The critic's second update of a step has the second prompts of every three, the generator's the third.
    key = jax.random.key(1)
    clip, _, x_t, t, noise = scored(key, [1, 4])
    wanted = ((flow_of(drawn["C"], x_t, t, context([1, 4])) - (noise - clip)) ** 2).mean()
    told = critic_step(critic, generator.params, fixed, batch, 1, key)[1]
    assert float(told["critic_loss"]) == pytest.approx(float(wanted), rel=1e-4)

    critic = put(fixed["teacher"], drawn["C"])  # the first was donated
    clip, counts, x_t, t, _ = scored(key, [2, 5])
    fake, cond = x0("C", x_t, t, context([2, 5])), x0("T", x_t, t, context([2, 5]))
    real = cond + settings.guidance * (cond - x0("T", x_t, t, np.stack([negative] * 2)))
    gradient = (fake - real) / np.abs(clip - real).mean((1, 2, 3, 4), keepdims=True)
    told = generator_step(generator, critic, fixed, batch, key)[1]
    assert float(told["strength"]) == pytest.approx(float(np.abs(gradient).mean()), rel=1e-4)
    assert float(told["loss"]) == pytest.approx(float(0.5 * (gradient[:, counts] ** 2).mean()), rel=1e-4)


def test_a_step_trains_the_critic_on_the_student_as_it_is_and_the_student_by_the_newest_critic(monkeypatch):
    """The networks are numbers that count their updates; the student's average is none of them."""
    settings, calls = config.load(CONFIGS / "shapes_distill.py"), []
    settings.update({"critic_steps": 2, "critic_warmup": 5})

    def critic_step(critic, student, fixed, batch, index, key):
        calls.append(("critic", critic.params, student, index, key))
        return critic.replace(params=critic.params + 1), {"critic_loss": 0}

    def generator_step(generator, critic, fixed, batch, key):
        calls.append(("generator", generator.params, critic, None, key))
        return generator.replace(params=generator.params + 1), {"loss": 0}

    monkeypatch.setattr(distill, "steps", lambda settings: (critic_step, generator_step))
    both = (train_state.TrainState(0, params, None, ema, None) for params, ema in ((10, -1), (20, None)))
    update, before = distill.update(settings), distill.Distillation(*both)
    after, told = update(before, {}, {}, 4)
    assert [call[:4] for call in calls] == [("critic", 20, 10, 0), ("critic", 21, 10, 1)]
    assert (after.generator.params, after.critic.params, set(told)) == (10, 22, {"critic_loss"})
    calls.clear()
    after, told = update(before, {}, {}, 5)
    assert [call[:4] for call in calls][2] == ("generator", 10, 22, None)
    assert after.generator.params == 11 and set(told) == {"critic_loss", "loss"}
    assert len({tuple(jax.random.key_data(call[4]).tolist()) for call in calls}) == 3


def test_every_update_of_a_step_has_its_own_prompts():
    settings = types.SimpleNamespace(critic_steps=2)
    parts = [distill._part(settings, jnp.arange(6), index) for index in range(3)]
    assert sorted(np.concatenate(parts)) == list(range(6)) and {part.shape for part in parts} == {(2,)}


@pytest.mark.parametrize("stage", ["teacher", "teacher_forcing", "ode", "distill"])
def test_micro_batches_draw_apart(stage, folder, monkeypatch):
    """The loss of the same clips as another part of the batch is another. Distillation's networks are stood in for."""
    settings, found = settings_of(stage, folder, vae_weights=""), []
    module, shape = STAGES[stage], (2, 6, 8, 8, 4)

    def descend(state, objective, batch, *_):
        loss = jax.jit(lambda index: objective(state.params, batch, index)[0])
        found.append([float(loss(index)) for index in (0, 1)])
        return state, {}

    monkeypatch.setattr(train_state, "descend", descend)
    monkeypatch.setattr(distill, "roll", lambda *args: jax.random.normal(args[-1], shape))
    monkeypatch.setattr(losses, "critic_loss", lambda dit, params, clip, *_: clip.mean())
    monkeypatch.setattr(losses, "score_x0", lambda dit, params, x_t, *_: x_t)
    monkeypatch.setattr(losses, "guided_x0", lambda dit, params, x_t, *_: 0 * x_t)
    monkeypatch.setattr(compilation, "training_step", lambda step: step)
    mesh, key = sharding.make_mesh(sharding.MeshConfig()), jax.random.key(0)
    fixed, params = (sources.load(which(settings), key, mesh) for which in (module.frozen, module.networks))
    state, batch = module.init(settings, params), next(data.iterate(module.data(settings)))
    module.update(settings)(state, fixed, jax.tree.map(jnp.asarray, batch), 1)
    assert len(found) == (3 if stage == "distill" else 1)
    assert all(first != second for first, second in found)


def test_the_generator_goes_to_the_teacher_and_away_from_the_critic(folder, monkeypatch):
    """Clips are a number that the generator's parameters move; the critic wants 0 of them, the teacher 1."""
    settings, shape, asked = settings_of("distill", folder, vae_weights=""), (2, 6, 8, 8, 4), []

    def roll(config, parts, how, params, *_):
        return jnp.full(shape, 0.5) + params["head"]["bias"].mean()

    monkeypatch.setattr(distill, "roll", roll)
    monkeypatch.setattr(distill.losses, "score_x0", lambda *_: jnp.zeros(shape))
    monkeypatch.setattr(distill.losses, "guided_x0", lambda *args: asked.append(args[-1]) or jnp.ones(shape))
    stage, mesh, key = STAGES["distill"], sharding.make_mesh(sharding.MeshConfig()), jax.random.key(0)
    fixed, params = (sources.load(which(settings), key, mesh) for which in (stage.frozen, stage.networks))
    state, batch = stage.init(settings, params), {"context": jnp.zeros((6, 16, 48))}
    before, critic = float(state.generator.params["head"]["bias"].mean()), state.critic.params
    after, _ = distill.steps(settings)[1](state.generator, critic, fixed, batch, key)
    assert float(after.params["head"]["bias"].mean()) > before and set(asked) == {settings.guidance}


def test_clips_are_scored_at_shifted_noise_levels_from_20_to_980(folder):
    clip = jax.random.normal(jax.random.key(1), (4000, 1, 1, 1, 1))
    x_t, t, noise = map(
        np.asarray, distill.score_draw(settings_of("distill", folder), jax.random.key(0), clip)
    )
    assert t.min() == 20 and t.max() == 980
    drawn = t / 1000 / (5 - 4 * t / 1000)  # the shift undone
    np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)
    sigma = t[:, None, None, None, None] / 1000
    np.testing.assert_allclose(x_t, (1 - sigma) * clip + sigma * noise, atol=1e-6)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(clip))[0, 1]) < 0.05 and abs(noise.std() - 1) < 0.05


@pytest.mark.parametrize("rolling", [True, False])
def test_a_draw_is_what_is_rolled_out(folder, monkeypatch, rolling):
    asked = []

    def how(model, method, plan):
        asked.append((method, plan))
        return jnp.zeros((2, 8, 8, 8, 4))

    settings = settings_of("distill", folder, scored_blocks=2)
    parts, params = (
        latent.parts(settings),
        random_params(parameters.abstract("dit", latent.parts(settings).dit.config), 0),
    )
    monkeypatch.setattr(jax.lax, "cond", lambda which, yes, no: yes() if which else no())
    drawn = distill.Draw(rolling, 1, 3)
    distill.roll(settings, parts, how, params, jnp.zeros((2, 16, 48)), drawn, jax.random.key(0))
    ((method, plan),) = asked
    assert method == ("rolling" if rolling else "self_forcing")
    assert (plan.exit_step, plan.num_blocks, plan.max_blocks, plan.scored_blocks) == (1, 3, 4, 2)


def test_loss_of_the_vae_is_its_formula():
    class Fake:
        def apply(self, variables, x, method):
            return (0.5 * x, jnp.full_like(x, -1.0)) if method == "encode" else 2 * x

    video, key = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5, 3)), jnp.float32),
        jax.random.key(1),
    )
    total, _ = vae_stage.loss(Fake(), {}, video, key, {"square": 2.0, "edge": 3.0, "kl": 4.0})
    x, noise = np.float64(video), np.float64(jax.random.normal(key, video.shape))
    error = 2 * (0.5 * x + np.exp(-0.5) * noise) - x
    edge = sum(np.abs(np.diff(error, axis=axis)).mean() for axis in (2, 3))
    kl = 0.5 * ((0.5 * x) ** 2 + np.exp(-1)).mean()  # of variance exp(-1): that - 1 + 1
    assert float(total) == pytest.approx(
        np.abs(error).mean() + 2 * (error**2).mean() + 3 * edge + 4 * kl, rel=1e-5
    )


def test_training_shows_no_held_out_combination(monkeypatch):
    for name in ("distill", "ode"):
        settings = config.load(CONFIGS / f"shapes_{name}.py")
        for caption in latent.texts(settings, "", 200)[0]["caption"]:
            for one in shapes.parse(str(caption)).objects:
                assert not shapes.held_out(one.shape, one.colour, one.motion)
    asked, made = [], vae_stage._clips
    monkeypatch.setattr(vae_stage, "_clips", lambda *args: asked.append(args[-1]) or made(*args))
    vae_stage.data(config.load(CONFIGS / "shapes_vae.py"))
    assert asked == ["train"]


def test_finished_run_exports_its_average_and_shows_and_judges_clips(run, monkeypatch):
    stage, network = STAGES[run.settings.stage], getattr(run.state, "generator", run.state)
    jax.tree.map(
        np.testing.assert_array_equal, stage.export(run.settings)(run.state, {}), {"dit": network.ema}
    )
    fixed = {"negative": {"context": np.zeros((16, 48), np.float32)}}
    if run.settings.stage in ("teacher_forcing", "distill"):  # they roll out as the ODE stage does
        monkeypatch.setattr(clips, "roller", lambda settings, generate: shown_by(network))
    videos, captions = stage.sample(run.settings)(run.state, fixed, jax.random.key(0))
    frames = 1 + 2 * (run.settings.frames - 1)
    assert videos.shape == (len(captions), frames, 16, 16, 3) and videos.dtype == np.uint8
    assert videos.std(0).max() > 0
    verdicts = iter([{"shape": True}, {"shape": False, "colour": True}, {"shape": True}, {"shape": True}])
    monkeypatch.setattr(clips.detect, "SIDE", 16)
    monkeypatch.setattr(clips.score, "score", lambda video, caption: {"first": next(verdicts)})
    assert stage.evaluate(run.settings)(run.state, fixed) == {"right_shape": 0.75, "right_colour": 1.0}


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_teacher_forcing_is_its_loss_at_levels_of_the_blocks_own(run):
    settings, parts = run.settings, latent.parts(run.settings)
    batch = STAGES["teacher_forcing"].data(settings)[0]
    key = jax.random.fold_in(
        jax.random.fold_in(jax.random.key(settings.seed), 0), 0
    )  # of step 0, micro-batch 0
    level_key, noise_key = jax.random.split(key)
    clips = np.float32(batch["latents"])
    t = teacher_forcing.levels(parts.rollout, level_key, *clips.shape[:2])
    noise = jax.random.normal(noise_key, clips.shape)
    loss = jax.jit(functools.partial(losses.teacher_forcing_loss, parts.dit, block_frames=2))
    wanted = loss(run.before[0].params, clips, batch["context"], t, noise)
    assert run.told[0]["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_every_block_draws_its_own_level_of_the_shifted_table():
    t = np.asarray(
        teacher_forcing.levels(RolloutConfig(block_frames=2, shift=5.0), jax.random.key(0), 2000, 6)
    )
    np.testing.assert_array_equal(t[:, ::2], t[:, 1::2])
    drawn = t[:, ::2] / 1000 / (5 - 4 * t[:, ::2] / 1000)  # the shift undone
    np.testing.assert_allclose(
        np.quantile(drawn, [0.25, 0.5, 0.75], axis=0), [[0.25] * 3, [0.5] * 3, [0.75] * 3], atol=0.04
    )
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.1


def shown_by(network):
    """What rolls out clips, and is to be asked for those of this network."""

    def roll(average, fixed, batch):
        assert average is network.ema
        return jax.vmap(lambda key: jax.random.normal(key, (6, 8, 8, 4)))(batch["key"])

    return roll


def test_distillation_by_sid_in_parts_without_vae_from_a_larger_teacher_in_bfloat16(folder):
    """Traced, not run: compiling it takes a minute. `test_losses` has the numbers of the loss, `test_state` those of the parts."""
    settings = settings_of("distill", folder, loss="sid", accumulate=2, vae_weights="", critic_warmup=0)
    settings.update({"critic_init": "", "teacher": ""})
    settings.dit.dtype = "bfloat16"
    settings.teacher_dit = settings.dit.copy_and_resolve_references()
    settings.teacher_dit.num_layers = 2
    stage, key = STAGES["distill"], jax.random.key(0)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    fixed, params = (sources.load(which(settings), key, mesh) for which in (stage.frozen, stage.networks))
    assert sorted(fixed) == ["negative", "teacher"]
    assert fixed["teacher"]["blocks"]["ffn_in"]["kernel"].shape[0] == 2
    assert {x.dtype for x in jax.tree.leaves(fixed["teacher"])} == {jnp.dtype("bfloat16")}
    state = stage.init(settings, params)
    assert {x.dtype for x in jax.tree.leaves(state.generator.params)} == {jnp.dtype("float32")}
    shapes = jax.eval_shape(lambda: state), sources.shapes(stage.frozen(settings))
    for name, (function, arguments) in distill.programs(settings, *shapes).items():
        network, other = state.generator, state.critic
        like = (network, other.params, fixed) if name == "generator" else (other, network.params, fixed)
        assert describe(arguments[:3]) == describe(like)
        after, told = jax.eval_shape(function, *arguments)
        assert describe(after) == describe(like[0])
        assert {x.shape for x in told.values()} == {()}


def test_adapters_of_fixed_parameters_learn_and_are_exported_merged(folder):
    settings = settings_of("ode", folder, vae_weights="")
    settings.lora = {"rank": 2, "alpha": 1.0}
    stage, mesh, key = STAGES["ode"], sharding.make_mesh(sharding.MeshConfig()), jax.random.key(0)
    fixed, params = (sources.load(which(settings), key, mesh) for which in (stage.frozen, stage.networks))
    state = stage.init(settings, params)
    base = jax.device_get(fixed["base"])
    batch = sharding.put_batch(next(data.iterate(stage.data(settings))), mesh)
    update, told = stage.update(settings), []
    for _ in range(3):
        state, metrics = update(state, fixed, batch, 0)
        told.append(float(metrics["loss"]))
    plain = settings_of("ode", folder)
    alone, whole = stage.init(plain, sources.load(stage.networks(plain), key, mesh)), stage.update(plain)
    assert float(whole(alone, {}, batch, 0)[1]["loss"]) == pytest.approx(told[0], rel=1e-6)
    assert told[2] < told[0]
    written = stage.export(settings)(state, fixed)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), written["dit"], base)
    moved = {path for path, differs in tree.flatten(changed).items() if differs}
    assert moved == {f"blocks/{kind}_{part}/kernel" for kind in ("self", "cross") for part in "qo"} | {
        f"blocks/self_{part}/kernel" for part in "kv"
    }
    again = lora.merge(base, written["lora"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), again, written["dit"])
    merged = jax.tree.map(jnp.copy, written["dit"])  # what is exported is what was trained
    here = float(update(state, fixed, batch, 0)[1]["loss"])
    assert here == pytest.approx(
        float(whole(stage.init(plain, {"dit": merged}), {}, batch, 0)[1]["loss"]), rel=1e-3
    )


def test_adapters_of_nothing_are_refused(folder):
    settings = settings_of("ode", folder)
    settings.update({"init_from": "", "lora": {"rank": 2}})
    with pytest.raises(UserError, match="give config.init_from"):
        STAGES["ode"].networks(settings)


def describe(tree):
    return [(x.shape, str(x.dtype)) for x in jax.tree.leaves(tree)]


# Records


def test_latent_records_are_the_world_through_the_vae(folder):
    settings = settings_of("teacher", folder)
    encode = latent.video_encoder(settings)
    world = build(data.shapes.World, settings, "world")
    found = records(folder / "teacher" / "00000.arrayrecord")
    assert len(found) == 4
    for number in range(2):
        batch = data.clips(1 + 2 * (FRAMES - 1), 2, settings.seed, world)[number]
        wanted = encode(batch["video"])
        for row, record in enumerate(found[2 * number : 2 * number + 2]):
            assert record["caption"] == batch["caption"][row]
            assert record["latents"].dtype == np.float16
            np.testing.assert_allclose(record["latents"], wanted[row], rtol=1e-3, atol=1e-3)
    batch = STAGES["teacher"].data(settings)[0]
    assert batch["latents"].shape == (2, settings.frames, 8, 8, 4) and batch["context"].shape == (2, 16, 48)


def test_ode_records_are_the_points_of_the_trajectory_at_the_few_step_levels(folder):
    settings = settings_of("ode", folder)
    parts = latent.parts(settings)
    params = checkpoint.load_params(settings.teacher, parameters.abstract("dit", parts.dit.config))
    found = records(folder / "ode" / "00000.arrayrecord")
    context = jnp.asarray(parts.encoder.encode([record["caption"] for record in found[:2]]))
    noise = jnp.asarray(np.stack([record["trajectory"][0] for record in found[:2]]), jnp.float32)
    solve = functools.partial(
        teacher.ode_trajectory, parts.dit, params, noise, context, jnp.zeros_like(context)
    )
    path = np.asarray(jax.jit(lambda: solve(settings.guidance, 4, 5.0))())
    levels = 1000 * teacher.solver_sigmas(4, 5.0)
    for place, t in enumerate([*flow.few_step_timesteps((1000, 500), 5.0), 0.0]):
        (wanted,) = path[np.isclose(levels, t)]
        got = np.stack([record["trajectory"][place] for record in found[:2]])
        np.testing.assert_allclose(got, wanted, rtol=2e-2, atol=2e-2)
    assert STAGES["ode"].data(settings)[0]["trajectory"].shape == (2, 3, 6, 8, 8, 4)


def test_second_run_of_the_data_command_makes_only_what_is_missing(folder):
    settings = settings_of("teacher", folder)
    first, second = (folder / "teacher" / f"0000{i}.arrayrecord" for i in (0, 1))
    before = first.stat().st_mtime_ns, first.read_bytes()
    make("latents", settings, "--shards", "2")
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    there = {record["caption"] for record in records(first)}
    assert len(records(second)) == 4 and any(record["caption"] not in there for record in records(second))
    os.remove(second)


def test_half_of_the_teacher_s_clips_go_on_from_clean_blocks_of_every_number():
    rollout = RolloutConfig(block_frames=2, shift=5.0)
    t, weight = map(np.asarray, teacher_stage.levels(rollout, jax.random.key(0), 4000, 7))
    assert t.shape == weight.shape == (4000, 7)
    np.testing.assert_allclose(weight.mean(), 1, rtol=1e-5)
    np.testing.assert_array_equal(weight > 0, t > 0)
    lengths, counts = np.unique((t == 0).sum(1), return_counts=True)
    np.testing.assert_array_equal(lengths, [0, 2, 4, 6])
    share = teacher_stage.CONTINUED / 3
    np.testing.assert_allclose(counts / 4000, [1 - teacher_stage.CONTINUED, *[share] * 3], atol=0.03)
    level = t[:, -1:]
    np.testing.assert_array_equal(t, np.where(np.arange(7) < (t == 0).sum(1, keepdims=True), 0, level))
    drawn = level / 1000 / (5 - 4 * level / 1000)  # the shift undone
    np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_clip_of_one_block_goes_on_from_nothing(frames):
    t, weight = teacher_stage.levels(RolloutConfig(block_frames=3), jax.random.key(0), 64, frames)
    assert (t > 0).all() and (weight == 1).all()


def test_the_critic_keeps_no_average(folder):
    params = {"dense": {"kernel": jnp.ones((2, 3))}}
    state = distill.init(settings_of("distill", folder), {"generator": params, "critic": params})
    assert state.critic.ema is None and state.generator.ema is not None


# Distillation's crop


def cropping(settings, params):
    """f(clip, number of blocks) → (scored clip, which frames count), with the help of a VAE or of none."""
    parts = latent.parts(settings)
    reencode = functools.partial(latent.reencoder(settings), params) if params else None
    return jax.jit(lambda clip, blocks: distill.crop(parts, reencode, clip, blocks, 3))


@pytest.fixture(scope="module")
def cropped(folder):
    """The crop of the config, and the config."""
    settings = settings_of("distill", folder)
    return cropping(settings, latent._vae(settings)[1]), settings


def test_longer_clip_begins_with_the_encoding_of_the_frame_before_the_kept_ones(cropped):
    crop, settings = cropped
    clip = np.random.default_rng(0).normal(size=(2, 8, 8, 8, 4)).astype(np.float32)
    scored, counts = crop(clip, 4)
    vae, params = VAE(build(VAEConfig, settings, "vae")), latent._vae(settings)[1]
    std, mean = params["latent_std"].reshape(1, 1, 1, 1, 4), params["latent_mean"].reshape(1, 1, 1, 1, 4)
    video = jax.jit(lambda z: vae.apply({"params": params}, z, method="decode"))(clip[:, :3] * std + mean)
    image, _ = jax.jit(lambda v: vae.apply({"params": params}, v, method="encode"))(video[:, -1:])
    np.testing.assert_allclose(scored[:, :1], (image - mean) / std, atol=1e-4)
    np.testing.assert_array_equal(scored[:, 1:], clip[:, 3:])
    assert list(counts) == [False, False, True, True, True, True]


@pytest.mark.parametrize("vae", [True, False])
def test_clip_of_the_span_is_scored_whole(cropped, vae):
    crop, settings = cropped
    clip = np.random.default_rng(1).normal(size=(2, 8, 8, 8, 4)).astype(np.float32)
    scored, counts = (crop if vae else cropping(settings, None))(clip, 3)
    np.testing.assert_array_equal(scored, clip[:, :6])
    assert all(counts)


def test_longer_clip_without_a_vae_is_its_last_frames_of_which_the_first_block_does_not_count(folder):
    clip = np.random.default_rng(2).normal(size=(2, 8, 8, 8, 4)).astype(np.float32)
    scored, counts = cropping(settings_of("distill", folder), None)(clip, 4)
    np.testing.assert_array_equal(scored, clip[:, 2:])
    assert list(counts) == [False, False, True, True, True, True]


def test_draws_cover_both_rollouts_every_exit_step_and_every_length(folder):
    settings = settings_of("distill", folder, blocks=(3, 5))
    keys = jax.random.split(jax.random.key(0), 300)
    drawn = jax.device_get(jax.jit(jax.vmap(functools.partial(distill.draw, settings)))(keys))
    for values, choices in ((drawn.rolling, 2), (drawn.exit_step, 2), (drawn.num_blocks - 3, 3)):
        counts = np.bincount(np.int32(values), minlength=choices)
        assert len(counts) == choices and counts.min() > 0.7 * 300 / choices


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_rolling_share_is_that_of_rolling_rollouts(folder, share):
    settings = settings_of("distill", folder, rolling_share=share)
    drawn = jax.vmap(functools.partial(distill.draw, settings))(jax.random.split(jax.random.key(0), 50))
    assert (np.asarray(drawn.rolling) == bool(share)).all()


# Mistakes


@pytest.mark.parametrize(
    "stage, what, changes, says",
    [
        ("teacher", "data", {"data": "none"}, "no records in none.*python -m rfjax.data latents --config"),
        ("ode", "data", {"data": "none"}, "no records in none.*python -m rfjax.data ode-pairs --config"),
        ("teacher", "networks", {"init_from": "none.safetensors"}, "no parameter file none.safetensors"),
        ("ode", "networks", {"init_from": "none.safetensors"}, "no parameter file none.safetensors"),
        ("distill", "frozen", {"teacher": "none.safetensors"}, "no parameter file none.safetensors"),
        ("distill", "networks", {"init_from": "vae"}, "is not of this network"),
        ("distill", "frozen", {"vae_weights": "none.safetensors"}, "no parameter file none.safetensors"),
        ("teacher", "sample", {"vae_weights": "none.safetensors"}, "no parameter file none.safetensors"),
        ("ode", "evaluate", {"vae_weights": "none.safetensors", "world": {"size": 64}}, "none.safetensors"),
        ("ode", "evaluate", {}, "config.world.size is 16, but clips are judged at 64"),
        ("distill", "networks", {"critic_init": "none.safetensors"}, "no parameter file none.safetensors"),
        (
            "teacher_forcing",
            "data",
            {"frames": 5},
            "config.frames is 5; set it to a multiple of the 2 frames",
        ),
        (
            "teacher_forcing",
            "data",
            {"frames": 10},
            r"latents of \[8, 8, 8, 4\], but this config needs \[10 or more",
        ),
        ("distill", "update", {"blocks": (2, 4)}, "config.blocks.*3"),
        ("distill", "update", {"scored_blocks": 4}, "blocks of a clip, 4 or more"),
        ("distill", "update", {"loss": "sdi"}, "config.loss is 'sdi'; it must be one of dmd, sid"),
    ],
)
def test_missing_file_is_told_before_training(stage, what, changes, says, folder):
    if "vae" in changes.values():
        changes = {"init_from": f"{folder}/vae.safetensors"}
    settings = settings_of(stage, folder)
    settings.update(changes)
    with pytest.raises(UserError, match=says):
        told = getattr(STAGES[stage], what)(settings)
        if what in ("networks", "frozen"):
            sources.load(told, jax.random.key(0), sharding.make_mesh(sharding.MeshConfig()))


@pytest.mark.parametrize(
    "stage, section, field",
    [("teacher", "", "guidance"), ("ode", "rollout", "block_frames")],
)
def test_field_that_a_stage_needs_is_told_before_training(
    stage, section, field, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(detect, "SIDE", 16)
    settings = settings_of(stage, folder)
    del (settings[section] if section else settings)[field]
    name = f"config.{section}.{field}" if section else f"config.{field}"
    with pytest.raises(UserError, match=f"The config lacks {name}, which stage '{stage}' needs"):
        train.train(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_stage_says_that_it_measures_is_what_its_clips_are_scored_by():
    settings = config.load(CONFIGS / "shapes_ode.py")
    for settings.judged in (1, 3):
        scores = [
            score.score(np.zeros((16, 64, 64, 3), np.uint8), caption)["first"]
            for caption in clips.held_out(settings)
        ]
        assert set(STAGES["ode"].measures(settings)) == {f"right_{name}" for row in scores for name in row}


@pytest.mark.parametrize(
    "what, stage, changes, says",
    [
        ("latents", "teacher", {"vae_weights": "none.safetensors"}, "no parameter file none.safetensors"),
        ("ode-pairs", "ode", {"teacher": "none.safetensors"}, "no parameter file none.safetensors"),
        (
            "ode-pairs",
            "ode",
            {"record_frames": 7},
            "config.record_frames is 7; set it to a multiple of the 2 frames",
        ),
        (
            "ode-pairs",
            "ode",
            {"shard_records": 1},
            "config.shard_records is 1; set it to a multiple of the 2 records",
        ),
        ("ode-pairs", "ode", {"shards": 0}, "config.shards is 0; set it to a whole number, 1 or more"),
        ("ode-pairs", "ode", {"solver_steps": 3}, "3 steps does not pass through the few-step list"),
    ],
)
def test_mistake_of_the_data_command_is_one_sentence(what, stage, changes, says, folder, tmp_path, capsys):
    settings = settings_of(stage, folder)
    settings.update({"data": str(tmp_path / "made")} | changes)
    with pytest.raises(SystemExit) as left:
        make(what, settings)
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.startswith("error: ") and says in told and told.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_schedules_of_distillation_end_with_its_last_updates(monkeypatch, folder):
    """5 steps of 2 critic updates and, after the first step, one of the generator."""
    asked, make_optimizer = [], distill.train.make_optimizer
    monkeypatch.setattr(
        distill.train,
        "make_optimizer",
        lambda options, updates: asked.append(updates) or make_optimizer(options, updates),
    )
    settings = settings_of("distill", folder, steps=5)
    jax.eval_shape(functools.partial(distill.init, settings), sources.shapes(distill.networks(settings)))
    assert asked == [10, 4]


def test_processes_may_feed_unequally_many_parts(monkeypatch):
    """One that holds two of three parts of a batch says how large the whole is."""
    asked = []
    monkeypatch.setattr(sharding, "batch_parts", lambda mesh: ([1, 2], 3))
    monkeypatch.setattr(
        jax, "make_array_from_process_local_data", lambda split, rows, shape: asked.append(shape)
    )
    sharding.put_batch({"a": np.zeros((4, 7))}, sharding.make_mesh(sharding.MeshConfig()))
    assert asked == [(6, 7)]
