/* attention_rows.h: where the rows of a tile of keys lie: in blocks, or in the precise tail. Included by attention.c. */
#ifndef TQI_ATTENTION_ROWS_H
#define TQI_ATTENTION_ROWS_H

#include "attention_plan.h"

#include <math.h>

/* Tokens side by side: in blocks, or in rows of the tail. */
typedef struct {
    int first; /* token of the tile */
    int n;
    const uint8_t * rows; /* of the first token and KV head 0, in the tail; NULL: in blocks */
} run;

typedef struct {
    int n;
    run r[TILE];
} runs;

/* Tokens t0 .. t0 + n - 1, a tile. In a batch, some of a task's query rows may read a token from the tail and the others
 * from its blocks, because a token in between takes its row. The task goes through such a tile twice: first all tokens
 * count, but these only for the rows that read their blocks; then these alone, for the rows that read the tail. */
typedef struct {
    int64_t t0;
    int n;
    int again;           /* whether this is the second time */
    int first, end;      /* of the tile, where these tokens lie; equal if there are none */
    int32_t until[TILE]; /* of these tokens, the first query row that reads blocks; 0 for all others */
} part;

/* Goes on to the second time, if there is one. */
static int once_more(part * p) {
    if (p->again || p->first == p->end) {
        return 0;
    }
    p->n = p->end - p->first;
    p->t0 += p->first;
    memmove(p->until, p->until + p->first, (size_t) p->n * sizeof *p->until);
    p->first = 0;
    p->end = p->n;
    p->again = 1;
    return 1;
}

/* Hides, of the scores of a query row, which lie stride floats apart, those that do not count this time. */
static void hide(const part * p, int64_t row, float * s, int stride) {
    for (int t = 0; p->first < p->end && t < p->n; ++t) {
        if ((row < p->until[t]) != p->again) {
            s[t * stride] = -INFINITY;
        }
    }
}

/* Where to look for the row of a token: tokens are asked for in ascending order. */
typedef struct {
    const tq_attn_tail * tail;
    const int32_t * owner;
    const int32_t * until; /* NULL: no batch, all query rows read what has an owner */
    const int32_t * order; /* (n_own) the batch's tokens by their cells */
    const uint8_t * rows;
    int64_t n_row; /* before the batch's own */
    int64_t row;   /* of the next token */
    int64_t own;   /* first of order that is not behind the next token */
} tail_cursor;

static tail_cursor tail_from(const tq_attn_tail * tail, int64_t stream, int64_t t0) {
    const uint8_t * owner = (const uint8_t *) tail->owner + (size_t) stream * tail->owner_stride_stream;
    tail_cursor c = {
        .tail = tail,
        .owner = (const int32_t *) (const void *) owner,
        .rows = (const uint8_t *) tail->data + (size_t) stream * tail->stride_stream,
        .n_row = tail->n_recent + tail->n_first,
        .row = tq_tail_row(tail->n_recent, 0, t0),
    };
    if (tail->n_own > 0) {
        c.until = c.owner + c.n_row + tail->n_own;
        c.order = c.until + c.n_row + tail->n_own;
        for (int64_t end = tail->n_own; c.own < end;) {
            const int64_t middle = c.own + (end - c.own) / 2;
            const int before = c.owner[c.n_row + c.order[middle]] <= t0;
            c.own = before ? middle + 1 : c.own;
            end = before ? end : middle;
        }
    }
    return c;
}

/* Whether any of n tokens from t0 on, where the cursor is, may have a row: most tiles have none. */
static int may_have_rows(const tail_cursor * c, int64_t t0, int n) {
    if (t0 < c->tail->n_first || (c->own < c->tail->n_own && c->owner[c->n_row + c->order[c->own]] <= t0 + n)) {
        return 1;
    }
    int any = 0;
    int64_t row = c->row;
    for (int t = 0; t < n; row = 0) {
        const int32_t * owner = c->owner + row;
        const int32_t next = (int32_t) (t0 + t + 1);
        const int m = (int) min64(n - t, c->tail->n_recent - row);
        for (int i = 0; i < m; ++i) {
            any |= owner[i] == next + i;
        }
        t += m;
    }
    return any;
}

/* The row of the next token, t, and the first query row that does not read it; NULL if the token has none. */
static const uint8_t * next_row(tail_cursor * c, int64_t t, int32_t * until) {
    int64_t mine = t < c->tail->n_first ? c->tail->n_recent + t : c->row;
    c->row = c->row + 1 < c->tail->n_recent ? c->row + 1 : 0;
    if (c->own < c->tail->n_own && c->owner[c->n_row + c->order[c->own]] == t + 1) {
        mine = c->n_row + c->order[c->own++];
    } else if (c->owner[mine] != t + 1) {
        return NULL;
    }
    *until = c->until != NULL ? c->until[mine] : INT32_MAX;
    return c->rows + (size_t) mine * c->tail->stride_row;
}

/* Cuts a stream's tokens into runs, as query rows row0 .. row1 - 1 read them this time. */
static void find_runs(const tq_attn_operand * x, int64_t stream, int64_t row0, int64_t row1, part * p, runs * to) {
    to->n = 1;
    to->r[0] = (run) { .first = 0, .n = p->n, .rows = NULL };
    if (x->tail.data == NULL) {
        return;
    }
    tail_cursor cursor = tail_from(&x->tail, stream, p->t0);
    if (!may_have_rows(&cursor, p->t0, p->n)) {
        return;
    }
    const uint8_t * after = NULL; /* where the run goes on */
    to->n = 0;
    for (int t = 0; t < p->n; ++t) {
        int32_t until = 0;
        const uint8_t * at = next_row(&cursor, p->t0 + t, &until);
        if (!p->again && until > row0 && until < row1) { /* of K and V, one may own no row */
            p->first = p->end == 0 || t < p->first ? t : p->first;
            p->end = t + 1 > p->end ? t + 1 : p->end;
            p->until[t] = until;
        }
        at = until >= (p->again ? row0 + 1 : row1) ? at : NULL;
        if (to->n > 0 && at == after) {
            to->r[to->n - 1].n++;
        } else {
            to->r[to->n++] = (run) { .first = t, .n = 1, .rows = at };
        }
        after = at != NULL ? at + x->tail.stride_row : NULL;
    }
}

#endif
