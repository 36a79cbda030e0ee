"""What `tokenprune patterns` does with its options."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from tokenprune.evals.commands import budgets, image_data, load
from tokenprune.evals.patterns.comparison import Subject, compare
from tokenprune.evals.patterns.plots import plot_all


def run_patterns(options: argparse.Namespace) -> int:
    """`tokenprune patterns`"""
    subjects = []
    for name in dict.fromkeys((options.model, *(options.other or ()))):
        own = copy.copy(options)
        own.model = name
        if name != options.model:
            own.checkpoint = None  # belongs to --model
        loaded = load(own)
        data = image_data(own, loaded, options.samples)
        subjects.append(Subject(name, loaded.model, data, loaded.transform))
    first, *others = subjects
    found = compare(
        first.model,
        first.data,
        options.method,
        budgets(options),
        others=others,
        measures=options.measure,
        anchors=options.anchor,
        transform=first.transform,
        name=first.name,
        batch_size=options.batch_size,
        samples=options.samples,
        seed=options.seed,
        resamples=options.resamples,
        show_progress=not options.quiet,
    )
    folder = Path(options.output)
    for table in found.tables.values():
        table.environment = {"model": ", ".join(subject.name for subject in subjects), **table.environment}
    found.save(folder)
    plots = plot_all(found.patterns, found.pairs, folder)
    if options.format == "json":
        print(json.dumps({name: json.loads(table.to_json()) for name, table in found.tables.items()}, indent=2))
        return 0
    for name in ("methods", "correlation"):
        if name in found.tables:
            print(f"{name}\n{found.tables[name]}")
    print(f"written to {folder}: {', '.join(found.tables)} as .md, .csv and .json; {', '.join(p.name for p in plots)}")
    return 0
