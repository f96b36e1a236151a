"""Seeds as pure functions of what they are for: no generator's history has to be saved or shared."""

ROW = 1 << 41
HELD_OUT = 1 << 42
OTHER = 1 << 43
"""Keep the seeds of training rows, of held-out rows and of what is drawn beside a row apart from each other and from
those of micro-batches."""


def mix_seed(*parts: int) -> int:
    """A 63-bit seed that is a pure function of `parts`, such as (seed, step, micro-batch).

    **Source**: the finaliser of SplitMix64: Steele, Lea and Flood, OOPSLA 2014, figure 15.
    """
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + (part & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def row_seed(seed: int, position: int) -> int:
    """The seed of the training row at `position`, counted over the whole run, under the recipe's `seed`."""
    return mix_seed(seed, ROW, position)


def held_out_seed(number: int) -> int:
    """The seed of held-out row `number`: the same in every evaluation of every run, so that figures compare."""
    return mix_seed(HELD_OUT, number)
