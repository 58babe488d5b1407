"""What the command line refuses, and that it leaves the process as it was."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import ipdiverse
from ipdiverse import cli
from ipdiverse.cli import COMMANDS, main
from ipdiverse.commands.checkpoints import Bases
from ipdiverse.commands.cluster import Spread
from ipdiverse.commands.evaluate import Calibrate
from ipdiverse.commands.generate import Generate
from ipdiverse.errors import ArgumentError, Interrupted
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def passes() -> None:
    pass


def fails() -> None:
    raise ArgumentError("is wrong", where="x")


def is_stopped() -> None:
    raise Interrupted(15)


def is_interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("ends", "status"), [(passes, 0), (fails, 2), (is_stopped, 143), (is_interrupted, 130)]
)
def test_warnings_are_notes_for_as_long_as_a_command_runs(
    ends: Callable[[], None],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: Bases) -> None:
        sys.stderr.write(warnings.formatwarning("too\rlong", UserWarning, "file.py", 7))
        ends()

    monkeypatch.setattr(Bases, "run", run)
    before = warnings.formatwarning
    assert main(["bases"]) == status
    assert capsys.readouterr().err.startswith("note: too\\rlong\n")
    assert warnings.formatwarning is before


def test_a_word_that_is_no_command_leaves_no_trace_either() -> None:
    before = warnings.formatwarning
    assert main(["no-such-command"]) == 2
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "ipdiverse needs a command; expected generate | bases | demo | "),
        (
            "generat",
            "generat: is not a command of ipdiverse. Did you mean generate? `ipdiverse --help`",
        ),
        ("critters", "action, --out: are missing. `ipdiverse critters --help` lists all."),
        (
            "critters mak",
            "action: is unknown; expected make; found mak. `ipdiverse critters --help`",
        ),
        ("critters make", "--out: is missing. `ipdiverse critters --help` lists all."),
        (
            "critters make --nn 3",
            "--nn: is not an option of ipdiverse critters. Did you mean --n?",
        ),
        ("convert a", "out, --to: are missing. `ipdiverse convert --help` lists all."),
        (
            "train --dta x",
            "--dta: is not an option of ipdiverse train. Did you mean --data? `ipdiverse tr",
        ),
        (
            "inspect a --sourc",
            "--sourc: is not an option of ipdiverse inspect. `ipdiverse inspect --help",
        ),
        (
            "generate --imge=a.png",
            "--imge: is not an option of ipdiverse generate. Did you mean --image?",
        ),
        (
            "generate --no-safty-checker",
            "--no-safty-checker: is not an option of ipdiverse generate. Did",
        ),
        ("genrate --image a.png", "genrate: is not a command of ipdiverse. Did you mean generate?"),
        ("genrate", "genrate: is not a command of ipdiverse. Did you mean generate?"),
        (
            "generate --image a.png b.png --mask m.png",
            "b.png: belongs to no option. Repeat --image for each value, and put quotes",
        ),
        (
            "generate --image https://example.com/a.png",
            "https://example.com/a.png: is an address; expected a file. Download it first",
        ),
        ("generate --image=", "image: is empty; expected a file"),
        ("generate --image a.png --mask=", "mask: is empty; expected a file"),
        ("generate a.png", "a.png: belongs to no option. `ipdiverse generate --help` lists all."),
        ("generate --image", "--image: has no value; expected STR. `ipdiverse generate --help`"),
        (
            "generate --n x",
            "--n: cannot be read; expected INT; found x. `ipdiverse generate --help",
        ),
        (
            "generate --n=x",
            "--n: cannot be read; expected INT; found x. `ipdiverse generate --help",
        ),
        (
            "generate --scale x",
            "--scale: cannot be read; expected FLOAT; found x. `ipdiverse gener",
        ),
        (
            "generate --interval 3",
            "--interval: cannot be read; expected FLOAT FLOAT; found 3. `ipdi",
        ),
        (
            "generate --dtype x",
            "--dtype: is unknown; expected auto | float32 | float16 | bfloat16; f",
        ),
    ],
)
def test_what_cannot_be_parsed_is_one_line(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ipdiverse: {line}")
    assert error.count("\n") == 1


def test_every_command_says_what_is_no_option_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--qqq"]) == 2
        error = capsys.readouterr().err
        assert error == (
            f"ipdiverse: --qqq: is not an option of ipdiverse {name}. "
            f"`ipdiverse {name} --help` lists all.\n"
        )


def test_a_tyro_that_tells_nothing_prints_its_boxes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "tyro._errors", None)
        patched.delattr("tyro._errors", raising=False)
        with cli.in_one_line([]):
            pass
    monkeypatch.setattr(cli, "_error", lambda *_: object().tokens)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--qqq"])
    assert stop.value.code == 2
    assert "Unrecognized" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bases", "--help"])
def test_a_reader_that_went_away_is_no_error(command: str) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    words = [sys.executable, "-m", "ipdiverse", command]
    done = subprocess.run(words, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_lists_requests_as_they_are_and_levers_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    flags = re.findall(r"^[^\w-]*--([a-z][a-z-]*)", capsys.readouterr().out, re.M)
    own = [field.name for field in fields(Generate) if field.name not in ("request", "spread")]
    request = [field.name for field in fields(Request) if field.name != "levers"]
    spread = [field.name for field in fields(Spread)]
    expected = [name.replace("_", "-") for name in (*own, *request, *LEVERS, *spread)]
    assert flags == expected
    assert request[:4] == ["image", "prompt", "diversity", "n"]


def asked(words: str, monkeypatch: pytest.MonkeyPatch) -> Request:
    """What a command line of `generate` asks for."""
    found: list[Request] = []
    monkeypatch.setattr(Generate, "run", lambda self: found.append(self.request))
    assert main(["generate", *words.split()]) == 0
    return found[0]


def test_flags_become_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "--image a.png --prompt x --image b.png --prompt y -n 3 --interval 0.1 4 --no-tiling"
    assert asked(words, monkeypatch) == Request.of(
        {"image": ("a.png", "b.png"), "prompt": ("x", "y"), "n": 3, "tiling": False}
        | {"interval": (0.1, 4.0)}
    )


def test_a_lever_that_others_register_is_a_flag(
    monkeypatch: pytest.MonkeyPatch, rivals: None
) -> None:
    assert asked("--image a.png --drop 0.25", monkeypatch).levers == {"drop": 0.25}


@pytest.mark.parametrize("word", ["--seed -1", "--seed=random"])
def test_a_random_seed_is_told_and_kept(
    word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = [asked(f"--image a.png {word} -n 2", monkeypatch).seed for _ in range(2)]
    notes = [f"note: the seed is {seed}; --seed {seed} repeats this" for seed in seeds]
    assert capsys.readouterr().err.splitlines() == notes
    assert seeds[0] != seeds[1]


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"ipdiverse \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "C locale"])
@pytest.mark.parametrize("words", ["generate --help", "train --help", "generate --image λ.png"])
def test_consoles_that_are_not_unicode_are_written_to(encoding: str, words: str) -> None:
    own = {"PYTHONIOENCODING": encoding}
    if encoding == "C locale":
        own, encoding = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}, "ascii"
        words = words.replace("--image λ.png", "--help")  # there an argument is bytes
    done = subprocess.run(
        [sys.executable, "-m", "ipdiverse", *words.split()],
        env=os.environ | own,
        capture_output=True,
        check=False,
    )
    said = (done.stdout + done.stderr).decode(encoding)
    assert done.returncode in (0, 2)
    assert "Traceback" not in said
    assert "\\u03b" in said


@pytest.mark.parametrize(
    "words",
    [
        "generate --image typo.png",
        "generate --image {here} --base typo",
        "generate --image {here} --adapter typo",
        "generate --image {here} --controlnet typo --control-image {here}",
        "generate --faces typo.npy",
        "generate --batch typo.jsonl",
        "inspect typo.png",
        "inspect typo.safetensors",
        "inspect {lora}",
        "convert typo.safetensors b.safetensors --to ipdiverse",
    ],
)
def test_what_is_mistyped_is_said_before_torch_is_imported(words: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    lora = tmp_path / "typo.safetensors"
    save_file({"lora_unet_down.lora_down.weight": np.zeros(1)}, lora)
    code = (
        "import sys; from ipdiverse.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "sys.exit('torch' if 'torch' in sys.modules else 0 if code == 2 else 'passed')"
    )
    argv = words.format(here=tmp_path / "a.png", lora=lora).split()
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, check=False)
    assert b"typo" in done.stderr
    assert (done.returncode, done.stderr.count(b"\n")) == (0, 1), done.stderr


def test_flags_of_version_0_1_are_understood_with_a_note(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "--training 0.5 --image=a.png --drop 0.2 --start=0.1 --noise-level=5 --end 0.9"
    with pytest.warns(UserWarning, match="--") as told:
        found = asked(words, monkeypatch)
    assert found == Request.of(
        {"image": "a.png", "interpolation": 0.5, "start_at": 0.1, "end_at": 0.9}
    )
    assert [str(one.message) for one in told] == [
        "renamed --training → --interpolation, --start → --start-at, --end → --end-at",
        "--drop no longer acts",
        "--noise-level no longer acts",
    ]


def test_the_flag_for_base_weights_by_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Calibrate] = []
    # a function is bound to the command, a built-in method is not
    monkeypatch.setattr(Calibrate, "run", lambda self: found.append(self))  # noqa: PLW0108
    with pytest.warns(UserWarning, match="renamed --plain → --base-weights"):
        assert main(["calibrate", "--adapter", "x", "--plain", "y"]) == 0
    assert found[0].base_weights == "y"


@pytest.mark.parametrize("words", ["--help", "generate --help", "--version"])
def test_what_is_only_read_loads_little(words: str) -> None:
    """Modules are counted, as seconds differ by machine: 260 and 325 when this was written."""
    code = (
        "import sys; from contextlib import suppress; from ipdiverse.cli import main\n"
        "with suppress(SystemExit): main(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL', 'gradio'}\n"
        "sys.exit(f'{len(sys.modules)} {sorted(heavy & sys.modules.keys())}')"
    )
    argv = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(argv, capture_output=True, check=False, text=True)
    count, heavy = done.stderr.splitlines()[-1].split(" ", 1)
    assert (int(count) <= 400, heavy) == (True, "[]"), done.stderr


def test_every_public_name_can_be_imported() -> None:
    for name in ipdiverse.__all__:
        assert getattr(ipdiverse, name) is not None


def test_generate_loads_only_what_runs(tmp_path: Path) -> None:
    """Modules are counted, as seconds differ by machine; nothing of other tasks is among them."""
    Image.new("RGB", (64, 64), (200, 90, 30)).save(tmp_path / "a.png")
    code = (
        "import sys; from ipdiverse.cli import main\n"
        "code = main(sys.argv[1:])\n"
        # peft and Flux come with diffusers' own pipeline, wherever they are installed
        "idle = {'gradio', 'datasets', 'ray', 'wandb', 'pandas', 'matplotlib',\n"
        "    'ipdiverse.training.trainer', 'ipdiverse.evaluation.running', 'ipdiverse.ui.page',\n"
        "    'ipdiverse.sampling.selection',\n"
        "    'ipdiverse.sampling.batch'}\n"
        "sys.exit(f'{code} {sorted(idle & sys.modules.keys())}')"
    )
    words = ["generate", "--image", str(tmp_path / "a.png"), "-n", "1", "--steps", "1"]
    argv = [sys.executable, "-c", code, *words, "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, capture_output=True, check=False, text=True)
    assert done.stderr.splitlines()[-1] == "0 []", done.stderr
