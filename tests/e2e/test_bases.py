"""Published bases by one word, from a local cache of the published form with small weights."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import ipdiverse
from ipdiverse.adapter.attach import face_embeddings
from ipdiverse.base import bases, memory
from ipdiverse.base.memory import Device, MemoryOptions
from ipdiverse.base.pipelines import load_unet
from ipdiverse.base.presets import PRESETS
from ipdiverse.cli import main
from ipdiverse.training.frozen import open_encoders
from tests import hub, models

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {"steps": 2, "n": 1, "seed": 3}
CPU = Device("cpu", 16 * 2**30)


@pytest.fixture(scope="session")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with everything in it; not to be changed."""
    cache = tmp_path_factory.mktemp("hub")
    hub.fill(cache, tmp_path_factory.mktemp("scratch"))
    return cache


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Point the hub's library at a cache, and let it connect to nothing."""

    def point(cache: Path, *, offline: bool = True) -> None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    monkeypatch.setattr(bases, "this_device", lambda: CPU)
    return point


@pytest.fixture
def cache(full: Path, use: Callable[[Path], None]) -> Path:
    use(full)
    return full


@pytest.fixture
def own_cache(full: Path, tmp_path: Path, use: Callable[[Path], None]) -> Path:
    """One that may be broken."""
    copied = hub.twin(full, tmp_path / "hub")
    use(copied)
    return copied


@pytest.fixture
def reference(tmp_path: Path) -> str:
    models.picture(0).save(tmp_path / "ref.png")
    return str(tmp_path / "ref.png")


@pytest.fixture
def faces(tmp_path: Path) -> str:
    np.save(tmp_path / "face.npy", models.face(0).numpy())
    return str(tmp_path / "face.npy")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@pytest.mark.parametrize("name", hub.KINDS)
def test_one_word_picks_base_adapter_and_encoder(
    name: str, cache: Path, reference: str, faces: str
) -> None:
    preset = PRESETS[name]
    given: dict[str, Any] = {"faces": faces} if preset.faces else {}
    with_image = ipdiverse.generate(reference, "a cat", base=name, **SMALL, **given)
    request = with_image.request
    assert with_image.images[0].size == (models.SIZE, models.SIZE)
    assert (request.adapter, request.scale) == (name, preset.scale)
    assert (request.revision, request.guidance_scale) == (
        preset.base.revision,
        preset.guidance_scale,
    )
    assert (request.dtype, request.tiling) == ("float32", False)
    alone = ipdiverse.generate(reference, "a cat", base=name, scale=0.0, **SMALL, **given)
    assert pixels(alone.images[0]).std() > 0
    assert (pixels(alone.images[0]) != pixels(with_image.images[0])).any(), "the adapter acts"


def test_defaults_schedulers_and_encoders_are_the_presets_own(cache: Path) -> None:
    for name in ("sd15", "sdxl-plus"):
        base, preset = ipdiverse.load_base(name), PRESETS[name]
        assert type(base.pipe.scheduler).__name__ == preset.scheduler
        assert base.pipe.scheduler.config.beta_schedule == "scaled_linear", "the base's own"
        assert (base.steps, base.scale) == (preset.steps, preset.scale)
        assert base.plan is None
        assert base.pipe.unet.dtype == torch.float32
        assert base.pipe.image_encoder.config.hidden_size == models.CLIP_WIDTH
        assert base.pipe.feature_extractor.crop_size["height"] == 32
    assert ipdiverse.load_base("sd15-faceid").pipe.image_encoder is None


def test_training_reads_a_presets_encoders(cache: Path) -> None:
    encoders = open_encoders("sd15-plus")
    assert encoders.image([models.picture(0)])["hidden"].shape[-1] == models.CLIP_WIDTH
    assert encoders.pipe.safety_checker is None


def test_a_unet_that_was_left_for_later_is_the_same(cache: Path) -> None:
    whole = ipdiverse.load_base("sd15").pipe.unet
    pipe = ipdiverse.load_base("sd15", unet=False).pipe
    assert {weight.device.type for weight in pipe.unet.parameters()} == {"meta"}
    assert pipe.unet.config.sample_size == whole.config.sample_size
    load_unet(pipe)
    loaded = pipe.unet
    assert not loaded.training
    assert all(
        torch.equal(weight, loaded.state_dict()[n]) for n, weight in whole.state_dict().items()
    )
    load_unet(pipe)
    assert pipe.unet is loaded, "it is loaded once"


