"""Train the projector of `geofast.data.demos.seeing`, which lets SmolLM2 see through DINOv2.

    python tools/train_projector.py --out geofast/data/demos/projector [--crops 3000] [--minutes 44]

Both models are frozen. DINOv2's patches of every training crop are made once; then the projector
alone learns, by the cross-entropy of the answers to questions about the place. All questions about
a crop share one pass: they stand one after the other behind its patches, each blind to the others.

Held out are crops at other random places, which overlap training crops (`between`), and crops in
15-degree blocks that no training crop touches (`apart`). Writes into --out: model.safetensors
(float16), training.log, metrics.json and README.md. --work keeps features and checkpoints, and a
second start with the same folder goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from geofast.data import Samples
from geofast.data.demos import dinov2_small, satellite, smollm2
from geofast.data.demos.satellite import CLIMATES, CONTINENTS, places_seen
from geofast.data.demos.seeing import LAYER, QUESTIONS, SIDE, answer
from geofast.geo import Blocks

TRAIN_SEED, TEST_SEED = 1, 0
BLOCKS = Blocks(15, folds=6, seed=0)  # the first fold is held out
REACH = 4.0  # degrees from the centre of a crop to its edge
COMMON = 0.01  # share of training crops from which on a country is a candidate
PATCHES = (SIDE // 14) ** 2
WARM_EPOCHS, BATCH, RATE, DECAY, WARM_UP = 6, 8, 1e-3, 0.01, 20
FIRST_WORDING = 0.5  # the share of the first wording of a question

Table = pd.DataFrame


def main() -> None:
    """Make data and features, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of what is committed")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "geofast-projector")
    )
    parser.add_argument("--crops", type=int, default=3000, help="training crops, each seen once")
    parser.add_argument("--test", type=int, default=200, help="crops in each held-out set")
    parser.add_argument("--minutes", type=float, default=44, help="stop training after so long")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    log = Log(options.work / "training.log")
    log(f"{time.strftime('%Y-%m-%d')}, {machine()}")
    asked = f"crops {options.crops}, test {options.test}, minutes {options.minutes}"
    log(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {asked}")
    sets = split(options.crops, options.test, log)
    features = {name: patches(data, name, options.work, log) for name, data in sets.items()}
    reader = Reader()
    projector, moments, used = train(reader, sets["train"].table, features["train"], options, log)
    weights = folded(projector, *moments)
    save_file(weights, options.out / "model.safetensors", metadata={"format": "pt"})
    metrics = measured(reader, weights, sets, features, log)
    metrics["crops"]["train"] = used  # fewer than there are where the time was spent before
    metrics["seconds"] = round(log.seconds())
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (options.out / "README.md").write_text(card(metrics))
    log(f"done after {log.seconds() / 60:.0f} minutes in all")
    (options.out / "training.log").write_text(log.path.read_text())


class Log:
    """Prints lines and keeps them, with the minutes since the first start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = path.stat().st_ctime if path.is_file() else time.time()
        began = path.with_suffix(".began")
        if began.is_file():
            self.begun = float(began.read_text())
        else:
            began.write_text(str(self.begun))

    def seconds(self) -> float:
        """Return the time since the first start."""
        return time.time() - self.begun

    def __call__(self, line: str) -> None:
        """Write one line."""
        line = f"{self.seconds() / 60:6.1f}  {line}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def machine() -> str:
    """Name the processor and how many cores there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores of {name}"


# ------------------------------------------------------------------------------------------- data


def cell(table: Table) -> NDArray[np.int64]:
    """Return the number of the 15-degree block of every row [n]."""
    side = int(BLOCKS.degrees)
    row = (table["latitude"].to_numpy() + 90) // side
    column = (table["longitude"].to_numpy() + 180) % 360 // side
    return np.asarray(row * (360 // side) + column, dtype=np.int64)


def apart_from(table: Table, cells: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return degrees [n, cells] from every centre to every block's edge, below 0 inside."""
    side = int(BLOCKS.degrees)
    south, west = (cells // (360 // side)) * side - 90, (cells % (360 // side)) * side - 180
    latitude = table["latitude"].to_numpy()[:, None] - south - side / 2
    longitude = table["longitude"].to_numpy()[:, None] - west - side / 2
    longitude = np.abs((longitude + 180) % 360 - 180)
    return np.asarray(np.maximum(np.abs(latitude), longitude) - side / 2)


def split(crops: int, test: int, log: Log) -> dict[str, Samples]:
    """Return `train`, `between` and `apart`; crops are 8 degrees a side."""
    pool = places_seen(satellite(2 * crops, seed=TRAIN_SEED))
    others = places_seen(satellite(max(60 * test, 1), seed=TEST_SEED))
    cells = np.unique(cell(pool.table)[BLOCKS.assign(pool.table) == 0])
    edge = apart_from(others.table, cells).min(axis=1)
    chosen = {
        "train": np.flatnonzero(apart_from(pool.table, cells).min(axis=1) >= REACH)[:crops],
        "between": np.flatnonzero(edge >= REACH)[:test],
        "apart": np.flatnonzero(edge <= -REACH)[:test],
    }
    sets = {name: (pool if name == "train" else others).take(rows) for name, rows in chosen.items()}
    log(f"{len(cells)} of {len(np.unique(cell(pool.table)))} blocks of 15 degrees held out")
    for name, data in sets.items():
        shares = data.table["continent"].value_counts(normalize=True).round(2).to_dict()
        log(f"{name}: {len(data)} crops, {data.table['country'].nunique()} countries, {shares}")
    return sets


@torch.no_grad()
def patches(data: Samples, name: str, work: Path, log: Log) -> NDArray[np.float16]:
    """Return DINOv2's patches after block LAYER, [n, PATCHES, 384]; kept in `work`."""
    from transformers import AutoImageProcessor, AutoModel

    file = work / f"{name}-{len(data)}-{SIDE}-{LAYER}.npy"
    if file.is_file():
        return np.asarray(np.load(file))
    processor = AutoImageProcessor.from_pretrained(
        dinov2_small(),
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
    )
    vision = AutoModel.from_pretrained(dinov2_small()).eval()
    vision.encoder.layer = vision.encoder.layer[:LAYER]
    out = np.empty((len(data), PATCHES, 384), dtype=np.float16)
    for start in range(0, len(data), 32):
        images = [data.load(i) for i in range(start, min(start + 32, len(data)))]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        states = vision(pixels, output_hidden_states=True).hidden_states[LAYER]
        out[start : start + len(images)] = states[:, 1:].numpy()
    np.save(file, out)
    log(f"{name}: patches made")
    return out


# ------------------------------------------------------------------------- reading with SmolLM2


class Reader:
    """Frozen SmolLM2, reading a tree: a crop, questions about it, and answers to each."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(smollm2())
        self.lm = AutoModelForCausalLM.from_pretrained(smollm2()).eval().requires_grad_(False)
        self.words = self.lm.get_input_embeddings().weight
        self.head = self.ids("<|im_start|>user\n")

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def question(self, text: str) -> list[int]:
        """Return the tokens from behind the image to where the answer begins."""
        return self.ids(f"\n{text}<|im_end|>\n<|im_start|>assistant\n")

    def __call__(self, seen: Tensor, trees: list[Tree]) -> Tensor:
        """Return log-probabilities [answers' tokens in order] of every tree's answers.

        Parameters
        ----------
        seen : Tensor [n, PATCHES, 576]
            What the projector makes of the crops.
        trees : list of Tree
            One per crop.
        """
        begin = len(self.head) + PATCHES
        longest = begin + max(len(tree.ids) for tree in trees)
        allowed = torch.eye(longest, dtype=torch.bool).repeat(len(trees), 1, 1)
        positions = torch.zeros(len(trees), longest, dtype=torch.long)
        positions[:, :begin] = torch.arange(begin)
        allowed[:, :begin, :begin] = torch.ones(begin, begin, dtype=torch.bool).tril()
        tokens = torch.zeros(len(trees), longest - begin, dtype=torch.long)
        rows, befores, targets = [], [], []
        for row, tree in enumerate(trees):
            size = len(tree.ids)
            tokens[row, :size] = torch.tensor(tree.ids)
            positions[row, begin : begin + size] = begin + torch.tensor(tree.depth)
            allowed[row, begin : begin + size, :begin] = True
            for index, parents in enumerate(tree.sees):
                allowed[row, begin + index, [begin + p for p in parents]] = True
            for before, target in tree.answers:
                rows.append(row)
                befores.append(begin + before)
                targets.append(target)
        head = self.words[self.head].expand(len(trees), -1, -1)
        states = self.lm.model(
            inputs_embeds=torch.cat([head, seen, self.words[tokens]], dim=1),
            attention_mask=allowed[:, None],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        logits = self.lm.lm_head(states[torch.tensor(rows), torch.tensor(befores)])
        return logits.log_softmax(-1).gather(1, torch.tensor(targets)[:, None])[:, 0]


class Tree:
    """Tokens behind an image, where each sees only those that led to it."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.depth: list[int] = []
        self.sees: list[list[int]] = []
        self.answers: list[tuple[int, int]] = []
        """Index of the token before, and the token that is scored there."""

    def grow(self, tokens: list[int], trunk: list[int], *, scored: bool = False) -> list[int]:
        """Add tokens behind those of `trunk`; return the indices of trunk and tokens."""
        path = list(trunk)
        for token in tokens:
            if scored:
                self.answers.append((path[-1], token))
            self.sees.append(list(path))
            self.depth.append(len(path))
            path.append(len(self.ids))
            self.ids.append(token)
        return path


def lesson(reader: Reader, place: dict[str, Any], rng: np.random.Generator) -> Tree:
    """Word every question about a crop with its answer."""
    tree = Tree()
    for kind, wordings in QUESTIONS.items():
        rest = (1 - FIRST_WORDING) / (len(wordings) - 1)
        wording = rng.choice(wordings, p=[FIRST_WORDING] + [rest] * (len(wordings) - 1))
        asked = tree.grow(reader.question(str(wording)), [])
        tree.grow(reader.ids(answer(kind, place) + "<|im_end|>"), asked, scored=True)
    return tree


# --------------------------------------------------------------------------------------- training


def new_projector() -> nn.Sequential:
    """Return LLaVA's projector: two linear layers around a GELU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(384, 576), nn.GELU(), nn.Linear(576, 576))


def train(
    reader: Reader,
    table: Table,
    features: NDArray[np.float16],
    options: argparse.Namespace,
    log: Log,
) -> tuple[nn.Sequential, tuple[Tensor, Tensor], int]:
    """Return the projector, mean and deviation [384] of the patches, and how many crops it saw."""
    places = table.to_dict("records")
    flat = features.reshape(-1, 384).astype(np.float32)
    mean, deviation = torch.from_numpy(flat.mean(0)), torch.from_numpy(flat.std(0))
    projector = new_projector()
    checkpoint = options.work / "checkpoint.pt"
    steps = math.ceil(len(places) / BATCH)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=DECAY)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(places))
    first, spent = 0, 0.0
    if checkpoint.is_file():
        kept = torch.load(checkpoint, weights_only=True)
        projector.load_state_dict(kept["projector"])
        optimiser.load_state_dict(kept["optimiser"])
        first, spent = kept["step"], kept["spent"]
        log(f"goes on at step {first}")
    else:
        warm_start(reader, projector, places, features, (mean, deviation), log)
    total = sum(p.numel() for p in projector.parameters())
    log(f"training {total} parameters: {steps} steps of {BATCH} crops and four questions each")
    recent: list[float] = []
    begun = time.time() - spent
    step = first
    while step < steps:
        for group in optimiser.param_groups:
            # By the time that is left, so that the rate has come down when it is spent.
            done = max(step / steps, (time.time() - begun) / 60 / options.minutes)
            fall = 0.5 + 0.5 * math.cos(math.pi * min(done, 1))
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * fall
        if time.time() - begun > 60 * options.minutes:
            log(f"stopped at step {step}, the time is spent")
            break
        rows = order[step * BATCH : (step + 1) * BATCH]
        draw = np.random.default_rng([1, step])
        trees = [lesson(reader, places[row], draw) for row in rows]
        x = (torch.from_numpy(features[rows].astype(np.float32)) - mean) / deviation
        loss = -reader(projector(x), trees).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimiser.step()
        recent.append(float(loss.detach()))
        step += 1
        if step < 5 or step % 10 == 0:
            log(f"step {step:4d}  crops {step * BATCH:5d}  loss {np.mean(recent):.3f}")
            recent = []
        if step % 25 == 0 or step == steps:
            kept = {
                "projector": projector.state_dict(), "optimiser": optimiser.state_dict(),
                "step": step, "spent": time.time() - begun,
            }  # fmt: skip
            torch.save(kept, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    return projector, (mean, deviation), min(step * BATCH, len(places))


def warm_start(
    reader: Reader,
    projector: nn.Sequential,
    places: list[dict[str, Any]],
    features: NDArray[np.float16],
    moments: tuple[Tensor, Tensor],
    log: Log,
) -> None:
    """Bring every patch near the mean embedding of the words of its crop, without the model.

    It costs a minute and saves the first part of training: what SmolLM2 reads are then mixtures of
    words that it knows, instead of vectors that mean nothing to it.
    """
    spoken = []
    for place in places:
        text = " ".join(f" {place[kind]}" for kind in ("continent", "country", "climate"))
        spoken.append(reader.words[reader.ids(text)].mean(0))
    targets = torch.stack(spoken)
    centre = targets.mean(0)
    # As large as a word's embedding, where the mean of several is smaller.
    size = reader.words.pow(2).mean().sqrt() / (targets - centre).pow(2).mean().sqrt()
    targets = (targets - centre) * size + centre
    mean, deviation = moments
    optimiser = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=DECAY)
    rng = np.random.default_rng(0)
    for epoch in range(WARM_EPOCHS):
        losses = []
        for rows in np.array_split(rng.permutation(len(places)), max(1, len(places) // 32)):
            x = (torch.from_numpy(features[rows].astype(np.float32)) - mean) / deviation
            loss = (projector(x) - targets[rows][:, None]).pow(2).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        variance = float((targets - targets.mean(0)).pow(2).mean())
        log(f"warm start, epoch {epoch + 1}: {np.mean(losses) / variance:.3f} of the variance left")


def folded(projector: nn.Sequential, mean: Tensor, deviation: Tensor) -> dict[str, Tensor]:
    """Return LLaVA's parameters in float16, which take patches as DINOv2 makes them."""
    first, last = projector[0], projector[2]
    weight = first.weight.detach() / deviation
    named = {
        "linear_1.weight": weight,
        "linear_1.bias": first.bias.detach() - weight @ mean,
        "linear_2.weight": last.weight.detach(),
        "linear_2.bias": last.bias.detach(),
    }
    return {name: value.half().contiguous() for name, value in named.items()}


# -------------------------------------------------------------------------------------- measuring


def projected(weights: dict[str, Tensor], features: NDArray[np.float16]) -> Tensor:
    """Return what the projector as it is written makes of patches [n, PATCHES, 384]."""
    w = {name: value.float() for name, value in weights.items()}
    x = torch.from_numpy(features.astype(np.float32))
    x = nn.functional.gelu(x @ w["linear_1.weight"].T + w["linear_1.bias"])
    return x @ w["linear_2.weight"].T + w["linear_2.bias"]


@torch.no_grad()
def scores(
    reader: Reader, seen: Tensor, candidates: dict[str, list[str]]
) -> dict[str, NDArray[np.float64]]:
    """Return log p(name | crop, first wording) [n, names] for every kind of question."""
    tree, bounds = Tree(), []
    for kind, names in candidates.items():
        asked = tree.grow(reader.question(QUESTIONS[kind][0]), [])
        for name in names:
            start = len(tree.answers)
            tree.grow(reader.ids(name), asked, scored=True)
            bounds.append((kind, start, len(tree.answers)))
    out: dict[str, list[list[float]]] = {kind: [] for kind in candidates}
    for one in seen.split(4):
        lines = reader(one, [tree] * len(one)).reshape(len(one), -1).double()
        for line in lines:
            for kind in candidates:
                out[kind].append([float(line[a:b].sum()) for k, a, b in bounds if k == kind])
    return {kind: np.array(rows) for kind, rows in out.items()}


@torch.no_grad()
def generated(reader: Reader, seen: Tensor, question: str) -> list[str]:
    """Return the likeliest answer to a question about every crop, at most 12 tokens."""
    answers = []
    for one in seen:
        asked = reader.words[reader.question(question)]
        inputs = torch.cat([reader.words[reader.head], one, asked])[None]
        ids = reader.lm.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=reader.ids("<|im_end|>"),
        )
        answers.append(reader.tokenizer.decode(ids[0], skip_special_tokens=True))
    return answers


def measured(
    reader: Reader,
    weights: dict[str, Tensor],
    sets: dict[str, Samples],
    features: dict[str, NDArray[np.float16]],
    log: Log,
) -> dict[str, Any]:
    """Return accuracies on the held-out sets, beside chance and what is said without an image."""
    train = sets["train"].table
    shares = train["country"].value_counts(normalize=True)
    candidates = {
        "continent": list(CONTINENTS.values()),
        "country": sorted(shares[shares >= COMMON].index),
        "climate": list(CLIMATES.values()),
    }
    # As they begin an answer.
    spoken = {kind: [n[0].upper() + n[1:] for n in names] for kind, names in candidates.items()}
    blank = features["train"].reshape(-1, PATCHES, 384).mean(0, dtype=np.float64)[None]
    unseen = scores(reader, projected(weights, blank.astype(np.float16)), spoken)
    out: dict[str, Any] = {
        "crops": {name: len(data) for name, data in sets.items()},
        "candidates": candidates,
        "held_out_blocks": sorted({int(x) for x in cell(sets["apart"].table)}),
    }
    for name in ("between", "apart"):
        table = sets[name].table
        seen = projected(weights, features[name])
        found = scores(reader, seen, spoken)
        rng = np.random.default_rng(0)
        out[name] = {}
        for kind, names in candidates.items():
            truth = table[kind].to_numpy(dtype=str)
            asked = np.isin(truth, names)
            truth, likeliest = truth[asked], np.array(names)[found[kind][asked].argmax(1)]
            alone = names[int(unseen[kind][0].argmax())]
            often = str(train[train[kind].isin(names)][kind].mode()[0])
            recalls = [(likeliest[truth == x] == x).mean() for x in np.unique(truth)]
            shuffled = [(truth == rng.permutation(likeliest)).mean() for _ in range(100)]
            row = {
                "n": len(truth),
                "accuracy": float((truth == likeliest).mean()),
                "balanced": float(np.mean(recalls)),
                "uniform": 1 / len(names),
                "commonest": float((truth == often).mean()),
                "no_image": float((truth == alone).mean()),
                "other_image": float(np.mean(shuffled)),
            }
            out[name][kind] = {key: round(value, 4) for key, value in row.items()}
            log(f"{name}, {kind}: {out[name][kind]}")
        told = generated(reader, seen[:100], QUESTIONS["continent"][0])
        truth = table["continent"].to_numpy(dtype=str)[: len(told)]
        right = [x == text.strip().removesuffix(".") for x, text in zip(truth, told, strict=True)]
        out[name]["generated_continent"] = {"n": len(told), "accuracy": float(np.mean(right))}
        log(f"{name}, continent as generated: {out[name]['generated_continent']}")
        for i, text in enumerate(generated(reader, seen[:8], QUESTIONS["where"][0])):
            place = ", ".join(table.loc[i, ["city", "country", "continent"]])
            log(f"{name}, {place}: {QUESTIONS['where'][0]} {text!r}")
    return out


CARD = """# Projector from DINOv2-S to SmolLM2-135M

LLaVA's `multi_modal_projector` (384 to 576 to 576, {parameters} parameters, float16) between the
patches of DINOv2-S after block {layer} (images of {side} px) and SmolLM2-135M-Instruct, both
frozen. Trained by tools/train_projector.py on {crops} crops of NASA's Blue Marble, each seen once,
in {minutes:.0f} minutes with the measuring; training.log is all of it. Questions:
{questions}
The answers come from GeoNames (CC BY 4.0).

Held out: `between`, crops at other random places, which overlap training crops; `apart`, crops in
{blocks} blocks of 15 degrees that no training crop touches. The likeliest of the named answers,
against the share of the commonest answer, the same question with the mean of all images in place
of the image, and with another crop's image:

| crops | question | right | mean over classes | n | one in | commonest | no image | another image |
|---|---|---|---|---|---|---|---|---|
{rows}

Generated answers name the continent in {between:.0%} of `between` and {apart:.0%} of `apart`.
"Country" is the nearest city's, among the {countries} that at least 1 % of the training crops have;
"climate" is a word for the latitude. The model knows regions that it was shown; of the continent
of one that it was not it knows little. It was taught these questions and no others. The weights of
the projector are geofast's (Apache-2.0).
"""


def card(metrics: dict[str, Any]) -> str:
    """Return the README of the folder."""
    rows = []
    for name in ("between", "apart"):
        for kind, names in metrics["candidates"].items():
            row = metrics[name][kind]
            shares = [f"{row[key]:.0%}" for key in ("commonest", "no_image", "other_image")]
            rows.append(
                f"| {name} | {kind} | **{row['accuracy']:.0%}** | {row['balanced']:.0%} "
                f"| {row['n']} | {len(names)} | {' | '.join(shares)} |"
            )
    return CARD.format(
        parameters=f"{384 * 576 + 576 * 576 + 2 * 576:,}",
        layer=LAYER,
        side=SIDE,
        minutes=metrics["seconds"] / 60,
        crops=f"{metrics['crops']['train']:,}",
        questions=" ".join(wordings[0] for wordings in QUESTIONS.values()),
        blocks=len(metrics["held_out_blocks"]),
        rows="\n".join(rows),
        countries=len(metrics["candidates"]["country"]),
        **{name: metrics[name]["generated_continent"]["accuracy"] for name in ("between", "apart")},
    )


if __name__ == "__main__":
    main()
