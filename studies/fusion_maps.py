"""What a text-image fusion attends to, and what it does with it, on the study's held-out pairs.

    python studies/fusion_maps.py ADAPTER.safetensors ... [--pairs 200] [--out docs/study]

Three questions, each with a number. Do image tokens look at the words that state the scene, more
than at the rest? Do the tokens move more where the prompt contradicts the reference than where it
agrees? Does what the tokens say of a stated attribute become readable or unreadable, by a linear
probe trained on half of the pairs? Writes `fusion.json` and `fusion.png`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from ipdiverse.adapter.files.checkpoint import load_adapter, read_spec
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.base.bases import load_base
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, WORDINGS, caption
from ipdiverse.errors import CheckpointError
from ipdiverse.evaluation.pairs import Pair, study_pairs
from ipdiverse.evaluation.report import as_bytes
from ipdiverse.training.frozen import FrozenEncoders
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic, write_text_atomic

KINDS = ("start", "stated scene", "other words", "end")


def word_kinds(tokenizer: Any, text: str) -> list[str]:
    """The kind of every token of a prompt, start and end included."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    said = [
        wording
        for name, values in ATTRIBUTES.items()
        if name not in IDENTITY
        for value in values
        for wording in WORDINGS.get(name, {}).get(value, (value,))
    ]
    spans = [found.span() for word in said for found in re.finditer(rf"\b{word}\b", text)]
    kinds, at = ["start"], 0
    for token in tokens[1:-1]:
        word = token.replace("</w>", "")
        at = text.find(word, at)
        stated = any(low <= at < high for low, high in spans)
        kinds.append("stated scene" if stated else "other words")
        at += len(word)
    return [*kinds, "end"]


