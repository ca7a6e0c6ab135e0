"""The encoder: a token's embedding plus its position's."""

from numba import cuda

from llm_numba.cuda.jit import blocks_for, float32, int32, kernel, sized, stream, to_float, to_storage, uint32

ZERO = float32(0)
BLOCK = sized(256, 4)  # threads
EACH = 4  # channels of a thread
LOOKS = sized(8, 16)  # tokens that a thread looks at, at a time
CHUNK = BLOCK * LOOKS  # tokens that a block looks at, at a time
WORDS = CHUNK // 32
ROWS = 4  # rows that a thread loads from at a time


@kernel
def encoder_forward_kernel(out, tokens, wte, wpe):
    """out (B, T, C) = wte (Vp, C)[tokens (B, T)] + wpe (at least T, C).

    Grid: (T, B, a block for BLOCK * EACH channels); block: BLOCK; a thread owns EACH channels of a row, BLOCK apart, so
    that a warp's are side by side. Moves: 2*B*T*C + T*C numbers.
    """
    t, b, C = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y), out.shape[2]
    first = uint32(cuda.blockIdx.z) * BLOCK * EACH + uint32(cuda.threadIdx.x)  # not signed, so never below 0
    token = uint32(tokens[b, t])
    sums = cuda.local.array(EACH, float32)
    # load them all before one is stored: no load starts before a store that the program puts first
    for k in range(EACH):
        c = first + k * BLOCK
        if c < C:
            sums[k] = to_float(wte[token, c]) + to_float(wpe[t, c])
    for k in range(EACH):
        c = first + k * BLOCK
        if c < C:
            out[b, t, c] = to_storage(sums[k], out)


@kernel(launch_bounds=(BLOCK, 6))  # most of its time it waits for tokens: many blocks at once
def dwte_kernel(dwte, dout, tokens):
    """dwte (Vp, C)[tokens (n,)] += dout (n, C).

    Grid: (n, a block for BLOCK * EACH channels); block: BLOCK; the block of the first position that a token stands at
    owns the token's row of dwte and adds up, in order, all rows of dout that belong there; every other block leaves. A
    thread owns EACH channels, BLOCK apart. Moves: n*C numbers; 2*C floats and the tokens for each different token.
    """
    position, thread, n, C = cuda.blockIdx.x, cuda.threadIdx.x, dout.shape[0], dout.shape[1]
    first = uint32(cuda.blockIdx.y) * BLOCK * EACH + uint32(thread)
    token = tokens[position]
    bits = cuda.shared.array(WORDS, uint32)
    rows = cuda.shared.array(CHUNK, uint32)
    found = cuda.shared.array(1, int32)
    same = cuda.local.array(LOOKS, int32)
    sums = cuda.local.array(EACH, float32)

    # look backwards: a block whose token stands at an earlier position too is not its owner
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
        # look for this token in the chunk
        seen = 0
        for k in range(LOOKS):
            i = uint32(start + k * BLOCK + thread)
            same[k] = i < n and tokens[i] == token
            seen |= same[k]
        if not cuda.syncthreads_or(seen):
            continue
        # note where: a bit for each token of the chunk
        for word in range(thread, WORDS, BLOCK):
            bits[word] = 0
        cuda.syncthreads()
        for k in range(LOOKS):
            if same[k]:
                j = uint32(k * BLOCK + thread)
                cuda.atomic.or_(bits, j // 32, uint32(1 << (j % 32)))
        cuda.syncthreads()
        # turn the bits into a list of rows, in order: a thread writes those of a word behind those of the words before
        for word in range(thread, WORDS, BLOCK):
            count = 0
            for earlier in range(word):
                count += cuda.popc(bits[earlier])
            left = bits[word]
            while left:
                rows[count] = start + word * 32 + cuda.ffs(left) - 1
                count += 1
                left &= uint32(left - 1)  # but for the lowest
            if word == WORDS - 1:
                found[0] = count
        cuda.syncthreads()
        # add them up, ROWS at a time; beyond the list's end its last row is named, but not loaded
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

    Grid: (T, a block for BLOCK channels); block: BLOCK; a thread owns a channel of a position. Moves: B*T*C numbers and
    2*T*C floats.
    """
    t, c = uint32(cuda.blockIdx.x), uint32(cuda.blockIdx.y) * BLOCK + uint32(cuda.threadIdx.x)
    if c < dout.shape[2]:
        total = ZERO
        for b in range(dout.shape[0]):
            total += to_float(dout[b, t, c])
        dwpe[t, c] += total


def encoder_forward(out, tokens, wte, wpe):
    """Look up each token's embedding and add that of its position.

    out (B, T, C) <- tokens (B, T) int32, wte (Vp, C), wpe (at least T, C)
    Writes:   out[b, t] = wte[tokens[b, t]] + wpe[t]
    Parallel: over all numbers of out; nothing races
    Moves:    2*B*T*C + T*C numbers
    Expects:  0 <= tokens < Vp, unchecked
    Source:   Radford et al. 2019, GPT-2
    """
    B, T, C = out.shape
    encoder_forward_kernel[(T, B, blocks_for(C, BLOCK * EACH)), BLOCK, stream()](out, tokens, wte, wpe)


def encoder_backward(dwte, dwpe, dout, tokens):
    """Hand each row of dout to the embedding of its token and to that of its position.

    dwte (Vp, C), dwpe (at least T, C) float32 <- dout (B, T, C), tokens (B, T) int32
    Writes:   dwte[tokens[b, t]] += dout[b, t], dwpe[t] += dout[b, t]
    Parallel: over the tokens that occur, and over the positions; a token may stand in many rows, but has one owner, who
              adds in the order of (b, t), so nothing races and the sum's order is fixed
    Moves:    2*B*T*C numbers, 2*T*C floats, and 2*C floats a different token
    Expects:  0 <= tokens < Vp, unchecked
    """
    B, T, C = dout.shape
    dwte_kernel[(B * T, blocks_for(C, BLOCK * EACH)), BLOCK, stream()](
        dwte, dout.reshape(B * T, C), tokens.reshape(B * T)
    )
    dwpe_kernel[(T, blocks_for(C, BLOCK)), BLOCK, stream()](dwpe, dout)
