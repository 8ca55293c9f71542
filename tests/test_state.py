import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfjax import state


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_gradient_of_a_batch_in_parts_is_that_of_the_whole(micro):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 3)).astype(np.float32), "y": rng.normal(size=8).astype(np.float32)}
    params = {"w": jnp.float32([1.0, -2.0, 0.5])}

    def objective(params, batch, index):
        error = batch["x"] @ params["w"] - batch["y"]
        return (error**2).mean(), {
            "loss": (error**2).mean(),
            "index": jnp.float32(index),
            "rows": jnp.float32(len(error)),
        }

    metrics, grads = jax.jit(lambda params, batch: state.gradients(objective, params, batch, micro))(
        params, batch
    )
    error = batch["x"].astype(np.float64) @ [1.0, -2.0, 0.5] - batch["y"]
    np.testing.assert_allclose(grads["w"], 2 * batch["x"].T @ error / 8, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (error**2).mean(), rtol=1e-5)
    assert metrics["index"] == (micro - 1) / 2 and metrics["rows"] == 8 / micro
