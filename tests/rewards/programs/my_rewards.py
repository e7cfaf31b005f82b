"""Rewards as users write them: a callable object, a function, a method of a class."""

from dataclasses import dataclass


@dataclass
class Judge:
    scale: float = 2.0

    def __call__(self, completions, **columns):
        return [self.scale * len(c) for c in completions]


judge = Judge()
limit = 3


def brief(completions, **columns):
    return [float(len(c) < limit) for c in completions]


class Holder:
    @staticmethod
    def inner(completions):
        return [0.0 for _ in completions]
