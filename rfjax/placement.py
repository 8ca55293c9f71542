"""Which devices a sampler uses: clips over `data`, the tokens and heads of each clip over `context`, the decoder apart.

    --devices 4                              one stream over 4 devices, the same as context=4
    --devices data=8                         a batch of clips, each on a device of its own
    --devices data=2,context=2,decoder=1     clips two by two, and what makes frames on a fifth device

The network's parameters are whole on each of its devices: a step then sends activations alone. A decoder of its own makes frames of
a block while the network is at work on the next; without one it runs where the network does, its clips over `data`.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rfjax import axes, sharding
from rfjax.dit import DiTConfig
from rfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Devices:
    """How many devices split what."""

    data: int = 1
    context: int = 1
    decoder: int = 0  # 0: where the network is


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where network and decoder run; None is the default device, without a mesh."""

    network: Mesh | None = None
    decoder: Mesh | None = None


HERE = Placement()


def parse(text: str) -> Devices:
    """The number of devices as --devices has it; UserError for words that are none."""
    if re.fullmatch("[0-9]{1,6}", text):
        text = f"context={text}"
    pairs = [re.fullmatch("(data|context|decoder)=([0-9]{1,6})", word) for word in text.split(",")]
    if (
        not all(pairs)
        or len({pair[1] for pair in pairs}) < len(pairs)
        or any(int(pair[2]) < 1 for pair in pairs)
    ):
        raise UserError(
            f"--devices must be like 4 or data=2,context=2,decoder=1, each 1 or more, not {text}."
        )
    return Devices(**{pair[1]: int(pair[2]) for pair in pairs})


def check(
    devices: Devices, clips: int, network: DiTConfig, tokens: int, there: Sequence | None = None
) -> None:
    """UserError where they do not divide the clips, the heads, or the tokens of a frame, or are not `there` (default: here)."""
    needed, number = devices.data * devices.context + devices.decoder, len(there or jax.local_devices())
    if needed > number:
        raise UserError(f"--devices asks for {needed} devices and there are {number}; ask for no more.")
    for name, count, what in (
        ("data", clips, "clips"),
        ("decoder", clips, "clips"),
        ("context", network.num_heads, "heads of the network"),
        ("context", tokens, "tokens of a frame"),
    ):
        if count % (getattr(devices, name) or 1):
            raise UserError(
                f"--devices has {name}={getattr(devices, name)}, which does not divide the {count} {what}."
            )


def place(devices: Devices, there: Sequence | None = None) -> Placement:
    """Meshes over the first devices of those that are `there` (default: here), those of the network nearest to each other."""
    here, count = list(there or jax.local_devices()), devices.data * devices.context
    network = sharding.make_mesh(sharding.MeshConfig(devices.data, 1, devices.context), here[:count])
    if not devices.decoder:
        return Placement(network, network)
    apart = here[count : count + devices.decoder]
    return Placement(network, sharding.make_mesh(sharding.MeshConfig(devices.decoder, 1, 1), apart))


def whole(tree, mesh: Mesh | None):
    """The tree of arrays, whole on every device of a mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(tree, mesh: Mesh | None):
    """The tree of arrays [B, …], clips over the mesh; from another mesh they are sent, and nothing waits for them."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axes.BATCH)))
