"""Words for the generated tasks: a list of common English ones, and made-up ones of two or three
syllables."""

import random

COMMON = tuple("""
able air animal apple arm autumn baby bag ball bank bear bed bell bird black blue board boat body bone book
bottle box boy branch bread bridge bright brother brown brush bucket button cake camera candle car card cat
chair cheese child church circle city clean clock cloud coat cold color corn country cow cream cup dance dark
day deep desk dinner doctor dog door dream dress drink dry dust ear earth east egg engine evening eye face
family farm father feather field finger fire fish flag floor flower food foot forest fork friend fruit full
game garden girl glass glove goat gold good grass green ground hair hammer hand happy hat head heart heavy
hill home honey horse house ice iron island jacket jewel juice jump key king kitchen kite knife ladder lake
lamp land large leaf leg lemon letter light line lion long lunch map market meal milk mirror money moon
morning mother mountain mouse mouth music nail name neck needle nest new night north nose nut ocean office oil
old onion open orange oven paint paper parent park party pencil people pepper picture pig pillow plane plant
plate pocket potato queen quick quiet rain red rice ring river road rock roof room root rope round salt sand
school sea seed sharp sheep ship shirt shoe shop short silver sister skin sky sleep slow small smile smoke
snow soap soft song soup south spoon spring square stamp star stone store storm street strong sugar summer sun
sweet table tail tall teacher thick thin thread ticket tiger time tooth top town train travel tree uncle under
valley village voice wagon wall warm water wave west wheel white wide wind window wing winter wood wool word
work yard yellow young zebra zoo """.split())

_STARTS = "b c d f g h j k l m n p r s t v w z".split() + ["br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "st", "tr"]
_VOWELS = "a e i o u".split()
_ENDS = ["", "", "", "l", "n", "r", "s", "t"]


def made_up(rng: random.Random) -> str:
    """A pronounceable word that need not exist, such as "trolanek": two or three syllables."""
    syllables = rng.choice((2, 2, 3))
    return "".join(rng.choice(_STARTS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_ENDS)
