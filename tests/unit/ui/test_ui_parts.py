"""Words, recipes, choices and reports of the page, without a browser."""

from __future__ import annotations

import ast
import io
import json
import shlex
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipdiverse.cli import main
from ipdiverse.critters.make import example
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.sampling.request import Request
from ipdiverse.ui import Installed, closeness, find_installed, page, results, status, uploads
from ipdiverse.ui.closeness import BANDS, CRITTER_BANDS, Closeness
from tests import joint_models, models

REQUEST = Request(
    image=("cat.png",),
    prompt=('it\'s "in" the $(snow)',),
    n=2,
    diversity=0.5,
    scale=1.0,
    steps=4,
    guidance_scale=3.0,
    adapter="plus",
)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd.png"),
        ("..\\..\\boot.ini", "boot.ini.png"),
        ("-rf.png", "rf.png"),
        (".hidden.jpg", "hidden.jpg"),
        ("a b;$(id)`x`.JPG", "a_b_id_x_.JPG"),
        ("x" * 500 + ".png", "x" * 80 + ".png"),
        ("repeat.py", "repeat.py.png"),
        ("", "reference.png"),
        ("\x00\n/\u202e.png", "png.png"),
    ],
)
def test_names_are_nothing_but_names(given: str, name: str) -> None:
    assert uploads.safe_name(given) == name
    assert Path(name).name == name
    assert shlex.quote(name) == name


def test_names_differ() -> None:
    assert uploads.safe_name("cat.png", ["cat.png"]) == "cat-2.png"
    assert uploads.safe_name("cat.png", ["cat.png", "cat-2.png"]) == "cat-3.png"


def test_a_command_keeps_any_prompt_whole() -> None:
    words = shlex.split(results.as_commands({"out": REQUEST}))
    assert f"--prompt={REQUEST.prompt[0]}" in words
    assert words[-1] == "--out=out"


def called(program: str) -> list[tuple[list[Any], dict[str, Any], str]]:
    """What a program asks of `generate`, and where it saves."""
    found: list[Any] = []

    def generate(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(save=lambda out: found.append((list(args), kwargs, out)))

    fake = SimpleNamespace(generate=generate)
    body = ast.parse(program).body
    assert ast.unparse(body[0]) == "import ipdiverse"
    exec(compile(ast.Module(body[1:], []), "recipe", "exec"), {"ipdiverse": fake})  # noqa: S102
    return found


def test_a_program_asks_for_the_same() -> None:
    ((args, kwargs, out),) = called(results.as_python({"out": REQUEST}))
    assert Request(image=args[0], prompt=args[1], **kwargs) == REQUEST
    assert out == "out"


def test_a_program_of_a_grid_asks_for_every_cell() -> None:
    cells = {
        f"out/{d:g}-{s:g}": replace(REQUEST, image=("a.png", "b.png"), diversity=d, scale=s)
        for d in (0.0, 0.5)
        for s in (0.5, 1.0)
    }
    found = called(results.as_python(cells))
    assert {o: Request(image=tuple(a[0]), prompt=a[1], **k) for a, k, o in found} == cells


def test_a_set_holds_what_its_recipes_need(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0000.png").write_bytes(b"image")
    (tmp_path / "kept").write_bytes(b"reference")
    files = {"cat.png": tmp_path / "kept"}
    data = results.packed(tmp_path, files, {"out": REQUEST}, "set")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("set/cat.png") == b"reference"
        assert archive.read("set/out/0000.png") == b"image"
        assert archive.read("set/command.sh").decode().startswith("ipdiverse generate")
        assert b"ipdiverse.generate(" in archive.read("set/repeat.py")


def seen(*near: float, prompt: tuple[float, ...] | None = None, alike: float = 0.2) -> Closeness:
    return Closeness(near, prompt, alike if len(near) > 1 else None, CRITTER_BANDS)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.1, "unlike the reference"),
        (0.25, "related to the reference"),
        (0.66, "close to the reference"),
        (0.85, "almost a copy of the reference"),
    ],
)
def test_closeness_in_words(value: float, words: str) -> None:
    assert closeness.reference_words(value, CRITTER_BANDS) == words


