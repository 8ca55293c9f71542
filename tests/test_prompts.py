"""Prompts for Wan: the tokenizer against transformers' own, the encoder, and the folder of encoded prompts."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from rfjax import checkpoint, config, prompts, sampler, umt5
from rfjax.errors import UserError

TEXTS = [
    "A red panda eats bamboo, slowly.",
    "  tabs\tand\n\nnewlines   become spaces ",
    "Tom &amp;amp; Jerry &lt;3",
    "一只红色的熊猫在吃竹子。静かな夜。고양이",
    "👩‍🚀 floats 🚀✨ naïve café",
    "word by word " * 12,
]
TINY = Path(__file__).parents[1] / "configs/tiny.py"
CONFIG = umt5.UMT5Config(
    vocab_size=400, dim=8, attn_dim=8, ffn_dim=10, num_heads=2, num_layers=1, num_buckets=8
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A unigram tokenizer with T5's marks and byte fallback, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    marks = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=marks, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:The prompt")
@pytest.mark.parametrize("length", [16, 512])
def test_ids_are_those_of_transformers(file, length):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    texts = [prompts.clean(text) for text in TEXTS]
    wanted = theirs(texts, max_length=length, padding="max_length", truncation=True, return_tensors="np")
    ids, mask = prompts.Tokenizer(file, length)(TEXTS)
    np.testing.assert_array_equal(ids, wanted["input_ids"])
    np.testing.assert_array_equal(mask, wanted["attention_mask"] == 1)
    assert mask.sum(1).min() > 5 and (mask.sum(1) == length).any() == (length == 16)


def test_cleaning_is_that_of_wan():
    assert prompts.clean(" a\t\tb\n c ") == "a b c"
    assert prompts.clean("Tom &amp;amp; Jerry") == "Tom & Jerry"
    assert prompts.clean("cafÃ©") == "café"


def test_long_prompt_is_cut_with_a_warning_and_keeps_its_end_mark(file):
    with pytest.warns(UserWarning, match="all after 16 are cut"):
        ids, mask = prompts.Tokenizer(file, 16)([TEXTS[-1]])
    assert mask.all() and ids[0, -1] == 1 and (ids[0, :-1] != 1).all()


@pytest.fixture
def encoder(file, tmp_path):
    """An encoder of random weights in a folder as `rfjax.convert` leaves it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(file.read_bytes())
    checkpoint.save_params(folder / "umt5.safetensors", umt5.init(CONFIG, jax.random.key(0)))
    return prompts.PromptEncoder(folder, CONFIG, 32, tmp_path / "kept")


def test_features_are_the_networks_up_to_the_prompts_end(encoder, file):
    found = encoder.encode(TEXTS[:2])
    ids, mask = prompts.Tokenizer(file, 32)(TEXTS[:2])
    params = checkpoint.load_params(
        encoder.folder / "umt5.safetensors",
        jax.eval_shape(functools.partial(umt5.init, CONFIG), jax.random.key(0)),
    )
    wanted = umt5.UMT5(CONFIG).apply({"params": params}, ids, mask)
    np.testing.assert_allclose(found, np.where(mask[..., None], wanted, 0), atol=1e-5)
    assert found.shape == (2, 32, 8) and found.std() > 0


def test_kept_prompt_needs_no_weights_and_other_weights_need_a_new_one(encoder):
    weights = encoder.folder / "umt5.safetensors"
    first = encoder.encode(TEXTS[:2])
    (encoder.folder / "tokenizer.json").rename(encoder.folder / "gone.json")
    np.testing.assert_array_equal(encoder.encode(TEXTS[:2]), first)
    np.testing.assert_array_equal(encoder.encode([f" {TEXTS[0]}\n"]), first[:1])  # cleaned, it is the same
    with pytest.raises(UserError, match="no tokenizer"):
        encoder.encode(["new"])
    checkpoint.save_params(weights, umt5.init(CONFIG, jax.random.key(1)))
    with pytest.raises(UserError, match="no tokenizer"):
        encoder.encode(TEXTS[:1])


def test_a_prompt_that_cannot_be_kept_is_encoded_all_the_same(encoder, tmp_path, capsys):
    (tmp_path / "file").touch()
    elsewhere = dataclasses.replace(encoder, cache=tmp_path / "file" / "prompts")
    np.testing.assert_array_equal(elsewhere.encode(TEXTS[:1]), encoder.encode(TEXTS[:1]))
    assert "Encoded prompts are not kept: " in capsys.readouterr().err


def test_a_full_disk_says_so_where_a_prompt_is_kept(encoder, monkeypatch, capsys):
    def save(*_):
        raise OSError("32 requested and 0 written")  # as numpy has it

    monkeypatch.setattr(np, "save", save)
    encoder.encode(TEXTS[:1])
    assert capsys.readouterr().err.endswith("kept: 32 requested and 0 written.\n")
    assert not list(encoder.cache.iterdir())


def test_a_process_without_the_cpu_is_told_how_to_have_it(encoder, monkeypatch):
    def local_devices(backend):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", local_devices)
    with pytest.raises(UserError, match="JAX_PLATFORMS=.* leaves out; set it to .*,cpu"):
        encoder.encode(TEXTS[:1])


@pytest.mark.parametrize("left", [50, 0])
def test_kept_prompt_that_is_damaged_is_encoded_again(encoder, left):
    first = encoder.encode(TEXTS[:1])
    (kept,) = Path(encoder.cache).iterdir()
    kept.write_bytes(kept.read_bytes()[:left])
    np.testing.assert_array_equal(encoder.encode(TEXTS[:1]), first)
    assert np.load(kept).shape[1] == 8


def test_a_resident_encoder_is_read_once_shared_and_keeps_nothing(encoder):
    """Two samplers that listen say the same when the weights are gone from the disk."""
    model = sampler.load(config.load(TINY))
    assert model.listening().encoder is model.encoder  # which reads no files
    model = dataclasses.replace(model, encoder=encoder)
    first, second = (model.listening().listening().encoder for _ in range(2))
    assert first is second
    before = first.encode(TEXTS[:1])
    (encoder.folder / "umt5.safetensors").unlink()
    after = second.encode(TEXTS[:2])
    np.testing.assert_array_equal(after[:1], before)
    assert after[1].std() > 0 and not encoder.cache.exists()


def test_bfloat16_is_near(encoder):
    half = dataclasses.replace(encoder, cache=None, config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    np.testing.assert_allclose(half.encode(TEXTS[:1]), encoder.encode(TEXTS[:1]), atol=0.1)
    assert not encoder.cache.exists() or len(list(encoder.cache.iterdir())) == 1


@pytest.mark.parametrize("damage", ["empty", "no tokenizer", "is damaged", "no parameter file"])
def test_mistakes_are_one_sentence(encoder, damage):
    tokenizer, weights = (encoder.folder / name for name in ("tokenizer.json", "umt5.safetensors"))
    if damage == "no tokenizer":
        tokenizer.unlink()
    elif damage == "is damaged":
        tokenizer.write_text(tokenizer.read_text()[:100])
    elif damage == "no parameter file":
        weights.unlink()
    with pytest.raises(UserError, match=damage):
        encoder.encode([" \n" if damage == "empty" else "word"])
