"""Studies and calibration on published bases, and on bases of one's own, in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from ipdiverse.base import bases
from ipdiverse.base.memory import Device
from ipdiverse.base.presets import PRESETS
from ipdiverse.cli import main
from ipdiverse.dial import Achieved, Levers
from ipdiverse.evaluation import calibrate, images
from ipdiverse.evaluation.features import ENCODERS
from tests import hub, models

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = Device("cpu", 16 * 2**30)
STUDY = """
base = "{base}"
references = "refs"
prompts = "prompts.txt"
features = ["dino"]
pairs = 2
images = 2
{more}
[[arm]]
name = "one"
{arm}
"""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything in it; not to be changed."""
    cache = tmp_path_factory.mktemp("hub")
    hub.fill(cache, tmp_path_factory.mktemp("scratch"))
    hub.fill_others(cache, tmp_path_factory.mktemp("others"))
    return cache


@pytest.fixture
def place(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with references and prompts; everything of the hub is there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(full))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(bases, "this_device", lambda: CPU)
    dino = full / f"models--{ENCODERS['dino'].replace('/', '--')}" / "snapshots" / hub.REVISION
    monkeypatch.setitem(ENCODERS, "dino", str(dino))  # a folder: asking the hub would connect
    monkeypatch.chdir(tmp_path)
    Path("refs").mkdir()
    for number in range(2):
        models.picture(number).save(f"refs/{number}.png")
    Path("prompts.txt").write_text("a cat\n")
    return tmp_path


@pytest.fixture
def own(place: Path) -> str:
    """A base of the user's, as most are: without an image encoder."""
    pipe = models.pipeline("sd1", fresh=True, image_encoder=None, feature_extractor=None)
    pipe.save_pretrained("own")
    hub.write_tokenizer(Path("own/tokenizer"))
    return "own"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Base and request of everything that is drawn."""
    seen: list[tuple[Any, Any]] = []
    real = images.sample_array

    def counting(base: Any, jobs: Any, request: Any, *rest: Any) -> Any:
        seen.append((base, request))
        return real(base, jobs, request, *rest)

    monkeypatch.setattr(images, "sample_array", counting)
    return seen


@pytest.fixture
def climbed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The ladders of a calibration, which measures two points for real."""
    seen: list[dict[str, Any]] = []

    def climb(start: Any, ladders: dict[str, Any], measure: Any, _: Any) -> Any:
        seen.append(ladders)
        first, last = measure(start), measure(Levers(cads=0.3))
        points = ((start, 0.2, first), (Levers(cads=0.3), 0.6, last))
        return [(levers, Achieved(variety, one.retention)) for levers, variety, one in points]

    monkeypatch.setattr(calibrate, "climb", climb)
    return seen


def study(base: str, arm: str = "", more: str = "steps = 1", out: str = "out", *flags: str) -> int:
    Path("study.toml").write_text(STUDY.format(base=base, arm=arm, more=more))
    return main(["evaluate", "--config", "study.toml", "--out", out, *flags])


def calibration(base: str, *more: str) -> int:
    words = ["--references", "refs", "--features", "dino", "--pairs", "2", "--images", "2"]
    return main(["calibrate", "--base", base, *words, "--out", "mine.safetensors", *more])


# --- as `generate` draws ----------------------------------------------------------------------


