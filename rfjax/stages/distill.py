"""Stage `distill`: few-step distillation on the student's own rollouts (DMD, 2311.18828; Self Forcing, 2506.08009).

One step trains the critic on `critic_steps` fresh rollouts, then the generator on one. Every batch draws its rollout
kind (a fair coin: rolling or Self Forcing), its exit step and its length; one program serves them all. Clips longer
than the span are cropped: their last frames, and before them the VAE's encoding of the decoded frame just before.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rfjax import flow, losses, rollout, training_rollout
from rfjax import state as train
from rfjax.config import build
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.stages import latent, ode


class Distillation(struct.PyTreeNode):
    """Both networks' training."""

    generator: train.TrainState
    critic: train.TrainState


class Draw(NamedTuple):
    """What a batch draws before it is rolled out."""

    rolling: jax.Array  # bool
    exit_step: jax.Array
    num_blocks: jax.Array


def init(config, key):
    """The generator from config.init_from, the critic from the teacher."""
    generator = latent.start_params(config, key)
    return Distillation(
        train.create(generator, latent.optimizer(config)[0]),
        train.create(_teacher(config), latent.optimizer(config, "critic_optimizer")[0]),
    )


def data(config):
    """Batches {"context" [(critic_steps + 1) · B, text_len, text_dim]}."""
    return latent.captions(config, config.batch_size * (config.critic_steps + 1))


def update(config):
    """f(state, batch, step) → (state, metrics). One program each. UserError for clips below the span."""
    span = latent.parts(config).rollout.span_blocks
    if not span <= config.blocks[0] <= config.blocks[1]:
        raise UserError(
            f"config.blocks is {tuple(config.blocks)}: set (fewest, most) blocks of a clip, {span} or more."
        )
    teach = functools.partial(jax.jit, donate_argnums=0)
    critic_step, generator_step = teach(_critic_step(config)), teach(_generator_step(config))
    teacher = _teacher(config)

    def step_once(state, batch, step):
        key = jax.random.fold_in(jax.random.key(config.seed), step)
        chunks = jnp.split(jnp.asarray(batch["context"]), config.critic_steps + 1)
        metrics, critic = {}, state.critic
        for index, context in enumerate(chunks[:-1]):
            here = jax.random.fold_in(key, index)
            critic, metrics = critic_step(critic, state.generator.params, context, here)
        generator = state.generator
        if step >= config.critic_warmup:
            here = jax.random.fold_in(key, config.critic_steps)
            generator, more = generator_step(generator, critic.params, teacher, chunks[-1], here)
            metrics |= more
        return Distillation(generator, critic), metrics

    return step_once


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
    plan = training_rollout.Plan(
        noise, drawn.exit_step, drawn.num_blocks, config.blocks[1], batch, parts.frame_shape
    )
    return jax.lax.cond(
        drawn.rolling, lambda: how(model, "rolling", plan), lambda: how(model, "self_forcing", plan)
    )


def crop(parts, reencode, clip, num_blocks):
    """What is scored: the last `span` frames [B, span, h, w, C] of a clip, and which of them count [span].

    Of a longer clip the first kept frame is replaced by the VAE's encoding of the decoded video frame at its place, since
    a clip begins with the latent of a single frame; its block then does not count.
    """
    frames = parts.rollout.block_frames
    span, longest = parts.rollout.span_blocks * frames, clip.shape[1]
    if longest == span:
        return clip, jnp.ones(span, bool)
    start = num_blocks * frames - span
    prefix = jax.lax.stop_gradient(clip[:, : longest - span + 1])
    longer = start > 0
    first = jax.lax.cond(longer, lambda: reencode(prefix, start), lambda: clip[:, :1])
    kept = jax.lax.dynamic_slice_in_dim(clip, start + 1, span - 1, axis=1)
    return jnp.concatenate([first, kept], 1), ~longer | (jnp.arange(span) >= frames)


def score_draw(config, key, clip):
    """(x_t, t, ε) at which a clip is scored: t shifted, clamped to [20, 980], one a clip."""
    level, noise_key = jax.random.split(key)
    t = flow.random_timesteps(jax.random.uniform(level, clip.shape[:1]), config.rollout.shift, 20.0, 980.0)
    noise = jax.random.normal(noise_key, clip.shape)
    return flow.add_noise(clip, noise, t), t, noise


def _critic_step(config):
    parts = latent.parts(config)
    optimizer, options = latent.optimizer(config, "critic_optimizer")
    reencode = latent.reencoder(config)

    def step(critic, generator_params, context, key):
        keys = jax.random.split(key, 3)
        drawn = draw(config, keys[0])
        how = training_rollout.constant_rollout
        clip = roll(config, parts, how, generator_params, context, drawn, keys[1])
        clip, _ = crop(parts, reencode, clip, drawn.num_blocks)
        _, t, noise = score_draw(config, keys[2], clip)

        def objective(params):
            return losses.critic_loss(parts.dit, params, clip, context, t, noise)

        critic, metrics = train.descend(critic, objective, optimizer, options)
        return critic, {f"critic_{name}": value for name, value in metrics.items()}

    return step


def _generator_step(config):
    parts = latent.parts(config)
    optimizer, options = latent.optimizer(config)
    reencode = latent.reencoder(config)

    def step(generator, critic_params, teacher_params, context, key):
        keys = jax.random.split(key, 3)
        drawn = draw(config, keys[0])

        def objective(params):
            how = training_rollout.gradient_rollout
            clip = roll(config, parts, how, params, context, drawn, keys[1])
            clip, counts = crop(parts, reencode, clip, drawn.num_blocks)
            x_t, t, _ = jax.lax.stop_gradient(score_draw(config, keys[2], clip))
            fake = losses.score_x0(parts.dit, critic_params, x_t, t, context)
            negative = jnp.zeros_like(context)
            real = losses.guided_x0(parts.dit, teacher_params, x_t, t, context, negative, config.guidance)
            gradient = jax.lax.stop_gradient(losses.dmd_gradient(clip, fake, real))
            return losses.dmd_loss(clip, gradient, counts), (jnp.abs(gradient).mean(), clip)

        (loss, (strength, clip)), grads = jax.value_and_grad(objective, has_aux=True)(generator.params)
        metrics = {
            "dmd_loss": loss,
            "dmd_gradient": strength,
            "grad_norm": optax.tree.norm(grads),
            "latent_std": clip.std(),
            "latent_max": jnp.abs(clip).max(),
        }
        return train.apply_gradients(generator, grads, optimizer, options), metrics

    return step


def _teacher(config):
    return latent.load(config.teacher, build(DiTConfig, config, "dit"))


def export(config):
    """f(state) → {"dit": averaged generator}."""
    del config
    return lambda state: {"dit": state.generator.ema}


def sample(config):
    """f(state, key) → clips of held-out captions."""
    samples = ode.sample(config)
    return lambda state, key: samples(state.generator, key)


def evaluate(config):
    """f(state) → {"right_shape": …, …} over config.frames."""
    judge = ode.evaluate(config)
    return lambda state: judge(state.generator)
