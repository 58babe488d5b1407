"""A run from TOML, from flags, and from flags of version 0.1 and of the original trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from ipdiverse import cli
from ipdiverse.cli import main
from ipdiverse.commands.train import Train, as_flags, read_run
from ipdiverse.data.prepare import PrepareOptions
from ipdiverse.errors import ArgumentError
from ipdiverse.training.config import RENAMED, CacheConfig, TrainConfig


def toml(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Commands that `main` parsed; none of them runs."""
    found: list[Any] = []

    def keep(command: Any) -> None:
        found.append(command)

    for kind in (cli.Train, cli.Embed, cli.Prepare, cli.Fit):
        monkeypatch.setattr(kind, "run", keep)
    return found


def test_flags_override_the_file(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'data = "d"\nsteps = 7\nlearning_rate = 1\ncache = false\nfrozen = ["layers", "fusion"]\n',
    )
    flags = as_flags(["--out", "o", "--config", str(file), "--steps=9", "--cache"])
    assert flags == [
        *("--data", "d", "--learning-rate", "1", "--frozen", "layers", "fusion"),
        *("--out", "o", "--steps", "9", "--cache"),
    ]


CHOICES = {
    name: choice
    for name, hint in get_type_hints(TrainConfig).items()
    for choice in get_args(hint)
    if isinstance(choice, str)
}
"""One choice of every setting that has a list of them."""
CHOICES["fusion"] = "gated"  # a generative one needs an adapter to start from


def test_every_choice_can_be_made_in_a_file(tmp_path: Path, parsed: list[Any]) -> None:
    assert {"adapter", "fusion", "lr_scheduler", "mixed_precision", "report_to"} <= CHOICES.keys()
    lines = [f'{name} = "{choice}"\n' for name, choice in CHOICES.items()]
    file = toml(tmp_path, 'data = "d"\nout = "o"\n' + "".join(lines))
    assert main(["train", "--config", str(file)]) == 0
    assert parsed == [Train(TrainConfig(data="d", out="o", **CHOICES))]  # type: ignore[arg-type]


def test_the_commands_hold_what_their_flags_say(parsed: list[Any]) -> None:
    assert main(["train", "--data", "d", "--out", "o", "--tokens", "8", "--root", "r"]) == 0
    assert main(["embed", "d", "--base", "b", "--flip", "--cache-images", "pooled"]) == 0
    assert main(["prepare", "d", "--out", "o", "--square", "pad", "--n", "3"]) == 0
    train, embed, prepare = parsed
    assert (train.training, train.root) == (TrainConfig(data="d", out="o", tokens=8), "r")
    assert (embed.cache, embed.cache_images) == (CacheConfig(base="b", flip=True), "pooled")
    assert (prepare.data, prepare.out) == (PrepareOptions(square="pad", n=3), "o")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "d", "--out", "o", "--stepz", "3"], "Did you mean --steps?"),
        (["embed", "d", "--fliip"], "Did you mean --flip?"),
        (["prepare", "d", "--out", "o", "--sqare", "pad"], "Did you mean --square?"),
    ],
)
def test_a_mistyped_flag_of_a_held_config_is_recognised(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_all_problems_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'stpes = 3\nsteps = "many"\nfusion = "glue"\nema = true\n'
        "checkpoints_total_limit = 1.5\nroot = 1\n",
    )
    with pytest.raises(ArgumentError) as caught:
        read_run(file)
    message = str(caught.value)
    for part in (
        "run.toml: unknown key 'stpes', did you mean 'steps'?",
        "steps is 'many', expected a whole number from 1 to 100000000",
        "fusion is 'glue', expected none or blend or gated",
        "ema is True, expected a number from 0 to 0.999999",
        "checkpoints_total_limit is 1.5, expected a whole number",
        "root is 1, expected a text",
    ):
        assert part in message
    assert "\n" not in message


def test_keys_of_0_1_are_read_with_a_note(tmp_path: Path) -> None:
    file = toml(tmp_path, 'precision = "fp32"\nkeep = 2\nnoise_conditioning = true\nsteps = 3\n')
    with pytest.warns(UserWarning, match=r"run\.toml") as told:
        found = read_run(file)
    assert found == {"mixed_precision": "no", "checkpoints_total_limit": 2, "steps": 3}
    notes = "\n".join(str(one.message) for one in told)
    assert notes.count("\n") == 1
    assert "run.toml: renamed precision → mixed_precision, keep → checkpoints_total_limit" in notes
    assert "noise_conditioning has no effect: noise conditioning was removed" in notes