def test_a_study_runs_as_precisely_as_generate_and_draws_anew_where_that_changes(
    place: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert study("sd15") == 0
    monkeypatch.setattr(bases, "this_device", lambda: Device("cpu", 16 * 2**30, bfloat16=True))
    assert study("sd15") == 0
    assert [base.plan.dtype for base, _ in drawn] == ["float32", "bfloat16"]
    assert study("sd15") == 0
    assert len(drawn) == 2, "nothing changed"


def test_what_a_study_leaves_open_is_the_bases_own(place: Path, drawn: list[Any]) -> None:
    assert study("sd15", more="") == 0
    (_, request), preset = drawn[0], PRESETS["sd15"]
    asked = (request.steps, request.scale, request.guidance_scale)
    assert asked == (preset.steps, preset.scale, preset.guidance_scale) == (30, 0.6, 7.5)
    assert json.loads(Path("out/results.json").read_text())["study"]["steps"] == 30
    assert study("sd15", arm="scale = 1.0", more="steps = 1") == 0
    assert (drawn[1][1].steps, drawn[1][1].scale) == (1, 1.0)


def test_a_calibration_leaves_the_same_to_the_base(
    place: Path, drawn: list[Any], climbed: list[Any]
) -> None:
    assert calibration("sd15", "--adapter", "sd15-plus") == 0
    assert {(r.steps, r.scale) for _, r in drawn} == {(30, 0.6)}
    assert climbed[0].keys() == {"interval", "cads"}


def test_a_lever_that_the_adapter_lacks_is_refused_before_the_base_is_opened(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "open_pipeline", lambda *_: pytest.fail("was opened"))
    assert calibration("sd15", "--adapter", "sd15", "--levers", "cads", "fusion_strength") == 2
    error = capsys.readouterr().err
    assert "adapter sd15: does not have this lever" in error
    assert "found fusion_strength" in error


# --- bases without an image encoder -----------------------------------------------------------


def test_a_presets_adapter_brings_its_encoder(own: str, drawn: list[Any]) -> None:
    assert study(own, arm='adapter = "sd15-plus"') == 0
    assert drawn[0][0].pipe.image_encoder is not None


def test_a_study_names_an_encoder_and_another_one_draws_anew(own: str, drawn: list[Any]) -> None:
    for seed, name in enumerate("ab"):
        encoder = models.image_encoder()
        encoder.visual_projection.weight.data += seed
        encoder.save_pretrained(name)
    arm = 'adapter = "sd15"'
    assert study(own, arm, 'steps = 1\nimage_encoder = "a"') == 0
    assert study(own, arm, 'steps = 1\nimage_encoder = "b"') == 0
    assert study(own, arm, 'steps = 1\nimage_encoder = "b"') == 0
    assert len(drawn) == 2


def test_places_spelled_otherwise_or_moved_are_the_same(
    own: str, place: Path, drawn: list[Any], climbed: list[Any]
) -> None:
    adapter = hub.place(Path(constants.HF_HUB_CACHE), PRESETS["sd15-plus"].adapter_files()[0])
    models.image_encoder().save_pretrained("encoder")

    def both(base: str, encoder: str, out: str) -> None:
        named = f'steps = 1\nimage_encoder = "{encoder}"'
        assert study(base, f'adapter = "{adapter}"', named, out) == 0
        words = ["--adapter", str(adapter), "--steps", "1", "--image-encoder", encoder]
        assert calibration(base, *words, "--work", f"{out}-work") == 0

    both(own, "encoder", "out")
    first = len(drawn)
    both(f"./{own}/", "encoder/", "./out")
    both(str(place / own), str(place / "encoder"), str(place / "out"))
    for name in (own, "encoder", "out", "out-work"):
        Path(name).rename(f"moved {name}")
    both(f"moved {own}", "moved encoder", "moved out")
    assert len(drawn) == first, "nothing is drawn again"


def test_a_calibration_names_an_encoder(
    own: str, climbed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = hub.place(Path(constants.HF_HUB_CACHE), PRESETS["sd15-plus"].adapter_files()[0])
    words = ["--adapter", str(adapter), "--steps", "1"]
    assert calibration(own, *words) == 2
    assert "Name one with --image-encoder" in capsys.readouterr().err
    assert calibration(own, *words, "--image-encoder", "none") == 2
    assert "none: no such folder" in capsys.readouterr().err
    models.image_encoder().save_pretrained("encoder")
    assert calibration(own, *words, "--image-encoder", "encoder") == 0
    assert Path("mine.safetensors").is_file()


def test_a_base_of_ones_own_has_no_adapter_of_its_own(
    own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(own) == 2
    assert "adapter: is missing; found base own" in capsys.readouterr().err


# --- before a download ------------------------------------------------------------------------


@pytest.fixture
def lacking(place: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A cache without one adapter; downloads come from the full one and are written down."""
    (file,) = PRESETS["sd15-plus"].adapter_files()
    cache = hub.twin(full, place / "hub")
    hub.place(cache, file).unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetched = list[str]()

    def download(repository: str, name: str, **_: Any) -> str:
        fetched.append(name)
        hub.copied(hub.place(full, file), hub.place(cache, file))
        return str(hub.place(cache, file))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


COMMANDS: dict[str, Callable[[], int]] = {
    "evaluate": lambda: study("sd15-plus"),
    "an arm": lambda: study("sd15", arm='adapter = "sd15-plus"'),
    "calibrate": lambda: calibration("sd15", "--adapter", "sd15-plus", "--steps", "1"),
    "--base-weights": lambda: calibration(
        "sd15", "--adapter", "sd15", "--base-weights", "sd15-plus"
    ),
    "train": lambda: main(
        ["train", "--base", "sd15", "--init-from", "sd15-plus", "--data", "d", "--out", "run"]
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_downloaded_where_nobody_can_be_asked(
    command: str, lacking: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[command]() == 2
    error = capsys.readouterr().err
    assert "sd15-plus: has to be downloaded first, about 98 MB; found no terminal" in error
    assert lacking == []


def test_yes_downloads(lacking: list[str], climbed: list[Any], drawn: list[Any]) -> None:
    assert study("sd15-plus", "", "steps = 1", "out", "--yes") == 0
    assert len(lacking) == 1
    cached = Path(constants.HF_HUB_CACHE)
    hub.place(cached, PRESETS["sd15-plus"].adapter_files()[0]).unlink()
    assert calibration("sd15", "--adapter", "sd15-plus", "--steps", "1", "--yes") == 0
    assert len(lacking) == 2


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda: Path("refs").rename("gone"), "refs: is not a folder"),
        (lambda: Path("refs/1.png").write_bytes(b"no image"), "1.png"),
    ],
)
def test_what_is_wrong_with_ones_own_files_is_said_before(
    command: str,
    spoil: Callable[[], Any],
    message: str,
    lacking: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil()
    assert COMMANDS[command]() == 2
    assert message in capsys.readouterr().err
    assert lacking == []


def test_prompts_too_are_read_before_a_base_that_is_no_preset(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bases, "open_pipeline", lambda *_: pytest.fail("was opened"))
    Path("prompts.txt").write_text("# nothing\n")
    assert study("owner/base", arm='adapter = "sd15"') == 2
    assert "holds no prompts" in capsys.readouterr().err


def test_a_presets_adapter_of_another_base_is_refused_before(
    lacking: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert study("sdxl", arm='adapter = "sd15-plus"') == 2
    assert "adapter sd15-plus: belongs to " in capsys.readouterr().err
    assert lacking == []
