/* products_i8mm.h: products of bytes by smmla, for tiles_neon.h: those of two rows with two columns, eight of each, in
 * one instruction. */
#ifndef TQI_PRODUCTS_I8MM_H
#define TQI_PRODUCTS_I8MM_H

#define NO_UNROLL _Pragma("GCC unroll 1")

/* Of groups of four bytes of four rows, in pairs: eight bytes of rows 0 and 1, then of rows 2 and 3. */
INLINE void arrange(int n, int8_t * x, size_t step) {
    for (int g = 0; g < n; g += 2, x += 2 * step) {
        const int32x4_t a = vreinterpretq_s32_s8(vld1q_s8(x)), b = vreinterpretq_s32_s8(vld1q_s8(x + step));
        vst1q_s8(x, vreinterpretq_s8_s32(vzip1q_s32(a, b)));
        vst1q_s8(x + step, vreinterpretq_s8_s32(vzip2q_s32(a, b)));
    }
}

/* Products of rows of a part with columns of a kind, 0: high, 1: low. sum[r][c]: of rows 2 r and 2 r + 1 with columns
 * 2 c and 2 c + 1 */
INLINE void multiply_bytes(int n_groups, const int8_t * rows, size_t apart, const int8_t * columns, int part, int kind,
                           int32x4_t (*sum)[4]) {
    rows += 16 * part;
    columns += 32 * kind;
    NO_UNROLL /* sums fill the registers */
        for (int g = 0; g < n_groups; g += 2, rows += 32 * PARTS, columns += 128) {
        const int8x16_t a[4] = { vld1q_s8(rows), vld1q_s8(rows + 16 * PARTS), vld1q_s8(rows + apart),
                                 vld1q_s8(rows + apart + 16 * PARTS) };
        const int8x16_t b[4] = { vld1q_s8(columns), vld1q_s8(columns + 64), vld1q_s8(columns + 16),
                                 vld1q_s8(columns + 80) };
        UNROLL
        for (int r = 0; r < 4; ++r) {
            UNROLL
            for (int c = 0; c < 4; ++c) {
                sum[r][c] = vmmlaq_s32(sum[r][c], a[r], b[c]);
            }
        }
    }
}

INLINE int32x4_t low_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

INLINE int32x4_t high_halves(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
}

INLINE void multiply_panel(int n_groups, const int8_t * rows, size_t apart, const int8_t * columns,
                           int32x4_t (*sum)[2]) {
    int32x4_t s[4][4];
    UNROLL
    for (int i = 0; i < 16; ++i) {
        s[i / 4][i % 4] = vdupq_n_s32(0);
    }
    multiply_bytes(n_groups, rows, apart, columns, 0, 0, s);
    UNROLL
    for (int i = 0; i < 16; ++i) {
        s[i / 4][i % 4] = vshlq_n_s32(s[i / 4][i % 4], 8);
    }
    multiply_bytes(n_groups, rows, apart, columns, 0, 1, s);
    if (PARTS == 2) {
        multiply_bytes(n_groups, rows, apart, columns, PARTS - 1, 0, s);
    }
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int c = 0; c < 2; ++c) {
            sum[2 * r][c] = low_halves(s[r][2 * c], s[r][2 * c + 1]);
            sum[2 * r + 1][c] = high_halves(s[r][2 * c], s[r][2 * c + 1]);
        }
    }
}

#endif
