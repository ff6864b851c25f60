# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bounded, repeatable part of ``make fuzz``: the corpus, and some thousand inputs made of it."""

from __future__ import annotations

import pytest
from fuzz.mutate import mutated
from fuzz.targets import TARGETS, Target

PER_TARGET = 3000
targets = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@targets
def test_the_corpus_is_read_or_refused(target: Target) -> None:
    corpus = target.corpus()
    assert len(corpus) > 3, f"{target.name} has next to no corpus"
    for data in corpus:
        target.run(data)


@targets
def test_mutations_are_read_or_refused(target: Target) -> None:
    corpus = target.corpus()
    for seed in range(PER_TARGET // target.cost):
        data = mutated(corpus, target.words, seed)
        try:
            target.run(data)
        except BaseException as problem:
            problem.add_note(f"seed {seed} of {target.name}: {data!r}")
            raise


def test_the_same_seed_makes_the_same_input() -> None:
    corpus = [b"abc", b"0x1000", b"static_shm = []"]
    made = [mutated(corpus, (b"word",), seed) for seed in range(200)]
    assert made == [mutated(corpus, (b"word",), seed) for seed in range(200)]
    assert len(set(made)) > 150
