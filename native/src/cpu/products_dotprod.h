/* products_dotprod.h: products of bytes by sdot, which makes four for each dword. Included by lanes_neon.h's users. */
#ifndef TQI_PRODUCTS_DOTPROD_H
#define TQI_PRODUCTS_DOTPROD_H

/* In units of 256 and of 1; for levels in two bytes in units of 65536 and 256. */
typedef struct {
    int32x4_t high, low;
} sums;

INLINE sums no_sums(void) {
    return (sums) { vdupq_n_s32(0), vdupq_n_s32(0) };
}

/* Adds the products of each dword of a with dword `at` of b; the instruction has its number as a constant. */
INLINE int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b, int at) {
    switch (at) {
        case 0:
            return vdotq_laneq_s32(sum, a, b, 0);
        case 1:
            return vdotq_laneq_s32(sum, a, b, 1);
        case 2:
            return vdotq_laneq_s32(sum, a, b, 2);
        default:
            return vdotq_laneq_s32(sum, a, b, 3);
    }
}

INLINE void add_products(sums * s, levels v, int8x16_t high, int8x16_t low, int at) {
    s->high = dot(s->high, v.part[0], high, at);
    s->low = dot(s->low, v.part[0], low, at);
    if (PARTS == 2) {
        s->low = dot(s->low, v.part[PARTS - 1], high, at);
    }
}

INLINE int32x4_t join(sums s) {
    return vaddq_s32(vshlq_n_s32(s.high, 8), s.low);
}

/* ---- Tiles (tiles_neon.h) ---- */

INLINE void arrange(int n, int8_t * x, size_t step) {
    (void) n, (void) x, (void) step;
}

#define NO_UNROLL _Pragma("GCC unroll 1")

/* Products of rows of a part with columns of a kind, 0: high, 1: low. */
INLINE void multiply_bytes(int n_groups, const int8_t * rows, size_t apart, const int8_t * columns, int part, int kind,
                           int32x4_t (*sum)[2]) {
    rows += 16 * part;
    columns += 32 * kind;
    NO_UNROLL /* sums fill the registers */
        for (int g = 0; g < n_groups; g += 2) {
        UNROLL
        for (int e = 0; e < 2; ++e, rows += 16 * PARTS, columns += 64) {
            const int8x16_t low = vld1q_s8(rows), high = vld1q_s8(rows + apart);
            const int8x16_t column[2] = { vld1q_s8(columns), vld1q_s8(columns + 16) };
            UNROLL
            for (int c = 0; c < 2; ++c) {
                UNROLL
                for (int m = 0; m < 4; ++m) {
                    sum[m][c] = dot(sum[m][c], column[c], low, m);
                    sum[4 + m][c] = dot(sum[4 + m][c], column[c], high, m);
                }
            }
        }
    }
}

INLINE void multiply_panel(int n_groups, const int8_t * rows, size_t apart, const int8_t * columns,
                           int32x4_t (*sum)[2]) {
    UNROLL
    for (int m = 0; m < 8; ++m) {
        sum[m][0] = sum[m][1] = vdupq_n_s32(0);
    }
    multiply_bytes(n_groups, rows, apart, columns, 0, 0, sum);
    UNROLL
    for (int m = 0; m < 8; ++m) {
        sum[m][0] = vshlq_n_s32(sum[m][0], 8);
        sum[m][1] = vshlq_n_s32(sum[m][1], 8);
    }
    multiply_bytes(n_groups, rows, apart, columns, 0, 1, sum);
    if (PARTS == 2) {
        multiply_bytes(n_groups, rows, apart, columns, PARTS - 1, 0, sum);
    }
}

#endif
