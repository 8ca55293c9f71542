import numpy as np
import pytest
import safetensors.numpy

from rfjax import release


def test_weights_are_halved_under_their_name_and_read_back_within_float16(tmp_path):
    weights = {"a/kernel": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    source = tmp_path / "dit.safetensors"
    safetensors.numpy.save_file(weights, source)
    release.main([str(source), str(tmp_path / "assets")])
    found = safetensors.numpy.load_file(tmp_path / "assets" / "dit.safetensors")
    assert found["a/kernel"].dtype == np.float16
    np.testing.assert_allclose(found["a/kernel"], weights["a/kernel"], rtol=2**-11, atol=1e-7)


def test_no_weights_are_written_over(tmp_path, capsys):
    for name in ("a/dit.safetensors", "b/dit.safetensors"):
        (tmp_path / name).parent.mkdir()
        safetensors.numpy.save_file({"kernel": np.ones(3, np.float32)}, tmp_path / name)
    one, other = str(tmp_path / "a/dit.safetensors"), str(tmp_path / "b/dit.safetensors")
    for arguments in ([one, str(tmp_path / "a")], [one, other, str(tmp_path / "c")]):
        with pytest.raises(SystemExit):
            release.main(arguments)
        assert "needs a name of its own" in capsys.readouterr().err
    assert safetensors.numpy.load_file(one)["kernel"].dtype == np.float32
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("content", [None, b"\x10\x00\x00\x00truncated", 1e6])
def test_bad_weights_are_one_sentence_and_leave_what_was_there(tmp_path, capsys, content):
    source, there = tmp_path / "dit.safetensors", tmp_path / "assets" / "dit.safetensors"
    there.parent.mkdir()
    there.write_text("as it was")
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content:
        safetensors.numpy.save_file({"kernel": np.full(3, content, np.float32)}, source)
    with pytest.raises(SystemExit) as stop:
        release.main([str(source), str(there.parent)])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert there.read_text() == "as it was"
