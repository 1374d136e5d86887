/* codebook.h: the tables an encoder or decoder needs for one (type, mode) pair. */
#ifndef TQI_CODEBOOK_H
#define TQI_CODEBOOK_H

#include "format.h"

#define TQI_MAX_LEVELS 64
#define TQI_MAX_FACTORS 4

/* Where the block transform applies the sign table. */
typedef enum {
    TQI_SIGNS_FIRST, /* y = H (s . x): decorrelates even if the caller has already applied a larger Hadamard matrix */
    TQI_SIGNS_LAST   /* y = s . (H x): turboquant-rs's order */
} tqi_sign_order;

/* The order of the inverse transform. */
static inline tqi_sign_order tqi_inverse_of(tqi_sign_order order) {
    return order == TQI_SIGNS_FIRST ? TQI_SIGNS_LAST : TQI_SIGNS_FIRST;
}

typedef struct {
    int type;
    int mode;
    int bits;
    int trellis; /* whether this is one of pqt2 to pqt5; see trellis.h */
    int cut; /* trellis: values on either side of the cut that decide the state there: closed_path, trellis_portable.c */
    int n_levels;
    int block_bytes;
    tqi_sign_order signs;
    int n_factors; /* search: scale candidates per sign */
    float factors[TQI_MAX_FACTORS];
    float outer;                        /* maxnorm: the centroid that the largest magnitude maps to */
    float levels[TQI_MAX_LEVELS];       /* ascending */
    float boundaries[TQI_MAX_LEVELS];   /* n_levels - 1 of them (trellis: n_levels - 4), then +infinity or nothing */
    int8_t level_units[TQI_MAX_LEVELS]; /* trellis: levels in units of TQI_LEVEL_UNIT */
} tqi_codec;

#define TQI_LEVEL_UNIT 0.015625f /* 1/64 */

extern const float tqi_signs[TQ_BLOCK];

/* The codec of a type and a mode; NULL if the type is not of tqgguf or does not have that mode. Thread-safe. */
const tqi_codec * tqi_codec_get(int type, int mode);

#endif