def test_summaries_read_as_sentences() -> None:
    told = seen(0.1, 0.2, 0.9, prompt=(1.0, 1.0, 1.0)).summary()
    assert told == (
        "2 are unlike the reference, 1 is almost a copy of the reference. "
        "All 3 show the prompt. The images are varied."
    )
    assert seen(0.3, prompt=(0.85,)).summary() == (
        "It is related to the reference. It shows part of the prompt."
    )
    assert "much alike" in seen(0.9, 0.9, alike=0.9).summary()


def test_bands_tell_rendered_critters_apart(references: list[Image.Image]) -> None:
    from ipdiverse.base.bases import load_base

    pipe = load_base().pipe
    attachment: Any = SimpleNamespace(
        pipe=pipe, image_encoder=pipe.image_encoder, image_processor=pipe.feature_extractor
    )
    made = example(200, 0, "train")
    same = [Image.fromarray(render(made.scene, made.seed + i)) for i in (0, 1, 2)]
    request = Request(image=("x",), prompt=(made.text,))
    found = closeness.judged(attachment, same, same[:1], request)
    assert found is not None
    assert found.reference[0] == pytest.approx(1, abs=1e-4)
    assert min(found.reference) > CRITTER_BANDS.close
    assert found.narrow
    assert found.prompt is not None
    assert min(found.prompt) >= closeness.SHOWN
    others = closeness.judged(attachment, references, same[:1], request)
    assert others is not None
    assert others.prompt is not None
    assert max(others.reference) < CRITTER_BANDS.close
    assert max(others.prompt) < closeness.SHOWN
    assert not others.narrow
    untold = closeness.judged(attachment, same, same[:1], replace(request, prompt=("",)))
    assert untold is not None
    assert untold.prompt is None


def test_the_plot_says_in_words_what_it_shows() -> None:
    svg = closeness.plot(seen(0.1, 0.9, prompt=(1.0, 0.2)))
    assert 'role="img"' in svg
    assert "image 2 almost a copy of the reference; hardly shows the prompt" in svg
    assert svg.count("<circle") == 2
    assert "shows the prompt →" not in closeness.plot(seen(0.1))


NARROWEST = replace(REQUEST, diversity=0.0, guidance_scale=9.0, image=("a", "b"))


@pytest.mark.parametrize(
    ("request_", "calibrated", "words"),
    [
        (NARROWEST, True, "Diversity is 0"),
        (NARROWEST, False, "The adapter scale is 1"),
        (
            replace(REQUEST, diversity=0.5),
            True,
            "Diversity is 0.5, and this adapter can vary more",
        ),
        (NARROWEST, True, "Guidance is 9, and this base's default is 3"),
        (NARROWEST, True, "Several references"),
        (NARROWEST, False, "was not calibrated"),
        (replace(REQUEST, prompt=(" ",)), True, "There is no prompt"),
        (replace(REQUEST, prompt=("word " * 12,)), True, "is detailed (12 words)"),
    ],
)
def test_hints_come_from_what_was_used(request_: Request, calibrated: bool, words: str) -> None:
    assert any(words in text for text in status.why_alike(request_, calibrated, 3.0))


def test_no_hint_is_made_up() -> None:
    open_ = replace(REQUEST, diversity=0.95)  # a calibrated dial keeps the scale
    (text,) = status.why_alike(open_, True, 3.0)
    assert "No setting explains it" in text


def test_the_report_hints_only_where_images_are_alike() -> None:
    sheet: Any = SimpleNamespace(
        request=NARROWEST, calibrated=False, usual_guidance=3.0, closeness=seen(0.9, 0.9, alike=0.9)
    )
    assert "Why are these alike?" in status.report(sheet)
    sheet.closeness = seen(0.3, 0.3)
    assert "Why" not in status.report(sheet)
    sheet.closeness = None
    assert "no image encoder that can compare" in status.report(sheet)


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (59, "59 s"), (61, "1 min 01 s")])
def test_durations(seconds: float, words: str) -> None:
    assert status.duration(seconds) == words


def test_errors_cannot_carry_markup() -> None:
    assert "<script" not in status.problem("<script>alert(1)</script>")