def test_an_encoder_published_without_preprocessing_opens_by_its_hub_id(cache: Path) -> None:
    base = ipdiverse.load_base("sdxl", encoder="")
    assert base.pipe.image_encoder is None
    encoder, processor = bases.load_image_encoder("h94/IP-Adapter/models/image_encoder", base)
    assert processor.crop_size["height"] == encoder.config.image_size


@pytest.mark.parametrize("kind", ["ControlNetModel", "CLIPVisionModelWithProjection"])
def test_a_part_that_is_not_there_is_no_question_for_the_hub(kind: str) -> None:
    for source in ("./part", "nowhere", "/no/such/part"):
        with pytest.raises(ipdiverse.IpdiverseError, match=f"{source}: no such folder; expected a"):
            bases.load_part(kind, source, ipdiverse.base.bases.Base("x", None, 1.0, 1))


def test_a_presets_adapter_goes_on_a_base_of_ones_own(
    cache: Path, reference: str, tmp_path: Path
) -> None:
    models.pipeline("sd1", fresh=True, image_encoder=None).save_pretrained(tmp_path / "mine")
    result = ipdiverse.generate(
        reference, "a cat", base=str(tmp_path / "mine"), adapter="sd15-plus", **SMALL
    )
    assert result.request.adapter == "sd15-plus"


def test_the_recorded_command_repeats_the_image(
    cache: Path, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--image", reference, "--base", "sd15-plus", "-n", "1", "--steps", "2", "--tiling"]
    assert main(["generate", *first, "--no-safety-checker", "--out", str(tmp_path / "a")]) == 0
    printed = capsys.readouterr().err
    assert "note: memory: cpu (16.0 GiB), float32, no offloading, VAE in tiles\n" in printed
    command = json.loads((tmp_path / "a" / "generation.json").read_text())["command"]
    assert "--base=sd15-plus" in command
    assert f"--revision={PRESETS['sd15'].base.revision}" in command
    words = shlex.split(command)
    assert {"--tiling", "--no-safety-checker", "--dtype=float32"} <= set(words)
    assert main([*words[1:-1], f"--out={tmp_path / 'b'}"]) == 0
    images = [pixels(Image.open(tmp_path / out / "0000.png")) for out in "ab"]
    np.testing.assert_array_equal(*images)


def test_a_batch_goes_from_base_to_base(cache: Path, reference: str, tmp_path: Path) -> None:
    lines = [{"base": "sd15"}, {"base": "sd15-plus"}, {"base": "critters"}]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("\n".join(json.dumps(line | {"image": reference}) for line in lines))
    out = tmp_path / "out"
    words = ["--batch", str(jobs), "-n", "1", "--steps", "1", "--out", str(out)]
    assert main(["generate", *words]) == 0
    made = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["job"] for line in made] == [0, 1, 2]
    assert len({line["sha256"] for line in made}) == 3
    assert "memory: cpu" in " ".join(made[1]["notes"])
    beyond = "the bundled model draws critters alone, and the reference looks like none"
    assert [note.startswith(beyond) for note in made[2]["notes"]] == [True]


# --- the safety checker -----------------------------------------------------------------------


def test_the_safety_checker_is_there_unless_it_is_refused(own_cache: Path) -> None:
    assert ipdiverse.load_base("sd15").pipe.safety_checker is not None
    folder = hub.folder_of(own_cache, PRESETS["sd15"].base) / "safety_checker"
    for file in folder.iterdir():
        file.unlink()
    assert ipdiverse.load_base("sd15", safety_checker=False).pipe.safety_checker is None
    with pytest.raises(ipdiverse.IpdiverseError, match=r"safety_checker/config\.json and 1 more"):
        ipdiverse.load_base("sd15")


