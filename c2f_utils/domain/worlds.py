"""What the stories of the embedded domain are made of: their words, and how large their numbers grow.

`SMALL` is for a model of a hundred thousand weights on a CPU. `WIDE` is for one of tens of millions on a GPU: hundreds
of sums instead of tens, one step more, and words enough that no story is met twice. A word has the same token in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The words of a story and the bounds of its numbers: every running value lies in 0..largest."""

    names: tuple[str, ...]
    items: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    ordinals: tuple[str, ...]  # one per step: as many steps as a problem can have
    largest: int
    start: int  # first values are drawn from 1..start
    operand: int  # what one step adds or takes is drawn from 1..operand

    @property
    def words(self) -> list[str]:
        """Numbers and words that only stories of this world need."""
        numbers = [str(number) for number in range(self.largest + 1)]
        return [*numbers, *self.names, *self.items, *self.gains, *self.losses, *self.ordinals]


SMALL = World(
    names=("anna", "ben", "carl", "dora", "emil", "fay", "gus", "hana"),
    items=("coins", "apples", "cards", "books", "shells", "pens"),
    gains=("finds", "buys", "gets"),
    losses=("loses", "sells", "gives"),
    ordinals=("first", "second", "third", "fourth", "fifth"),
    largest=14,
    start=9,
    operand=4,
)
WIDE = World(
    names=(
        *SMALL.names,
        *(
            "ada amir asha bela bruno chen clara dario devi dina edith elif enzo erik farid felix flora gita greta "
            "hugo ines ivan jana jonas kaya kofi lars leila lena luca maja marco mei milan mina nadia nils noor olga "
            "omar oscar paula petra pia quinn rafael rania rita rosa sami sara sven tara theo tomas ulla vera viktor "
            "wanda yara yusuf zara"
        ).split(),
    ),
    items=(
        *SMALL.items,
        *(
            "balls beads bells boxes bricks buttons candles chairs cups dolls drums eggs flags flowers forks gloves "
            "hats jars keys kites lamps leaves lemons maps marbles masks nails nuts pearls pears plates plums ribbons "
            "rings ropes scarves seeds socks spoons stamps stones tickets"
        ).split(),
    ),
    gains=(*SMALL.gains, "earns", "wins", "collects", "receives", "borrows"),
    losses=(*SMALL.losses, "drops", "breaks", "donates", "returns", "hides"),
    ordinals=(*SMALL.ordinals, "sixth"),
    largest=49,
    start=40,
    operand=9,
)
WORLDS = {"small": SMALL, "wide": WIDE}
