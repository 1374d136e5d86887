/* codebook.h: the tables an encoder or decoder needs for one (type, mode) pair. */
#ifndef TQI_CODEBOOK_H
#define TQI_CODEBOOK_H

#include "format.h"

#define TQI_MAX_LEVELS  16
#define TQI_MAX_FACTORS 4

/* Where the block transform applies the sign table. */
typedef enum {
    TQI_SIGNS_FIRST, /* y = H (s . x): decorrelates even if the caller has already applied a larger Hadamard matrix */
    TQI_SIGNS_LAST   /* y = s . (H x): turboquant-rs's order */
} tqi_sign_order;

typedef struct {
    int            type;
    int            mode;
    int            bits;
    int            n_levels;
    int            block_bytes;
    tqi_sign_order signs;
    int            n_factors;                     /* search: scale candidates per sign */
    float          factors[TQI_MAX_FACTORS];
    float          outer;                         /* maxnorm: the centroid that the largest magnitude maps to */
    float          levels[TQI_MAX_LEVELS];        /* ascending */
    float          boundaries[TQI_MAX_LEVELS];    /* n_levels - 1 of them, then +infinity */
} tqi_codec;

extern const float tqi_signs[TQ_BLOCK];

/* The codec of a pair, or NULL if the type is no PQO type or the mode unknown. Thread-safe. */
const tqi_codec * tqi_codec_get(int type, int mode);

#endif
