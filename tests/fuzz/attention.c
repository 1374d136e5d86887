/* attention.c: attention over arbitrary blocks, shapes, strides, masks (NaN and infinities too), sinks and tails with
 * arbitrary owners, with several threads one after another. Nothing outside the arrays is touched; where nothing that
 * goes in is NaN or infinite the output is attention over the decoded values, in double, within what the scores'
 * tolerance allows. */
#include "fuzz.h"

#define MAX_KV 330           /* keys are cut for several threads above 256 */
#define MAX_VALUES (1 << 14) /* of K, and of V */
#define MAX_ROWS 12          /* query rows */

typedef struct {
    tq_attn_operand x;
    uint8_t * memory;
    uint16_t * tail;
    int32_t * owner;
    float * values; /* (n_stream, n_kv, n_head, head_dim), as attention should read them */
    double * reach; /* (n_stream, n_kv, n_head), see fuzz.h: of the row's blocks together */
    int finite;
} side;

static void * allocate(size_t n) {
    void * p = malloc(n > 0 ? n : 1);
    if (p == NULL) {
        exit(2);
    }
    return p;
}

static float from_f16(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const float a = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf((float) (1024 + m), e - 25) : ldexpf((float) m, -24);
    return h & 0x8000 ? -a : a;
}

/* The values of a row of a tail: n values, back in the original domain. */
static void decode_tail(const tq_attn_operand * o, const uint16_t * row, float * x) {
    float signs[TQ_BLOCK];
    tq_signs(signs);
    for (int64_t b = 0; b < o->head_dim; b += TQ_BLOCK) {
        double y[TQ_BLOCK];
        for (int i = 0; i < TQ_BLOCK; ++i) { /* the other modes have their signs after the transform */
            y[i] = (double) from_f16(row[b + i]) * (o->mode == TQ_MODE_SEARCH ? 1.0 : (double) signs[i]);
        }
        for (int s = 1; s < TQ_BLOCK; s *= 2) {
            for (int i = 0; i < TQ_BLOCK; ++i) {
                if (!(i & s)) {
                    const double u = y[i], v = y[i + s];
                    y[i] = u + v;
                    y[i + s] = u - v;
                }
            }
        }
        for (int i = 0; i < TQ_BLOCK; ++i) {
            x[b + i] = (float) (y[i] / sqrt(32.0) * (o->mode == TQ_MODE_SEARCH ? (double) signs[i] : 1.0));
        }
    }
}

