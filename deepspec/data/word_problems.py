"""Arithmetic word problems with worked solutions: the math part of the built-in corpus.

Every problem is drawn from a seeded `random.Random`, so the same seed gives the same problems on every machine.
A solution reasons step by step and ends with the answer in `\\boxed{}`, the form that the public math sets ask for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Jack", "Kira", "Leo", "Mia", "Noah"]
ITEMS = ["apples", "books", "coins", "eggs", "marbles", "pencils", "stamps", "shells", "tickets", "cookies"]
PLACES = ["market", "school", "library", "bakery", "garden", "station"]
BOXES = ["boxes", "bags", "baskets", "crates"]

Problem = tuple[str, list[str], int]  # question, solution steps, answer


def _gain_and_loss(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start, gain = rng.randint(10, 60), rng.randint(5, 40)
    loss = rng.randint(1, start + gain - 1)
    total = start + gain
    return (
        f"{name} has {start} {item}. {name} buys {gain} more and then gives away {loss}. "
        f"How many {item} does {name} have now?",
        [
            f"After buying, {name} has {start} + {gain} = {total} {item}.",
            f"After giving some away, {name} has {total} - {loss} = {total - loss} {item}.",
        ],
        total - loss,
    )


def _boxes(rng: random.Random) -> Problem:
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    count, each, extra = rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 20)
    product = count * each
    return (
        f"{name} packs {count} {box} with {each} {item} each and has {extra} {item} left over. "
        f"How many {item} are there in total?",
        [
            f"The {box} hold {count} * {each} = {product} {item}.",
            f"With the ones left over there are {product} + {extra} = {product + extra} {item}.",
        ],
        product + extra,
    )


def _price(rng: random.Random) -> Problem:
    name, item, place = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(PLACES)
    count, price = rng.randint(2, 12), rng.randint(2, 9)
    cost = count * price
    paid = cost + rng.randint(1, 30)
    return (
        f"At the {place}, {name} buys {count} {item} for ${price} each and pays with ${paid}. "
        f"How much change does {name} get?",
        [
            f"The {item} cost {count} * {price} = {cost} dollars.",
            f"The change is {paid} - {cost} = {paid - cost} dollars.",
        ],
        paid - cost,
    )


def _share(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    friends, each, kept = rng.randint(2, 9), rng.randint(2, 12), rng.randint(1, 15)
    shared = friends * each
    return (
        f"{name} has {shared + kept} {item}, keeps {kept} and shares the rest equally among {friends} friends. "
        f"How many {item} does each friend get?",
        [
            f"There are {shared + kept} - {kept} = {shared} {item} to share.",
            f"Each friend gets {shared} / {friends} = {each} {item}.",
        ],
        each,
    )


def _travel(rng: random.Random) -> Problem:
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    speed, hours, more = rng.randint(3, 12) * 5, rng.randint(2, 8), rng.randint(2, 40)
    distance = speed * hours
    return (
        f"{name} travels to the {place} at {speed} kilometers per hour for {hours} hours and then walks "
        f"{more} kilometers. How many kilometers is the whole trip?",
        [
            f"The first part is {speed} * {hours} = {distance} kilometers.",
            f"The whole trip is {distance} + {more} = {distance + more} kilometers.",
        ],
        distance + more,
    )


def _compare(rng: random.Random) -> Problem:
    first, second = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    base, factor = rng.randint(3, 25), rng.randint(2, 5)
    product = base * factor
    return (
        f"{first} has {base} {item}. {second} has {factor} times as many. How many {item} do they have together?",
        [
            f"{second} has {factor} * {base} = {product} {item}.",
            f"Together they have {base} + {product} = {base + product} {item}.",
        ],
        base + product,
    )


def _weekly(rng: random.Random) -> Problem:
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    per_day, days, used = rng.randint(3, 15), rng.randint(3, 9), rng.randint(1, 20)
    made = per_day * days
    used = min(used, made - 1)
    return (
        f"{name} collects {per_day} {item} a day for {days} days and loses {used} of them. How many {item} are left?",
        [
            f"In {days} days {name} collects {per_day} * {days} = {made} {item}.",
            f"After the loss there are {made} - {used} = {made - used} {item}.",
        ],
        made - used,
    )


def _rectangle(rng: random.Random) -> Problem:
    place, width, height = rng.choice(PLACES), rng.randint(3, 20), rng.randint(3, 20)
    half = width + height
    return (
        f"The floor of the {place} is a rectangle {width} meters wide and {height} meters long. "
        f"What is its perimeter in meters?",
        [
            f"One width and one length are {width} + {height} = {half} meters.",
            f"The perimeter is 2 * {half} = {2 * half} meters.",
        ],
        2 * half,
    )


KINDS: list[Callable[[random.Random], Problem]] = [
    _gain_and_loss,
    _boxes,
    _price,
    _share,
    _travel,
    _compare,
    _weekly,
    _rectangle,
]


def word_problems(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield `count` distinct (question, worked solution) pairs."""
    rng = random.Random(seed)
    seen: set[str] = set()
    while len(seen) < count:
        question, steps, answer = rng.choice(KINDS)(rng)
        if question in seen:
            continue
        seen.add(question)
        yield question, "\n".join([*steps, f"The answer is \\boxed{{{answer}}}."])
