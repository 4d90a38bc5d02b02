"""The 276 benchmark prompts of Attend-and-Excite (arXiv 2301.13826), which InitNO uses too.

Colours are fixed by the tables below, which the authors drew once by chance.
"""

from __future__ import annotations

from itertools import combinations

ANIMALS = (
    "cat", "dog", "bird", "bear", "lion", "horse",
    "elephant", "monkey", "frog", "turtle", "rabbit", "mouse",
)  # fmt: skip
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon",
    "bow", "car", "bowl", "bench", "clock", "apple",
)  # fmt: skip
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white",
)  # fmt: skip
WORN = ("glasses", "crown", "bow")  # an animal is "with" these, and they have no colour
# of each animal's object that is not worn, in the order of OBJECTS
BESIDE_ANIMALS = {
    "cat": "blue black black yellow yellow purple gray green red",
    "dog": "brown green orange blue purple gray pink gray black",
    "bird": "black black green brown yellow black purple white yellow",
    "bear": "orange red white red white purple gray blue pink",
    "lion": "black orange white brown red pink white yellow gray",
    "horse": "blue green pink pink white brown blue yellow green",
    "elephant": "pink green black green brown green green yellow orange",
    "monkey": "yellow orange blue green red green brown yellow orange",
    "frog": "yellow red black purple orange green pink green black",
    "turtle": "gray orange blue pink yellow yellow white blue pink",
    "rabbit": "orange yellow gray white yellow blue white gray orange",
    "mouse": "brown pink purple black red purple red blue pink",
}
# of an object and of each object after it
BESIDE_OBJECTS = {
    "backpack": "gray/yellow green/yellow green/brown yellow/purple black/pink black/green "
    "orange/purple red/yellow green/purple gray/green yellow/gray",
    "glasses": "green/black red/red green/yellow white/orange yellow/brown yellow/black "
    "yellow/gray green/black orange/pink white/gray",
    "crown": "purple/blue pink/red blue/red pink/purple black/red red/black "
    "purple/blue gray/white gray/purple",
    "suitcase": "white/white blue/gray gray/brown yellow/yellow gray/black orange/brown "
    "brown/black red/blue",
    "chair": "white/gray purple/red green/purple purple/orange brown/white orange/blue pink/gray",
    "balloon": "blue/blue brown/pink green/pink blue/orange purple/white white/white",
    "bow": "white/white yellow/pink yellow/orange white/black pink/gray",
    "car": "white/black orange/red black/white purple/pink",
    "bowl": "purple/black brown/green orange/purple",
    "bench": "red/yellow green/red",
    "clock": "blue/blue",
}


def benchmark(corrected: bool = False) -> dict[str, list[str]]:
    """By name of the set: "animals" 66 prompts, "animals_objects" 144, "objects" 66, in the order
    of the lists.

    Args:
        corrected: "an elephant", as the published list has it; no other word is corrected there
            ("a orange apple"). Otherwise the article is always "a".
    """
    beside = [thing for thing in OBJECTS if thing not in WORN]
    with_objects = []
    for animal in ANIMALS:
        colours = dict(zip(beside, BESIDE_ANIMALS[animal].split(), strict=True))
        for thing in OBJECTS:
            ending = f"with a {thing}" if thing in WORN else f"and a {colours[thing]} {thing}"
            with_objects.append(f"a {animal} {ending}")
    objects = []
    for number, one in enumerate(OBJECTS[:-1]):
        pairs = BESIDE_OBJECTS[one].split()
        for pair, other in zip(pairs, OBJECTS[number + 1 :], strict=True):
            first, second = pair.split("/")
            objects.append(f"a {first} {one} and a {second} {other}")
    found = {
        "animals": [f"a {one} and a {other}" for one, other in combinations(ANIMALS, 2)],
        "animals_objects": with_objects,
        "objects": objects,
    }
    if not corrected:
        return found
    return {
        name: [text.replace("a elephant", "an elephant") for text in texts]
        for name, texts in found.items()
    }
