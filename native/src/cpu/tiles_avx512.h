/* tiles_avx512.h: the steps of tqi_tiles in 16-bit integers. vpdpwssd makes two products a dword, twice what an f32 FMA
 * does.
 *
 * The including file defines
 *   words_table, load_words(bits, codec, level_max)  a codebook as integers, with .step: what the integer 1 stands for
 *   unpack_words(bits, &c, from)  the block's 32 levels as integers, in an order of its own
 *   VALUE_AT(p)                    which of the block's values stands at place p of that order
 *   K_LEVEL_MAX, Q_MAX, V_LEVEL_MAX, WEIGHT_MAX  the largest magnitudes that the sums allow */
#define PANEL 4                      /* vectors of columns at once, at most */
#define N_ROWS(n_vec) (16 / (n_vec)) /* of a panel: 16 sums hide the latency of vpdpwssd */

/* Of a block of all columns: integers of values VALUE_AT(2 j) and VALUE_AT(2 j + 1) for each j and column, then what the
 * integer 1 times that of a level stands for. */
#define QUERIES_OF_BLOCK(n_col) ((size_t) TQI_TILE_QUERY * (size_t) (n_col))

/* The magnitudes' largest bits; those of what is not finite are larger than all others. */
INLINE __m512i higher(__m512i top, __m512 x) {
    return _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(x)));
}

INLINE __m512i pair_words(__m512i low, __m512i high) {
    return _mm512_mask_mov_epi16(low, 0xaaaaaaaau, _mm512_slli_epi32(high, 16));
}

static void load_queries(const tqi_codec * codec, const float * q, int n_blocks, int n_col, float * queries) {
    const __m512 step = _mm512_set1_ps(load_words(codec->bits, codec, K_LEVEL_MAX).step);
    for (int b = 0; b < n_blocks; ++b, q += TQ_BLOCK * n_col, queries += QUERIES_OF_BLOCK(n_col)) {
        for (int col = 0; col < n_col; col += LANES) {
            __m512i top = _mm512_setzero_si512();
            for (int i = 0; i < TQ_BLOCK; ++i) {
                top = higher(top, v_load(q + i * n_col + col));
            }
            const vec largest = v_cast(top), inverse = inverse_of(largest, Q_MAX);
            for (int j = 0; j < TQ_BLOCK / 2; ++j) {
                const words low = w_round(v_mul(v_load(q + VALUE_AT(2 * j) * n_col + col), inverse));
                const words high = w_round(v_mul(v_load(q + VALUE_AT(2 * j + 1) * n_col + col), inverse));
                v_store(queries + j * n_col + col, v_cast(pair_words(low, high)));
            }
            v_store(queries + TQ_BLOCK / 2 * n_col + col, v_mul(unit_of(largest, Q_MAX), step));
        }
    }
}

/* N_ROWS(n_vec) rows' products with n_vec vectors of columns, over one block: added to s unless it is the first; n_row of
 * the rows are there. */
INLINE void score_panel(int n_vec, int16_t (*rows)[TQ_BLOCK], const float * d, int n_row, const float * queries,
                        int n_col, int first, float * s) {
    __m512i sum[16][PANEL];
    for (int i = 0; i < N_ROWS(n_vec); ++i) {
        for (int v = 0; v < n_vec; ++v) {
            sum[i][v] = _mm512_setzero_si512();
        }
    }
    for (int j = 0; j < TQ_BLOCK / 2; ++j) {
        __m512i q[PANEL];
        for (int v = 0; v < n_vec; ++v) {
            q[v] = w_load(queries + j * n_col + LANES * v);
        }
        for (int i = 0; i < N_ROWS(n_vec); ++i) {
            const __m512i pair = w_set1((int) tqi_load_u32(rows[i] + 2 * j));
            for (int v = 0; v < n_vec; ++v) {
                sum[i][v] = _mm512_dpwssd_epi32(sum[i][v], pair, q[v]);
            }
        }
    }
    for (int i = 0; i < N_ROWS(n_vec) && i < n_row; ++i) {
        for (int v = 0; v < n_vec; ++v) {
            float * to = s + i * n_col + LANES * v;
            const vec unit = v_mul(v_load(queries + TQ_BLOCK / 2 * n_col + LANES * v), v_set1(d[i]));
            v_store(to, v_fma(v_from(sum[i][v]), unit, first ? v_set1(0.0f) : v_load(to)));
        }
    }
}