/* K or V: rows of a type, with gaps between them, of the input's bytes as they are or of tame ones. */
static side make_side(bytes * in, uint32_t * state, int64_t head_dim, int64_t n_head, int64_t n_stream, int64_t n_kv) {
    static const int types[] = { TQ_TYPE_PQO3, TQ_TYPE_PQO4, TQ_TYPE_PQT3, TQ_TYPE_PQT4,
                                 TQ_TYPE_PQT2, TQ_TYPE_PQT5, TQ_TYPE_F16,  TQ_TYPE_F32 };
    enum { N_TYPES = sizeof types / sizeof types[0] };
    side s;
    memset(&s, 0, sizeof s);
    const int pick = take(in), wild = take_below(in, 2), gap = take_below(in, 3);
    const int n_type = head_dim % TQ_BLOCK == 0 ? N_TYPES : 2;
    const int type = types[pick % n_type + N_TYPES - n_type], is_pqo = type >= TQ_TYPE_PQO3;
    const int mode = type == TQ_TYPE_PQO3 || type == TQ_TYPE_PQO4 ? pick / N_TYPES % 3 : TQ_MODE_SEARCH;
    const double outer = outermost(type, mode);
    const size_t row = tq_row_bytes(type, head_dim), step = row + (size_t) gap * (is_pqo ? 1 : 4);
    s.x = (tq_attn_operand) { .type = type,
                              .mode = mode,
                              .head_dim = head_dim,
                              .n_head = n_head,
                              .n_stream = n_stream,
                              .stride_head = step,
                              .stride_token = step * (size_t) n_head,
                              .stride_stream = step * (size_t) (n_head * n_kv) };
    const size_t n_rows = (size_t) (n_stream * n_kv * n_head), n_bytes = n_rows > 0 ? (n_rows - 1) * step + row : 0;
    s.memory = allocate(n_bytes);
    s.values = allocate(n_rows * (size_t) head_dim * sizeof(float));
    s.reach = allocate(n_rows * sizeof(double));
    s.x.data = s.memory;
    s.finite = 1;
    for (size_t i = 0; i < n_bytes; ++i) {
        s.memory[i] = wild && in->left > 16 ? take(in) : (uint8_t) scramble(state);
    }
    for (size_t r = 0; r < n_rows; ++r) {
        uint8_t * at = s.memory + r * step;
        float * x = s.values + r * (size_t) head_dim;
        for (size_t i = 0; !wild && i < row; i += type == TQ_TYPE_F16 ? 2 : 4) { /* about 1 in size */
            if (type == TQ_TYPE_F16) {
                const uint16_t h = (uint16_t) (0x3800u + (at[i] & 3u) * 0x100u + (at[i + 1] & 0x80u) * 0x100u);
                memcpy(at + i, &h, 2);
            } else if (type == TQ_TYPE_F32) {
                const float f = (float) (int8_t) at[i] / 64.0f;
                memcpy(at + i, &f, 4);
            }
        }
        for (size_t b = 0; !wild && is_pqo && b < row; b += tq_row_bytes(type, TQ_BLOCK)) {
            at[b + 1] = (uint8_t) (0x38u + (at[b + 1] & 0x83u));
        }
        s.reach[r] = 0.0;
        for (size_t b = 0; is_pqo && b < row; b += tq_row_bytes(type, TQ_BLOCK)) {
            s.reach[r] = hypot(s.reach[r], scale_of(at + b) * outer);
        }
        if (is_pqo) {
            tq_decode(type, mode, at, head_dim, x);
        }
        for (int64_t i = 0; i < head_dim; ++i) {
            if (type == TQ_TYPE_F16) {
                x[i] = from_f16(load_u16(at + 2 * i));
            } else if (type == TQ_TYPE_F32) {
                memcpy(&x[i], at + 4 * i, 4);
            }
            s.finite &= isfinite(x[i]) != 0;
        }
    }
    const int n_recent = take(in);
    if (!is_pqo || n_recent == 0) {
        return s;
    }
    /* a tail, whose owners may be any numbers */
    const int n_first = take_below(in, 5), hostile = take_below(in, 2);
    const size_t n_row = (size_t) (n_recent + n_first), width = (size_t) (n_head * head_dim);
    s.tail = allocate((size_t) n_stream * n_row * width * 2);
    s.owner = allocate((size_t) n_stream * n_row * 4);
    for (size_t i = 0; i < (size_t) n_stream * n_row * width; ++i) {
        const uint32_t u = scramble(state);
        s.tail[i] = wild ? (uint16_t) u : (uint16_t) (0x3800u + (u & 0x83ffu));
    }
    memset(s.owner, 0, (size_t) n_stream * n_row * 4);
    for (int64_t st = 0; st < n_stream; ++st) {
        int32_t * owner = s.owner + (size_t) st * n_row;
        for (int64_t t = 0; t < n_kv; ++t) {
            owner[tq_tail_row(n_recent, n_first, t)] = scramble(state) % 5 == 0 ? 0 : (int32_t) t + 1;
        }
        for (size_t i = 0; hostile && i < n_row; ++i) {
            owner[i] = in->left > 4 ? (int32_t) take_u32(in) : owner[i];
        }
        for (int64_t t = 0; t < n_kv; ++t) {
            const int64_t r = tq_tail_row(n_recent, n_first, t);
            for (int64_t h = 0; h < n_head && owner[r] == t + 1; ++h) {
                const uint16_t * row16 = s.tail + ((size_t) st * n_row + (size_t) r) * width + (size_t) (h * head_dim);
                float * x = s.values + (size_t) (((st * n_kv + t) * n_head + h) * head_dim);
                decode_tail(&s.x, row16, x);
                for (int64_t i = 0; i < head_dim; ++i) {
                    s.finite &= isfinite(x[i]) != 0;
                }
            }
        }
    }
    s.x.tail = (tq_attn_tail) { .data = s.tail,
                                .owner = s.owner,
                                .n_recent = n_recent,
                                .n_first = n_first,
                                .stride_row = width * 2,
                                .stride_head = (size_t) head_dim * 2,
                                .stride_stream = n_row * width * 2,
                                .owner_stride_stream = n_row * 4 };
    return s;
}

static void free_side(side * s) {
    free(s->memory);
    free(s->values);
    free(s->reach);
    free(s->tail);
    free(s->owner);
}

