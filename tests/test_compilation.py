"""Programs of training: which options they are compiled with."""

import jax
import jax.numpy as jnp
import pytest

from rfjax import axes, compilation


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's pipeline for CPU")
def test_barriers_stay_on_cpu_and_the_platform_is_that_of_the_call(monkeypatch):
    step = compilation.training_step(lambda state: jax.lax.optimization_barrier(2 * state) + 1)

    def text():
        return step.trace(jnp.ones(64)).lower().compile().as_text()

    assert "opt-barrier" in text()
    monkeypatch.setattr(axes, "platform", lambda: "tpu")
    assert "opt-barrier" not in text()
    state = jnp.ones(64)
    assert (step(state) == 3).all() and state.is_deleted()
