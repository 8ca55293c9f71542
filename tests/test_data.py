"""Pipelines against the pure functions below them: random access, resuming, round trips, atomic shards."""

import contextlib
import itertools
import json

import grain
import jax
import numpy as np
import pytest

from rfjax import data, shapes
from rfjax.errors import UserError

TINY = shapes.World(size=16)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def example(number):
    rng = np.random.default_rng(number)
    return {
        "latents": rng.standard_normal((2, 4, 4, 3)).astype(np.float16),
        "trajectory": rng.standard_normal((5, 2, 1)).astype(np.float32),
        "caption": f"clip {number}",
    }


def test_clips_are_the_world_and_randomly_accessible():
    dataset = data.clips(frames=5, batch_size=3, seed=2, world=TINY)
    batch = dataset[7]
    assert batch["video"].shape == (3, 5, 16, 16, 3) and batch["video"].dtype == np.uint8
    for row, index in enumerate(range(21, 24)):
        scene = shapes.sample_scene(index, 2, TINY)
        assert batch["caption"][row] == shapes.caption(scene)
        starts = (shapes.render(scene, start, 5) for start in range(data.LATEST_START))
        assert any((video == batch["video"][row]).all() for video in starts)
    assert_same(batch, data.clips(5, 3, 2, TINY)[7])
    assert (data.clips(5, 3, 3, TINY)[7]["video"] != batch["video"]).any()


def test_captions_of_a_split():
    batch = data.captions(batch_size=8, split="held_out")[3]
    assert list(batch["caption"]) == shapes.prompts(32)[24:]


def test_iterator_resumes_exactly():
    dataset = data.clips(frames=2, batch_size=2, world=TINY)
    iterator = data.iterate(dataset)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    ahead = [next(iterator) for _ in range(2)]
    resumed = data.iterate(dataset)
    resumed.set_state(state)
    for batch in ahead:
        assert_same(batch, next(resumed))
    assert_same(ahead[0], dataset[3])


def test_records_round_trip_shuffled_by_the_seed(tmp_path):
    data.write_shards(tmp_path, lambda shard: (example(4 * shard + i) for i in range(4)), shards=3)
    dataset = data.records(tmp_path, batch_size=6, made_by="make", seed=1)
    passes = [[dataset[2 * n], dataset[2 * n + 1]] for n in range(2)]
    orders = [[name for batch in epoch for name in batch["caption"]] for epoch in passes]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"clip {i}" for i in range(12))
    assert orders[0] != orders[1] and orders[0] != list(
        data.records(tmp_path, 6, "make", seed=2)[0]["caption"]
    )
    batch = dataset[5]
    for row, name in enumerate(batch["caption"]):
        want = example(int(name.split()[1]))
        assert batch["latents"].dtype == np.float16
        np.testing.assert_array_equal(batch["latents"][row], want["latents"])
        np.testing.assert_array_equal(batch["trajectory"][row], want["trajectory"])
    assert_same(batch, data.records(tmp_path, 6, "make", seed=1)[5])


