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

INLINE void multiply_panel(int n_groups, const int8_t * rows, const int8_t * columns, size_t step,
                           int32x4_t (*sum)[2]) {
    sums s[4][2];
    for (int m = 0; m < 4; ++m) {
        s[m][0] = s[m][1] = no_sums();
    }
    for (int g = 0; g < n_groups; ++g, rows += 16 * PARTS, columns += step) {
        levels v;
        for (int i = 0; i < PARTS; ++i) {
            v.part[i] = vld1q_s8(rows + 16 * i);
        }
        UNROLL
        for (int c = 0; c < 2; ++c) {
            const int8x16_t high = vld1q_s8(columns + 32 * c), low = vld1q_s8(columns + 32 * c + 16);
            UNROLL
            for (int m = 0; m < 4; ++m) {
                s[m][c].high = dot(s[m][c].high, high, v.part[0], m);
                s[m][c].low = dot(s[m][c].low, low, v.part[0], m);
                if (PARTS == 2) {
                    s[m][c].low = dot(s[m][c].low, high, v.part[PARTS - 1], m);
                }
            }
        }
    }
    for (int m = 0; m < 4; ++m) {
        sum[m][0] = join(s[m][0]);
        sum[m][1] = join(s[m][1]);
    }
}

#endif
