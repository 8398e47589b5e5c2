"""What users call: `preprocess_check`, the doctor, and `preprocess_statistics`. Neither changes data or checkpoint."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from okavango.data import statistics
from okavango.data.sources import Source, cached
from okavango.data.statistics import Statistics
from okavango.doctor.checks import Finding, Severity, examine
from okavango.doctor.seen import Seen, chosen, look, steps
from okavango.doctor.trials import NEIGHBOURS, Candidate, Trial, compare
from okavango.downstream.classification.features import image_modality
from okavango.files import write_json
from okavango.models import expectations
from okavango.models.backbone import Backbone
from okavango.models.preprocess import Preprocess, Raster, Resize
from okavango.verbs import Say, open_model, training_part

WORTH = 0.03  # a comparison that nobody asked for is mentioned from this difference on


@dataclass(frozen=True, eq=False)
class Report:
    """What the doctor found. `print(report)` shows it; see `to_json` for the numbers.

    Attributes:
        checkpoint, data: names.
        steps: what would be done to the data, a line each.
        findings: the gravest first.
        trials: the contract as it stands first; empty where nothing could be measured, and `unmeasured` says why.
        suggested: the contract with the suggestions of all that is wrong; the same where there are none.
        described: what the data should say of themselves otherwise (rasters), fit for ``bands.json``.
        seen: all statistics.
    """

    checkpoint: str
    data: str
    steps: tuple[str, ...]
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...]
    unmeasured: str
    suggested: Preprocess
    described: dict[str, Any]
    seen: Seen

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings of that severity."""
        return tuple(finding for finding in self.findings if finding.severity == "wrong")

    @property
    def verdict(self) -> str:
        """One line."""
        counts = {severity: sum(each.severity == severity for each in self.findings) for severity in ("wrong", "look")}
        parts = [f"{counts['wrong']} wrong"] * bool(counts["wrong"]) + [f"{counts['look']} to look at"] * bool(counts["look"])
        return ", ".join(parts) or "nothing looks wrong"

    def trial(self, finding: Finding) -> Trial | None:
        """What a finding's suggestion is worth, where it was measured."""
        return next((trial for trial in self.trials if trial.check == finding.check), None)

    def __str__(self) -> str:
        lines = [f"{self.checkpoint} on {self.data}: {self.verdict}", "", "what would be done"]
        lines += [f"  {number}. {step}" for number, step in enumerate(self.steps, 1)]
        for finding in self.findings:
            lines += ["", f"{finding.severity}: {finding.check}", f"  {finding.sentence}"]
            lines += [f"  suggested: {finding.change}"] * bool(finding.change)
            lines += [f"  measured: {measured(trial)}" for trial in [self.trial(finding)] if trial]
        if self.described:
            lines += ["", f"what the data should say of themselves (bands.json): {json.dumps(self.described)}"]
        lines += ["", f"accuracy of the {NEIGHBOURS} nearest, leaving one out, with 95 % intervals"]
        if not self.trials:
            return "\n".join([*lines[:-1], f"not measured: {self.unmeasured}"])
        width = max(len(trial.name) for trial in self.trials)
        return "\n".join([*lines, *(f"  {trial.name:{width}}  {measured(trial)}" for trial in self.trials)])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: findings with their evidence, trials, suggestion, statistics of all stages."""
        seen = self.seen
        stages = {"stored": seen.stored, "values": seen.values, "inputs": seen.inputs}
        return {
            "checkpoint": self.checkpoint,
            "data": {"name": self.data, "digest": seen.source.digest, "samples": seen.samples, "of": len(seen.source)},
            "verdict": self.verdict,
            "steps": list(self.steps),
            "findings": [
                {"check": each.check, "severity": each.severity, "sentence": each.sentence, "evidence": each.evidence}
                | {"change": each.change, "description": each.data}
                for each in self.findings
            ],
            "trials": [dataclasses.asdict(trial) for trial in self.trials],
            "unmeasured": self.unmeasured,
            "preprocess": seen.preprocess.to_json(),
            "suggested": self.suggested.to_json(),
            "described": self.described,
            "statistics": {name: stage.to_json() for name, stage in stages.items() if stage is not None},
        }


def measured(trial: Trial) -> str:
    """A trial in words: 84.2 % [81.0, 87.3], +3.1 points [1.2, 5.0]."""
    if trial.accuracy is None or trial.interval is None:
        return f"refused: {trial.refused}"
    text = f"{100 * trial.accuracy:.1f} % [{100 * trial.interval[0]:.1f}, {100 * trial.interval[1]:.1f}]"
    if trial.difference is None:
        return f"{text}, {trial.samples} samples"
    mean, low, high = (100 * each for each in trial.difference)
    return f"{text}, {mean:+.1f} points [{low:+.1f}, {high:+.1f}]"


def preprocess_check(
    checkpoint: str | Backbone | Preprocess,
    data: str | Source,
    *,
    out: str | os.PathLike | None = None,
    suggestion: str | os.PathLike | None = None,
    reference: str | os.PathLike | Statistics | None = None,
    samples: int = 512,
    seed: int = 0,
    batch: int = 64,
    say: Say = print,
) -> Report:
    """Look at data under a checkpoint's contract: what would be done to them, what looks wrong, and what a change is worth.

    Suspicions come from the statistics of the values. Where the data are labelled and the checkpoint holds a network, each
    suggestion is measured: k-NN accuracy on the same samples, leaving one out, with paired bootstrap intervals.

    Args:
        checkpoint: anything `ok.load` takes, a backbone, or a contract alone: a `Preprocess`, or the name of one of
            `okavango.models.expectations.CHECKPOINTS`, such as ``ssl4eo_s12_s2`` or ``seco:torchgeo``.
        data: folder of pictures or rasters, shards, ``samples/fashion`` or a source; of a folder with train and test, the former.
        out: folder that gets ``index.html`` and ``report.json``.
        suggestion: file that gets the suggested contract as JSON.
        reference: statistics that the data should have, such as those of the training set (`preprocess_statistics`), or their file;
            for pictures only. Without it, the contract's normalisation tells what to expect.
        samples: how many are looked at, evenly over the classes.
        seed: of the bootstrap.
        batch: samples per forward pass.
        say: receives the report.
    Raises:
        ValueError: no data, or a reference that does not go with the contract.
    """
    model, preprocess, name = _opened(checkpoint)
    modality = image_modality(preprocess)
    source = cached(training_part(data))  # each candidate reads the samples again
    statistics.check_one_split(source)
    known = _reference(reference, preprocess, modality)
    if known is not None and known.digest == source.digest:
        raise ValueError(f"the reference is of {source.name} itself, so nothing could differ from it; take the training set's")
    indices = chosen(source, samples)
    seen = look(source, preprocess, modality, indices, split=statistics.split_of(source.name), reference=known)
    findings = examine(seen)
    trials: list[Trial] = []
    unmeasured = _unmeasured(model, seen)
    if model is not None and not unmeasured:
        trials = compare(model, modality, source, seen.indices, candidates(seen, findings), seed=seed, batch=batch)
        findings = weighed(findings, trials)
    changes: dict[str, Any] = {}
    described: dict[str, Any] = {}
    for finding in findings:
        if finding.severity == "wrong":
            changes, described = {**finding.changes, **changes}, {**finding.data, **described}
    report = Report(
        name,
        source.name,
        tuple(steps(seen)),
        tuple(findings),
        tuple(trials),
        unmeasured,
        preprocess.replace(modality, **changes),
        described,
        seen,
    )
    say(str(report))
    if out is not None:
        from okavango.doctor.page import render

        page = render(report, Path(out) / "index.html")
        write_json(Path(out) / "report.json", report.to_json(), default=float)
        say(f"the page is {page}")
    if suggestion is not None:
        Path(suggestion).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(suggestion), report.suggested.to_json(), default=float)
        say(f"the suggested contract is {os.fspath(suggestion)}")
    return report


def candidates(seen: Seen, findings: Sequence[Finding]) -> list[Candidate]:
    """The contract as it stands, each suggestion, all that is wrong together, and two comparisons: own statistics, native size."""
    contract, modality, spec = seen.preprocess, seen.modality, seen.spec
    found = [Candidate("as it stands", contract, {})]
    helped = [finding for finding in findings if finding.change]
    found += [Candidate(each.change, contract.replace(modality, **each.changes), each.data, each.check) for each in helped]
    grave = [finding for finding in helped if finding.severity == "wrong"]
    if len(grave) > 1:
        changes = {key: value for each in reversed(grave) for key, value in each.changes.items()}
        data = {key: value for each in reversed(grave) for key, value in each.data.items()}
        found.append(Candidate("all that is wrong", contract.replace(modality, **changes), data))
    if seen.refused or grave:
        return found  # comparisons of a contract that does not fit say nothing
    if seen.own_rule is not None and not any(each.check == "fit" for each in helped):
        found.append(Candidate(OWN, contract.replace(modality, normalise=seen.own_rule), {}))
    if len(seen.sizes) == 1 and seen.size != spec.size and spec.resize.rule != "none":
        plain = contract.replace(modality, resize=Resize(rule="none"), size=seen.size)
        found.append(Candidate(f"{NATIVE}, {seen.size[0]}x{seen.size[1]}", plain, {}))
    return found


OWN, NATIVE = "standardised by their own statistics", "at native size"


def weighed(findings: Sequence[Finding], trials: Sequence[Trial]) -> list[Finding]:
    """Findings in the light of what was measured: a suggestion that helps is a proof, one that hurts is no suspicion any more."""
    found = []
    for finding in findings:
        trial = next((trial for trial in trials if trial.check == finding.check), None)
        if trial and trial.better:
            finding = dataclasses.replace(finding, severity="wrong")
        elif trial and trial.worse:
            milder: Severity = "look" if finding.severity == "wrong" else "ok"
            sentence = f"{finding.sentence} But measured on the labels, the contract as it stands is better."
            finding = dataclasses.replace(finding, severity=milder, sentence=sentence)
        found.append(finding)
    for trial in trials:
        if trial.name.startswith((OWN, NATIVE)) and trial.better and trial.difference and trial.difference[0] >= WORTH:
            sentence = f"The network does better with the data {trial.name}: {measured(trial)}. Worth a try on all of them."
            if trial.name == OWN:
                sentence += " Take the statistics of the training set (okavango preprocess statistics)."
            found.append(Finding("compared", "look", sentence))
    return sorted(found, key=lambda finding: ("wrong", "look", "ok").index(finding.severity))


def preprocess_statistics(
    data: str | Source, out: str | os.PathLike | None = None, *, split: str = "", samples: int = 0, say: Say = print
) -> Statistics:
    """Statistics of the stored values of each channel, with their origin.

    Args:
        data: as for `preprocess_check`; training and test pictures are never mixed.
        out: JSON file to write.
        split: "train", "val" or "test"; "" goes by the name of the data. Those of a test set cannot become a normalisation.
        samples: at most so many, evenly chosen; 0 for all.
        say: receives a table.
    Raises:
        ValueError: the data hold training and test pictures in one, or differ in their channels.
    """
    if split not in ("", *statistics.SPLITS.values()):
        raise ValueError(f"--split {split}: expected train, val or test")
    source = training_part(data)
    found = statistics.of_source(source, split=split, limit=samples)
    part = f", the {found.split} part" if found.split else ""
    say(f"{found.source}{part}: {found.samples} samples, {max(found.count):,} cells a channel")
    heads = ("channel", "mean", "std", "low", "1 %", "median", "99 %", "high", "missing")
    rows = zip(
        found.channels,
        *(found.mean, found.std, found.low, found.percentile(1.0), found.percentile(50.0), found.percentile(99.0), found.high),
        found.missing,
        strict=True,
    )
    table = [heads, *((name, *(f"{number:.5g}" for number in numbers), f"{missing:,}") for name, *numbers, missing in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        say("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if out is not None:
        say(f"the statistics are {statistics.save(found, out)}")
    return found


def _opened(checkpoint: str | Backbone | Preprocess) -> tuple[Backbone | None, Preprocess, str]:
    if isinstance(checkpoint, Preprocess):
        return None, checkpoint, "this contract"
    name, _, variant = checkpoint.partition(":") if isinstance(checkpoint, str) else ("", "", "")
    if name in expectations.CHECKPOINTS and not Path(name).exists():
        return None, expectations.checkpoint(name, variant), str(checkpoint)
    model, name, _ = open_model(checkpoint)
    return model, model.preprocess, name


def _reference(given: str | os.PathLike | Statistics | None, preprocess: Preprocess, modality: str) -> Statistics | None:
    if given is None:
        return None
    known = given if isinstance(given, Statistics) else statistics.read(given)
    spec = preprocess.array(modality)
    if isinstance(spec, Raster):
        raise ValueError("a reference is for pictures; the statistics of rasters stand in the contract, band by band")
    if len(known.channels) not in (1, len(spec.channels)):
        raise ValueError(
            f"the reference has {len(known.channels)} channels, the contract {len(spec.channels)}; they must be the same"
        )
    return known


def _unmeasured(model: Backbone | None, seen: Seen) -> str:
    """Why no accuracy can be measured, or ""."""
    if model is None:
        return "a contract alone has no network"
    labels = seen.source.labels
    if labels is None:
        return "the data have no labels; put the pictures of each class into a folder of its own"
    if len(set(labels[seen.indices].tolist())) < 2 or len(seen.indices) < 10:
        return "the sample has too few pictures or a single class"
    return ""