def test_an_image_that_it_blacks_out_is_said(cache: Path, reference: str) -> None:
    base = ipdiverse.load_base("sd15-plus")
    base.pipe.safety_checker.concept_embeds_weights.data.fill_(-1)  # everything is too close
    result = ipdiverse.generate(reference, "a cat", loaded=base, **SMALL)
    assert not pixels(result.images[0]).any()
    assert [note for note in result.notes if "blacked out image 0 of 'a cat'" in note]


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_does_not_change_the_image(
    offload: Any, cache: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA is only named: the models execute on the CPU, with the hooks of an accelerator."""
    arrange = memory.arrange

    def on_cpu(pipe: Any, plan: memory.Plan) -> None:
        arrange(pipe, replace(plan, device="cpu"))

    monkeypatch.setattr(bases, "arrange", on_cpu)
    monkeypatch.setattr("ipdiverse.sampling.task.arrange", on_cpu)
    monkeypatch.setattr(bases, "this_device", lambda: Device("cuda", 8 * 2**30))
    common: dict[str, Any] = {"base": "sd15-plus", "dtype": "float32", **SMALL}
    for more in ({}, {"init_image": reference, "strength": 0.9}):
        plain = ipdiverse.generate(reference, "a cat", offload="none", **common, **more)
        moved = ipdiverse.generate(reference, "a cat", offload=offload, **common, **more)
        np.testing.assert_array_equal(pixels(plain.images[0]), pixels(moved.images[0]))
        words = {"model": "models offloaded", "sequential": "layers offloaded"}
        assert words[offload] in " ".join(moved.notes)


def test_half_precision_computes_in_it(cache: Path, reference: str) -> None:
    base = ipdiverse.load_base("sd15-plus", memory=MemoryOptions(dtype="bfloat16"))
    assert base.pipe.unet.dtype == base.pipe.image_encoder.dtype == torch.bfloat16
    result = ipdiverse.generate(reference, "a cat", loaded=base, **SMALL)
    assert pixels(result.images[0]).std() > 0


def test_candidates_are_chosen_in_half_precision(cache: Path, reference: str) -> None:
    result = ipdiverse.generate(
        reference, "a cat", base="sdxl-plus", dtype="bfloat16", n=2, candidates=3, steps=2
    )
    assert len(result.images) == 2


def test_running_out_of_memory_is_one_line(
    cache: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ipdiverse.load_base("sd15-plus", memory=MemoryOptions())

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(base.pipe.unet, "forward", full)
    with pytest.raises(ipdiverse.IpdiverseError) as caught:
        ipdiverse.generate(reference, "a cat", loaded=base, **SMALL)
    line = str(caught.value)
    assert line.startswith("sd15-plus: ran out of memory; found cpu (16.0 GiB), float32")
    assert "--offload=sequential" in line


def test_critters_stay_as_they_are(cache: Path, reference: str) -> None:
    assert ipdiverse.load_base("critters", memory=MemoryOptions()).plan is None
    with pytest.raises(ipdiverse.IpdiverseError, match="always runs in float32 on the CPU"):
        ipdiverse.generate(reference, base="critters", dtype="float16", n=1)


# --- faces ------------------------------------------------------------------------------------


def test_without_insightface_one_line_says_what_to_install(
    cache: Path,
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    given = ["--image", reference, "--base", "sd15-faceid", "--out", str(tmp_path / "o")]
    assert main(["generate", *given]) == 2
    error = capsys.readouterr().err
    assert error == (
        "ipdiverse: insightface: is not installed. Run `pip install -e '.[faces]'` in your "
        "copy of ipdiverse, or give embeddings: --faces FILE.\n"
    )


def test_faces_are_found_in_the_images(
    cache: Path, reference: str, faces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face_embeddings, "detect_face", lambda image: models.face(0))
    found = ipdiverse.generate(reference, "a man", base="sd15-faceid", **SMALL)
    given = ipdiverse.generate((), "a man", base="sd15-faceid", faces=faces, **SMALL)
    np.testing.assert_array_equal(pixels(found.images[0]), pixels(given.images[0]))


def test_faces_that_the_adapter_does_not_read_are_refused(
    cache: Path, reference: str, faces: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sd15-plus", "critters"):
        given = ["--image", reference, "--faces", faces, "--base", name, "--steps", "1"]
        assert main(["generate", *given]) == 2
        error = capsys.readouterr().err
        found = "plus" if name == "critters" else name
        assert f"faces: are not read by this adapter; found {found}. Leave out --faces" in error
        assert error.count("\n") == 1


def test_an_adapters_file_says_that_it_reads_faces(
    cache: Path, reference: str, faces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = hub.place(cache, PRESETS["sd15-faceid"].adapter_files()[0])
    common: dict[str, Any] = {"base": "sd15", "adapter": str(file), **SMALL}
    monkeypatch.setattr(face_embeddings, "detect_face", lambda image: models.face(0))
    found = ipdiverse.generate(reference, "a man", **common)
    given = ipdiverse.generate(reference, "a man", faces=faces, **common)
    np.testing.assert_array_equal(pixels(found.images[0]), pixels(given.images[0]))


# --- before and after downloads ---------------------------------------------------------------


def test_bases_lists_sizes_licences_and_what_is_cached(
    own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file,) = PRESETS["sdxl-plus"].adapter_files()
    hub.place(own_cache, file).unlink()
    assert main(["bases", "--json"]) == 0
    listed = {p["name"]: p for p in json.loads(capsys.readouterr().out)["presets"]}
    assert [name for name, preset in listed.items() if preset["cached"]] == [*hub.KINDS][:-1]
    assert listed["sdxl-plus"]["files_missing"] == [f"h94/IP-Adapter/{file.name}"]
    assert listed["sdxl-plus"]["bytes_missing"] == file.size
    repositories = listed["sd15-plus"]["repositories"]
    assert repositories["image_encoder"]["link"] == "https://huggingface.co/h94/IP-Adapter"
    assert repositories["base"]["license"] == "creativeml-openrail-m"
    assert main(["bases"]) == 0
    shown = capsys.readouterr().out
    assert "sdxl: Stable Diffusion XL, 4 image tokens" in shown
    assert "10.3 GB, 848 MB to download; 1024 px, 30 steps, guidance 5, scale 0.6" in shown
    assert "approximate" in shown


@pytest.fixture
def lacking(
    own_cache: Path, use: Callable[..., None], full: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """A cache without one adapter; downloads come from the full one and are written down."""
    (file,) = PRESETS["sd15-plus"].adapter_files()
    hub.place(own_cache, file).unlink()
    use(own_cache, offline=False)
    fetched = []

    def download(repository: str, name: str, revision: str, **_: Any) -> str:
        fetched.append(f"{repository}/{name}@{revision}")
        target = hub.place(own_cache, file)
        hub.copied(hub.place(full, file), target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return fetched


def words(reference: str, out: Path, *more: str) -> list[str]:
    usual = ["--image", reference, "--base", "sd15-plus", "-n", "1", "--steps", "1"]
    return ["generate", *usual, "--out", str(out), *more]


def test_nothing_is_downloaded_where_nobody_can_be_asked(
    lacking: list[str], reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(reference, tmp_path / "o")) == 2
    assert capsys.readouterr().err == (
        "ipdiverse: sd15-plus: has to be downloaded first, about 98 MB; found no terminal to ask "
        "on, for h94/IP-Adapter. Add --yes; `ipdiverse bases` lists sizes and licences.\n"
    )
    assert lacking == []


def test_yes_downloads_and_says_what(
    lacking: list[str], reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(reference, tmp_path / "o", "--yes")) == 0
    printed = capsys.readouterr().err
    assert "sd15-plus needs about 98 MB from the Hugging Face hub:\n" in printed
    assert "  https://huggingface.co/h94/IP-Adapter (licence: apache-2.0)\n" in printed
    assert "98 MB  models/ip-adapter-plus_sd15.safetensors\n" in printed
    revision = PRESETS["sd15-plus"].adapter.revision
    assert lacking == [f"h94/IP-Adapter/models/ip-adapter-plus_sd15.safetensors@{revision}"]
    assert main(words(reference, tmp_path / "o")) == 0, "asks no more"
    assert len(lacking) == 1


def test_pictures_are_read_before_a_download_is_offered(
    lacking: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert main(words(str(broken), tmp_path / "o")) == 2
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "download" not in error
    assert not lacking


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--adapter", "plus"],
            "adapter plus: belongs to critters; found base sd15-plus. Name one",
        ),
        (
            ["--adapter", "sdxl"],
            "adapter sdxl: belongs to stabilityai/stable-diffusion-xl-base-1.0",
        ),
        (["--adapter", "sd15", "--base", "critters"], "adapter sd15: belongs to stable-diff"),
        (["--adapter", "nope"], "nope: unknown adapter; expected diverse, plus, base (with"),
        (["--preset", "vibes"], "preset: is not a preset"),
        (["--combine", "mix"], "combine: is unknown"),
        (["--mask", "REF", "--mask", "REF"], "mask: has the wrong length"),
        (["--faces", "face.npy"], "faces: are not read by this adapter"),
        (["--image-encoder", "./enc"], "./enc: no such folder"),
        (["--controlnet", "./cn", "--control-image", "REF"], "./cn: no such folder"),
    ],
)
@pytest.mark.parametrize("offline", [True, False])
def test_names_are_read_before_a_download_is_offered(
    flags: list[str],
    message: str,
    offline: bool,
    lacking: list[str],
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    given = [reference if flag == "REF" else flag for flag in flags]
    assert main(words(reference, tmp_path / "o", "--yes", *given)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ipdiverse: {message}")
    assert error.count("\n") == 1
    assert not lacking


@pytest.mark.parametrize(("answer", "status"), [("y\n", 0), ("\n", 2), ("", 2)])
def test_on_terminals_it_asks(
    answer: str,
    status: int,
    lacking: list[str],
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(words(reference, tmp_path / "o")) == status
    _, asked, said = capsys.readouterr().err.partition("Download? [y/N] ")
    assert asked
    refused = "ipdiverse: sd15-plus: was not downloaded; found no. Answer y, or --yes.\n"
    assert (said == refused) is (status == 2)
    assert len(lacking) == (status == 0)


def test_training_asks_too(
    lacking: list[str], own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = PRESETS["sd15-plus"].encoder_files()[1]
    hub.place(own_cache, file).unlink()
    (tmp_path / "data").mkdir()
    for command in (
        ["embed", str(tmp_path / "data"), "--base", "sd15-plus"],
        ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--base", "sd15-plus"],
    ):
        assert main(command) == 2
        message = capsys.readouterr().err
        assert "sd15-plus: has to be downloaded first, about 2.5 GB" in message, "no adapter"


def test_offline_is_one_line(
    lacking: list[str],
    reference: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words(reference, tmp_path / "o", "--yes")) == 2
    error = capsys.readouterr().err
    assert "sd15-plus: is not in the local cache, and downloads are off; found no h94/" in error
    assert error.count("\n") == 1


def test_another_revision_is_looked_for(
    cache: Path, reference: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(reference, tmp_path / "o", "--revision", "v2")) == 2
    assert "stable-diffusion-v1-5/model_index.json and" in capsys.readouterr().err
    assert main(words(reference, tmp_path / "o", "--revision", "main")) == 0, "a branch of it"


def test_an_image_encoder_that_is_broken_is_one_line(own_cache: Path) -> None:
    for file in PRESETS["sd15-plus"].encoder_files():
        hub.place(own_cache, file).write_bytes(b"broken")
    assert ipdiverse.load_base("sd15", encoder="").pipe.image_encoder is None
    with pytest.raises(ipdiverse.IpdiverseError) as caught:
        ipdiverse.load_base("sd15-plus")
    line = str(caught.value)
    assert line.startswith("sd15-plus: its image encoder cannot be opened; found ")
    assert "\n" not in line


def test_an_installation_without_the_embedded_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.base.pipelines.CRITTERS_BASE", tmp_path)
    with pytest.raises(ipdiverse.IpdiverseError) as caught:
        ipdiverse.load_base()
    assert str(caught.value) == (
        "critters: the embedded model is not in this installation. Run `make base` in a checkout, "
        "or install a released package."
    )


def test_what_has_no_revisions_says_so(reference: str, tmp_path: Path) -> None:
    with pytest.raises(ipdiverse.IpdiverseError, match="critters: has no revisions; found main"):
        ipdiverse.generate(reference, revision="main", n=1)


def test_a_base_that_nobody_knows_an_adapter_for(reference: str) -> None:
    with pytest.raises(ipdiverse.IpdiverseError, match="adapter: is missing; found base owner/x"):
        ipdiverse.generate(reference, base="owner/x", n=1)