def test_flags_of_0_1_are_read_with_a_note() -> None:
    given = ["--precision", "fp32", "--save-every", "5", "--noise-conditioning"]
    with pytest.warns(UserWarning, match="--") as told:
        flags = as_flags([*given, "--held_out=2", "--cache"])
    assert flags == [
        *("--mixed-precision", "no", "--checkpointing-steps", "5"),
        *("--num-validation-images", "2", "--cache"),
    ]
    notes = [str(one.message) for one in told]
    assert notes == [
        "renamed --precision → --mixed-precision, --save-every → --checkpointing-steps, "
        "--held_out → --num-validation-images",
        "--noise-conditioning has no effect: noise conditioning was removed after version 0.1",
    ]


def test_an_old_flag_overrides_the_new_key_of_a_file(tmp_path: Path) -> None:
    for old, new in RENAMED.items():
        text = '"x"' if new in ("init_from", "lr_scheduler", "mixed_precision") else "3"
        text = {"lr_scheduler": '"cosine"', "mixed_precision": '"bf16"'}.get(new, text)
        file = toml(tmp_path, f"{new} = {text}\nseed = 1\n")
        with pytest.warns(UserWarning, match="renamed"):
            flags = as_flags(["--config", str(file), f"--{old}", "4"])
        assert flags == ["--seed", "1", f"--{new.replace('_', '-')}", "4"]


ORIGINAL = """--pretrained_model_name_or_path sd15 --image_encoder_path enc --data_json_file d.json
    --data_root_path images --mixed_precision no --resolution 512 --train_batch_size 8
    --dataloader_num_workers 4 --learning_rate 1e-04 --weight_decay=0.01 --output_dir out
    --save_steps 10000 --num_train_epochs 2 --report_to tensorboard
    --pretrained_ip_adapter_path a.bin"""
OURS = """--base sd15 --image-encoder enc --data d.json --root images --mixed-precision no
    --resolution 512 --process-batch 8 --workers 4 --learning-rate 1e-04 --weight-decay 0.01
    --out out --checkpointing-steps 10000 --epochs 2 --report-to tensorboard --init-from a.bin"""


def test_the_original_trainers_command_is_understood() -> None:
    with pytest.warns(UserWarning, match="--output_dir → --out, --save_steps → --check") as told:
        assert as_flags(ORIGINAL.split()) == OURS.split()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_flags(OURS.split()) == OURS.split()


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (["--logging_dir", "logs"], "--logging-dir has no effect: logs are written to the folder"),
        (["--local_rank=-1"], "--local-rank has no effect: the launcher has told accelerate which"),
    ],
)
def test_flags_without_a_meaning_here_are_left_out_with_a_note(given: list[str], note: str) -> None:
    with pytest.warns(UserWarning, match=note) as told:
        assert as_flags(["--steps", "2", *given, *given, "--batch", "8"]) == [
            *("--steps", "2", "--batch", "8")
        ]
    assert len(told) == 1
    assert as_flags(["--noise_offset", "0.1"]) == ["--noise-offset", "0.1"], "is refused later"


def test_a_flag_overrides_what_would_replace_it_in_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "epochs = 3\nprocess_batch = 2\nseed = 1\n")
    flags = as_flags(["--config", str(file), "--steps", "9", "--batch", "8"])
    assert flags == ["--seed", "1", "--steps", "9", "--batch", "8"]


RECIPES = sorted((Path(__file__).parents[3] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=[file.stem for file in RECIPES])
def test_every_recipe_is_a_command(recipe: Path, parsed: list[Any]) -> None:
    kind, _, preset = recipe.stem.partition("-")
    if kind == "fit":
        assert main(["fit", "data/subjects", "--config", str(recipe), "--bank", "7"]) == 0
        [command] = parsed
        assert (command.folder, command.fit.bank, command.cache.changed) == ("data/subjects", 7, 0)
        assert (command.cache.base, command.adapter) == (preset, preset)
    else:
        assert main(["train", "--config", str(recipe)]) == 0
        [command] = parsed
        config = command.training
        assert (config.base, config.init_from, config.fusion) == (preset, preset, "generative")
    assert len(RECIPES) == 6


def test_a_file_for_fit_is_held_to_its_options(
    tmp_path: Path, parsed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = toml(tmp_path, 'bank = "many"\nfolder = "data"\nout = 3\ncache_dtype = "int8"')
    assert main(["fit", "data", "--config", str(wrong)]) == 2
    said = capsys.readouterr().err
    for part in ("bank is 'many'", "unknown key 'folder'", "out is 3", "cache_dtype is 'int8'"):
        assert part in said
    assert not parsed
