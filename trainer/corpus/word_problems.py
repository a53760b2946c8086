"""Maths without the web: worked arithmetic and word problems, drawn from a seed, each answer right by construction.

They take GSM8K's form (Cobbe et al. 2021, arXiv 2110.14168): a question, steps that show their arithmetic, and a last
line `#### answer`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from shared.files import write_atomically
from trainer.corpus.documents import worked_problem

NUM_PROBLEMS = 24_000
SEED = 20_251_219

NAMES = (
    "Ada Ben Carla David Elena Farid Grace Hugo Ines Jonas Kira Liam Mara Noah Olga Pablo Quinn Rosa Sam Tara Umar "
    "Vera Will Xenia Yara Zoe"
).split()
THINGS = (
    "apples marbles books stamps pencils shells cookies stickers coins cards oranges buttons flowers beads tickets"
).split()
GOODS = ("pens", 2, 9), ("cups", 3, 12), ("shirts", 8, 30), ("chairs", 15, 60), ("lamps", 12, 45), ("notebooks", 2, 8)

Problem = tuple[str, str, int]
"""Question, worked steps, answer."""


def bring_word_problems(path: Path) -> str:
    """Write the problems to `path` (.jsonl); return what they are."""
    rng = random.Random(SEED)
    rows = [json.dumps({"text": as_text(make_problem(rng))}) for _ in range(NUM_PROBLEMS)]
    write_atomically(path, "\n".join(rows) + "\n")
    return f"{NUM_PROBLEMS:,} generated arithmetic and word problems (seed {SEED})"


def make_problem(rng: random.Random) -> Problem:
    """Draw one problem of any kind."""
    return rng.choice(KINDS)(rng)


def as_text(problem: Problem) -> str:
    question, steps, answer = problem
    return worked_problem(question, f"{steps}\n#### {answer}")


def gains_and_losses(rng: random.Random) -> Problem:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    have, more = rng.randint(5, 90), rng.randint(3, 60)
    gone = rng.randint(1, have + more - 1)
    verb, to = rng.choice([("gives", " to a friend"), ("loses", ""), ("sells", " at the market")])
    question = (
        f"{name} has {have} {thing} and gets {more} more. Then {name} {verb} {gone} {thing}{to}. "
        f"How many {thing} does {name} have now?"
    )
    total = have + more
    steps = (
        f"{name} first has {have} + {more} = {total} {thing}.\nAfter that {total} - {gone} = {total - gone} are left."
    )
    return question, steps, total - gone


def shopping(rng: random.Random) -> Problem:
    name = rng.choice(NAMES)
    (first, low, high), (second, low_2, high_2) = rng.sample(GOODS, 2)
    count, count_2 = rng.randint(2, 9), rng.randint(2, 9)
    price, price_2 = rng.randint(low, high), rng.randint(low_2, high_2)
    question = (
        f"{name} buys {count} {first} for ${price} each and {count_2} {second} for ${price_2} each. "
        f"How much does {name} pay in all?"
    )
    cost, cost_2 = count * price, count_2 * price_2
    steps = (
        f"The {first} cost {count} * {price} = ${cost}.\nThe {second} cost {count_2} * {price_2} = ${cost_2}.\n"
        f"Together that is {cost} + {cost_2} = ${cost + cost_2}."
    )
    return question, steps, cost + cost_2


def sharing(rng: random.Random) -> Problem:
    thing = rng.choice(THINGS)
    people, each, left = rng.randint(2, 12), rng.randint(2, 20), rng.randint(0, 11)
    left %= people
    total = people * each + left
    if left and rng.random() < 0.5:
        question = f"{total} {thing} are shared equally among {people} children. How many {thing} are left over?"
        steps = f"Each child gets {total} // {people} = {each}.\nThat uses {people} * {each} = {people * each}, so "
        return question, f"{steps}{total} - {people * each} = {left} are left.", left
    total = people * each
    question = f"{total} {thing} are shared equally among {people} children. How many {thing} does each child get?"
    return question, f"Each child gets {total} / {people} = {each} {thing}.", each


def travelling(rng: random.Random) -> Problem:
    name, speed, hours = rng.choice(NAMES), rng.randint(3, 90), rng.randint(2, 9)
    distance = speed * hours
    if rng.random() < 0.5:
        question = f"{name} travels at {speed} km per hour for {hours} hours. How many km does {name} travel?"
        return question, f"The distance is {speed} * {hours} = {distance} km.", distance
    question = f"{name} travels {distance} km in {hours} hours. What is the speed in km per hour?"
    return question, f"The speed is {distance} / {hours} = {speed} km per hour.", speed


def comparing(rng: random.Random) -> Problem:
    name, other = rng.sample(NAMES, 2)
    thing, count, times = rng.choice(THINGS), rng.randint(3, 40), rng.randint(2, 6)
    question = (
        f"{name} has {count} {thing}. {other} has {times} times as many as {name}. How many do they have together?"
    )
    steps = f"{other} has {times} * {count} = {times * count} {thing}.\n"
    total = count + times * count
    return question, f"{steps}Together they have {count} + {times * count} = {total}.", total


def saving(rng: random.Random) -> Problem:
    name, weekly, weeks, spent = rng.choice(NAMES), rng.randint(5, 40), rng.randint(3, 12), rng.randint(2, 14)
    question = f"{name} saves ${weekly} every week for {weeks} weeks and then spends ${spent}. How much money is left?"
    total = weekly * weeks
    steps = f"{name} saves {weekly} * {weeks} = ${total}.\nThen {total} - {spent} = ${total - spent} is left."
    return question, steps, total - spent


def addition(rng: random.Random) -> Problem:
    numbers = [rng.randint(2, 500) for _ in range(rng.randint(2, 4))]
    steps, total = [], numbers[0]
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return f"What is {' + '.join(map(str, numbers))}?", "\n".join(steps), total


def multiplication(rng: random.Random) -> Problem:
    a, b = rng.randint(11, 99), rng.randint(3, 99)
    tens, ones = b // 10 * 10, b % 10
    if not tens or not ones:
        return f"What is {a} * {b}?", f"{a} * {b} = {a * b}", a * b
    steps = f"{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n{a * tens} + {a * ones} = {a * b}"
    return f"What is {a} * {b}?", steps, a * b


def linear_equation(rng: random.Random) -> Problem:
    factor, x, plus = rng.randint(2, 12), rng.randint(1, 40), rng.randint(1, 60)
    right = factor * x + plus
    steps = f"{factor}x = {right} - {plus} = {right - plus}\nx = {right - plus} / {factor} = {x}"
    return f"Solve {factor}x + {plus} = {right} for x.", steps, x


def percentage(rng: random.Random) -> Problem:
    percent, whole = rng.choice((5, 10, 20, 25, 50, 75)), rng.randint(1, 60) * 20
    part = whole * percent // 100
    hundredth = f"{whole / 100:g}"
    steps = (
        f"1 percent of {whole} is {whole} / 100 = {hundredth}.\n{percent} percent is {percent} * {hundredth} = {part}."
    )
    return f"What is {percent} percent of {whole}?", steps, part


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    gains_and_losses,
    shopping,
    sharing,
    travelling,
    comparing,
    saving,
    addition,
    multiplication,
    linear_equation,
    percentage,
)
