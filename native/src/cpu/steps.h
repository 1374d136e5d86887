/* steps.h: the steps of tqi_steps from the including file's unpack_rows, scores_rows and accumulate_rows, which are
 * made for each number of bits and of query vectors. */

static void unpack(const tqi_codec * codec, const uint8_t * blocks, int64_t n_blocks, float * y) {
    TQI_BY_BITS(unpack_rows, codec->bits, codec, blocks, n_blocks, y)
}

static void scores(const tqi_codec * codec, const uint8_t * k, size_t stride, int n_tok, const float * q, int n_q,
                   int n_blocks, float * s, int ld) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(scores_rows, 3, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    } else {
        TQI_BY_N_Q(scores_rows, 4, n_q, codec, k, stride, n_tok, q, n_blocks, s, ld)
    }
}

static void accumulate(const tqi_codec * codec, const uint8_t * v, size_t stride, int n_tok, const float * p, int ld,
                       int n_q, int n_blocks, float * o) {
    if (codec->bits == 3) {
        TQI_BY_N_Q(accumulate_rows, 3, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    } else {
        TQI_BY_N_Q(accumulate_rows, 4, n_q, codec, v, stride, n_tok, p, ld, n_blocks, o)
    }
}
