"""Stage `distill`: distillation on the student's own rollouts (Self Forcing, 2506.08009) by DMD (2311.18828) or SiD (2404.04057).

One step trains the critic on `critic_steps` fresh rollouts, then the generator on one. Every batch draws its rollout
kind (a fair coin: rolling or Self Forcing), its exit step and its length; one program serves them all. The teacher scores the
last frames of a clip, as many as the student's span (or config.scored_blocks): a longer clip is cropped to these, and begins with
the VAE's encoding of the decoded frame just before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from rfjax import compilation, flow, losses, rollout, training_rollout
from rfjax import state as train
from rfjax.config import build
from rfjax.dit import DiT, DiTConfig
from rfjax.errors import UserError
from rfjax.stages import latent, ode, student


class Distillation(struct.PyTreeNode):
    """Both networks' training. The critic's average would be read by nobody and is None."""

    generator: train.TrainState
    critic: train.TrainState


class Draw(NamedTuple):
    """What a batch draws before it is rolled out."""

    rolling: jax.Array  # bool
    exit_step: jax.Array
    num_blocks: jax.Array


def networks(config):
    """The generator from config.init_from, the critic from config.critic_init; both of the sizes in config.dit."""
    sizes = build(DiTConfig, config, "dit")
    return {
        "generator": student.trained(config),
        "critic": student.transformer(sizes, config.critic_init),
    }


def frozen(config):
    """The teacher, the negative prompt, what adapters adapt, and the VAE where longer clips are cropped with its help."""
    teacher = {"teacher": student.transformer(student.teacher_sizes(config), config.teacher, frozen=True)}
    teacher |= latent.unconditional(config) | student.base(config)
    return teacher | ({"vae": latent.codec(config)} if config.vae_weights else {})


def init(config, params):
    """Fresh training of params {"generator", "critic"}."""
    critic = train.create(params["critic"], _critic_optimizer(config)[0])
    generator = train.create(params["generator"], _generator_optimizer(config)[0])
    return Distillation(generator, critic.replace(ema=None))


def _critic_optimizer(config):
    return student.optimizer(config, "critic_optimizer", config.steps * config.critic_steps)


def _generator_optimizer(config):
    return student.optimizer(config, updates=max(1, config.steps - config.critic_warmup))


def data(config):
    """Batches {"context" [(critic_steps + 1) · B, text_len, text_dim]}."""
    return latent.prompts(config, config.batch_size * (config.critic_steps + 1))


def update(config):
    """f(state, frozen params, batch, step) → (state, metrics). One program each. UserError for clips below the span."""
    critic_step, generator_step = steps(config)

    def step_once(state, fixed, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        critic, metrics = state.critic, {}
        for index in range(config.critic_steps):
            here = jax.random.fold_in(key, index)
            critic, metrics = critic_step(critic, state.generator.params, fixed, batch, index, here)
        generator = state.generator
        if step >= config.critic_warmup:
            here = jax.random.fold_in(key, config.critic_steps)
            generator, more = generator_step(generator, critic.params, fixed, batch, here)
            metrics |= more
        return Distillation(generator, critic), metrics

    return step_once


def steps(config):
    """The two compiled updates: of the critic (critic, generator params, frozen params, batch, index of its part, key) and of
    the generator (generator, critic params, frozen params, batch, key), each → (state, metrics). The state is donated.
    """
    check_blocks(config)
    if config.loss not in OBJECTIVES:
        raise UserError(f"config.loss is {config.loss!r}; it must be one of {', '.join(OBJECTIVES)}.")
    return tuple(compilation.training_step(step(config)) for step in (_critic_step, _generator_step))


def check_blocks(config) -> None:
    """UserError where clips may be shorter than what the teacher scores of them."""
    scored = _scored_blocks(config)
    if not scored <= config.blocks[0] <= config.blocks[1]:
        raise UserError(
            f"config.blocks is {tuple(config.blocks)}: set (fewest, most) blocks of a clip, {scored} or more, "
            "or config.scored_blocks to what the teacher is to score of it."
        )


def programs(config, state, fixed):
    """{"critic", "generator"}: (the compiled update, its arguments as shapes), of shapes of the state and of the frozen params."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    text = config.batch_size * (config.critic_steps + 1), config.dit.text_len, config.dit.text_dim
    batch, index = {"context": jax.ShapeDtypeStruct(text, jnp.float32)}, jax.ShapeDtypeStruct((), jnp.int32)
    critic_step, generator_step = steps(config)
    return {
        "critic": (critic_step, (state.critic, state.generator.params, fixed, batch, index, key)),
        "generator": (generator_step, (state.generator, state.critic.params, fixed, batch, key)),
    }