def attention_map(
    fusion: BlendFusion | GatedFusion, tokens: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Attention of one reference's tokens over the words, mean over heads, (tokens, words)."""
    if isinstance(fusion, BlendFusion):
        query, key = fusion.query(tokens)[:, None], fusion.key(text)[:, None]
    else:
        query = fusion._split(fusion.to_q(fusion.norm_image(tokens)))
        key = fusion._split(fusion.to_k(fusion.norm_text(text)))
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[0]


def probe(features: torch.Tensor, labels: torch.Tensor, classes: int) -> float:
    """Accuracy of a ridge-regularised linear reader, trained on one half, read on the other."""
    half = len(labels) // 2
    mean, spread = features[:half].mean(0), features[:half].std(0) + 1e-6
    x = torch.cat([(features - mean) / spread, torch.ones(len(features), 1)], 1).double()
    y = F.one_hot(labels, classes).double()
    solved = torch.linalg.solve(
        x[:half].T @ x[:half] + 30 * torch.eye(x.shape[1], dtype=torch.float64),
        x[:half].T @ y[:half],
    )
    return float(((x[half:] @ solved).argmax(1) == labels[half:]).double().mean())


@torch.no_grad()
def analyse(file: Path, encoders: FrozenEncoders, pairs: list[Pair]) -> dict[str, Any]:
    """The three numbers, and an example's map."""
    adapter = load_adapter(file).eval()
    fusion, tokenizer = adapter.fusion, encoders.pipe.tokenizer
    if fusion is None:
        raise CheckpointError("has no text-image fusion", where=file)
    embeds = encoders.image([pair.image() for pair in pairs])[adapter.reads[0]]
    before = adapter.tokens(embeds)
    share: dict[str, list[float]] = {kind: [] for kind in KINDS}
    fair: dict[str, list[float]] = {kind: [] for kind in KINDS}
    moved: dict[str, list[float]] = {"contradicts": [], "agrees": []}
    after, example = [], None
    for pair, tokens in zip(pairs, before, strict=True):
        text = encoders.text([pair.prompt])
        kinds = word_kinds(tokenizer, pair.prompt)
        seen = attention_map(fusion, tokens[None], text["states"][:, : len(kinds)])
        for kind in KINDS:
            chosen = torch.tensor([k == kind for k in kinds])
            share[kind].append(float(seen[:, chosen].sum(1).mean()))
            fair[kind].append(float(chosen.float().mean()))
        after.append(adapter.fuse(tokens[None], text["states"], text.get("mask"))[0])
        for name, value in pair.stated.items():
            which = "agrees" if getattr(pair.reference, name) == value else "contradicts"
            alone = encoders.text([caption({name: value}, pair.seed)])
            fused = adapter.fuse(tokens[None], alone["states"], alone.get("mask"))[0]
            change = fused - tokens
            moved[which].append(float(change.norm() / tokens.norm()))
        if example is None:
            labels = tokenizer.convert_ids_to_tokens(tokenizer(pair.prompt).input_ids)
            example = (pair.prompt, [w.replace("</w>", "") for w in labels], seen.numpy())
    gate = getattr(fusion, "gate", None)
    report = {
        "adapter": file.parent.name if file.name == "adapter.safetensors" else file.stem,
        "reference": read_spec(file).get("reference"),
        "kind": fusion.kind,
        "attention": {k: round(float(np.mean(share[k])), 4) for k in KINDS},
        "uniform": {k: round(float(np.mean(fair[k])), 4) for k in KINDS},
        "moved": {k: round(float(np.mean(v)), 4) for k, v in moved.items() if v},
        "gate": None if gate is None else round(float(torch.tanh(gate).abs().mean()), 4),
        "blend": round(float(fusion.blend), 4) if gate is None else None,
        "readable": readable(before, torch.stack(after), pairs),
    }
    return report | {"_example": example}


def readable(
    before: torch.Tensor, after: torch.Tensor, pairs: list[Pair]
) -> dict[str, dict[str, float]]:
    """What a linear probe reads of the reference's scene from tokens: stated, and open."""
    found: dict[str, dict[str, float]] = {}
    for name in ("place", "position"):
        for state, inside in (("stated", True), ("open", False)):
            rows = [i for i, pair in enumerate(pairs) if (name in pair.stated) == inside]
            labels = torch.tensor(
                [ATTRIBUTES[name].index(getattr(pairs[i].reference, name)) for i in rows]
            )
            found[f"{name}, {state}"] = {
                when: round(probe(t[rows].flatten(1), labels, len(ATTRIBUTES[name])), 3)
                for when, t in (("before", before), ("after", after))
            }
    return found


def draw(reports: list[dict[str, Any]]) -> Any:
    """A row for each adapter: an example's map, and the attention by kind of word."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8 * len(reports)), dpi=110, layout="constrained")
    rows = figure.subplots(len(reports), 2, squeeze=False)
    for (left, right), report in zip(rows, reports, strict=True):
        prompt, words, seen = report["_example"]
        left.imshow(seen, aspect="auto", cmap="viridis", vmin=0)
        left.set_xticks(range(len(words)), words, rotation=35, ha="right", fontsize=7)
        left.set_ylabel("image token", fontsize=8)
        left.set_title(f"{report['adapter']}: “{prompt}”", fontsize=8, loc="left")
        kinds = np.arange(len(KINDS))
        right.bar(kinds - 0.2, [report["attention"][k] for k in KINDS], 0.4, label="attention")
        right.bar(kinds + 0.2, [report["uniform"][k] for k in KINDS], 0.4, label="share of words")
        right.set_xticks(kinds, KINDS, fontsize=8)
        right.legend(fontsize=7, frameon=False)
    return figure


def main() -> None:
    """Analyse, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/study"))
    chosen = parser.parse_args()
    encoders = FrozenEncoders(load_base().pipe)
    pairs = study_pairs(chosen.pairs, seed=3)
    reports = [analyse(file, encoders, pairs) for file in chosen.adapters]
    folder = ensure_writable_folder(chosen.out)
    write_bytes_atomic(folder / "fusion.png", as_bytes(draw(reports), "png"))
    kept = [{k: v for k, v in report.items() if k != "_example"} for report in reports]
    write_text_atomic(folder / "fusion.json", json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
