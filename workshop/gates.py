"""The embedded base against its gates, all on held-out identities."""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS, Base, load_base
from ipdiverse.critters.oracle import Oracle, Reading, read
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, Scene, caption, conditional, mentioned
from ipdiverse.evaluation.images import sample_array
from ipdiverse.evaluation.metrics import entropy_miller_madow, expected_entropy
from ipdiverse.evaluation.pairs import held_out_scenes, shipped_oracle
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job
from workshop.base.clip import tokenize
from workshop.base.corpus import draw, to_pixels
from workshop.base.faults import LEFT_OUT, TRAINED
from workshop.base.inspector import MIXED, VALID, decoded, scene_with
from workshop.base.oracle import round_trip
from workshop.copier import CopierOptions, measure_copier

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 25
SET = 8
"""Images a prompt, for the entropy of what it leaves open."""

GATES: dict[str, tuple[str, float]] = {
    "vae_psnr": (">=", 30.0),
    "oracle_mean": (">=", 0.99),
    "oracle_worst": (">=", 0.97),
    "oracle_mean_round_trip": (">=", 0.99),
    "oracle_worst_round_trip": (">=", 0.97),
    "prompt_accuracy_mean": (">=", 0.95),
    "prompt_accuracy_worst": (">=", 0.90),
    "false_alarms": ("<=", 0.01),
    "false_alarms_round_trip": ("<=", 0.01),
    "fault_found_worst": (">=", 0.90),
    "left_out_fault_found_worst": (">=", 0.60),
    "entropy_guidance_1": (">=", 0.95),
    "probe_worst": (">=", 0.90),
    "plus_identity_mean": (">=", 0.93),
    "plus_identity_worst": (">=", 0.90),
    "plus_asked_for_agreeing": (">=", 0.80),
    "plus_copies": (">=", 0.60),
    "plus_token_probe_worst": (">=", 0.95),
    "base_identity_mean": (">=", 0.88),
    "base_identity_worst": (">=", 0.85),
    "base_copies": (">=", 0.60),
    "base_token_probe_worst": (">=", 0.95),
}
"""Figure, comparison and bound; figures without a gate are reported too."""


