/* products.cuh: a warp's products with 16 keys, on tensor cores: K times q, and V times weights. Both kernels of
 * attention do them; what they do not share is who holds the results. g = lane / 4 and t = lane % 4 are the row and
 * column of a lane in a tensor-core fragment (tqi_mma). */
#ifndef TQI_PRODUCTS_CUH
#define TQI_PRODUCTS_CUH

#include "slices.cuh"

struct alignas(16) tqi_quad {
    uint32_t word[4];
};

/* An entry of a table is found once and stored in all its copies, 16 bytes at a time, each thread beginning at another
 * bank. */
template <typename T> TQI_D void tqi_fill_table(const float * levels, uint32_t * table) {
    const int n = T::ENTRIES > 0 ? T::ENTRIES : 1, n_quads = TQI_LANES / 4, i = tqi_thread() % n;
    if (T::ENTRIES > 0) {
        const uint32_t x = T::entry(levels, i);
        const tqi_quad copies = { { x, x, x, x } };
        TQI_UNROLL
        for (int first = 0; first < n_quads; first += TQI_ATTENTION_THREADS / n) {
            ((tqi_quad *) (void *) table)[i * (T::SPACING / 16) + (i + first + tqi_thread() / n) % n_quads] = copies;
        }
    }
}

/* sum[i] <- K q for tile i of query vectors, block by block in the tensor core, times K's scales: rows g and g + 8,
 * vectors 2 t and 2 t + 1. row: row g of the 16, which are stride bytes apart; part t of their blocks is the lane's.
 * q(b, i): the fragments. */
template <typename T, int NT, int BLOCKS, typename Q>
TQI_D void tqi_multiply_keys(const uint32_t * table, const uint8_t * row, int stride, const typename T::place & part,
                             int n_blocks, const Q & q, float (*sum)[4]) {
    const uint32_t * row0 = (const uint32_t *) (const void *) row;
    const uint32_t * row1 = (const uint32_t *) (const void *) (row + 8 * stride);
    TQI_UNROLL
    for (int i = 0; i < NT; ++i) {
        sum[i][0] = sum[i][1] = sum[i][2] = sum[i][3] = 0.0f;
    }
    TQI_UNROLL_BY(BLOCKS > 0 ? BLOCKS : 1)
    for (int b = 0; b < n_blocks; ++b) {
        const typename T::slice s0 = T::load(row0, b, part), s1 = T::load(row1, b, part);
        const float d0 = T::SCALED ? tqi_half_to_float(tqi_load_half(row0, T::BYTES * b)) : 1.0f;
        const float d1 = T::SCALED ? tqi_half_to_float(tqi_load_half(row1, T::BYTES * b)) : 1.0f;
        uint32_t a[8];
        TQI_UNROLL
        for (int n = 0; n < 8; n += 2) {
            a[n] = T::along(table, s0, n);
            a[n + 1] = T::along(table, s1, n);
        }
        TQI_UNROLL
        for (int i = 0; i < NT; ++i) {
            const tqi_quad x = q(b, i);
            float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
            tqi_mma(c, a[0], a[1], a[2], a[3], x.word[0], x.word[1]);
            tqi_mma(c, a[4], a[5], a[6], a[7], x.word[2], x.word[3]);
            sum[i][0] += d0 * c[0];
            sum[i][1] += d0 * c[1];
            sum[i][2] += d1 * c[2];
            sum[i][3] += d1 * c[3];
        }
    }
}

/* What a lane takes of V: one part of a block, or two, or all four. */
template <typename T, int N> struct tqi_parts {
    int b, at;                                /* the block, and where it begins */
    typename T::place part;                   /* N = 1 */
    typename T::half half[N > 2 ? N / 2 : 1]; /* N = 2, 4: two parts each */
};

template <typename T, int N> TQI_D tqi_parts<T, N> tqi_parts_of(int b, int part) {
    tqi_parts<T, N> l;
    l.b = b;
    l.at = tqi_keep(T::BYTES * b);
    if constexpr (N == 1) {
        l.part = T::place_of(part);
    } else {
        TQI_UNROLL
        for (int i = 0; i < N / 2; ++i) {
            l.half[i] = T::half_of(b, part / 2 + i);
        }
    }
    return l;
}