def test_what_lost_an_attribute_is_never_called_close() -> None:
    """Held-out renders; the encoder alone calls most of such pairs close, and many copies."""
    made = [example(index, 13, "test") for index in range(12)]
    references = [Image.fromarray(render(one.scene, one.seed)) for one in made]
    for name in IDENTITY:
        other = [next(v for v in ATTRIBUTES[name] if v != getattr(m.scene, name)) for m in made]
        changed = [replace(m.scene, **{name: v}) for m, v in zip(made, other, strict=True)]
        images = [Image.fromarray(render(one, n)) for n, one in enumerate(changed)]
        lost = closeness._lost(images, references, np.arange(12))
        assert lost == ((name,),) * 12
        seen = Closeness((0.99,) * 12, None, None, CRITTER_BANDS, lost)
        assert {seen.words(n) for n in range(12)} == {f"another {name}"}
        assert seen.summary() == f"All 12 have another {name}."
        assert 'class="lost"' in closeness.plot(seen)
    kept = closeness._lost(references, references, np.arange(12))
    assert kept == ((),) * 12
    some = Closeness((0.5, 0.9, 0.9), None, None, CRITTER_BANDS, ((), (), IDENTITY))
    assert [some.words(n) for n in range(3)] == [
        "the same critter",
        "almost a copy of the reference",
        "another critter",
    ]
    assert "1 is another critter" in some.summary()
    photo = [Image.effect_noise((64, 64), 90).convert("RGB")]
    assert closeness._lost(references, photo, np.zeros(12, int)) is None


def test_of_photos_less_is_said_and_it_is_said_why() -> None:
    from ipdiverse.base.bases import load_base

    pipe = load_base().pipe
    attachment: Any = SimpleNamespace(
        pipe=pipe, image_encoder=pipe.image_encoder, image_processor=pipe.feature_extractor
    )
    made = example(200, 0, "train")
    critter = [Image.fromarray(render(made.scene, made.seed))]
    photo = [Image.effect_noise((64, 64), 90).convert("RGB")]
    request = Request(image=("x",), prompt=("",))
    for reference, bands, rests in (
        (critter, CRITTER_BANDS, "2,000 rendered pairs"),
        (photo, BANDS, "103 photos of 20 subjects, seen by the small model's image encoder"),
    ):
        found = closeness.judged(attachment, critter, reference, request)
        assert found is not None
        assert found.bands is bands
        assert rests in found.rests_on
    other = closeness.judged(attachment, critter, photo, replace(request, base="sd15"))
    assert other is not None
    assert "set with another image encoder" in other.rests_on


def test_previews_are_few_and_change_no_pixel(tmp_path: Path) -> None:
    from ipdiverse.ui import queue

    name, data = uploads.example_files()[0]
    (tmp_path / name).write_bytes(data)
    turns, looks, drawn = queue.Turns(), [], []
    for number in range(2):
        request = replace(REQUEST, image=(str(tmp_path / name),), steps=8, prompt=("a critter",))
        job = queue.Job(turns, {"out": request}, (name,), tmp_path / str(number))
        look = queue.watched

        def counted(base: Any, look: Any = look, number: int = number) -> Any:
            return watching(look(base), looks) if number else nullcontext(lambda _: [])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(queue, "watched", counted)
            job.start()
            assert job.wait(300)
        assert job.error is None
        assert job.previews == []
        drawn.append([np.asarray(Image.open(file)) for file in job.files["out"]])
    np.testing.assert_array_equal(*drawn)
    assert [len(one) for one in looks] == [2, 2, 2], "after 2, 4 and 6 of 8 steps"
    final = drawn[1][0].astype(float)
    far = [np.abs(np.asarray(one[0]) - final).mean() for one in looks]
    assert far[2] < far[0], "nearer and nearer to the image"
    pipe = turns.base(REQUEST).pipe
    assert not pipe.unet._forward_hooks


@contextmanager
def watching(opened: Any, looks: list[Any]) -> Any:
    with opened as guessed:

        def look(images: int) -> Any:
            looks.append(guessed(images))
            return looks[-1]

        yield look