INLINE void score_columns(int n_vec, int16_t (*rows)[TQ_BLOCK], const float * d, int n_tok, const float * queries,
                          int n_col, int first, float * s) {
    for (int t = 0; t < n_tok; t += N_ROWS(n_vec)) {
        score_panel(n_vec, rows + t, d + t, n_tok - t, queries, n_col, first, s + t * n_col);
    }
}

INLINE void tile_scores_of(int bits, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                           const float * queries, int n_blocks, int n_col, float * s) {
    const words_table c = load_words(bits, codec, K_LEVEL_MAX);
    int16_t rows[TQI_AHEAD][TQ_BLOCK] __attribute__((aligned(64)));
    float d[TQI_AHEAD];
    memset(rows, 0, sizeof rows);
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(k + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (int b = 0; b < n_blocks; ++b, k += TQI_BLOCK_BYTES(bits), queries += QUERIES_OF_BLOCK(n_col)) {
        int col = 0;
        for (int t = 0; t < n_tok; ++t) {
            w_store(rows[t], unpack_words(bits, &c, k + (size_t) t * stride));
            d[t] = block_scale(k + (size_t) t * stride);
        }
        for (; col + 4 * LANES <= n_col; col += 4 * LANES) {
            score_columns(4, rows, d, n_tok, queries + col, n_col, b == 0, s + col);
        }
        if (col + 2 * LANES <= n_col) {
            score_columns(2, rows, d, n_tok, queries + col, n_col, b == 0, s + col);
            col += 2 * LANES;
        }
        if (col < n_col) {
            score_columns(1, rows, d, n_tok, queries + col, n_col, b == 0, s + col);
        }
    }
}

static void tile_scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * queries,
                        int n_blocks, int n_col, float * s) {
    const int bits = codec->bits;
    BY_BITS(tile_scores_of, bits, codec, k, stride, n_tok, queries, n_blocks, n_col, s)
}

/* The place of a block's order whose pairs stand in dword i of unpacklo, then of unpackhi, of two tokens' words. */
#define PLACE_OF(i) (8 * ((i) % 16 / 4) + (i) % 4 + 4 * ((i) / 16))

/* A tile's block of V. */
typedef struct {
    __m512i pairs[TQI_AHEAD / 2][2]; /* of two tokens each */
    float share[TQI_AHEAD];          /* each token's scale, as a part of the largest */
    float largest;
} value_block;

/* used: whether a token weighs anything. What the others are must not matter, not even for rounding. */
INLINE void load_values(int bits, const words_table * c, const uint8_t * v, size_t stride, int n_tok,
                        const uint8_t * used, value_block * x) {
    x->largest = 0.0f;
    for (int t = 0; t < n_tok; t += 2) {
        const uint8_t * from = v + (size_t) t * stride;
        const uint8_t * next = t + 1 < n_tok ? from + stride : from;
        const __m512i low = unpack_words(bits, c, from), high = unpack_words(bits, c, next);
        x->pairs[t / 2][0] = _mm512_unpacklo_epi16(low, high);
        x->pairs[t / 2][1] = _mm512_unpackhi_epi16(low, high);
    }
    for (int t = 0; t < n_tok; ++t) {
        x->share[t] = used[t] ? block_scale(v + (size_t) t * stride) : 0.0f;
        x->largest = fmaxf(x->largest, fabsf(x->share[t]));
    }
    for (int t = 0; t < n_tok; ++t) {
        x->share[t] = x->largest > 0.0f ? x->share[t] / x->largest : 0.0f;
    }
}

