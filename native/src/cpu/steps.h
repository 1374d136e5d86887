/* steps.h: the steps of tqi_steps from the including file's unpack_rows, scores_rows and accumulate_rows, which are
 * made for each number of bits and of query vectors. The file says which bits its types have: BY_BITS is TQI_BY_BITS or
 * TQI_BY_TRELLIS_BITS. ATTENTION_ONLY: it has no unpack_rows. */

#if !defined(ATTENTION_ONLY)
static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    const int bits = codec->bits;
    BY_BITS(unpack_rows, bits, codec, blocks, n_blocks, y)
}
#endif

INLINE void scores_by_n_q(int bits, int n_q, const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok,
                          const float * query, int n_blocks, float * s, int ld) {
    TQI_BY_N_Q(scores_rows, bits, n_q, codec, k, stride, n_tok, query, n_blocks, s, ld)
}

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * query, int n_q,
                   int n_blocks, float * s, int ld) {
    const int bits = codec->bits;
    BY_BITS(scores_by_n_q, bits, n_q, codec, k, stride, n_tok, query, n_blocks, s, ld)
}

INLINE void accumulate_by_n_q(int bits, int n_q, const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok,
                              const float * p, int ld, int n_blocks, float * o) {
    TQI_BY_N_Q(accumulate_rows, bits, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o) {
    const int bits = codec->bits;
    BY_BITS(accumulate_by_n_q, bits, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
}