def test_the_command_of_a_cancelled_set_finds_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipdiverse.ui import queue

    name, data = uploads.example_files()[0]
    (tmp_path / name).write_bytes(data)
    request = replace(REQUEST, image=(str(tmp_path / name),), n=6, steps=1, prompt=("a critter",))

    def heard() -> bool:
        if job.images == 4:
            job.stop()
        return True

    job = queue.Job(queue.Turns(), {"out": request}, (name,), tmp_path / "job", heard=heard)
    job.start()
    assert job.wait(300)
    assert (job.error, job.images, job.stopped) == (None, 4, True)
    with zipfile.ZipFile(results.archive_of(job)) as archive:
        archive.extractall(tmp_path)
        (unpacked,) = {Path(inside).parts[0] for inside in archive.namelist()}
    monkeypatch.chdir(tmp_path / unpacked)
    before = {file: file.read_bytes() for file in Path("out").iterdir()}
    assert len(before) == 6, "four images, their sheet and record"
    command = results.as_commands({"out": job.sheets["out"].request})
    assert main(shlex.split(command)[1:]) == 0
    assert {file: file.read_bytes() for file in before} == before
    assert not Path("out-2").exists()


def drawn_in_sight(pipe: Any, offload: str = "none", look: bool = True) -> tuple[Any, list[Any]]:
    """Images of a small pipeline, and what was seen after each step."""
    base: Any = SimpleNamespace(pipe=pipe, plan=SimpleNamespace(offload=offload))
    own = ((pipe.scheduler, "step"), (pipe.vae, "decode"))
    before, seen = [vars(one).get(name) for one, name in own], []
    with closeness.watched(base) if look else nullcontext() as guessed:

        def told(_: Any, step: int, time: Any, given: Any) -> Any:
            seen.append(guessed(2) if guessed else [])
            return given

        images = pipe(
            ["a red critter", "a dog", "a cat"],
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(seed) for seed in range(3)],
            callback_on_step_end=told,
        ).images
    assert [vars(one).get(name) for one, name in own] == before, "nothing is left"
    return [np.asarray(image).astype(float) for image in images], seen


@pytest.mark.parametrize("name", ["flux", "sd3", "sd1"])
def test_previews_end_in_the_image_on_every_architecture(name: str) -> None:
    pipe = (models if name == "sd1" else joint_models).pipeline(name, fresh=True)
    if name != "sd1":  # random ones hardly change what they are given
        pipe.transformer.proj_out.weight.data *= 20
    final, seen = drawn_in_sight(pipe)
    again, _ = drawn_in_sight(pipe, look=False)
    np.testing.assert_array_equal(final, again)
    assert [len(one) for one in seen] == [2, 2, 2]
    for preview, image in zip(seen[-1], final, strict=False):
        assert np.abs(np.asarray(preview) - image).max() <= 1, "what the last step leaves"
    assert np.abs(np.asarray(seen[0][0]) - final[0]).max() > 1


def test_offloaded_models_are_seen_by_the_colours_of_what_they_drew() -> None:
    pipe = joint_models.pipeline("flux", fresh=True)
    final, seen = drawn_in_sight(pipe, "model")
    assert seen == [[], [], []], "nothing was decoded yet"
    with pytest.MonkeyPatch.context() as patch:
        decoded = []
        decode = pipe.vae.decode
        patch.setattr(pipe.vae, "decode", lambda *a, **k: decoded.append(a) or decode(*a, **k))
        _, seen = drawn_in_sight(pipe, "model")
    assert len(decoded) == 1, "by the pipeline, at its end"
    assert [len(one) for one in seen] == [2, 2, 2]
    small = Image.fromarray(final[0].astype(np.uint8)).resize(
        seen[-1][0].size, Image.Resampling.BOX
    )
    wanted = np.asarray(small).astype(float)
    assert np.abs(np.asarray(seen[-1][0]) - wanted).mean() < np.abs(wanted - wanted.mean()).mean()


