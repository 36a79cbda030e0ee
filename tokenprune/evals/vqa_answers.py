"""Whether an answer is right: exact match and VQA accuracy of normalised texts, and boxes by their overlap."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
MATCHES = 3
"""Equal answers of people by which one counts as wholly right."""
OVERLAP = 0.5

_DIGITS = {**{word: str(number) for number, word in enumerate(NUMBERS)}, "none": "0"}
_ARTICLES = {"a", "an", "the"}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def normalised(answer: str) -> str:
    """An answer without what does not count: case, punctuation outside of numbers, articles, and how numbers are
    written, as in the evaluation of VQA (Antol et al., 2015), but for its table of contractions: apostrophes are left
    out in all words. An answer of articles alone, such as the choice A, stays: nothing is not it."""
    text = answer.lower().replace("'", "").replace("\u2019", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_", " ", text)
    words = text.split()
    told = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in told)


def exact_match(answer: str, truths: Sequence[str]) -> float:
    """1 where the normalised answer is one of the true ones, else 0."""
    return float(normalised(answer) in {normalised(truth) for truth in truths})


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Mean over all but one of the true answers of min(1, how many of them are this one / 3) (Antol et al., 2015)."""
    found = normalised(answer)
    equal = [normalised(truth) == found for truth in truths]
    shares = [min(1.0, (sum(equal) - own) / MATCHES) for own in equal]
    return sum(shares) / len(shares)


def box_of(answer: str) -> tuple[float, ...] | None:
    """The first four numbers of an answer, left, top, right and bottom, None where there are fewer."""
    numbers = [float(number) for number in _NUMBER.findall(answer)[:4]]
    return tuple(numbers) if len(numbers) == 4 else None


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    sides = [max(0.0, min(one[i + 2], other[i + 2]) - max(one[i], other[i])) for i in (0, 1)]
    both = sides[0] * sides[1]
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (one, other)]
    return both / (sum(areas) - both) if sum(areas) > both else 0.0


def located(answer: str, box: Sequence[float]) -> float:
    """1 where the box that the answer names overlaps the true one by at least a half (intersection over union)."""
    found = box_of(answer)
    return float(found is not None and box_iou(found, box) >= OVERLAP)
