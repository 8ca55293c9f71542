"""Checkpoints there and back: every official name, every form of file, and all that can be wrong with one."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from rfjax import convert, dit, teacher, tensorfile, umt5
from rfjax.errors import UserError
from rfjax.golden import Golden
from rfjax.tree import flatten
from rfjax.vae import VAE, VAEConfig

GOLDEN = Path(__file__).parent / "golden"
SHAPES = json.loads((GOLDEN / "official_state_dict_shapes.json").read_text())
DIT = GOLDEN / "causal_dit.safetensors"
OFFICIAL = {
    "wan2.1_t2v_1.3b": "dit",
    "wan2.1_t2v_14b": "dit",
    "wan2.1_vae": "vae",
    "umt5_xxl_encoder": "umt5",
}


class Shapes(dict):
    """A source of tensors that take no memory."""

    def source(self):
        kinds = {name: tensorfile.Kind(tuple(shape), np.dtype(np.float32)) for name, shape in self.items()}
        known = convert.WAN_LATENT_STATISTICS
        return tensorfile.Source(
            kinds, lambda name, layer: known.get(name, np.broadcast_to(np.float32(0), self[name]))
        )


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_name_and_shape_goes_there_and_back(name):
    module, official = OFFICIAL[name], Shapes(SHAPES[name])
    assert convert.module_of(list(official)) == (module, False)
    entries = convert.to_ours(official.source(), module)
    for entry in entries:
        assert sum(read().size for read in entry.reads) == np.prod(entry.kind.shape)
    ours = Shapes({entry.name: entry.kind.shape for entry in entries})
    assert convert.module_of(list(ours)) == (module, True)
    back = {entry.name: list(entry.kind.shape) for entry in convert.to_torch(ours.source(), module)}
    assert back == SHAPES[name] and len(back) == {"dit": len(back), "vae": 194, "umt5": 242}[module]


def half(path, folder):
    """The file's tensors in bfloat16, in a file of the folder."""
    weights = {name: np.asarray(x, jnp.bfloat16) for name, x in load_file(path).items()}
    save_file(weights, folder / "half.safetensors")
    return folder / "half.safetensors"


def test_checkpoint_of_two_precisions_keeps_both(tmp_path):
    weights = {
        n: np.asarray(x, np.float32 if "norm" in n else jnp.bfloat16) for n, x in load_file(DIT).items()
    }
    save_file(weights, tmp_path / "mixed.safetensors")
    there = convert.convert(tmp_path / "mixed.safetensors", tmp_path / "ours")
    back = load_file(convert.convert(there, tmp_path / "back.safetensors"))
    assert {str(x.dtype) for x in back.values()} == {"float32", "bfloat16"}
    assert all(back[n].dtype == x.dtype and back[n].tobytes() == x.tobytes() for n, x in weights.items())