def test_colours_of_a_vae_that_is_linear_are_found() -> None:
    latents, linear = torch.randn(2, 4, 8, 8), torch.randn(5, 3)
    pixels = torch.einsum("bchw,cr->brhw", latents, linear[:4]) + linear[4][:, None, None]
    large = torch.nn.functional.interpolate(pixels, scale_factor=8)
    torch.testing.assert_close(closeness.colours(latents, large), linear)


def test_a_page_that_was_closed_leaves_its_results_to_the_next(tmp_path: Path) -> None:
    from ipdiverse.ui.visitors import Sessions

    sessions = Sessions(tmp_path)
    first, cookie = sessions.of("first", "cookie"), "cookie"
    job: Any = SimpleNamespace(stop=lambda: None)
    first.jobs["vary"] = job
    (first.folder / "0000.png").touch()
    second = sessions.of("second", cookie)
    assert second.jobs == {}, "another page that is open"
    sessions.leave("second", cookie)
    assert not second.folder.exists(), "nothing was drawn"
    sessions.leave("first", cookie)
    again = sessions.of("again", cookie)
    assert again.jobs == {"vary": job}
    assert (again.folder / "0000.png").exists()
    assert sessions.of("third", cookie).jobs == {}, "one page takes it over"
    assert sessions.of("stranger", "other").jobs == {}
    program = sessions.of("program")
    program.jobs["vary"] = job
    sessions.leave("program")
    assert sessions.of("program").jobs == {}
    assert not (program.folder / "0000.png").exists()


def test_critters_and_its_adapters_are_always_there(tmp_path: Path) -> None:
    found = find_installed()
    assert found.bases["critters"] == "critters"
    assert list(found.adapters_of("critters")) == ["plus", "diverse", "base"]
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"")
    (tmp_path / "model_index.json").touch()
    more = find_installed([str(tmp_path)], [str(mine)])
    label = f"{tmp_path.name}/mine.safetensors"
    assert more.adapters_of("critters")[label] == str(mine)
    assert more.adapters_of(str(tmp_path)) == {label: str(mine)}
    assert str(tmp_path) in more.bases.values()


def test_a_preset_is_offered_once_all_of_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipdiverse.base.presets import PRESETS

    assert "sd15" not in find_installed().bases
    there = {"sd15-plus", "sd15-plus-face"}
    lacks = {name: [] if name in there else [1] for name in PRESETS}
    names = {tuple(one.all_files()): name for name, one in PRESETS.items()}
    monkeypatch.setattr("ipdiverse.ui.missing", lambda files: lacks[names[tuple(files)]])
    found = find_installed()
    assert list(found.bases) == ["critters", "sd15-plus"]
    assert list(found.adapters_of("sd15-plus")) == ["sd15-plus", "sd15-plus-face"]
    lacks["sd35-medium"] = []
    assert find_installed() == found, "nobody published an adapter for it"


def test_defaults_are_those_of_the_opened_base() -> None:
    from ipdiverse.base.bases import defaults_of, load_base

    base, told = load_base(), defaults_of("critters")
    assert (told.steps, told.scale, told.guidance_scale) == (
        base.steps,
        base.scale,
        base.guidance_scale,
    )
    assert defaults_of("sdxl").guidance_scale == 5.0


def asked(**changes: Any) -> Request:
    from ipdiverse.ui.inputs import request_from
    from ipdiverse.ui.uploads import Upload

    values = {
        "uploads": [Upload("cat.png", "kept.png")],
        "prompt": "p",
        "negative": "",
        "seed": 1,
        "keep": True,
        "steps": 4,
        "guidance": 3.0,
        "base": "critters",
        "adapter": "plus",
        "combine": "concat",
        "diversity": 0.5,
        "n": 2.0,
        "scale": 1.0,
    }
    return request_from(Installed({"critters": "critters"}), **(values | changes))


def test_what_was_set_becomes_a_request() -> None:
    request = asked()
    assert (request.image, request.n, request.seed) == (("kept.png",), 2, 1)
    assert [asked().fast, asked(fast=2.0).fast] == [0, 2]
    drawn = {asked(keep=keep).seed for keep in (False, None, "yes") for _ in range(5)}
    assert len(drawn) > 10, "a new one unless it is kept"


