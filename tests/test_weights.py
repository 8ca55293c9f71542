"""Where weights are found: folders, and repositories of a hub that is imitated by a folder of tiny checkpoints."""

import functools
import importlib
import shutil
import sys
import tempfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rfjax import convert, tensorfile, weights
from rfjax.errors import UserError

errors = importlib.import_module("huggingface_hub.errors")
httpx = sys.modules[errors.HTTPError.__module__]  # the hub's HTTP client, whose name changes with its version

GOLDEN = Path(__file__).parent / "golden"
PUBLIC = weights.FILES
STUDENT, MINE = "TencentARC/RollingForcing", "me/mine"
WANTED = ["dit.safetensors", "umt5.safetensors", "tokenizer.json"]
# What each repository has, under its names; as .safetensors, for which torch is not needed.
HUB = {
    f"{weights.BASE}/dit_base.safetensors": GOLDEN / "bidirectional_dit.safetensors",
    f"{weights.BASE}/text/encoder.safetensors": GOLDEN / "umt5.safetensors",
    f"{weights.BASE}/google/umt5-xxl/tokenizer.json": GOLDEN / "config.json",
    f"{STUDENT}/checkpoints/student.safetensors": GOLDEN / "causal_dit.safetensors",
}
FILES = {
    weights.BASE: {
        "dit.safetensors": "dit_base.safetensors",
        "umt5.safetensors": "text/encoder.safetensors",
        "tokenizer.json": "google/umt5-xxl/tokenizer.json",
    },
    STUDENT: {"dit.safetensors": "checkpoints/student.safetensors"},
}


class Hub(dict):
    """{repository/file: path}, and what was asked for."""

    def __init__(self, files):
        super().__init__(files)
        self.asked, self.error = [], None

    def download(self, repo, file):
        self.asked.append(f"{repo}/{file}")
        if self.error:
            raise self.error
        if f"{repo}/{file}" not in self:
            response = httpx.Response(404, request=httpx.Request("HEAD", f"https://hub/{repo}/{file}"))
            raise errors.RemoteEntryNotFoundError(
                "404 Client Error. (Request ID: 1)\n\nNone.", response=response
            )
        return str(self[f"{repo}/{file}"])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(HUB)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(weights, "FILES", FILES)
    monkeypatch.setenv("RFJAX_WEIGHTS", str(tmp_path / "kept"))
    return hub


@pytest.fixture
def ours(tmp_path):
    """A transformer in our form."""
    (tmp_path / "dit.safetensors").write_bytes(converted("causal_dit"))
    return tmp_path / "dit.safetensors"


def refused(name, wanted=WANTED):
    with pytest.raises(UserError) as error:
        weights.locate(str(name), wanted)
    said = str(error.value)
    assert "\n" not in said and said.endswith(".")
    return said


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


@functools.cache
def converted(name):
    """What a golden file is in our form."""
    with tempfile.TemporaryDirectory() as folder:
        return convert.convert(GOLDEN / f"{name}.safetensors", Path(folder)).read_bytes()


# Folders


def test_folder_with_all_files_is_taken_as_it_is(hub, tmp_path):
    for name in WANTED:
        (tmp_path / name).touch()
    assert weights.locate(str(tmp_path), WANTED) == tmp_path and not hub.asked


def test_what_a_folder_lacks_is_listed_with_the_ways_to_get_it(hub, tmp_path):
    (tmp_path / "dit.safetensors").touch()
    said = refused(tmp_path, [*WANTED, "tiny.safetensors"])
    assert f"{tmp_path} lacks umt5.safetensors, tokenizer.json, tiny.safetensors;" in said
    made = "umt5.safetensors from its checkpoint, tiny.safetensors from taew2_1.pth of github.com/madebyollin/taehv"
    copied = "google/umt5-xxl/tokenizer.json of Wan-AI/Wan2.1-T2V-1.3B"
    way = f"make {made} with `python -m rfjax.convert SRC {tmp_path}`, and copy {copied} to {tmp_path}."
    assert said.endswith(way)
    assert not hub.asked


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "~/no/where", "/no/where", "a/b/c", "a/", "a/.."])
def test_name_of_no_folder_and_no_repository(name, hub):
    said = refused(name)
    assert f"There is no folder {name}; name one that holds dit.safetensors, umt5" in said and STUDENT in said
    assert not hub.asked