/* n_vec vectors of columns. p: (n_tok, PANEL), scaled to integers' size; unit: (n_vec); o: (32, n_col) */
INLINE void accumulate_panel(int n_vec, const value_block * x, int n_tok, vec (*p)[PANEL], const vec * unit,
                             const float * factor, int n_col, float * o) {
    __m512i weights[TQI_AHEAD / 2][PANEL];
    for (int t = 0; t < n_tok; t += 2) { /* behind an odd last token p is 0 */
        for (int v = 0; v < n_vec; ++v) {
            weights[t / 2][v] = pair_words(w_round(v_mul(p[t][v], v_set1(x->share[t]))),
                                           w_round(v_mul(p[t + 1][v], v_set1(x->share[t + 1]))));
        }
    }
    for (int i0 = 0; i0 < TQ_BLOCK; i0 += N_ROWS(n_vec)) {
        __m512i sum[16][PANEL];
        for (int i = 0; i < N_ROWS(n_vec); ++i) {
            for (int v = 0; v < n_vec; ++v) {
                sum[i][v] = _mm512_setzero_si512();
            }
        }
        for (int t = 0; t < (n_tok + 1) / 2; ++t) {
            for (int i = 0; i < N_ROWS(n_vec); ++i) {
                const __m512i pair = w_set1((int) tqi_load_u32((const int32_t *) (const void *) x->pairs[t] + i0 + i));
                for (int v = 0; v < n_vec; ++v) {
                    sum[i][v] = _mm512_dpwssd_epi32(sum[i][v], pair, weights[t][v]);
                }
            }
        }
        for (int i = 0; i < N_ROWS(n_vec); ++i) {
            for (int v = 0; v < n_vec; ++v) {
                float * to = o + VALUE_AT(PLACE_OF(i0 + i)) * n_col + LANES * v;
                const vec before = v_mul(v_load(to), v_load(factor + LANES * v));
                v_store(to, v_fma(v_from(sum[i][v]), v_mul(unit[v], v_set1(x->largest)), before));
            }
        }
    }
}

/* All blocks of n_vec vectors of columns. */
INLINE void accumulate_columns(int bits, int n_vec, const words_table * c, const uint8_t * v, size_t stride, int n_tok,
                               const float * p, const float * factor, int n_blocks, int n_col, float * o) {
    vec scaled[TQI_AHEAD + 1][PANEL], unit[PANEL];
    uint8_t used[TQI_AHEAD] = { 0 };
    value_block x;
    for (int i = 0; i < n_vec; ++i) {
        __m512i top = _mm512_setzero_si512();
        for (int t = 0; t < n_tok; ++t) {
            top = higher(top, v_load(p + t * n_col + LANES * i));
        }
        const vec largest = v_cast(top), inverse = inverse_of(largest, WEIGHT_MAX);
        unit[i] = v_mul(unit_of(largest, WEIGHT_MAX), v_set1(c->step));
        for (int t = 0; t < n_tok; ++t) {
            scaled[t][i] = v_mul(v_load(p + t * n_col + LANES * i), inverse);
            used[t] |= _mm512_cmp_ps_mask(scaled[t][i], _mm512_setzero_ps(), _CMP_NEQ_UQ) != 0;
        }
        scaled[n_tok][i] = v_set1(0.0f);
    }
    memset(x.share, 0, sizeof x.share);
    for (int b = 0; b < n_blocks; ++b) {
        load_values(bits, c, v + (size_t) b * TQI_BLOCK_BYTES(bits), stride, n_tok, used, &x);
        accumulate_panel(n_vec, &x, n_tok, scaled, unit, factor, n_col, o + b * TQ_BLOCK * n_col);
    }
}

INLINE void tile_accumulate_of(int bits, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                               const float * p, const float * factor, int n_blocks, int n_col, float * o) {
    const words_table c = load_words(bits, codec, V_LEVEL_MAX);
    int col = 0;
    for (int t = 0; t < n_tok; ++t) {
        tqi_prefetch(v + (size_t) (TQI_AHEAD + t) * stride, (size_t) n_blocks * TQI_BLOCK_BYTES(bits));
    }
    for (; col + 4 * LANES <= n_col; col += 4 * LANES) {
        accumulate_columns(bits, 4, &c, v, stride, n_tok, p + col, factor + col, n_blocks, n_col, o + col);
    }
    if (col + 2 * LANES <= n_col) {
        accumulate_columns(bits, 2, &c, v, stride, n_tok, p + col, factor + col, n_blocks, n_col, o + col);
        col += 2 * LANES;
    }
    if (col < n_col) {
        accumulate_columns(bits, 1, &c, v, stride, n_tok, p + col, factor + col, n_blocks, n_col, o + col);
    }
}

static void tile_accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p,
                            const float * factor, int n_blocks, int n_col, float * o) {
    const int bits = codec->bits;
    BY_BITS(tile_accumulate_of, bits, codec, v, stride, n_tok, p, factor, n_blocks, n_col, o)
}

static const tqi_tiles tiles = { load_queries, tile_scores, tile_accumulate };
