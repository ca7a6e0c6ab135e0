"""The matrix products of a linear layer in bf16 on Hopper's tensor cores: the kernel. matmul_wgmma.py launches it.

There is one block on each multiprocessor, with three warpgroups. The first thread of warpgroup 0, the producer, has TMA
copy tiles of a and b to a ring of buffers. Warpgroups 1 and 2, the consumers, take turns: a tile of the result each,
and while one multiplies, the other one finishes its tile (bias, GELU, storing) and waits. So the tensor cores always
have work.

    producer     load load load load load load load load          full:  a stage of the ring has been written
    consumer 0   multiply tile 0 | finish | wait | multiply       empty: it has been read
    consumer 1   wait            | multiply tile 1 | finish       turn:  this consumer may multiply

A tile is TILE_M x TILE_N. A thread of a consumer holds TILE_N of its sums in registers.
Source: the roles are those of NVIDIA's CUTLASS, "warp-specialized persistent ping-pong kernel"
"""

from numba import cuda

from llm_numba.cuda.hopper import (
    divide,
    dynamic_shared,
    fence_proxy_async,
    setmaxnreg_dec,
    setmaxnreg_inc,
    store_shared_16_bytes,
    tensor_map_acquire,
    tma_prefetch_2d,
    tma_store_wait_read,
    uniform,
)
from llm_numba.cuda.jit import float32, int32, int64, kernel, uint32, unrolled
from llm_numba.cuda.wgmma_ends import (
    BIAS,
    GELU,
    GELU_BACKWARD,
    GRADIENT,
    GRADIENT_WITH_BIAS,
    PLAIN,
    load_pre,
    store_bias_gradient,
    store_columns,
    store_float_columns,
    store_times_slope,
)
from llm_numba.cuda.wgmma_tiles import (
    A_TILE,
    BOX,
    CONSUMER,
    DEPTH,
    OTHERS,
    PIECE,
    STAGES,
    TILE_M,
    add_piece,
    helpers_of,
    init_mbarriers,
    load_part,
    load_steps,
    multiply_steps,
    next_item,
    part_at,
    place_of,
    publish_part,
    store_row,
)

BLOCK = 3 * CONSUMER
TWO_ONES = 0x3F803F80  # bf16