def check_base(images: int = 2000, guidance: float | None = None) -> dict[str, Any]:
    """Measure every gate.

    Args:
        images: Images sampled for the text-to-image gates.
        guidance: The one fixed guidance; None takes the base's default.

    Returns:
        `figures` (all numbers), `gates` (figure, bound, holds), `passed`, and per-attribute
        details.
    """
    base, oracle = load_base(CRITTERS), shipped_oracle()
    guidance = base.guidance_scale if guidance is None else guidance
    torch.manual_seed(0)
    scenes = held_out_scenes(images, seed=1)
    renders = np.stack([render(scene, seed) for scene, seed in scenes])
    truth = np.array([scene.indices() for scene, _ in scenes])
    figures, details = _reconstruction(base, oracle, renders, truth)
    for part in (
        fault_part(base.pipe.vae, oracle, each=max(8, images // 40)),
        _text_to_image(base, oracle, [scene for scene, _ in scenes], guidance),
        _encoder(base, scenes, renders, truth),
        *(_copier(base, name, scenes, renders, truth) for name in ("plus", "base")),
    ):
        figures |= part[0]
        details |= part[1]
    gates = {
        name: {"value": figures[name], "gate": f"{sign} {bound}", "holds": _holds(name, figures)}
        for name, (sign, bound) in GATES.items()
    }
    return {
        "images": images,
        "steps": STEPS,
        "guidance": guidance,
        "passed": all(gate["holds"] for gate in gates.values()),
        "gates": gates,
        "figures": figures,
        "details": details,
    }


def gate_table(report: dict[str, Any]) -> str:
    """The gates as a Markdown table."""
    rows = [
        f"| {name} | {gate['value']:.4g} | {gate['gate']} | {'yes' if gate['holds'] else 'NO'} |"
        for name, gate in report["gates"].items()
    ]
    other = [
        f"| {name} | {value:.4g} | reported | |"
        for name, value in report["figures"].items()
        if name not in GATES
    ]
    table = ["| figure | value | gate | holds |", "|---|---|---|---|", *rows, *other]
    return "\n".join([*table, "", *_fault_table(report["details"]["faults"])])


def _fault_table(faults: dict[str, dict[str, float]]) -> list[str]:
    """What is called invalid, by kind of fault and by how images are drawn."""
    drawn = list(faults[VALID])
    rows = [
        f"| {kind}{' (never trained on)' if kind in LEFT_OUT else ''} | "
        + " | ".join(f"{found[way]:.3f}" if way in found else "-" for way in drawn)
        + " |"
        for kind, found in faults.items()
    ]
    return [
        "| called invalid | " + " | ".join(drawn) + " |",
        "|---" * (len(drawn) + 1) + "|",
        *rows,
    ]


def _holds(name: str, figures: dict[str, float]) -> bool:
    sign, bound = GATES[name]
    return bool(figures[name] >= bound if sign == ">=" else figures[name] <= bound)


_Part = tuple[dict[str, float], dict[str, Any]]


def _per_attribute(values: np.ndarray) -> dict[str, float | None]:
    pairs = zip(ATTRIBUTES, values, strict=True)
    return {name: None if np.isnan(v) else round(float(v), 4) for name, v in pairs}


def _reconstruction(base: Base, oracle: Oracle, renders: np.ndarray, truth: np.ndarray) -> _Part:
    decoded = round_trip(base.pipe.vae, renders)
    errors = ((decoded.astype(np.float32) - renders) ** 2).mean((1, 2, 3)) / 255**2
    figures: dict[str, float] = {"vae_psnr": float((-10 * np.log10(errors)).mean())}
    details = {}
    for suffix, images in (("", renders), ("_round_trip", decoded)):
        reading = read(oracle, images)
        right = (reading.attributes == truth).mean(0)
        figures[f"oracle_mean{suffix}"] = float(right.mean())
        figures[f"oracle_worst{suffix}"] = float(right.min())
        figures[f"false_alarms{suffix}"] = _share_invalid(reading)
        details[f"oracle{suffix}"] = _per_attribute(right)
    return figures, details


def fault_part(vae: Any, oracle: Oracle, each: int) -> _Part:
    """Share called invalid of each kind of fault, on held-out identities, by how they are drawn.

    Of renders at another size, JPEGs and round trips without noise nothing was trained on.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in (VALID, *TRAINED, MIXED, *LEFT_OUT):
        drawn = [scene_with(kind, "test", index)[2] for index in range(each)]
        large = [scene_with(kind, "test", index, 192)[2] for index in range(each)]
        plain = np.stack(drawn)
        ways = {"decoded": decoded(vae, plain, kind, seed=1)}
        if kind != MIXED:  # its renders have no fault before they are encoded
            shrunk = np.stack(large).reshape(each, 64, 3, 64, 3, 3).mean((2, 4))
            ways |= {"render": plain, "shrunk": shrunk.round().astype(np.uint8)}
            ways |= {"JPEG": np.stack([_as_jpeg(image) for image in drawn])}
            ways |= {"round trip": round_trip(vae, plain)}
        shares = {way: _share_invalid(read(oracle, images)) for way, images in ways.items()}
        found[kind] = dict(sorted(shares.items()))
    means = {kind: float(np.mean([*ways.values()])) for kind, ways in found.items()}
    figures = {
        "fault_found_worst": min(means[kind] for kind in (*TRAINED, MIXED)),
        "left_out_fault_found_worst": min(means[kind] for kind in LEFT_OUT),
        "fault_found_mean": float(np.mean([means[kind] for kind in (*TRAINED, MIXED)])),
    }
    return figures, {"faults": found}


def _share_invalid(reading: Reading) -> float:
    assert reading.invalid is not None, "it was just read"  # noqa: S101 - for types
    return float(reading.invalid.mean())


def _as_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return np.asarray(Image.open(buffer))


def _text_to_image(base: Base, oracle: Oracle, scenes: list[Scene], guidance: float) -> _Part:
    """Accuracy of what prompts state, validity, and entropy of what they leave open.

    Each prompt gets `SET` images, so that a model that always draws the same for a prompt shows.
    """
    scenes = scenes[: max(1, len(scenes) // SET)]
    stated = [mentioned(scene, seed, 0.5) for seed, scene in enumerate(scenes)]
    prompts = [caption(part, seed) for seed, part in enumerate(stated)]
    mask = np.array([[name in part for name in ATTRIBUTES] for part in stated])
    truth = np.array([scene.indices() for scene in scenes])
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    for label, scale in (("default_guidance", guidance), ("guidance_1", 1.0)):
        jobs = [Job(p, number, i) for number, p in enumerate(prompts) for i in range(SET)]
        request = Request(n=1, steps=STEPS, guidance_scale=scale)
        reading = read(oracle, sample_array(base, jobs, request))
        seen = reading.attributes.reshape(len(prompts), SET, -1)
        hits = seen == truth[:, None]
        right = np.array([_mean(hits[m, :, i]) for i, m in enumerate(mask.T)])
        entropy = np.array([_open_entropy(seen[..., i], stated, i) for i in range(mask.shape[1])])
        suffix = "" if label == "default_guidance" else f"_{label}"
        figures[f"prompt_accuracy_mean{suffix}"] = _mean(right)
        figures[f"prompt_accuracy_worst{suffix}"] = float(np.nanmin(right))
        figures[f"invalid_rate{suffix}"] = _share_invalid(reading)
        figures[f"entropy_{label}"] = _mean(entropy)
        figures[f"entropy_worst_{label}"] = float(np.nanmin(entropy))
        details[f"prompt_accuracy{suffix}"] = _per_attribute(right)
        details[f"entropy_{label}"] = _per_attribute(entropy)
    return figures, details


def _mean(values: np.ndarray) -> float:
    """Mean of what could be measured; NaN when nothing could."""
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return float(known.mean()) if known.size else float("nan")


def _open_entropy(seen: np.ndarray, stated: list[dict[str, str]], attribute: int) -> float:
    """Entropy within each prompt's set, relative to as many draws from the true conditional.

    Args:
        seen: Values of one attribute, (prompts, images).
        stated: What each prompt states.
        attribute: Its number in `ATTRIBUTES`.
    """
    name = list(ATTRIBUTES)[attribute]
    ratios = []
    for values, part in zip(seen, stated, strict=True):
        if name not in part:
            prior = conditional(name, part)
            counts = np.bincount(values, minlength=len(prior))
            ideal = expected_entropy(tuple(float(p) for p in prior), len(values))
            ratios.append(entropy_miller_madow(counts) / ideal)
    return _mean(np.array(ratios, dtype=float))


@torch.no_grad()
def _encode(base: Base, images: np.ndarray, of: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    encoder: Any = base.pipe.image_encoder
    parts = [
        of(encoder(to_pixels(images[i : i + 200]), output_hidden_states=True))
        for i in range(0, len(images), 200)
    ]
    return torch.cat(parts)


def _encoder(
    base: Base, scenes: list[tuple[Scene, int]], renders: np.ndarray, truth: np.ndarray
) -> _Part:
    """Caption retrieval 1 of 256, and a linear probe on the penultimate hidden states."""
    drawn = [draw("train", 7, index) for index in range(6000)]
    train = np.stack([render(scene, seed) for scene, seed in drawn])
    labels = torch.tensor([scene.indices() for scene, _ in drawn])
    features = _encode(base, train, _penultimate)
    held_out = _encode(base, renders, _penultimate)
    right = linear_probe(features, labels, held_out, torch.from_numpy(truth))
    figures = {"probe_mean": float(right.mean()), "probe_worst": float(right.min())}
    if len(scenes) >= 256:
        figures["retrieval_256"] = _retrieval(base, scenes, renders)
    return figures, {"probe": _per_attribute(right)}


@torch.no_grad()
def _copier(
    base: Base, name: str, scenes: list[tuple[Scene, int]], renders: np.ndarray, truth: np.ndarray
) -> _Part:
    """How truly a plain adapter copies at λ = 1, and what a linear reader finds in its tokens."""
    options = CopierOptions(name, (1.0,), max(2, len(scenes) // 10), 4, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        [row] = measure_copier(options, Path(folder))["rows"]
    adapter = load_adapter(adapter_file(CRITTERS, name))
    reads = _pooled if adapter.reads == ("pooled",) else _hidden
    drawn = [draw("train", 7, index) for index in range(3 * len(scenes))]
    labels = torch.tensor([scene.indices() for scene, _ in drawn])
    train, held_out = (
        torch.cat([adapter.tokens(part) for part in _encode(base, pictures, reads).split(200)])
        for pictures in (np.stack([render(scene, seed) for scene, seed in drawn]), renders)
    )
    known = [list(ATTRIBUTES).index(one) for one in IDENTITY]
    right = linear_probe(train.flatten(1), labels, held_out.flatten(1), torch.from_numpy(truth))
    right = right[known]
    figures = {
        f"{name}_identity_mean": float(row["retention"]),
        f"{name}_identity_worst": min(row["retention_by"].values()),
        f"{name}_asked_for_agreeing": float(row["asked_for_agreeing"]),
        f"{name}_copies": float(row["copy_rate"]),
        f"{name}_invalid": float(row["invalid_rate"]),
        f"{name}_token_probe_worst": float(right.min()),
    }
    read_by = dict(zip(IDENTITY, right.round(4).tolist(), strict=True))
    return figures, {f"{name} identity": row["retention_by"], f"{name} tokens": read_by}


def _pooled(output: Any) -> torch.Tensor:
    return output.image_embeds


def _hidden(output: Any) -> torch.Tensor:
    return output.hidden_states[-2]


def _penultimate(output: Any) -> torch.Tensor:
    return output.hidden_states[-2].flatten(1)


_RIDGE = 0.2
"""Weight of the probe's penalty, per standardised feature."""


def linear_probe(
    features: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor, truth: torch.Tensor
) -> np.ndarray:
    """Accuracy per attribute of ridge regression to one-hot labels, in closed form.

    Args:
        features: Training features, (count, width).
        labels: Training labels, (count, attributes).
        held_out: Test features.
        truth: Test labels.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x, z = (features - mean) / std, (held_out - mean) / std
    sizes = [len(values) for values in ATTRIBUTES.values()]
    hot = torch.cat(
        [torch.nn.functional.one_hot(labels[:, i], size) for i, size in enumerate(sizes)], dim=1
    ).float()
    centre = hot.mean(0)
    # dual form: as many unknowns as samples, not as features
    gram = x @ x.T + _RIDGE * x.shape[1] * torch.eye(len(x))
    scores = z @ (x.T @ torch.linalg.solve(gram, hot - centre)) + centre
    predicted = torch.stack([part.argmax(1) for part in scores.split(sizes, dim=1)], dim=1)
    return (predicted == truth).float().mean(0).numpy()


@torch.no_grad()
def _retrieval(base: Base, scenes: list[tuple[Scene, int]], renders: np.ndarray) -> float:
    count = len(scenes) // 256 * 256
    captions = [caption(mentioned(s, i, 0.5), i) for i, (s, _) in enumerate(scenes[:count])]
    ids = tokenize(base.pipe.tokenizer, captions)
    text = torch.cat([base.pipe.text_encoder(part).pooler_output for part in ids.split(256)])
    image = _encode(base, renders[:count], lambda output: output.image_embeds)
    text = torch.nn.functional.normalize(text, dim=-1).unflatten(0, (-1, 256))
    image = torch.nn.functional.normalize(image, dim=-1).unflatten(0, (-1, 256))
    best = (image @ text.transpose(1, 2)).argmax(-1)
    return float((best == torch.arange(256)).float().mean())
