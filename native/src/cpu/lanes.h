/* lanes.h: blocks of several tokens side by side, for attention in integers. Included by lanes_avx2.h and lanes_avx512.h,
 * which add to the vocabulary of vector.h:
 *
 *   N_LANES                 lanes of 128 bits in a vector
 *   w_load, w_set1, w_lane  32-bit integers at any address, one in all places, 16 bytes in all lanes
 *   w_add, w_sub, w_max     of 32-bit integers; w_max: without sign
 *   w_shl, w_shr, w_rol     by a constant
 *   w_xor3, w_select        of bits
 *   w_shuffle(a, at)        bytes of each lane: byte i is byte at[i] of a's lane
 *   w_swap1, w_swap2        dwords of a lane at distance 1 and 2 exchanged
 *   w_low32, w_high32(a, b) a's and b's lower, upper dwords of each lane in turn; w_low64, w_high64: halves of a lane
 *   w_round(v), v_from(w)   conversion; w_cast(v), v_cast(w): the same bits
 *   v_store_first(p, n, a)  the first n of LANES floats
 *   WIDE(n_blocks), token_blocks, load_blocks, spread_tokens, sum_blocks, add_rows   see there
 *
 * A lane is a block of a row, and its four dwords are four tokens: a step decodes 4 N_LANES blocks alike, and a token's
 * sum over a block needs no sum over lanes. If a row has fewer blocks than a vector lanes, a vector holds further tokens
 * instead: `wide` is the number of a row's blocks in a vector. */
#ifndef TQI_LANES_H
#define TQI_LANES_H

#define N_TOKENS(wide) (4 * N_LANES / (wide)) /* of a vector */
#define MAX_VECTORS (TQI_AHEAD / 4)           /* of a tile's tokens */
#define TINY 1e-30f                           /* magnitudes below it count as zero, so that reciprocals stay finite */

/* For w_shuffle: byte k of dword m is byte m of dword k. */
static const uint8_t turned_bytes[16] = { 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15 };

/* Transposes four dwords of four tokens in each lane. */
INLINE void transpose(const words * x, words * y) {
    const words low01 = w_low32(x[0], x[1]), low23 = w_low32(x[2], x[3]);
    const words high01 = w_high32(x[0], x[1]), high23 = w_high32(x[2], x[3]);
    y[0] = w_low64(low01, low23);
    y[1] = w_high64(low01, low23);
    y[2] = w_low64(high01, high23);
    y[3] = w_high64(high01, high23);
}

INLINE words lane_sum(words x) {
    x = w_add(x, w_swap1(x));
    return w_add(x, w_swap2(x));
}

/* Magnitudes are compared as integers, among which those that are not finite are the largest. */
INLINE words lane_max(words x) {
    x = w_max(x, w_swap1(x));
    return w_max(x, w_swap2(x));
}

/* The largest magnitude of each lane of n vectors, `step` apart. */
INLINE vec largest_in(const vec * x, int step, int n) {
    words top = w_zero();
    for (int c = 0; c < n; ++c) {
        top = w_max(top, w_cast(v_abs(x[c * step])));
    }
    return v_cast(lane_max(top));
}

/* To make integers of magnitudes up to `most` of floats: what to multiply them by, and what the integer 1 stands for,
 * NaN where the largest magnitude is not finite. */
INLINE vec inverse_of(vec largest, int most) {
    return v_keep(v_not_less(largest, v_set1(TINY)), v_div(v_set1((float) most), largest));
}

INLINE vec unit_of(vec largest, int most) {
    const vec unit = v_keep(v_not_less(largest, v_set1(TINY)), v_mul(largest, v_set1(1.0f / (float) most)));
    return v_add(unit, v_sub(largest, largest)); /* infinity less infinity is NaN */
}

#endif
