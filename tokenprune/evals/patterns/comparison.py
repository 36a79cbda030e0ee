"""The comparison: patterns of every method at every budget on the same images, and the tables made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from tokenprune.errors import TokenPruneError
from tokenprune.evals.accuracy import placement
from tokenprune.evals.arms import Arm, Budget, build_arms
from tokenprune.evals.data import ImageData, Transform, open_data
from tokenprune.evals.patterns.collect import collect_patterns
from tokenprune.evals.patterns.pairs import Pair, enough_for_pwcca, measure_pairs, pair_up
from tokenprune.evals.patterns.pattern import Pattern, require_class_tokens, require_same_images
from tokenprune.evals.patterns.tables import correlation_rows, pair_rows, summary_rows
from tokenprune.evals.stats import bootstrap_mean, resample_weights
from tokenprune.evals.table import Row, Table, environment
from tokenprune.evals.transforms import model_transform

ANCHORS = ("top_k", "k_medoids")
MEASURES = ("kept", "clusters", "depth", "features")


@dataclass(frozen=True)
class Comparison:
    """patterns: of every model, method and budget. pairs: what was compared. tables: `methods`, those of `MEASURES`
    that were asked for, and `correlation`, by name."""

    patterns: list[Pattern]
    pairs: list[Pair]
    tables: dict[str, Table]

    def save(self, folder: str | Path) -> None:
        """Writes each table as .md, .csv and .json into `folder`, which is made where it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            for suffix in (".md", ".csv", ".json"):
                table.save(folder / f"{name}{suffix}")


@dataclass(frozen=True)
class Subject:
    """A model to compare, with the images as it takes them (as in `tokenprune.evals.data.open_data`)."""

    name: str
    model: nn.Module
    data: object
    transform: Transform | None = None


def compare(
    model: nn.Module,
    data: object,
    methods: Sequence[str] | None = None,
    budgets: Sequence[Budget] = ({"flops": 0.6},),
    *,
    others: Sequence[Subject] = (),
    measures: Sequence[str] | None = None,
    anchors: Sequence[str] | None = None,
    transform: Transform | None = None,
    name: str = "",
    split: str | None = None,
    batch_size: int = 32,
    samples: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
    show_progress: bool = False,
) -> Comparison:
    """Runs every method at every budget over `data` once and compares what they keep, pair by pair.

    data, transform, split, samples, methods, budgets: as in `tokenprune.evals.evaluate`; all methods that fit where
    none is named. others: further models, whose patterns are compared under the same method and budget. measures: those
    of `MEASURES`; all that the models have where none is named. anchors: methods, beside the unpatched
    model, with the similarity to which the loss of accuracy is correlated; `ANCHORS` where none is named. name: of
    `model` in the tables, another one than those of `others`.

    Means over images with 95% bootstrap intervals over images, the same resamples for all; of class features, only
    where they are compared with the unpatched model's.

    Raises:
        UnsupportedModel: tokens do not leave one by one, or `measures` names "features" and a model has no class token.
        TokenPruneError: as `evaluate`; the models' grids differ; two have one name; a measure is unknown; an anchor was
            not run.
    """
    unknown = sorted(set(measures or ()) - set(MEASURES))
    if unknown:
        raise TokenPruneError(f"measures={unknown[0]!r} is none of {', '.join(MEASURES)}")
    subjects = (Subject(name, model, data, transform), *others)
    if len({subject.name for subject in subjects}) < len(subjects):
        raise TokenPruneError(
            f"models need names of their own, got {[subject.name for subject in subjects]}; name= and Subject"
        )
    patterns: list[Pattern] = []
    arms: list[Arm] = []
    sources: list[ImageData] = []
    for subject in subjects:
        images = _images(subject, split)
        example, _ = next(images.batches(1, samples=samples, seed=seed))
        own = build_arms(subject.model, example.to(*placement(subject.model)), methods, budgets, baselines=False)
        found = collect_patterns(
            own,
            images,
            name=subject.name,
            batch_size=batch_size,
            samples=samples,
            seed=seed,
            show_progress=show_progress,
        )
        require_same_images((patterns or found)[0], found[0])
        patterns += found
        arms += own
        sources.append(images)
    for pattern in patterns if measures is not None and "features" in measures else ():
        require_class_tokens(pattern)
    for anchor in anchors or ():
        if anchor not in (pattern.method for pattern in patterns):
            raise TokenPruneError(f"anchor {anchor!r} is none of the methods that ran: {_methods(patterns)}")
    anchors = ANCHORS if anchors is None else anchors
    wanted = MEASURES if measures is None else tuple(measures)
    chosen = sources[0].chosen(samples, seed)
    groups = None if sources[0].groups is None else sources[0].groups[chosen]
    weights = resample_weights(len(chosen), groups=groups, seed=seed, resamples=resamples)
    mean = partial(bootstrap_mean, groups=groups, seed=seed, resamples=resamples)
    pairs = pair_up(patterns, anchors)
    measure_pairs(pairs, weights, wanted, show_progress=show_progress)
    conditions: Row = {"data": sources[0].name, "images": len(chosen), **environment(*placement(model))}
    score = "agreement" if sources[0].classes is None or sources[0].dense else "top1"
    tables = {"methods": Table(summary_rows(patterns, arms, score, mean), conditions | left_out(patterns))}
    for kind in wanted:
        if rows := pair_rows(pairs, kind):
            tables[kind] = Table(rows, conditions)
    if rows := correlation_rows(pairs, anchors, weights):
        tables["correlation"] = Table(rows, {"loss of": score, **conditions})
    return Comparison(patterns, pairs, tables)


def _images(subject: Subject, split: str | None) -> ImageData:
    return open_data(
        subject.data,
        subject.transform or model_transform(subject.model),
        split=split,
        num_classes=getattr(subject.model, "num_classes", None),
    )


def _methods(patterns: Sequence[Pattern]) -> str:
    return ", ".join(dict.fromkeys(pattern.method for pattern in patterns))


def left_out(patterns: Sequence[Pattern]) -> Row:
    """What is not in the tables, and why."""
    reasons: Row = {}
    for pattern in {pattern.model: pattern for pattern in patterns}.values():
        prefix = f"{pattern.model}: " if pattern.model else ""
        if pattern.features is None:
            reasons[f"{prefix}class features"] = "none, the model has no class token among its blocks' tokens"
        elif not enough_for_pwcca(pattern):
            count, channels = len(pattern.depth), pattern.features.shape[2]
            reasons[f"{prefix}pwcca"] = f"none, {count} images are too few for {channels} channels"
        if pattern.right is None:
            reasons[f"{prefix}correlation"] = (
                "none, the model has no classifier whose loss of accuracy it could be with"
            )
    return reasons