/* The one part that a lane takes, or two from part i on. */
template <typename T, int N>
TQI_D void tqi_load_parts(const uint32_t * row, const tqi_parts<T, N> & l, int i, typename T::slice * s) {
    if constexpr (N == 1) {
        s[0] = T::load(row, l.b, l.part);
    } else {
        T::load_half(row, l.half[i / 2], s);
    }
}

/* o <- o + V^T weights: o[i][4 s + j] has values n = 2 j and 2 j + 1 of slice s, of vectors 2 t and 2 t + 1. row: row 2
 * t of the 16. keep: ones, or zeros if the lane has no such block. weights: B fragments. Slices come in pairs: of four
 * at once, levels would wait in registers. */
template <typename T, int NT, int N>
TQI_D void tqi_multiply_values(const uint32_t * table, const uint8_t * row, int stride, const tqi_parts<T, N> & parts,
                               uint32_t keep, const uint32_t (*weights)[2], float (*o)[4 * N][4]) {
    constexpr int n_at_once = N < 2 ? N : 2;
    uint32_t d[2];
    TQI_UNROLL
    for (int i = 0; i < 2; ++i) { /* tokens 2 t + 8 i and the next one */
        const uint8_t * row0 = row + 8 * i * stride;
        d[i] = tqi_scales<T>((const uint32_t *) (const void *) row0, (const uint32_t *) (const void *) (row0 + stride),
                             parts.at) &
               keep;
    }
    TQI_UNROLL
    for (int first = 0; first < N; first += n_at_once) {
        typename T::merged m[n_at_once][2];
        TQI_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t * row0 = (const uint32_t *) (const void *) (row + 8 * i * stride);
            const uint32_t * row1 = (const uint32_t *) (const void *) (row + (8 * i + 1) * stride);
            typename T::slice s0[n_at_once], s1[n_at_once];
            tqi_load_parts<T, N>(row0, parts, first, s0);
            tqi_load_parts<T, N>(row1, parts, first, s1);
            TQI_UNROLL
            for (int s = 0; s < n_at_once; ++s) {
                m[s][i] = T::merge(s0[s], s1[s]);
            }
        }
        TQI_UNROLL
        for (int j = 0; j < 4 * n_at_once; ++j) {
            uint32_t a[4];
            TQI_UNROLL
            for (int i = 0; i < 4; ++i) {
                a[i] = T::across(table, m[j / 4][i / 2], 2 * (j % 4) + i % 2);
                a[i] = T::SCALED ? tqi_mul_half2(a[i], d[i / 2]) : a[i] & keep;
            }
            TQI_UNROLL
            for (int i = 0; i < NT; ++i) {
                tqi_mma(o[i][4 * first + j], a[0], a[1], a[2], a[3], weights[i][0], weights[i][1]);
            }
        }
    }
}

/* The same of f16, whose values have no blocks: of a row of 16 BLOCKS words a lane takes every eighth from word g on,
 * and o[i][j] has the two values of word g + 8 j. keep: which of tokens 2 t, 2 t + 1, and 8 more, count: others may
 * hold infinities, which a weight of 0 does not cancel. */
template <int NT, int BLOCKS>
TQI_D void tqi_multiply_plain_values(const uint8_t * row, int stride, const uint32_t * keep,
                                     const uint32_t (*weights)[2], float (*o)[2 * BLOCKS][4]) {
    const uint32_t * from = (const uint32_t *) (const void *) row + tqi_thread() % 32 / 4;
    const int next = stride / 4; /* rows begin at multiples of 16 */
    TQI_UNROLL
    for (int j = 0; j < 2 * BLOCKS; ++j) {
        uint32_t a[4];
        TQI_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t x = from[8 * i * next + 8 * j], y = from[(8 * i + 1) * next + 8 * j];
            a[2 * i] = tqi_permute(x, y, 0x5410) & keep[i];
            a[2 * i + 1] = tqi_permute(x, y, 0x7632) & keep[i];
        }
        TQI_UNROLL
        for (int i = 0; i < NT; ++i) {
            tqi_mma(o[i][j], a[0], a[1], a[2], a[3], weights[i][0], weights[i][1]);
        }
    }
}

#endif