def test_file_is_no_folder_though_it_looks_like_a_repository(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/dit.safetensors").touch()
    assert "There is no folder out/dit.safetensors" in refused("out/dit.safetensors") and not hub.asked


# Repositories


def test_repository_gives_its_transformer_and_wans_the_rest_once(hub, tmp_path, capsys):
    folder = weights.locate(STUDENT, WANTED)
    assert folder == tmp_path / "kept/TencentARC--RollingForcing"
    assert (folder / "dit.safetensors").read_bytes() == converted("causal_dit")
    assert (folder / "umt5.safetensors").read_bytes() == converted("umt5")
    assert (folder / "tokenizer.json").read_bytes() == (GOLDEN / "config.json").read_bytes()
    base = tmp_path / "kept/Wan-AI--Wan2.1-T2V-1.3B"
    assert files(base) == ["tokenizer.json", "umt5.safetensors"] and files(folder) == sorted(WANTED)
    assert all((folder / name).samefile(base / name) for name in files(base))
    said = capsys.readouterr().out
    assert f"checkpoints/student.safetensors of {STUDENT} → {folder / 'dit.safetensors'}\n" in said
    assert f"text/encoder.safetensors of {weights.BASE} → {base / 'umt5.safetensors'}\n" in said
    assert len(hub.asked) == 3
    weights.locate(STUDENT, WANTED)
    assert len(hub.asked) == 3 and not capsys.readouterr().out
    weights.locate(weights.BASE, WANTED)  # its encoder is there already
    assert hub.asked[3:] == [f"{weights.BASE}/dit_base.safetensors"]
    assert (base / "dit.safetensors").read_bytes() == converted("bidirectional_dit")
    assert (folder / "dit.safetensors").read_bytes() == converted("causal_dit")


def test_kept_folders_can_move_together_and_a_broken_link_is_mended(hub, tmp_path, monkeypatch):
    weights.locate(STUDENT, WANTED)
    shutil.move(tmp_path / "kept", tmp_path / "moved")
    monkeypatch.setenv("RFJAX_WEIGHTS", str(tmp_path / "moved"))
    folder = weights.locate(STUDENT, WANTED)
    assert len(hub.asked) == 3
    shutil.rmtree(tmp_path / "moved/Wan-AI--Wan2.1-T2V-1.3B")
    weights.locate(STUDENT, WANTED)
    assert len(hub.asked) == 5 and files(folder) == sorted(WANTED)


def test_unknown_repository_holds_files_of_ours_and_lacks_what_is_wans(hub, ours, tmp_path):
    hub[f"{MINE}/dit.safetensors"] = ours
    folder = weights.locate(MINE, WANTED)
    assert (folder / "dit.safetensors").read_bytes() == ours.read_bytes()
    assert not (folder / "dit.safetensors").is_symlink() and not ours.is_symlink()
    assert files(tmp_path / "kept/Wan-AI--Wan2.1-T2V-1.3B") == ["tokenizer.json", "umt5.safetensors"]
    hub[f"{MINE}/tiny.safetensors"] = ours
    assert weights.locate(MINE, [*WANTED, "tiny.safetensors"]) == folder
    assert files(folder) == sorted([*WANTED, "tiny.safetensors"])


def test_unknown_repository_has_to_have_a_transformer_of_its_own(hub, tmp_path):
    said = refused(MINE)
    assert (
        "dit.safetensors of me/mine could not be fetched (RemoteEntryNotFoundError: 404 Client Error)" in said
    )
    assert (
        "make dit.safetensors from its checkpoint, umt5.safetensors from text/encoder.safetensors of" in said
    )
    assert f"`python -m rfjax.convert SRC {tmp_path / 'kept/me--mine'}`" in said
    assert hub.asked == [f"{MINE}/dit.safetensors"]


def test_tiny_decoder_is_asked_for_before_anything_is_fetched(hub, tmp_path):
    said = refused(STUDENT, [*WANTED, "tiny.safetensors"])
    folder = tmp_path / "kept/TencentARC--RollingForcing"
    made = "tiny.safetensors from taew2_1.pth of github.com/madebyollin/taehv"
    way = f"make {made} with `python -m rfjax.convert SRC {folder}`"
    assert said == f"{STUDENT} lacks tiny.safetensors; {way}." and not hub.asked


# Trouble


def without_connection():
    error = errors.LocalEntryNotFoundError("Please check your connection. Try again.")
    error.__cause__ = httpx.ConnectError("[Errno -2] Name or service not known")
    return error


@pytest.mark.parametrize(
    "error, says",
    [
        (without_connection(), "ConnectError: [Errno -2] Name or service not known"),
        (errors.OfflineModeIsEnabled("Cannot reach hub: offline. Unset it."), "Cannot reach hub: offline)"),
        (httpx.ReadTimeout(""), "(ReadTimeout: )"),
        (errors.HFValidationError("Cannot have -- or .. in repo_id: x."), "have -- or .. in repo_id: x)"),
        (RuntimeError("CAS: broken pipe"), "CAS: broken pipe"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_hub_out_of_reach_tells_what_to_put_where(error, says, hub, tmp_path):
    hub.error = error
    said, folder = refused(STUDENT), tmp_path / "kept/TencentARC--RollingForcing"
    assert f"checkpoints/student.safetensors of {STUDENT} could not be fetched (" in said and says in said
    assert (
        f"make dit.safetensors from checkpoints/student.safetensors of {STUDENT}, umt5.safetensors from"
        in said
    )
    assert f" text/encoder.safetensors of {weights.BASE} with `python -m rfjax.convert SRC {folder}`" in said
    assert said.endswith(f", and copy google/umt5-xxl/tokenizer.json of {weights.BASE} to {folder}.")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_fetched(hub, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/TencentARC--RollingForcing").touch()
    said = refused(STUDENT)
    assert said.endswith("(File exists); set $RFJAX_WEIGHTS to a folder that can be written to.")
    assert not hub.asked


def test_a_folder_that_can_take_no_link_is_told_before_anything_is_fetched(hub, ours, tmp_path, monkeypatch):
    folder = tmp_path / "kept/TencentARC--RollingForcing"
    folder.mkdir(parents=True)
    shutil.copy(ours, folder / "dit.safetensors")
    monkeypatch.setattr(weights.os, "access", lambda path, _: path != folder)  # those of another user
    assert f"Weights cannot be kept in {folder} (Permission denied); set $RFJAX" in refused(STUDENT)
    assert not hub.asked


def test_a_bucket_keeps_no_weights(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RFJAX_WEIGHTS", "gs://bucket/weights")
    assert "is no folder of this machine; mount the bucket" in refused(STUDENT)
    assert not list(tmp_path.iterdir()) and not hub.asked


def test_folder_filled_by_hand_needs_no_hub(hub, ours, tmp_path):
    folder = tmp_path / "kept/TencentARC--RollingForcing"
    folder.mkdir(parents=True)
    for name in WANTED:
        shutil.copy(ours, folder / name)
    assert weights.locate(STUDENT, WANTED) == folder and not hub.asked


def test_only_what_still_lacks_is_told(hub):
    del hub[f"{weights.BASE}/text/encoder.safetensors"]
    said = refused(STUDENT)
    assert (
        "text/encoder.safetensors of Wan-AI" in said
        and "make umt5.safetensors from" in said
        and "dit.saf" not in said
    )


def test_hub_needs_its_package_and_pth_files_need_torch_before_they_are_fetched(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    files = {STUDENT: {"dit.safetensors": "checkpoints/student.pt"}}
    monkeypatch.setattr(weights, "FILES", FILES | files)
    assert "pip install -e '.[convert]'" in refused(STUDENT) and not hub.asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install huggingface_hub: pip install -e '.[wan]'" in refused(STUDENT)


def test_checkpoint_that_does_not_convert_leaves_nothing(hub, tmp_path):
    damaged = load_file(GOLDEN / "causal_dit.safetensors") | {"blocks.0.ffn.0.bias": np.zeros(3, np.float32)}
    save_file(damaged, tmp_path / "damaged.safetensors")
    hub[f"{STUDENT}/checkpoints/student.safetensors"] = tmp_path / "damaged.safetensors"
    assert "not of this network" in refused(STUDENT)
    assert not files(tmp_path / "kept")


def test_copy_that_is_cut_short_leaves_nothing(hub, ours, tmp_path, monkeypatch):
    def cut(source, path):
        Path(path).write_bytes(ours.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    hub[f"{MINE}/dit.safetensors"] = ours
    monkeypatch.setattr(shutil, "copyfile", cut)
    with pytest.raises(OSError, match="No space"):
        weights.locate(MINE, WANTED)
    assert not files(tmp_path / "kept")


@pytest.mark.parametrize(
    "repo, file", [(STUDENT, "rolling_forcing_dmd"), ("gdhe17/Self-Forcing", "self_forcing_dmd")]
)
def test_public_repositories_and_wans_hold_all_that_a_clip_needs(repo, file, hub, monkeypatch):
    monkeypatch.setattr(weights, "FILES", PUBLIC)
    monkeypatch.setattr(tensorfile, "torch_module", lambda: None)
    hub.error = without_connection()
    said = refused(repo, ["dit.safetensors", "vae.safetensors", "umt5.safetensors", "tokenizer.json"])
    assert hub.asked == [f"{repo}/checkpoints/{file}.pt"] and f"checkpoints/{file}.pt of {repo}" in said
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json"):
        assert f"{name} of {weights.BASE}" in said