def product_kernel(a_transposed, b_transposed, end, TILE_N):
    """The kernel for one layout of the operands and one end of a tile."""
    IS_GRADIENT, WITH_ONES = end in (GRADIENT, GRADIENT_WITH_BIAS), end == GRADIENT_WITH_BIAS
    N_SUMS = TILE_N + 8 * WITH_ONES  # columns that are multiplied: the sums of a over K are its product with ones
    COPIED = A_TILE + TILE_N * DEPTH * 2
    STAGE = COPIED + BOX * WITH_ONES
    CHUNKS, BOXES, GROUPS, ROWS = TILE_N // 64, TILE_N // 32, TILE_N // 8, N_SUMS // 2
    PIECES = -(-ROWS // PIECE)
    # boxes in shared memory that a consumer finishes its tile in
    BUFFERS = {PLAIN: 2, BIAS: 2, GELU: 4, GELU_BACKWARD: CHUNKS}.get(end, 0)
    STAGING = STAGES * STAGE
    BARRIERS = STAGING + 2 * BUFFERS * BOX
    PRE_BARRIERS = 2 * BUFFERS if end == GELU_BACKWARD else 0

    @kernel(launch_bounds=(BLOCK, 1))
    def product(out, pre, a, b, vector, parts, flags, M, N, K, group, whole, splits, helpers, owned, accumulate):
        """out (M, N) = a (M, K) @ b.T, b (N, K); a is (K, M), b (K, N) if transposed; then as `end` says:

        PLAIN:               nothing
        BIAS:                + vector (N,), if its address is not 0
        GELU:                pre = that, out = GELU(pre)
        GELU_BACKWARD:       out = the product times GELU'(pre)
        GRADIENT:            out is float32, = (+= if accumulate)
        GRADIENT_WITH_BIAS:  the same, and vector (M,) float32 likewise the sums of a over K

        The rest is bf16. a, b, and unless out is float32 out and pre, are tensor maps. vector, parts, flags and a
        float32 out are addresses. Tiles are taken in groups of `group` rows of tiles, and split as wgmma_tiles.py says.

        Grid: a block for each multiprocessor; block: BLOCK threads
        Moves: a, b, out and pre at least once
        """
        shared, thread = dynamic_shared(), uint32(cuda.threadIdx.x)
        barriers, warpgroup = uint32(shared + BARRIERS), uniform(thread >> 7)
        if thread == 0:
            init_mbarriers(barriers, PRE_BARRIERS)
        if thread == 32:
            tensor_map_acquire(a)
        if thread == 64:
            tensor_map_acquire(b)
        if thread == 96 and not IS_GRADIENT:
            tensor_map_acquire(out)
            if end == GELU or end == GELU_BACKWARD:
                tensor_map_acquire(pre)
        if WITH_ONES:
            for s in range(STAGES):
                i = thread
                while i < BOX // 16:
                    ones = TWO_ONES, TWO_ONES, TWO_ONES, TWO_ONES
                    store_shared_16_bytes(shared + s * STAGE + COPIED + i * 16, ones)
                    i = uint32(i + BLOCK)
            fence_proxy_async()
        cuda.syncthreads()

        rows, columns = divide(M + (TILE_M - 1), TILE_M), divide(N + (TILE_N - 1), TILE_N)
        steps, group, whole = divide(K + (DEPTH - 1), DEPTH), uint32(group), uint32(whole)
        splits, helpers, owned = uint32(splits), uint32(helpers), uint32(owned)
        block, blocks, position = uint32(cuda.blockIdx.x), uint32(cuda.gridDim.x), uint32(0)
        current, k, k_end, tile, done = next_item(block, uint32(0), block, blocks, steps, whole, splits, helpers, owned)

        if warpgroup == 0:
            setmaxnreg_dec(24)
            if thread == 0:
                while k < k_end:
                    row, column = place_of(current, rows, columns, group)
                    m, n = int32(row * TILE_M), int32(column * TILE_N)
                    position = load_steps(
                        shared, barriers, position, k, k_end, a, b, m, n, a_transposed, b_transposed, TILE_N, STAGE
                    )
                    if k == 0 and k_end < steps:
                        split = uint32(current - whole)
                        helper, last = helpers_of(split, steps, splits, helpers, owned)
                        while helper <= last:
                            slot = uint32(helper + split)
                            part, flag = part_at(parts, slot, N_SUMS), flags + int64(slot) * 4
                            position = load_part(shared, barriers, position, part, flag, N_SUMS, STAGE)
                            helper = uint32(helper + 1)
                    current, k, k_end, tile, done = next_item(
                        tile, done, block, blocks, steps, whole, splits, helpers, owned
                    )
        else:
            setmaxnreg_inc(240)
            consumer, thread = uint32(warpgroup - 1), uint32(thread & (CONSUMER - 1))
            staging = uint32(shared + STAGING + consumer * (BUFFERS * BOX))
            pre_barriers = uint32(barriers + OTHERS + consumer * (8 * BUFFERS))
            sums = cuda.local.array(N_SUMS, float32)
            item, turn = uint32(0), uint32(0)
            while k < k_end:
                if item & 1 == consumer:
                    row, column = place_of(current, rows, columns, group)
                    m, n = int32(row * TILE_M), int32(column * TILE_N)
                    if end == GELU_BACKWARD and thread == 0 and k == 0:
                        tma_store_wait_read(0)
                        for i in range(BUFFERS):
                            load_pre(i, staging, BUFFERS, pre_barriers, pre, m, n)
                        for i in range(BUFFERS, 2 * BUFFERS):
                            tma_prefetch_2d(pre, n + i // 2 * 64, m + i % 2 * 64)
                    position = multiply_steps(
                        sums, shared, barriers, position, uint32(k_end - k), turn, thread, consumer,
                        N_SUMS, N_SUMS, a_transposed, b_transposed, STAGE,
                    )  # fmt: skip
                    turn = uint32(turn + 1)
                    split = uint32(current - whole)
                    if k > 0:
                        slot = uint32(block + split)
                        unrolled(ROWS, store_row, (sums, part_at(parts, slot, N_SUMS) + int64(thread) * 8))
                        publish_part(flags + int64(slot) * 4, thread, consumer)
                    else:
                        if k_end < steps:
                            helper, last = helpers_of(split, steps, splits, helpers, owned)
                            while helper <= last:
                                where = shared, barriers, position, thread, consumer, STAGE
                                unrolled(PIECES, add_piece, (sums, N_SUMS, *where))
                                position, helper = uint32(position + PIECES), uint32(helper + 1)
                        if end == GELU_BACKWARD:
                            arguments = staging, BUFFERS, pre_barriers, thread, consumer, m, n, out, pre
                            unrolled(BOXES, store_times_slope, (sums, TILE_N, *arguments))
                        elif not IS_GRADIENT:
                            arguments = end, staging, thread, consumer, m, n, N, out, pre, vector
                            unrolled(CHUNKS, store_columns, (sums, TILE_N, *arguments))
                        else:
                            arguments = thread, m, n, M, N
                            if accumulate != 0:
                                unrolled(GROUPS, store_float_columns, (sums, N_SUMS, out, *arguments, True))
                            else:
                                unrolled(GROUPS, store_float_columns, (sums, N_SUMS, out, *arguments, False))
                            if WITH_ONES and column == 0:
                                unrolled(4, store_bias_gradient, (sums, N_SUMS, vector, thread, m, M, accumulate != 0))
                else:
                    position = uint32(position + k_end - k)
                item = uint32(item + 1)
                current, k, k_end, tile, done = next_item(
                    tile, done, block, blocks, steps, whole, splits, helpers, owned
                )
            if thread == 0 and not IS_GRADIENT:
                tma_store_wait_read(0)

    product.shared_bytes = BARRIERS + OTHERS + 8 * PRE_BARRIERS
    product.part_floats = N_SUMS * CONSUMER
    return product
