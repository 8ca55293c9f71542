"""Config files and sections: what is wrong is named, and close names are offered."""

import dataclasses
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from rfjax import config, stages
from rfjax.dit import DiTConfig
from rfjax.errors import UserError
from rfjax.rollout import RolloutConfig
from rfjax.vae import VAEConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True)
class Sizes:
    depth: int
    width: int = 8

    def __post_init__(self):
        if self.width % 2:
            raise ValueError("width must be even")


def test_a_section_becomes_its_dataclass():
    settings = ConfigDict({"net": {"depth": 3, "width": 4}})
    assert config.build(Sizes, settings, "net") == Sizes(3, 4)


@pytest.mark.parametrize(
    "sections, says",
    [
        ({}, "no section 'net'"),
        ({"net": {"depht": 3}}, "'depht'; did you mean depth"),
        ({"net": {"width": 2}}, "config.net lacks depth; add"),
        ({"net": {"depth": 1, "width": 3}}, "width must be even"),
    ],
)
def test_a_bad_section_is_named(sections, says):
    with pytest.raises(UserError, match=says):
        config.build(Sizes, ConfigDict(sections), "net")


@pytest.mark.parametrize(
    "text, says",
    [
        ("def get_config(): return 1", "must return"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("raise RuntimeError('out of ideas')", "out of ideas"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, says):
    (tmp_path / "tiny.py").write_text(text)
    with pytest.raises(UserError, match=f"tiny.py.*{says}"):
        config.load(tmp_path / "tiny.py")


def test_a_misspelt_field_is_named_and_one_of_ones_own_is_not(tmp_path):
    def found(field):
        file = tmp_path / "own.py"
        fields = {"prompt": "", "decoder": "vae", field: 1}
        file.write_text(
            f"import ml_collections\ndef get_config(): return ml_collections.ConfigDict({fields})"
        )
        return config.load(file)[field]

    for field, near in (("decodr", "decoder"), ("promt", "prompt"), ("batchsize", "batch_size")):
        with pytest.raises(UserError, match=f"sets {field!r}, which nothing reads; did you mean {near!r}?"):
            found(field)
    assert found("broken") == 1


def test_the_known_fields_are_those_of_the_configs_here():
    """So that no name stays when the last config that sets it is gone."""
    assert config.FIELDS == {field for file in CONFIGS.rglob("*.py") for field in config.load(file)}


def test_a_misspelt_file_is_guessed(tmp_path):
    (tmp_path / "shapes.py").write_text("def get_config(): …")
    with pytest.raises(UserError, match=r"did you mean .*/shapes\.py"):
        config.load(tmp_path / "shape.py")
    with pytest.raises(UserError, match="There is no config"):
        config.load(tmp_path / "missing" / "shapes.py")


STAGES = ("vae_images", "vae", "teacher", "teacher_long", "ode", "distill")


@pytest.mark.parametrize("stage", STAGES)
def test_quick_variant_is_shorter_and_keeps_to_files_of_its_own(stage):
    full, quick = (config.load(f"{CONFIGS}/shapes_{stage}.py{variant}") for variant in ("", ":quick"))
    assert quick.steps < full.steps and quick.dit == full.dit and quick.vae == full.vae
    weights = [quick[name] for name in ("init_from", "vae_weights", "teacher") if quick.get(name)]
    assert {path.rsplit("/", 1)[0] for path in weights} <= {f"runs/quick/{run}" for run in STAGES}
    if "data" in quick:
        assert quick.data.startswith("data/quick/") and quick.made_by.endswith(".py:quick")


@pytest.mark.parametrize(
    "section, field, value, said",
    [
        ("dit", "dtype", "bf16", "dtype must be one of float32, bfloat16, float16, not 'bf16'"),
        ("vae", "dtype", "int8", "dtype must be one of"),
        ("rollout", "block_frames", 0, "block_frames must be 1 or more"),
        ("rollout", "steps", (200, 1000), "steps must fall from at most 1000 to above 0"),
        ("rollout", "steps", (1200, 600), "steps must fall from at most 1000 to above 0"),
        ("rollout", "steps", (), "steps must fall from at most 1000 to above 0"),
    ],
)
def test_a_number_that_makes_no_sense_is_told(section, field, value, said):
    settings = config.load(f"{CONFIGS}/shapes.py")
    settings[section].unlock()
    settings[section] = settings[section].to_dict() | {field: value}
    kind = {"dit": DiTConfig, "vae": VAEConfig, "rollout": RolloutConfig}[section]
    with pytest.raises(UserError, match=said):
        config.build(kind, settings, section)


@pytest.mark.parametrize("name", ["wan_teacher", "wan_teacher_forcing", "wan_ode", "wan_distill_14b"])
def test_a_stage_takes_all_that_it_reads_from_the_config_of_wans_size(name):
    settings = config.load(f"{CONFIGS}/{name}.py")
    settings.vae_weights = ""  # whose file is not here
    stage = stages.STAGES[settings.stage]
    for part in (
        stage.networks,
        stage.frozen,
        stage.update,
        stage.export,
        stage.sample,
        stage.evaluate,
        stage.measures,
    ):
        with config.read_by(settings.stage, settings):
            part(settings)


def test_the_teacher_learns_from_the_records_of_teacher_forcing():
    one, other = (config.load(f"{CONFIGS}/{name}.py") for name in ("wan_teacher", "wan_teacher_forcing"))
    assert one.data == other.data and one.frames <= other.record_frames
    assert (one.video, one.vae, one.umt5, one.negative_prompt) == (
        other.video,
        other.vae,
        other.umt5,
        other.negative_prompt,
    )


def test_variant_that_is_not_there_is_told():
    with pytest.raises(UserError, match="there is no variant 'quik'"):
        config.load(f"{CONFIGS}/shapes_vae.py:quik")
