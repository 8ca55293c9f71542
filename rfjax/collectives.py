"""What a compiled program sends between devices, read from its text: bytes by kind of collective.

Counted is what a device sends (as much comes in) where every collective takes the way that needs the least bandwidth, such as rings
(Thakur et al., 2005). With n devices in a group, and r bytes of result on each: all-gather and all-to-all r·(n-1)/n, reduce-scatter
r·(n-1), all-reduce twice its result r·(n-1)/n, collective-permute r.
"""

import collections
import math
import re

SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?\S+ = (?P<type>.*?) (?P<op>[a-z][a-z0-9-]*)\((?P<rest>.*)")
CALLED = re.compile(r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")


def collectives(compiled) -> dict[str, float]:
    """{kind: bytes that a device sends in a run} of a `jax.stages.Compiled`, for the kinds that it has.

    What a loop sends counts as often as the loop runs, or once where that is not known. Of a conditional, the branch that sends
    most counts. Where groups of devices differ in size, the first is taken.
    """
    return of_text(compiled.as_text())


def of_text(text: str) -> dict[str, float]:
    """`collectives` of a program's text."""
    bodies, entry = _computations(text)
    devices = re.search(r"num_partitions=(\d+)", text)
    known = {}

    def sent(name):
        if name not in known:
            known[name] = collections.Counter()
            for line in bodies[name]:
                known[name].update(_instruction(line, int(devices[1]) if devices else 1, sent, bodies))
        return known[name]

    return dict(sent(entry))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the one that is run."""
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return bodies, entry


def _instruction(line: str, devices: int, sent, bodies) -> dict[str, float]:
    """What an instruction sends by itself, or by the computations that it runs."""
    found = INSTRUCTION.match(line)
    if found is None or found["op"].endswith(("-done", "-update")):
        return {}
    kind = found["op"].removesuffix("-start")
    if kind in SENT:
        return {kind: _result_bytes(found["type"], found["op"]) * SENT[kind](_group_size(line, devices))}
    branches = re.search(r"branch_computations=\{([^}]*)\}", line)
    if branches:
        names = re.findall(r"[\w.-]+", branches[1])
    else:
        names = [name for _, name in CALLED.findall(line)]
    if kind == "conditional":
        return max(map(sent, names), key=lambda branch: sum(branch.values()))
    trips = _trips(line, bodies) if kind == "while" else 1
    total = collections.Counter()
    for name in names:
        total.update({what: size * trips for what, size in sent(name).items()})
    return total


def _trips(line: str, bodies) -> int:
    """How often a loop runs: as XLA noted or, for TPUs it notes nothing, by a condition of the form `counter < constant`."""
    noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if noted:
        return int(noted[1])
    condition = "\n".join(bodies.get(re.search(r"condition=%?([\w.-]+)", line)[1], []))
    compared = re.search(r"ROOT .* compare\(\S+, %?([\w.-]+)\), direction=LT", condition)
    bound = compared and re.search(
        rf"%?{re.escape(compared[1])} = [su]32\[\]\S* constant\((\d+)\)", condition
    )
    return int(bound[1]) if bound else 1


def _result_bytes(kind: str, op: str) -> float:
    """Bytes of a type such as `(f32[8,16]{1,0}, bf16[4])`; an asynchronous start lists its operands first, then its results."""
    shapes = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", kind)
    if op in ("all-gather-start", "collective-permute-start"):
        shapes = [shape for shape in shapes if shape != ("u", "32", "")]  # handles of the transfer
        shapes = shapes[len(shapes) // 2 :]
    return sum(
        int(bits or 8) / 8 * math.prod(int(size) for size in sizes.split(",") if size)
        for _, bits, sizes in shapes
    )


def _group_size(line: str, devices: int) -> int:
    """Devices that take part together: `{{0,1},{2,3}}`, `[2,4]<=[8]`, `mesh['a'=2,'b'=4] {'b'}`; none named is all."""
    mesh = re.search(r"replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'a':(1)2 is a part of axis a
        return math.prod(int(part or sizes[name]) for name, part in used)
    rows = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line)
    if rows:
        return int(rows[1])
    groups = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(groups[1].split(",")) if groups else devices