def draw(config, key) -> Draw:
    """Rollout kind, exit step, and length, uniform over config.blocks = (fewest, most)."""
    kind, exit_key, length = jax.random.split(key, 3)
    fewest, most = config.blocks
    return Draw(
        jax.random.bernoulli(kind, config.rolling_share),
        jax.random.randint(exit_key, (), 0, len(config.rollout.steps)),
        jax.random.randint(length, (), fewest, most + 1),
    )


def roll(config, parts, how, params, context, drawn: Draw, key):
    """The student's clip [B, span frames, h, w, C], by `training_rollout.constant_rollout` or `.gradient_rollout`."""
    text_kv = parts.dit.apply({"params": params}, context, method="text_kv")
    model = rollout.Model(parts.dit, params, text_kv, parts.rollout)
    batch = context.shape[0]
    noise = rollout.position_noise(jax.random.split(key, batch), parts.frame_shape)
    length = drawn.num_blocks, config.blocks[1]
    plan = training_rollout.Plan(
        noise, drawn.exit_step, *length, batch, parts.frame_shape, _scored_blocks(config)
    )
    return jax.lax.cond(
        drawn.rolling, lambda: how(model, "rolling", plan), lambda: how(model, "self_forcing", plan)
    )


def _scored_blocks(config):
    """Blocks at a clip's end that the teacher scores."""
    return config.get("scored_blocks", 0) or latent.parts(config).rollout.span_blocks


def crop(parts, reencode, clip, num_blocks, scored_blocks):
    """What is scored: the last s = scored_blocks · f frames [B, s, h, w, C] of a clip, and which of them count [s].

    Of a longer clip the first kept frame is replaced by `reencode(latents, i)`, the VAE's encoding of the decoded video frame at
    its place, since a clip begins with the latent of a single frame; its block then does not count. Without a VAE (None) the
    frame stays what it is, and its block does not count either.
    """
    frames = parts.rollout.block_frames
    scored, longest = scored_blocks * frames, clip.shape[1]
    if longest == scored:
        return clip, jnp.ones(scored, bool)
    start = num_blocks * frames - scored
    kept = jax.lax.dynamic_slice_in_dim(clip, start, scored, axis=1)
    longer = start > 0
    if reencode is not None:
        prefix = jax.lax.stop_gradient(clip[:, : longest - scored + 1])
        first = jax.lax.cond(longer, lambda: reencode(prefix, start), lambda: clip[:, :1])
        kept = jnp.concatenate([first, kept[:, 1:]], 1)
    return kept, ~longer | (jnp.arange(scored) >= frames)


def score_draw(config, key, clip):
    """(x_t, t, ε) at which a clip is scored: t shifted, clamped to [20, 980], one a clip."""
    level, noise_key = jax.random.split(key)
    t = flow.random_timesteps(jax.random.uniform(level, clip.shape[:1]), config.rollout.shift, 20.0, 980.0)
    noise = jax.random.normal(noise_key, clip.shape)
    return flow.add_noise(clip, noise, t), t, noise