def test_the_levels_of_fast_are_offered_with_what_was_measured() -> None:
    from ipdiverse.ui.inputs import FAST

    file = Path(__file__).parents[3] / "docs" / "benchmarks" / "fast.json"
    report = json.loads(file.read_text())
    times = [one["ratio"] for one in report["critters"]["cells"] if one["level"]]
    worse = {"invalid_rate": 1}  # of all others less is worse
    lost = [
        100 * max(worse.get(name, -1) * one[0] for name, one in change["scores"].items())
        for change in report["losses"]["changes"]
    ]
    assert "{:.1f}, {:.1f} and {:.1f} times as fast".format(*times) in FAST
    assert "up to {:.1f}, {:.1f} and {:.1f} of 100".format(*lost) in FAST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uploads": []}, "reference: is missing"),
        ({"n": 17}, "n: is out of range"),
        ({"n": 1.5}, "n: is not a whole number"),
        ({"steps": 101}, "steps: is out of range"),
        ({"seed": -1}, "seed: is out of range"),
        ({"seed": None}, "seed: is not a whole number"),
        ({"seed": float("inf")}, "seed: is not a whole number"),
        ({"diversity": 2}, "diversity: is out of range"),
        ({"guidance": "x"}, "guidance_scale: is out of range"),
        ({"prompt": "x" * 2001}, "length of the prompt: is out of range"),
        ({"base": "/etc"}, "base: is not installed"),
        ({"fast": 4}, "fast: is out of range"),
        ({"fast": 0.5}, "fast: is not a whole number"),
        ({"fast": "1"}, "fast: is not a whole number"),
        ({"adapter": "../x.safetensors"}, "adapter: is not installed"),
    ],
)
def test_programs_cannot_ask_for_more_than_the_page_offers(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(IpdiverseError, match=message):
        asked(**changes)


def test_a_grid_needs_something_to_draw() -> None:
    from ipdiverse.ui import tabs

    with pytest.raises(ArgumentError, match="scale: nothing is chosen"):
        tabs._numbers("scale", ["7"], tabs.SCALES)
    assert tabs._numbers("scale", ["1", "0.5"], tabs.SCALES) == [0.5, 1.0]


PAGE = "<!doctype html><h1>Variety against fidelity</h1><script>parent.hit = 1</script>"


def test_reports_are_found_and_nothing_else(tmp_path: Path) -> None:
    inside = tmp_path / "out" / "study"
    inside.mkdir(parents=True)
    (inside / "report.html").write_text(PAGE)
    (tmp_path / "out" / "other").mkdir()
    (tmp_path / "out" / "other" / "report.html").write_text("<p>something else")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "report.html").write_text(PAGE)
    (tmp_path / "out" / "link").mkdir()
    (tmp_path / "out" / "link" / "report.html").symlink_to(tmp_path / "outside" / "report.html")
    found = page.find_reports([tmp_path / "out", tmp_path / "missing"])
    assert list(found.values()) == [inside / "report.html"]


def test_a_written_report_is_recognised(tmp_path: Path) -> None:
    from ipdiverse.evaluation import report
    from ipdiverse.evaluation.measured import Done, Measured
    from ipdiverse.evaluation.sets import PairSums
    from ipdiverse.evaluation.study import Arm, Study

    names = ("entropy", "retention", "prompt_accuracy")
    sums = {name: PairSums(np.ones(2), np.ones(2)) for name in names}
    images = np.zeros((1, 2, 8, 8, 3), np.uint8)
    done = Done([Measured(Arm("a", "a"), [sums], images)], [Image.new("RGB", (8, 8))], [], [])
    written = report.write_report(Study((Arm("a", "a"),)), done, tmp_path)
    assert list(page.find_reports([tmp_path]).values()) == [written]


def test_a_frame_can_do_nothing() -> None:
    frame = page.framed('a"b', PAGE)
    assert 'sandbox=""' in frame
    assert "<script" not in frame, "escaped into the attribute"
    assert 'title="report a&quot;b"' in frame


def test_other_bases_have_their_own_bands() -> None:
    assert closeness.reference_words(0.7, BANDS) == "related to the reference"
