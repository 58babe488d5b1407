"""A run from TOML, from flags, and from the original trainer's flags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.errors import ArgumentError
from ipdiverse.training.config import TrainConfig, as_flags, read_toml

if TYPE_CHECKING:
    from pathlib import Path


def toml(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


def test_flags_hold_over_the_file(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'data = "d"\nsteps = 7\nlearning_rate = 1\ncache = false\nfrozen = ["layers", "fusion"]\n',
    )
    flags = as_flags(["--out", "o", "--config", str(file), "--steps=9", "--cache"])
    assert flags == [
        *("--data", "d", "--learning-rate", "1", "--frozen", "layers", "fusion"),
        *("--out", "o", "--steps", "9", "--cache"),
    ]


def test_all_problems_of_a_file_are_named_at_once(tmp_path: Path) -> None:
    file = toml(tmp_path, 'stpes = 3\nsteps = "many"\nfusion = "glue"\nema = true\nkeep = 1.5\n')
    with pytest.raises(ArgumentError) as caught:
        read_toml(file)
    message = str(caught.value)
    for part in (
        "unknown key 'stpes'",
        "steps is 'many', expected int",
        "fusion is 'glue', expected Literal",
        "ema is True, expected float",
        "keep is 1.5, expected int",
    ):
        assert part in message
    assert "\n" not in message
    for text in ("steps = ", "\xff"):
        with pytest.raises(ArgumentError, match="cannot be read; expected TOML"):
            read_toml(toml(tmp_path, text)) if text[0] == "s" else read_toml(tmp_path / "none")


ORIGINAL = """--pretrained_model_name_or_path sd15 --image_encoder_path enc --data_json_file d.json
    --data_root_path images --mixed_precision no --resolution 512 --train_batch_size 8
    --dataloader_num_workers 4 --learning_rate 1e-04 --weight_decay=0.01 --output_dir out
    --save_steps 10000 --num_train_epochs 2 --report_to tensorboard
    --pretrained_ip_adapter_path a.bin"""
OURS = """--base sd15 --image-encoder enc --data d.json --root images --precision fp32
    --resolution 512 --process-batch 8 --workers 4 --learning-rate 1e-04 --weight-decay 0.01
    --out out --save-every 10000 --epochs 2 --report-to tensorboard --start a.bin"""


def test_the_original_trainers_command_is_understood() -> None:
    assert as_flags(ORIGINAL.split()) == OURS.split()


@pytest.mark.parametrize(
    ("given", "note"),
    [
        (["--logging_dir", "logs"], "--logging-dir is ignored: logs are written to the folder of"),
        (["--local_rank=-1"], "--local-rank is ignored: the launcher has told accelerate which"),
    ],
)
def test_what_means_nothing_here_is_left_out_with_a_note(given: list[str], note: str) -> None:
    with pytest.warns(UserWarning, match=note) as told:
        assert as_flags(["--steps", "2", *given, *given, "--batch", "8"]) == [
            *("--steps", "2", "--batch", "8")
        ]
    assert len(told) == 1
    assert as_flags(["--noise_offset", "0.1"]) == ["--noise-offset", "0.1"], "is refused later"


def test_a_flag_holds_over_what_takes_its_place_in_the_file(tmp_path: Path) -> None:
    file = toml(tmp_path, "epochs = 3\nprocess_batch = 2\nseed = 1\n")
    flags = as_flags(["--config", str(file), "--steps", "9", "--batch", "8"])
    assert flags == ["--seed", "1", "--steps", "9", "--batch", "8"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: is out of range"),
        ({"drop_text": 0.5, "drop_both": 0.6}, "drops together: is out of range"),
        ({"process_batch": 0}, "process_batch: is out of range"),
        ({"start": ""}, "start: is empty. Leave it out for new weights."),
        ({"frozen": ("unet",)}, "frozen: is no part; expected projection, layers, fusion"),
        ({"workers": 1, "cache": False}, "workers: needs the cache"),
        ({"learning_rate": float("nan")}, "learning_rate: is out of range"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**{"data": "d", "out": "o", **changes})
