/* encode.cuh: the encoders of the PQO types, and all decoders, by teams of eight threads, step for step portable.c's:
 * the same bytes.
 *
 * Every sum has the order of tqi_sum32, and nothing may be contracted into FMA: the files that include this are
 * compiled with -fmad=false (-ffp-contract=off on the host). Divisions and roots are IEEE's, nvcc's default, and f16 is
 * rounded in integers. */
#ifndef TQI_ENCODE_CUH
#define TQI_ENCODE_CUH

#include "transform.cuh"

/* A codebook as kernels use it: shared memory, filled from the launch's tqi_codec. */
struct tqi_tables {
    float levels[TQI_MAX_LEVELS];
    float boundaries[TQI_MAX_LEVELS];
};

TQI_D void tqi_fill_tables(const tqi_codec & codec, tqi_tables * tables) {
    const int i = tqi_thread();
    if (i < TQI_MAX_LEVELS) {
        tables->levels[i] = codec.levels[i];
        tables->boundaries[i] = codec.boundaries[i];
    }
    tqi_sync();
}

/* How many boundaries lie below t. They ascend, so halving the range finds the same number as counting does; for NaN it
 * is 0 either way. */
TQI_HD int tqi_index_of(const tqi_tables * tables, int bits, float t) {
    int index = 0;
    TQI_UNROLL
    for (int b = 3; b >= 0; --b) {
        if (b < bits) {
            index += t > tables->boundaries[index + (1 << b) - 1] ? 1 << b : 0;
        }
    }
    return index;
}

/* Writes a block from what every thread of the team knows: scale d (f16 bits) and the words. */
TQI_HD void tqi_store_block(int bits, uint16_t d, const uint32_t * words, int l, uint8_t * block) {
    uint16_t * halves = (uint16_t *) (void *) block;
    TQI_UNROLL
    for (int i = 0; i < 2 * TQI_MAX_WORDS + 1; ++i) {
        if (i < 2 * bits + 1 && i % TQI_TEAM == l) {
            halves[i] = (d & 0x7fffu) == 0 ? (uint16_t) 0
                        : i == 0           ? d
                                           : (uint16_t) (words[(i - 1) / 2] >> (16 * ((i - 1) & 1)));
        }
    }
}

/* Writes scale d (f16 bits) and the indices of t, the values over their scale; a zero scale makes a zero block. */
TQI_D void tqi_put_block(const tqi_tables * tables, int bits, uint16_t d, const float * t, int l, bool store,
                         uint8_t * block) {
    uint32_t groups[4], words[TQI_MAX_WORDS];
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        groups[m] = tqi_gather((uint32_t) tqi_index_of(tables, bits, t[m]) << (bits * l));
    }
    tqi_pack(bits, groups, words);
    if (store) {
        tqi_store_block(bits, d, words, l, block);
    }
}

/* sum y v and sum v v for the codebook values v nearest to y / d. */
TQI_D void tqi_fit(const tqi_tables * tables, int bits, const float * y, float d, float * yv, float * vv) {
    float a[TQI_VALUES], b[TQI_VALUES];
    const float inverse = 1.0f / d;
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        const float v = tables->levels[tqi_index_of(tables, bits, y[m] * inverse)];
        a[m] = y[m] * v;
        b[m] = v * v;
    }
    *yv = tqi_sum32(a);
    *vv = tqi_sum32(b);
}

TQI_D float tqi_search_scale(const tqi_codec & codec, const tqi_tables * tables, int bits, const float * y) {
    float max, min;
    tqi_bounds32(y, &max, &min);
    const float high = 1.0f / codec.levels[(1 << bits) - 1], low = 1.0f / codec.levels[0];
    const bool zero = max < TQI_AMAX_MIN && -min < TQI_AMAX_MIN; /* other teams of the warp go on: no return here */
    const float base = fmaxf(max * high, min * low), mirrored = -fmaxf(-min * high, -max * low);
    float best = -1.0f, d = 0.0f;
    TQI_NO_UNROLL
    for (int c = 0; c < 2 * codec.n_factors; ++c) {
        float yv, vv;
        tqi_fit(tables, bits, y, (c & 1 ? mirrored : base) * codec.factors[c / 2], &yv, &vv);
        const float gain = yv * yv / vv;
        if (gain > best) {
            best = gain;
            d = yv / vv;
        }
    }
    return zero ? 0.0f : d;
}

/* v: the team's values; store: whether this block exists. */
TQI_D void tqi_encode_block(const tqi_codec & codec, const tqi_tables * tables, int bits, float * v, int l, bool store,
                            uint8_t * block) {
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        v[m] = tqi_sanitize(v[m]);
    }
    if (codec.mode == TQ_MODE_SEARCH) {
        tqi_transform(codec.signs == TQI_SIGNS_FIRST, v, l);
        const uint16_t h = tqi_f32_to_f16(tqi_sanitize(tqi_search_scale(codec, tables, bits, v)));
        const float inverse = 1.0f / tqi_f16_to_f32(h);
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            v[m] *= inverse;
        }
        tqi_put_block(tables, bits, h, v, l, store, block);
        return;
    }
    float d;
    if (codec.mode == TQ_MODE_MAXNORM) {
        float max, min;
        tqi_transform(codec.signs == TQI_SIGNS_FIRST, v, l);
        tqi_bounds32(v, &max, &min);
        d = fmaxf(fmaxf(max, -min), 0.0f) / codec.outer;
    } else { /* TQ_MODE_L2NORM */
        float squares[TQI_VALUES];
        TQI_UNROLL
        for (int m = 0; m < TQI_VALUES; ++m) {
            squares[m] = v[m] * v[m];
        }
        d = sqrtf(tqi_sum32(squares));
    }
    d = d > TQI_NORM_MIN ? d : TQI_NORM_MIN;
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        v[m] = v[m] / d;
    }
    if (codec.mode == TQ_MODE_L2NORM) {
        tqi_transform(codec.signs == TQI_SIGNS_FIRST, v, l);
    }
    tqi_put_block(tables, bits, tqi_f32_to_f16(d < TQI_F16_MAX ? d : TQI_F16_MAX), v, l, store, block);
}

/* ---- Decoders: to the bit what portable.c gives ---- */

/* y: values l, l + 8, ... of a block, in the transformed domain. */
TQI_HD void tqi_unpack_block(const tqi_tables * tables, int bits, int trellis, const uint8_t * block, int l,
                             float * y) {
    uint32_t words[TQI_MAX_WORDS];
    const float d = tqi_f16_to_f32(tqi_finite_scale(*(const uint16_t *) (const void *) block));
    tqi_load_words(block, bits, words);
    TQI_UNROLL
    for (int m = 0; m < TQI_VALUES; ++m) {
        const int index =
            trellis ? tqi_unpack_level(bits, words, l + TQI_TEAM * m) : tqi_unpack_index(bits, words, l, m);
        y[m] = d * tables->levels[index];
    }
}

TQI_D void tqi_decode_block(const tqi_codec & codec, const tqi_tables * tables, const uint8_t * block, int transformed,
                            int l, float * x) {
    tqi_unpack_block(tables, codec.bits, codec.trellis, block, l, x);
    if (!transformed) {
        tqi_inverse_transform(codec.signs == TQI_SIGNS_FIRST, x, l);
    }
}

#endif
