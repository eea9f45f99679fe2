"""The steps that streamed weight gradients go through: how many, whose share each is, what it does.

See `wgrad` for the order. Shared neurons, if there are any, are expert number E.
"""

import triton
import triton.language as tl


@triton.jit
def share_begin(program, total, programs):
    """The first step of a program's share; the first shares have a step more where they cannot be equal."""
    return program * (total // programs) + tl.minimum(program, total % programs)


@triton.jit
def share_of(step, total, programs):
    """The program whose share has a step."""
    each = total // programs
    longer = total % programs
    within_longer = step // (each + 1)
    return tl.where(within_longer < longer, within_longer, (step - longer) // tl.maximum(each, 1))


@triton.jit
def steps_before_cut(tile_first, steps, total):
    """How many steps of the tile from step `tile_first` on a program takes that began before the tile."""
    program = share_of(tile_first, total, tl.num_programs(0))
    taken = tl.minimum(share_begin(program + 1, total, tl.num_programs(0)) - tile_first, steps)
    return tl.where(share_begin(program, total, tl.num_programs(0)) < tile_first, taken, 0)


@triton.jit
def _steps_of_experts(
    offsets_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Of every expert, the shared neurons' among them: its number, rows, steps of a tile and of all tiles."""
    e = tl.arange(0, EXPERTS)
    begin_E = tl.load(offsets_ptr + e, mask=e < E, other=0)
    end_E = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
    if C > 0:
        end_E += tl.load(offsets_ptr + E + e * 0, mask=e == E, other=0)
    steps_E = tl.maximum((end_E - begin_E + BLOCK_K - 1) // BLOCK_K, 1)
    steps_E = tl.where(e < E + (C > 0), steps_E, 0)
    tiles_E = TILES
    if C > 0:
        tiles_E = tl.where(e < E, TILES, SHARED_TILES)
    return e, begin_E, end_E, steps_E, steps_E * tiles_E


@triton.jit
def count_steps(
    offsets_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The length of the list of steps, below 2^31 up to 2^31 rows of a few hundred tiles."""
    _, _, _, steps_E, all_E = _steps_of_experts(offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS)
    return tl.sum(steps_E, 0) * TILES if C == 0 else tl.sum(all_E, 0)


@triton.jit
def find_step(
    step,
    offsets_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
    SHARED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Expert and tile of a step, its number in the tile, how many the tile has, the expert's rows."""
    e, begin_E, end_E, steps_E, all_E = _steps_of_experts(
        offsets_ptr, E, C, TILES, SHARED_TILES, BLOCK_K, EXPERTS
    )
    until_E = tl.cumsum(steps_E, 0) * TILES if C == 0 else tl.cumsum(all_E, 0)
    expert = tl.sum(((until_E <= step) & (e < E + (C > 0))).to(tl.int32), 0)
    mine_E = e == expert
    steps = tl.sum(tl.where(mine_E, steps_E, 0), 0)
    within = step - tl.sum(tl.where(mine_E, until_E - all_E, 0), 0)
    begin = tl.sum(tl.where(mine_E, begin_E, 0), 0)
    end = tl.sum(tl.where(mine_E, end_E, 0), 0)
    return expert, within // steps, within % steps, steps, begin, end