/* out[row, h] of a stream against the definition. */
static void check_row(const tq_attn * a, const side * k, const side * v, int64_t stream, int64_t row, int64_t head) {
    static double score[MAX_KV];
    const int64_t kv_head = head / (a->q.n_head / a->k.n_head), kv_stream = stream / (a->q.n_stream / a->k.n_stream);
    const int64_t dk = a->k.head_dim, dv = a->v.head_dim;
    const float * q = (const float *) a->q.data + ((stream * a->n_q + row) * a->q.n_head + head) * dk;
    const float * out = a->out + ((stream * a->n_q + row) * a->q.n_head + head) * dv;
    double max = a->sinks ? (double) a->sinks[head] : -INFINITY, slack = 0.0, total = 0.0, size = 0.0, qq = 0.0;
    int64_t n2 = 1;
    while (2 * n2 <= a->q.n_head) {
        n2 *= 2;
    }
    const double slope = a->max_bias <= 0.0f ? 1.0
                         : head < n2
                             ? pow(2.0, -(double) a->max_bias / (double) n2 * (double) (head + 1))
                             : pow(2.0, -(double) a->max_bias / 2.0 / (double) n2 * (double) (2 * (head - n2) + 1));
    for (int64_t i = 0; i < dk; ++i) {
        qq += (double) q[i] * (double) q[i];
    }
    for (int64_t t = 0; t < a->n_kv; ++t) {
        const float * kt = k->values + ((kv_stream * a->n_kv + t) * a->k.n_head + kv_head) * dk;
        const float * vt = v->values + ((kv_stream * a->n_kv + t) * a->v.n_head + kv_head) * dv;
        double x = 0.0, kk = 0.0;
        for (int64_t i = 0; i < dk; ++i) {
            x += (double) q[i] * (double) kt[i];
            kk += (double) kt[i] * (double) kt[i];
        }
        x *= (double) a->scale;
        if (!(fabs((double) a->scale) * sqrt(qq * kk) < 1e30)) {
            return; /* scores that f32 cannot hold: NaN */
        }
        const double reach = k->reach[(kv_stream * a->n_kv + t) * a->k.n_head + kv_head];
        const double off = fabs((double) a->scale) * dot_bound(sqrt(qq), sqrt(kk), reach) + 1e-6 * fabs(x);
        x = a->softcap > 0.0f ? (double) a->softcap * tanh(x / (double) a->softcap) : x;
        score[t] = x;
        if (a->mask != NULL) {
            const uint16_t m =
                a->mask[((stream % a->n_mask_stream) * a->n_mask_head + head % a->n_mask_head) * a->n_q * a->n_kv +
                        row * a->n_kv + t];
            score[t] = m == 0xfc00u ? -INFINITY : x + slope * (double) from_f16(m);
        }
        if (score[t] == -INFINITY) {
            continue;
        }
        slack = fmax(slack, off + 1e-6 * fabs(score[t]));
        max = fmax(max, score[t]);
        for (int64_t i = 0; i < dv; ++i) {
            size = fmax(size, fabs((double) vt[i]));
        }
    }
    for (int64_t t = 0; t < a->n_kv; ++t) {
        score[t] = score[t] == -INFINITY ? 0.0 : exp(score[t] - max);
        total += score[t];
    }
    total += a->sinks ? exp((double) a->sinks[head] - max) : 0.0;
    /* weights are off by a factor between exp(-2 slack) and exp(2 slack), the sum of values by what fuzz.h says */
    double allowed = size * (fmin(2.0, 2.0 * expm1(2.0 * slack)) + F32_TOLERANCE) + 1e-30;
    for (int64_t t0 = 0; sums_integers() && total > 0.0 && t0 < a->n_kv; t0 += TILE) {
        double most = 0.0, all = 0.0;
        for (int64_t t = t0; t < t0 + TILE && t < a->n_kv; ++t) {
            const double w = score[t] / total * v->reach[(kv_stream * a->n_kv + t) * a->v.n_head + kv_head] *
                             exp(fmin(2.0 * slack, 50.0));
            most = fmax(most, w);
            all += w;
        }
        allowed += 5.6569 * (most * TILE / 16382 + all / 8190);
    }
    for (int64_t i = 0; i < dv; ++i) {
        double want = 0.0;
        for (int64_t t = 0; t < a->n_kv && total > 0.0; ++t) {
            const float * vt = v->values + ((kv_stream * a->n_kv + t) * a->v.n_head + kv_head) * dv;
            want += score[t] > 0.0 ? score[t] / total * (double) vt[i] : 0.0;
        }
        REQUIRE(fabs((double) out[i] - want) <= allowed, "output %g, by the definition %g, allowed %g apart",
                (double) out[i], want, allowed);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    bytes in = { data, size };
    uint32_t state = 1u + (uint32_t) size;
    if (n_kernels == 0) {
        find_kernels();
    }
    use_kernel(0);
    const int64_t dk = take_below(&in, 8) == 7 ? 1 + take_below(&in, 80) : 32 * (1 + take_below(&in, 4));
    const int64_t dv = take_below(&in, 2) ? dk : 32 * (1 + take_below(&in, 4));
    const int64_t n_head_kv = 1 + take_below(&in, 4), n_stream = 1 + take_below(&in, 2),
                  n_kv = (take(&in) | take(&in) << 8) % (MAX_KV + 1);
    const int64_t n_head = n_head_kv * (1 + take_below(&in, 9)), n_q_stream = n_stream * (1 + take_below(&in, 2));
    const int64_t n_q = take_below(&in, MAX_ROWS + 1);
    if (n_kv * n_head_kv * n_stream * (dk > dv ? dk : dv) > MAX_VALUES) {
        return 0;
    }
    const int n_threads = 1 + take_below(&in, 4), options = take(&in), wild_q = take_below(&in, 2);
    side k = make_side(&in, &state, dk, n_head_kv, n_stream, n_kv),
         v = make_side(&in, &state, dv, n_head_kv, n_stream, n_kv);

    const size_t nq = (size_t) (n_q_stream * n_q * n_head * dk), no = (size_t) (n_q_stream * n_q * n_head * dv);
    float *q = allocate(nq * 4), *out = allocate(no * 4), *sinks = allocate((size_t) n_head * 4);
    int finite = k.finite && v.finite;
    for (size_t i = 0; i < nq; ++i) {
        q[i] = wild_q && in.left > 4 ? take_float(&in) : (float) (int32_t) scramble(&state) / 1073741824.0f;
        finite &= fabsf(q[i]) < 1e15f;
    }
    for (int64_t i = 0; i < n_head; ++i) {
        sinks[i] = (float) (int8_t) take(&in);
    }
    tq_attn a;
    memset(&a, 0, sizeof a);
    a.q = (tq_attn_operand) { .data = q,
                              .type = TQ_TYPE_F32,
                              .head_dim = dk,
                              .n_head = n_head,
                              .n_stream = n_q_stream,
                              .stride_head = (size_t) dk * 4,
                              .stride_token = (size_t) (n_head * dk) * 4,
                              .stride_stream = (size_t) (n_q * n_head * dk) * 4 };
    a.k = k.x;
    a.v = v.x;
    a.n_q = n_q;
    a.n_kv = n_kv;
    a.n_mask_head = options & 1 ? n_head : 1;
    a.n_mask_stream = options & 2 ? n_q_stream : 1;
    a.mask_stride_row = (size_t) n_kv * 2;
    a.mask_stride_head = (size_t) (n_q * n_kv) * 2;
    a.mask_stride_stream = (size_t) (a.n_mask_head * n_q * n_kv) * 2;
    const size_t nm = (size_t) (a.n_mask_stream * a.n_mask_head * n_q * n_kv);
    uint16_t * mask = allocate(nm * 2);
    const int kind = options >> 2 & 3;
    for (size_t i = 0; i < nm; ++i) { /* hidden or not; finite numbers, too; anything */
        const uint32_t u = scramble(&state);
        mask[i] = kind == 1     ? (u % 3 ? 0 : 0xfc00u)
                  : kind == 2   ? (u % 3 ? (uint16_t) (0xb800u + u % 0x800u) : 0xfc00u)
                  : in.left > 2 ? (uint16_t) (take(&in) | take(&in) << 8)
                                : (uint16_t) u;
        finite &= kind == 0 || (mask[i] & 0x7c00) != 0x7c00 || mask[i] == 0xfc00u;
    }
    a.mask = kind ? mask : NULL;
    a.sinks = options & 16 ? sinks : NULL;
    a.max_bias = options & 32 ? 8.0f : 0.0f;
    a.softcap = options & 64 ? 10.0f : 0.0f;
    a.scale = options & 128 ? take_float(&in) : 1.0f / sqrtf((float) dk);
    finite &= fabsf(a.scale) < 1e15f;
    a.out = out;
    a.out_stride_head = (size_t) dv * 4;
    a.out_stride_row = (size_t) (n_head * dv) * 4;
    a.out_stride_stream = (size_t) (n_q * n_head * dv) * 4;
    for (int kernel = 0; kernel < n_kernels; ++kernel) {
        use_kernel(kernel);
        memset(out, 0xff, no * 4);
        const size_t n_work = tq_attn_work_bytes(&a, n_threads);
        REQUIRE(n_work > 0, "%s", tq_last_error());
        void * work = allocate(n_work);
        memset(work, 0xff, n_work);
        for (int phase = 0; phase < 2; ++phase) {
            for (int t = 0; t < n_threads; ++t) {
                REQUIRE(tq_attn_compute(&a, phase, t, n_threads, work) == TQ_OK, "%s", tq_last_error());
            }
        }
        free(work);
        for (int64_t i = 0; finite && i < n_q_stream * n_q * n_head; i += 1 + (n_q_stream * n_q * n_head) / 7) {
            check_row(&a, &k, &v, i / (n_q * n_head), i / n_head % n_q, i % n_head);
        }
    }
    free_side(&k);
    free_side(&v);
    free(q);
    free(out);
    free(sinks);
    free(mask);
    return 0;
}
