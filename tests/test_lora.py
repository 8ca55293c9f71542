import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rfjax import checkpoint, lora, tree
from rfjax.errors import UserError


def random(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), shapes)


def adapters(**changes):
    config = lora.LoRAConfig(rank=2, **changes)
    return random(lora.init(config, tiny.params(), jax.random.key(0)), 0)


def test_merged_kernels_are_base_plus_the_scaled_product_and_nothing_else_changes():
    base, low = tree.flatten(tiny.params()), adapters()
    merged = tree.flatten(lora.merge(tiny.params(), low, 0.5))
    changed = {f"blocks/{kind}_{part}/kernel" for kind in ("self", "cross") for part in "qo"} | {
        "blocks/self_k/kernel",
        "blocks/self_v/kernel",
    }
    for path, kernel in base.items():
        wanted = np.float64(kernel)
        if path in changed:
            part = low["blocks"][path.split("/")[1]]
            wanted = wanted + 0.5 * np.einsum("lir,lro->lio", *(np.float64(part[x]) for x in ("down", "up")))
        np.testing.assert_allclose(merged[path], wanted, rtol=1e-5, atol=1e-5)
        assert (merged[path] == kernel).all() == (path not in changed)
    jax.tree.map(
        np.testing.assert_array_equal,
        lora.merge(tiny.params(), lora.scaled(low, 0.5)),
        tree.unflatten(merged),
    )


def test_fresh_adapters_change_nothing_and_are_small():
    fresh = lora.init(lora.LoRAConfig(rank=2, targets=".*/ffn_in"), tiny.params(), jax.random.key(0))
    assert {path: x.shape for path, x in tree.flatten(fresh).items()} == {
        "blocks/ffn_in/down": (2, 24, 2),
        "blocks/ffn_in/up": (2, 2, 32),
    }
    jax.tree.map(np.testing.assert_array_equal, lora.merge(tiny.params(), fresh), tiny.params())


def test_targets_that_match_nothing_are_told():
    with pytest.raises(UserError, match="'blocks/q' matches no layer; there are .*blocks/self_q"):
        lora.init(lora.LoRAConfig(rank=2, targets="blocks/q"), tiny.params(), jax.random.key(0))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rfjax.lora", *map(str, arguments)])
    lora.main()


def test_command_merges_files(tmp_path, monkeypatch, capsys):
    names = base, low, out = [tmp_path / f"{name}.safetensors" for name in ("dit", "lora", "out")]
    checkpoint.save_params(base, tiny.params())
    checkpoint.save_params(low, adapters())
    run(monkeypatch, *names)
    wanted = lora.merge(tiny.params(), adapters())
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(out, wanted), wanted)
    checkpoint.save_params(
        low, {"blocks": {"self_q": {"down": np.zeros((2, 23, 2)), "up": np.zeros((2, 2, 24))}}}
    )
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *names)
    told = capsys.readouterr().err
    assert left.value.code == 2 and "adapts nothing" in told and told.count("\n") == 1