@pytest.mark.parametrize("file", ["causal_dit", "umt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_the_identity_bit_for_bit(file, dtype, tmp_path):
    src = GOLDEN / f"{file}.safetensors"
    src = half(src, tmp_path) if dtype == "bfloat16" else src
    there = convert.convert(src, tmp_path / "ours")
    assert there.name == f"{convert.module_of(list(load_file(src)))[0]}.safetensors"
    back = load_file(convert.convert(there, tmp_path / "back.safetensors"))
    wanted = load_file(src)
    assert back.keys() == wanted.keys()
    for name, array in wanted.items():
        assert back[name].dtype == array.dtype == dtype
        assert back[name].tobytes() == array.tobytes() and back[name].shape == array.shape


@pytest.mark.parametrize("own", [True, False])
def test_a_vaes_statistics_go_along_where_they_are_its_own(own, tmp_path, capsys):
    """Wan's, which PyTorch's code has in itself, stay behind and come back."""
    sizes = ConfigDict({"vae": {"dim": 4}})
    model, video = VAE(VAEConfig(dim=4)), jnp.zeros((1, 1, 8, 8, 3))
    flat = flatten(jax.eval_shape(model.init, jax.random.key(0), video)["params"])
    rng = np.random.default_rng(0)
    ours = {name: rng.normal(size=leaf.shape).astype(np.float32) for name, leaf in flat.items()}
    ours |= {} if own else convert.WAN_LATENT_STATISTICS
    save_file(ours, tmp_path / "vae.safetensors")
    there = convert.convert(tmp_path / "vae.safetensors", tmp_path / "there.safetensors", settings=sizes)
    assert own == any("latent_" in name for name in load_file(there))
    back = load_file(convert.convert(there, tmp_path / "back", settings=sizes))
    assert back.keys() == ours.keys() and all((back[name] == ours[name]).all() for name in ours)
    if own:
        with pytest.raises(UserError, match=r"2 unknown \(latent_mean, latent_std\)"):
            convert.convert(
                tmp_path / "vae.safetensors", tmp_path / "x.pt", layout="diffusers", settings=sizes
            )


def shards(folder):
    weights = load_file(DIT)
    parts = [{n: x for i, (n, x) in enumerate(sorted(weights.items())) if i % 2 == odd} for odd in (0, 1)]
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
    where = {name: f"part-{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (folder / "dit.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_shards_by_their_index_are_the_whole_file(tmp_path):
    whole = convert.convert(DIT, tmp_path / "whole").read_bytes()
    folder = shards(tmp_path)
    assert convert.convert(folder, tmp_path / "a").read_bytes() == whole
    index = folder / "dit.safetensors.index.json"
    assert convert.convert(index, tmp_path / "b").read_bytes() == whole


# Files of PyTorch


@pytest.fixture
def few_step(tmp_path):
    """A .pt file as Rolling Forcing publishes them: generator and its average, names wrapped."""
    torch = pytest.importorskip("torch")
    weights = {name: torch.from_numpy(x) for name, x in load_file(DIT).items()}
    content = {
        "generator": {f"model.{name}": x for name, x in weights.items()},
        "generator_ema": {f"model._fsdp_wrapped_module.{name}": 2 * x for name, x in weights.items()},
        "step": 3,
    }
    torch.save(content, tmp_path / "few.pt")
    return tmp_path / "few.pt"


def test_average_is_taken_unless_another_part_is_asked_for(few_step, tmp_path):
    plain = load_file(convert.convert(DIT, tmp_path / "plain"))
    for part, factor in ((None, 2), ("generator_ema", 2), ("generator", 1)):
        found = load_file(convert.convert(few_step, tmp_path / str(part), part))
        assert found.keys() == plain.keys()
        assert all((found[name] == factor * plain[name]).all() for name in plain)


def test_pt_and_pth_files_hold_what_torch_reads(tmp_path):
    torch = pytest.importorskip("torch")
    there = convert.convert(half(DIT, tmp_path), tmp_path / "ours")
    few = torch.load(convert.convert(there, tmp_path / "a.pt"), weights_only=True)["generator"]
    plain = torch.load(convert.convert(there, tmp_path / "a.pth"), weights_only=True)
    assert {name.removeprefix("model.") for name in few} == plain.keys() == load_file(DIT).keys()
    assert all(x.dtype == torch.bfloat16 and torch.equal(x, few[f"model.{n}"]) for n, x in plain.items())
    assert convert.convert(tmp_path / "a.pt", tmp_path / "b").read_bytes() == there.read_bytes()


class Code:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("what", ["code", "cut", "other"])
def test_pickle_that_is_not_weights_is_refused(what, few_step, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / "bad.pth"
    if what == "cut":
        path.write_bytes(few_step.read_bytes()[:5000])
    else:
        torch.save({"weight": Code()} if what == "code" else [torch.ones(2)], path)
    said = refused(capsys, path, tmp_path / "out")
    assert ("may run code" if what != "other" else "not weights by name") in said and "this ran" not in said


def test_part_that_is_not_there_is_told(few_step, tmp_path, capsys):
    said = refused(capsys, few_step, tmp_path / "out", "--part", "critic")
    assert "has generator, generator_ema; choose one with --part" in said


# What can be wrong


def refused(capsys, *arguments):
    """What the command says when it writes nothing."""
    with pytest.raises(SystemExit) as left:
        convert.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert left.value.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert not Path(arguments[1]).exists() or not list(Path(arguments[1]).iterdir())
    return said.out + said.err


def damaged(folder, **changes):
    """The golden transformer with tensors replaced, or left out (None)."""
    weights = {n: x for n, x in (load_file(DIT) | changes).items() if x is not None}
    save_file(
        {n: np.ascontiguousarray(x, np.float32) for n, x in weights.items()}, folder / "bad.safetensors"
    )
    return folder / "bad.safetensors"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"blocks.0.ffn.0.bias": None}, "1 of an unexpected shape|1 missing"),
        ({"blocks.1.ffn.0.bias": None}, "ffn_in/bias"),
        ({"head.head.bias": None}, "1 missing \\(head/bias\\)"),
        ({"blocks.0.ffn.0.bias": np.zeros(3)}, "of an unexpected shape .*ffn.0.bias"),
        ({"head.head.weight": np.zeros((64, 16))}, "head/kernel \\[16, 64\\] in place of"),
        ({"img_emb.proj.weight": np.zeros(3)}, "1 unknown \\(img_emb.proj.weight\\)"),
        ({"model.head.head.bias": np.zeros(24)}, "1 given twice \\(.*head.head.bias\\)"),
        ({f"extra.{i}": np.zeros(1) for i in range(12)}, "12 unknown \\((extra.\\d+, ){10}…\\)"),
    ],
)
def test_weights_that_do_not_fit_are_listed_and_nothing_is_written(changes, says, tmp_path, capsys):
    said = refused(capsys, damaged(tmp_path, **changes), tmp_path / "out")
    assert re.search(says, said), said


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda f: f / "none.safetensors", "There is no file"),
        (lambda f: save(f / "text.txt", b"x"), "is not .safetensors"),
        (lambda f: save(f / "cut.safetensors", DIT.read_bytes()[:9000]), "is damaged"),
        (lambda f: f, "holds 0 files of weights"),
        (lambda f: other(f), "No network here has a weight named classifier.weight"),
        (lambda f: GOLDEN / "vae.safetensors", "decoder/conv1/bias"),
    ],
)
def test_file_that_cannot_be_converted_is_one_sentence(make, says, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    assert says in refused(capsys, make(folder), tmp_path / "out")


def save(path, content):
    path.write_bytes(content)
    return path


def other(folder):
    save_file({"classifier.weight": np.zeros(3, np.float32)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_a_text_encoder_has_to_fit_the_config_that_is_given(tmp_path, capsys):
    sizes = dataclasses.asdict(Golden(GOLDEN).umt5().config)
    for name, changed in (("fits", {}), ("other", {"ffn_dim": sizes["ffn_dim"] + 1})):
        fields = {"umt5": sizes | changed}
        (tmp_path / f"{name}.py").write_text(
            f"import ml_collections\ndef get_config(): return ml_collections.ConfigDict({fields})"
        )
    source, place = str(GOLDEN / "umt5.safetensors"), tmp_path / "out"
    convert.main([source, str(place), "--config", str(tmp_path / "fits.py")])
    assert (place / "umt5.safetensors").exists()
    said = refused(capsys, source, tmp_path / "no", "--config", tmp_path / "other.py")
    assert "ffn_in" in said and not (tmp_path / "no").exists()


def test_way_back_needs_a_file_and_a_known_layout(tmp_path, capsys):
    there = convert.convert(DIT, tmp_path / "ours")
    assert "give a .safetensors, .pt or .pth file" in refused(capsys, there, tmp_path / "folder")
    said = refused(capsys, there, tmp_path / "x.safetensors", "--layout", "transformers")
    assert "There is no layout 'transformers' of dit; choose wan or diffusers." in said


# Independent implementations, at random tiny sizes


def random_weights(module):
    """Fills a torch module, so that no part of it is silent, and gives its state dict."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(
                1 + spread if parameter.ndim == 1 or parameter.numel() == len(parameter) else spread
            )
    return {name: x.detach().numpy() for name, x in module.eval().state_dict().items()}


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())
    assert theirs.std() > 0.01


def test_diffusers_transformer_agrees():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sizes = dict(text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        **sizes,
        rope_max_seq_len=32,
    )
    model = dit.DiT(dit.DiTConfig(dim=24, num_heads=2, in_dim=4, text_len=5, **sizes))
    like = jax.eval_shape(functools.partial(dit.init, model.config), jax.random.key(0))
    params = convert.from_torch(random_weights(theirs), "dit", like)
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 4, 6, 4), (2, 5, 8)))
    t = np.float32([700, 31])
    inputs = [torch.from_numpy(a) for a in (np.moveaxis(x, -1, 1), t, context)]
    out = theirs(inputs[0], inputs[1], inputs[2], return_dict=False)[0]
    close(np.moveaxis(np.asarray(teacher.predict_flow(model, params, x, t, context)), -1, 1), out)


def test_diffusers_vae_agrees():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan(base_dim=4)
    model, video = VAE(VAEConfig(dim=4)), jnp.zeros((1, 1, 8, 8, 3))
    like = jax.eval_shape(model.init, jax.random.key(0), video)["params"]
    params = convert.from_torch(random_weights(theirs), "vae", like)
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
    z = rng.normal(size=(1, 2, 2, 2, 16)).astype(np.float32)
    run = jax.jit(lambda x, how: model.apply({"params": params}, x, method=how), static_argnums=1)
    with torch.no_grad():
        mean = theirs.encode(torch.from_numpy(np.moveaxis(video, -1, 1))).latent_dist.mean
        out = theirs.decode(torch.from_numpy(np.moveaxis(z, -1, 1))).sample
    close(np.moveaxis(np.asarray(run(video, "encode")[0]), -1, 1), mean)
    close(np.clip(np.moveaxis(np.asarray(run(z, "decode")), -1, 1), -1, 1), out)


def test_transformers_umt5_agrees():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = transformers.UMT5Config(
        vocab_size=30, d_model=16, d_kv=6, d_ff=20, num_heads=2, num_layers=2, dropout_rate=0.0
    )
    theirs = transformers.UMT5EncoderModel(sizes)
    model = umt5.UMT5(umt5.UMT5Config(30, 16, 12, 20, 2, 2))
    like = jax.eval_shape(functools.partial(umt5.init, model.config), jax.random.key(0))
    params = convert.from_torch(random_weights(theirs), "umt5", like)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30, (2, 200)).astype(np.int32)
    mask = np.arange(200) < np.array([[200], [77]])
    with torch.no_grad():
        out = theirs(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state
    ours = umt5.prompt_features(model, jax.tree.map(jnp.asarray, params), ids, mask)
    close(ours, out * torch.from_numpy(mask)[..., None])