def _critic_step(config):
    parts = latent.parts(config)
    optimizer, options = _critic_optimizer(config)

    def step(critic, generator_params, fixed, batch, part, key):
        generator = student.working(config)(generator_params, fixed)

        def objective(params, context, index):
            keys = jax.random.split(jax.random.fold_in(key, index), 3)
            drawn = draw(config, keys[0])
            how = training_rollout.constant_rollout
            clip = roll(config, parts, how, generator, context, drawn, keys[1])
            clip, _ = crop(parts, _reencode(config, fixed), clip, drawn.num_blocks, _scored_blocks(config))
            _, t, noise = score_draw(config, keys[2], clip)
            loss = losses.critic_loss(
                parts.dit, student.cast(parts.dit.config, params), clip, context, t, noise
            )
            return loss, {"loss": loss}

        context = _part(config, batch["context"], part)
        critic, metrics = train.descend(critic, objective, context, optimizer, options, config.accumulate)
        return critic, {f"critic_{name}": value for name, value in metrics.items()}

    return step


def _generator_step(config):
    parts = latent.parts(config)
    teacher = DiT(student.teacher_sizes(config))
    optimizer, options = _generator_optimizer(config)
    loss_of, whole = OBJECTIVES[config.loss], student.working(config)

    def step(generator, critic_params, fixed, batch, key):
        critic = student.cast(parts.dit.config, critic_params)

        def objective(params, context, index):
            keys = jax.random.split(jax.random.fold_in(key, index), 3)
            drawn = draw(config, keys[0])
            params = whole(params, fixed)
            clip = roll(config, parts, training_rollout.gradient_rollout, params, context, drawn, keys[1])
            scored, counts = crop(
                parts, _reencode(config, fixed), clip, drawn.num_blocks, _scored_blocks(config)
            )
            x_t, t, _ = score_draw(config, keys[2], scored)
            negative = jnp.broadcast_to(fixed["negative"]["context"], context.shape)

            def scores(x_t):
                fake = losses.score_x0(parts.dit, critic, x_t, t, context)
                real = fixed["teacher"], x_t, t, context, negative, config.guidance
                return fake, losses.guided_x0(teacher, *real)

            loss, strength = loss_of(scored, x_t, scores, counts)
            told = {"latent_std": scored.std(), "latent_max": jnp.abs(scored).max()}
            return loss, {"loss": loss, "strength": strength} | told

        context = _part(config, batch["context"], config.critic_steps)
        return train.descend(generator, objective, context, optimizer, options, config.accumulate)

    return step


def _dmd(clip, x_t, scores, counts):
    """Distribution matching: the scores are constants, so nothing is differentiated but the student's windows."""
    gradient = jax.lax.stop_gradient(losses.dmd_gradient(clip, *scores(jax.lax.stop_gradient(x_t))))
    return losses.dmd_loss(clip, gradient, counts), jnp.abs(gradient).mean()


def _sid(clip, x_t, scores, counts):
    """Score identity distillation: the gradient goes through both scores."""
    fake, real = scores(x_t)
    return losses.sid_loss(clip, fake, real, counts), jnp.abs(fake - real).mean()


OBJECTIVES = {"dmd": _dmd, "sid": _sid}


def _part(config, context, index):
    """Every update's share of a batch [(critic_steps + 1) · B, …]: rows index, index + critic_steps + 1, …"""
    return context.reshape(-1, config.critic_steps + 1, *context.shape[1:])[:, index]


def _reencode(config, fixed):
    return functools.partial(latent.reencoder(config), fixed["vae"]) if "vae" in fixed else None


def export(config):
    """f(state, frozen params) → {"dit": averaged generator}, and {"lora"} of adapters."""
    exported = student.export(config)
    return lambda state, fixed: exported(state.generator, fixed)


def sample(config):
    """f(state, frozen params, key) → clips of held-out captions."""
    samples = ode.sample(config)
    return lambda state, fixed, key: samples(state.generator, fixed, key)


def evaluate(config):
    """f(state, frozen params) → {"right_shape": …, …} over config.frames."""
    judge = ode.evaluate(config)
    return lambda state, fixed: judge(state.generator, fixed)
