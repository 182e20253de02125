# SPDX-License-Identifier: Apache-2.0
"""Words and values that texts are made of: keys of needles, numbers, identifiers, codes, words to count."""

import functools
import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Iterator

# Plain English nouns and adjectives. RULER joins two words of the package wonderwords to a key; this needs no package.
_LIST = (
    "acorn album alley almond amber anchor ankle antler apple apricot arbour arch arena armour arrow ash attic autumn "
    "badge badger bakery balcony bamboo banner barley barn barrel basin basket bat bay beach beacon bean bear beaver "
    "bell belt bench berry bike birch bishop blanket blossom blue boat bold bonnet book border bottle boulder bowl "
    "box branch brass brave bread breeze brick bridge bright broad bronze brook broom brown brush bubble bucket "
    "buckle buffalo bugle butter button cabin cactus cake calm camel camp canal candle canoe canvas canyon cape "
    "caravan carpet carrot castle cave cedar cellar cherry chest chestnut chimney church cider cinema circus clay "
    "clever cliff cloak clock cloud clover coach coal coast cobalt coffee comet copper coral cork corn cottage cotton "
    "cradle crane crater creek crimson crow crown crystal cup curtain cushion daisy dale dancer dapper deep deer "
    "desert diamond dolphin donkey door dove dragon drawer drum dune eager eagle early earth east echo elbow elm "
    "ember emerald engine envelope evening falcon farm feather fence fern ferry field fig flag flame flint flute "
    "foggy forest forge fork fountain fox frost furnace galaxy garden garlic gate gentle geyser giant ginger glacier "
    "glad glass glove goat golden goose gorge grain granite grape gravel green grove guitar gull hammer hammock "
    "harbour hare harp harvest hat hawk hazel heath hedge helmet herald heron hill honest honey hook horizon horn "
    "humble hut ice indigo inlet iris iron island ivory ivy jacket jade jasmine jewel jolly juniper kayak kennel "
    "kettle key kind kite kitchen knot ladder lagoon lake lamp lantern larch large lark late lava lavender leaf lemon "
    "lentil level lily lime linen lion little lively lizard lodge loft lofty loom lotus loud lucky lunar magnet "
    "magpie maple marble market marsh mast meadow medal melon merry mill mint mirror mist mole moon morning moss moth "
    "mountain muffin mule museum needle nest night noble north nutmeg oak oasis oat ocean olive onion opal orange "
    "orbit orchard orchid osprey otter oven owl oyster paddle palace palm panther paper parrot patient peach peacock "
    "pearl pebble pelican pencil pepper petal piano pigeon pillow pilot pine plain planet plum polar pond poppy "
    "prairie proud pumpkin purple quarry quick quiet quill rabbit raft rain rapid raven reed reef ribbon ridge river "
    "robin rocket rope rose round ruby rustic saddle sail salmon sand sapphire scarf school sea shadow sheep shell "
    "shore silent silver slate sleepy sleigh smooth snow soap sofa solar south sparrow spice spoon spring spruce "
    "square squirrel stable star steady steam stone stork storm stove straw stream summer summit sunny swallow swan "
    "swift table tall tent thistle thorn thunder tidal tiger timber tin torch tower trail train tulip tunnel turnip "
    "turtle valley vast velvet village violet violin wagon walnut warm water wave west whale wharf wheat wheel willow "
    "windy winter wise wolf wooden wool wren yellow young zebra "
)
WORDS = tuple(_LIST.split())


def number(rng: random.Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randint(1_000_000, 9_999_999))


def identifier(rng: random.Random) -> str:
    """A UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def key(rng: random.Random) -> str:
    """Two different words with a hyphen."""
    return "-".join(rng.sample(WORDS, 2))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """A word without meaning."""
    return "".join(rng.choices(alphabet, k=count))


def distinct(rng: random.Random, draw: Callable[[random.Random], str]) -> Iterator[str]:
    """What `draw` gives, never twice, for as long as there is something new."""
    seen: set[str] = set()
    while True:
        word = draw(rng)
        if word not in seen:
            seen.add(word)
            yield word


@functools.lru_cache(maxsize=1)
def _words_of(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\b[a-z]{4,12}\b", text))


def countable(rng: random.Random, texts: Iterable[str]) -> Iterator[str]:
    """Words in a drawn order, never twice and without end: those of the texts and of WORDS, then pairs of WORDS."""
    known = sorted(set(WORDS).union(*map(_words_of, texts)))
    yield from rng.sample(known, len(known))
    yield from distinct(rng, key)


def joined(items: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last