def test_a_stopped_writer_leaves_no_shard_and_goes_on(tmp_path):
    made = []

    def make(shard, stop=False):
        made.append(shard)
        for number in range(2):
            if stop and shard == 1 and number == 1:
                raise KeyboardInterrupt
            yield example(number)

    with pytest.raises(KeyboardInterrupt):
        data.write_shards(tmp_path, lambda shard: make(shard, stop=True), 3)
    assert len(list(tmp_path.glob("*.arrayrecord"))) == 1
    data.write_shards(tmp_path, make, 3)
    assert made == [0, 1, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{i}.arrayrecord" for i in range(3)]
    assert len(list(itertools.islice(data.iterate(data.records(tmp_path, 2, "make")), 5))) == 5


def test_processes_share_the_shards_and_wait_for_each_other(tmp_path, monkeypatch):
    for process in (1, 0):
        monkeypatch.setattr(data.jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(data.jax, "process_count", lambda: 2)
        made = []
        data.write_shards(tmp_path, lambda shard, made=made: made.append(shard) or [example(shard)], 5)
        assert made == list(range(process, 5, 2))
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        data.write_shard(tmp_path / "00005.arrayrecord", [example(5)])

    monkeypatch.setattr(data.time, "sleep", sleep)
    data.wait_for(tmp_path, 6)
    assert looks == [data.WAIT]
    batch = data.records(tmp_path, 6, "make")[0]
    assert sorted(batch["caption"]) == [f"clip {number}" for number in range(6)]


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_every_shape_is_seen_from_anywhere_in_the_minute(split, monkeypatch):
    """Starts are uniform, whatever is drawn for the scene: of each shape about as many in every quarter."""
    starts = {name: [] for name in shapes.SHAPES}
    monkeypatch.setattr(
        shapes, "render", lambda scene, start, frames: starts[scene.things[0].name.shape].append(start)
    )
    clips = data.clips(1, 1, 0, TINY, split)
    for index in range(2000):
        with contextlib.suppress(ValueError, TypeError):  # a batch of nothing
            clips[index]
    for found in starts.values():
        counts = np.histogram(found, 4, (0, data.LATEST_START))[0]
        assert len(found) > 200 and (abs(counts / len(found) - 0.25) < 0.1).all()


def test_what_killed_processes_left_of_a_file_is_no_part_of_anything(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dit.safetensors").write_text("weights")
    before = data.fingerprint(tmp_path / "run")
    for left in ("dit.safetensors.7.partial", "config.tmp"):
        (tmp_path / "run" / left).write_text("some")
    assert data.fingerprint(tmp_path / "run") == before
    (tmp_path / "00000.arrayrecord.7.partial").write_text("some")
    data.write_shards(tmp_path, lambda shard: [example(shard)], 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.arrayrecord", "run"]


def test_folder_of_other_records_is_refused(tmp_path):
    data.claim(tmp_path, {"size": (16, 16), "fps": 16})
    data.claim(tmp_path, {"size": (16, 16), "fps": 16})
    with pytest.raises(UserError, match="made with fps = 16, now it is 24: delete the folder"):
        data.claim(tmp_path, {"size": (16, 16), "fps": 24})
    with pytest.raises(UserError, match="made with size = .16, 16., now it is None"):
        data.claim(tmp_path, {"fps": 16})
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


def test_records_made_from_other_contents_of_a_file_or_run_are_refused(tmp_path):
    weights, run, made = (
        tmp_path / "vae.safetensors",
        tmp_path / "run" / "checkpoints" / "7",
        tmp_path / "made",
    )
    weights.write_bytes(bytes(3_000_000))
    run.mkdir(parents=True)
    (run / "state").write_text("one")
    sources = [weights, tmp_path / "run"]
    data.claim(made, {"fps": 16}, sources)
    (tmp_path / "run" / "metrics.jsonl").touch()  # the run's folder is read for its newest checkpoint alone
    data.claim(made, {"fps": 16}, sources)
    weights.write_bytes(bytes(2_999_999) + b"\1")
    with pytest.raises(UserError, match="were made from something else than .*vae.safetensors: delete"):
        data.claim(made, {"fps": 16}, sources)
    weights.write_bytes(bytes(3_000_000))
    data.claim(made, {"fps": 16}, sources)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    data.claim(made, {"fps": 16}, [moved, tmp_path / "run"])
    moved.write_bytes(bytes(2_999_999) + b"\1")
    with pytest.raises(UserError, match="were made from something else than .*moved.safetensors: delete"):
        data.claim(made, {"fps": 16}, [moved, tmp_path / "run"])
    (run / "state").write_text("two")
    with pytest.raises(UserError, match="were made from something else than .*run: delete"):
        data.claim(made, {"fps": 16}, sources)
    (made / "about.json").write_text(json.dumps({"fps": 16}))  # says nothing of what they are made from
    with pytest.raises(
        UserError, match="were made from something else than .*vae.safetensors, .*run: delete"
    ):
        data.claim(made, {"fps": 16}, sources)


def test_missing_few_or_damaged_records_say_what_to_run(tmp_path):
    with pytest.raises(UserError, match="no records.*`python make.py`"):
        data.records(tmp_path / "none", 2, made_by="python make.py")
    data.write_shard(tmp_path / "00000.arrayrecord", [example(0)])
    few = data.records(tmp_path, 2, made_by="python make.py")[0]  # one record, twice
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), few)
    whole = (tmp_path / "00000.arrayrecord").read_bytes()
    (tmp_path / "00000.arrayrecord").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="python make.py"):
        data.records(tmp_path, 1, made_by="python make.py")


def test_pipelines_are_grain_map_datasets(tmp_path):
    data.write_shard(tmp_path / "00000.arrayrecord", [example(0)])
    for dataset in (data.clips(1, 1, world=TINY), data.captions(1), data.records(tmp_path, 1, "make")):
        assert isinstance(dataset, grain.MapDataset)
