"""The encoder: token embedding plus position embedding."""

from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32, int32, kernel, sized, stream, to_float, to_storage, uint32
from llm_numba.cuda.overlap import let_next_start, overlapping, wait_for_previous

ZERO = float32(0)
BLOCK = sized(256, 4)  # threads
EACH = 4  # channels per thread
LOOKS = sized(8, 16)  # tokens that a thread compares at a time
CHUNK = BLOCK * LOOKS  # tokens that a block compares at a time
WORDS = CHUNK // 32
ROWS = 4  # rows that a thread loads from at a time


@kernel
def encoder_forward_kernel(out, tokens, wte, wpe, position, with_position):
    """out (B, T, C) = wte (Vp, C)[tokens (B, T)] + wpe (at least T, C), the latter from row position[0] on if
    with_position. A token below 0 counts as 0.

    Grid: (T, B, C / (BLOCK * EACH)); block: BLOCK; a thread owns EACH channels of a row, BLOCK apart, so accesses are
    coalesced. Moves: 2*B*T*C + T*C elements.
    """
    t, b, C = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y), out.shape[2]
    first = uint32(cuda.blockIdx.z) * BLOCK * EACH + uint32(cuda.threadIdx.x)  # unsigned: no check for negative indices
    let_next_start()
    wait_for_previous()
    token, row = uint32(max(tokens[b, t], 0)), t + uint32(position[0] if with_position else 0)
    sums = cuda.local.array(EACH, float32)
    # load everything before the first store: the compiler does not move a load before an earlier store
    for k in range(EACH):
        c = first + k * BLOCK
        if c < C:
            sums[k] = to_float(wte[token, c]) + to_float(wpe[row, c])
    for k in range(EACH):
        c = first + k * BLOCK
        if c < C:
            out[b, t, c] = to_storage(sums[k], out)


@kernel(launch_bounds=(BLOCK, 6))  # bound by the latency of loading tokens: high occupancy helps
def dwte_kernel(dwte, dout, tokens):
    """dwte (Vp, C)[tokens (n,)] += dout (n, C).

    Grid: (n, C / (BLOCK * EACH)); block: BLOCK; the block at a token's first position owns the token's row of dwte and
    adds up, in order, all rows of dout with this token; the other blocks return. A thread owns EACH channels, BLOCK
    apart. Moves: n*C elements; 2*C floats and the tokens for each distinct token.
    """
    position, thread, n, C = cuda.blockIdx.x, cuda.threadIdx.x, dout.shape[0], dout.shape[1]
    first = uint32(cuda.blockIdx.y) * BLOCK * EACH + uint32(thread)
    token = tokens[position]
    bits = cuda.shared.array(WORDS, uint32)
    rows = cuda.shared.array(CHUNK, uint32)
    found = cuda.shared.array(1, int32)
    same = cuda.local.array(LOOKS, int32)
    sums = cuda.local.array(EACH, float32)

    # search backwards: if the token occurs earlier, another block owns it
    for start in range(position // CHUNK * CHUNK, -1, -CHUNK):
        seen = 0
        for k in range(LOOKS):
            i = uint32(start + k * BLOCK + thread)
            seen |= i < position and tokens[i] == token
        if cuda.syncthreads_or(seen):
            return

    for k in range(EACH):
        sums[k] = ZERO
    for start in range(position, n, CHUNK):
        # search the chunk for this token
        seen = 0
        for k in range(LOOKS):
            i = uint32(start + k * BLOCK + thread)
            same[k] = i < n and tokens[i] == token
            seen |= same[k]
        if not cuda.syncthreads_or(seen):
            continue
        # mark its positions: one bit per token of the chunk
        for word in range(thread, WORDS, BLOCK):
            bits[word] = 0
        cuda.syncthreads()
        for k in range(LOOKS):
            if same[k]:
                j = uint32(k * BLOCK + thread)
                cuda.atomic.or_(bits, j // 32, uint32(1 << (j % 32)))
        cuda.syncthreads()
        # turn the bits into an ordered list of rows: a thread writes the rows of one word after those of earlier words
        for word in range(thread, WORDS, BLOCK):
            count = 0
            for earlier in range(word):
                count += cuda.popc(bits[earlier])
            left = bits[word]
            while left:
                rows[count] = start + word * 32 + cuda.ffs(left) - 1
                count += 1
                left &= uint32(left - 1)  # clears the lowest bit
            if word == WORDS - 1:
                found[0] = count
        cuda.syncthreads()
        # add them up, ROWS at a time; past the end of the list the last row is addressed, but not loaded
        count = found[0]
        for listed in range(0, count, ROWS):
            for j in range(ROWS):
                row = rows[min(listed + j, count - 1)]
                for k in range(EACH):
                    c = first + k * BLOCK
                    sums[k] += to_float(dout[row, c]) if listed + j < count and c < C else ZERO

    for k in range(EACH):
        c = first + k * BLOCK
        if c < C:
            dwte[token, c] += sums[k]


@kernel
def dwpe_kernel(dwpe, dout):
    """dwpe (at least T, C) += the sum over b of dout (B, T, C).

    Grid: (T, C / BLOCK); block: BLOCK; a thread owns a channel of a position. Moves: B*T*C elements and 2*T*C floats.
    """
    t, c = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y) * BLOCK + uint32(cuda.threadIdx.x)
    if c < dout.shape[2]:
        total = ZERO
        for b in range(dout.shape[0]):
            total += to_float(dout[b, t, c])
        dwpe[t, c] += total


def encoder_forward(out, tokens, wte, wpe):
    """Look up the embedding of each token and add the embedding of its position.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least T, C)
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[t]
    Parallel: over the elements of out; nothing races
    Moves:    2*B*T*C + T*C elements
    Expects:  0 <= tokens < Vp, unchecked
    Source:   Radford et al. 2019, GPT-2
    """
    launch_forward(out, tokens, wte, wpe, tokens.reshape(-1), False)  # the position is not read, but must be an array


def encoder_forward_at(out, tokens, wte, wpe, position):
    """The same for tokens in the middle of a sequence.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least position + T, C), position (1,) int32
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[position + t]; a token below 0 counts as 0
    Expects:  tokens < Vp, unchecked
    """
    launch_forward(out, tokens, wte, wpe, position, True)


def launch_forward(out, tokens, wte, wpe, position, with_position):
    B, T, C = out.shape
    launch = overlapping(encoder_forward_kernel, (T, B, blocks_for(C, BLOCK * EACH)), BLOCK)
    launch(out, tokens, wte, wpe, position, with_position)


def encoder_backward(dwte, dwpe, dout, tokens):
    """Add each row of dout to the gradients of its token embedding and of its position embedding.

    dwte (Vp, C), dwpe (at least T, C) float32 <- dout (B, T, C), tokens (B, T) int32
    Writes:   dwte[tokens[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    Parallel: over the distinct tokens, and over the positions; each token has one owner, which adds its rows in the
              order of (b, t), so nothing races and the order of the sum is fixed
    Moves:    2*B*T*C elements, 2*T*C floats, and 2*C floats per distinct token
    Expects:  0 <= tokens < Vp, unchecked
    """
    B, T, C = dout.shape
    dwte_kernel[(B * T, blocks_for(C, BLOCK * EACH)), BLOCK, stream()](
        dwte, dout.reshape(B * T, C), tokens.reshape(B * T)
    )
    dwpe_kernel[(T, blocks_for(C, BLOCK)), BLOCK, stream()](dwpe, dout)
